"""The experiments behind docs/evidence: which method survives which lag, and why.

    python -m benchmarks.evidence [--quick] [--only NAME,NAME] [--jobs N] [--out FOLDER]

Each study is a comparison (``vcpo compare``) below FOLDER (docs/evidence/data; with --quick runs/evidence),
resumed where it was stopped: a run whose row is in the study's results.jsonl is not repeated, so the full
form can be spread over many sittings. --quick takes fewer methods, lags and seeds: a first look, in less
than an hour on two cores. Studies:

- rates: every method at three learning rates, lag 16, seeds 100 and 101. The rule, stated before anything was
  run: a method's rate is the one with the best mean final sampled accuracy; among equals the lowest. Added
  when it had been run: a method whose rate is the lowest of the three is tried at half of it too, and, if
  that is the best then, at a quarter. Nobody gets a higher one: the seven methods whose rate is the highest
  of the three, tapered ones and rivals of theirs, may be the better for it.
- rates-collect: eight methods on the second task, by the same rule.
- lag, lag-collect: every method at its rate, over lags and fresh seeds, on two tasks. On the second one those
  that rates-collect has not run at the rate that suited them on the first.
- controls: ESS scaling against a constant rate and against its own factors permuted; OPOB against b = 0.
- rewards: the task collect with graded rewards and with 0 or 1, for baselines that differ.
- clipping: {ESS off, of used weights, of untruncated ones} x {sqrt, linear} x truncation {2, 8, none}.
- ablations: on-policy ratio, group size.
- small-batches: a quarter of the prompts a step, with controls: where variance should matter most.
- mechanism: VCPO at lag 64 with its weights, baseline and warm-up changed one at a time, towards TOPR's.
- negatives: no importance weight and no clip, with and without a baseline, for both ways to sum over tokens.
- collapse: methods that fall and methods that do not, evaluated every ten steps (benchmarks.lead_time).

``python -m benchmarks.evidence_pages`` makes the tables and figures of the pages from the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from vcpo.algorithms import ALGORITHMS
from vcpo.compare.command import Grid, compare

DATA = Path("docs/evidence/data")
QUICK_DATA = Path("runs/evidence")
RATES = ("2e-4", "4e-4", "8e-4")
LOWER_RATES = ("1e-4", "5e-5")
"""For methods that are best at the lowest rate before."""
RECIPES_RATE = "4e-4"
"""That of the recipes maze and collect."""
FEW = "vcpo,vcpo-taper,topr,grpo"
SECOND_TASK = ("vcpo", "vcpo-ess", "vcpo-taper", "topr", "vespo", "grpo", "asymre", "reinforce")
"""Those that led on the first task, VCPO, and the field's standard."""
BASELINES = "vcpo,vcpo[algorithm.baseline=zero],vcpo-ess,vcpo-taper,topr,topr[algorithm.baseline=zero],asymre"
TOWARDS_TOPR = ",".join(
    [
        "vcpo",
        "vcpo[algorithm.truncation=1]",
        "vcpo[algorithm.baseline=leave-one-out]",
        "vcpo[algorithm.truncation=1;algorithm.baseline=leave-one-out]",
        "vcpo[algorithm.baseline=bounded-optimal;algorithm.margin=0]",
        "vcpo[algorithm.baseline=zero]",
        "vcpo[algorithm.truncation=1;algorithm.baseline=zero]",
        "topr[algorithm.normalise=none]",
        "topr[algorithm.normalise=none;algorithm.baseline=optimal]",
        "topr[algorithm.normalise=none;algorithm.baseline=zero]",
        "vcpo[learner.warmup_steps=100]",
    ]
)
"""Weights, baseline and warm-up, one at a time; advantages are divided by nothing in all of them."""
LESS_EVALUATION = ("--evaluation.every", "150", "--evaluation.problems", "128")


@dataclass(frozen=True)
class Study:
    """One comparison."""

    name: str
    recipe: str
    methods: str
    lags: str
    seeds: str
    settings: tuple[str, ...] = ()
    controls: bool = False
    rates: tuple[str, ...] = ()
    """Studies at whose choice of learning rates methods run; where two have chosen, the later one counts."""


def clipping_grid(ceilings: Sequence[str]) -> str:
    """VCPO with every combination of ESS, rule and ceiling; and PPO's clip with ESS."""
    scales = ["algorithm.step_scale=off"]
    scales += [
        f"algorithm.ess_weights={weights};algorithm.step_scale={rule}"
        for weights in ("sequence", "used")
        for rule in ("sqrt", "linear")
    ]
    methods = [f"vcpo[algorithm.truncation={ceiling};{scale}]" for ceiling in ceilings for scale in scales]
    clipped = [f"grpo[algorithm.ess_weights={w};algorithm.step_scale=sqrt]" for w in ("sequence", "used")]
    return ",".join([*methods, "grpo", *clipped])


def at_rates(names: Iterable[str], rates: Iterable[str]) -> str:
    return ",".join(f"{name}[learner.learning_rate={rate}]" for name in names for rate in rates)


ALL = ",".join(ALGORITHMS)
FULL = (
    Study("rates", "maze", at_rates(ALGORITHMS, RATES), "16", "100,101", LESS_EVALUATION),
    Study("rates-collect", "collect", at_rates(SECOND_TASK, RATES), "16", "100,101", LESS_EVALUATION),
    Study("lag", "maze", ALL, "0,4,16,64,128", "0-4", LESS_EVALUATION, rates=("rates",)),
    Study("lag-collect", "collect", ALL, "0,4,16,64,128", "0-4", LESS_EVALUATION,
          rates=("rates", "rates-collect")),
    Study("controls", "maze", "vcpo,vcpo-taper", "16,64", "10-14", LESS_EVALUATION, controls=True),
    Study("rewards-graded", "collect", BASELINES, "16,64", "10-12", LESS_EVALUATION),
    Study("rewards-all", "collect", BASELINES, "16,64", "10-12",
          (*LESS_EVALUATION, "--environment.reward", "all")),
    Study("clipping", "maze", clipping_grid(("2", "8", "1e30")), "16", "10-12", LESS_EVALUATION),
    Study("ablations", "maze",
          "vcpo,vcpo[algorithm.on_policy_ratio=0.5],vcpo[algorithm.on_policy_ratio=0.25],"
          "vcpo[pipeline.group_size=4;pipeline.prompts=32],vcpo[pipeline.group_size=16;pipeline.prompts=8],"
          "vcpo[pipeline.group_size=32;pipeline.prompts=4]",
          "16", "10-12", LESS_EVALUATION),
    Study("small-batches", "maze", "vcpo,vcpo-ess,vcpo-taper,topr,grpo", "16", "10-14",
          (*LESS_EVALUATION, "--pipeline.prompts", "4", "--pipeline.steps", "1200"), controls=True),
    Study("mechanism", "maze", TOWARDS_TOPR, "64", "20-22", LESS_EVALUATION),
    Study("negatives", "maze",
          "reinforce,reinforce[algorithm.baseline=leave-one-out],rloo,rloo[algorithm.baseline=zero]",
          "16", "20-22", (*LESS_EVALUATION, "--learner.learning_rate", "2e-4")),
    Study("collapse", "maze", "cispo,rloo,reinforce,tis,tis-token,ppo,grpo,vcpo,topr,vespo", "16,64", "30,31",
          ("--evaluation.every", "10", "--evaluation.problems", "128")),
)  # fmt: skip
QUICK = (
    Study("lag", "maze", FEW, "0,16,64", "0,1", LESS_EVALUATION),
    Study("controls", "maze", "vcpo", "16", "10,", LESS_EVALUATION, controls=True),
    Study("rewards-graded", "collect", "vcpo,vcpo[algorithm.baseline=zero],vcpo-taper", "16", "10,",
          LESS_EVALUATION),
    Study("rewards-all", "collect", "vcpo,vcpo[algorithm.baseline=zero],vcpo-taper", "16", "10,",
          (*LESS_EVALUATION, "--environment.reward", "all")),
)  # fmt: skip


def best_rates(results: Path) -> dict[str, str]:
    """A learning rate for every method, by the rule above, from the results of a study of rates."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["status"] == "completed":
            name, _, rest = row["method"].partition("[")
            found[name][rest.removeprefix("learner.learning_rate=").rstrip("]")].append(row["accuracy_after"])
    return {name: best_rate(rates) for name, rates in found.items()}


def best_rate(accuracies: Mapping[str, Sequence[float]]) -> str:
    """By the rule above, from the final sampled accuracies at each learning rate."""
    return min(accuracies, key=lambda rate: (-statistics.fmean(accuracies[rate]), float(rate)))


def at_their_rates(methods: str, rates: dict[str, str]) -> str:
    """Each method with its learning rate; one without a rate, or with the recipe's, is left as it is."""
    chosen = {name: rate for name, rate in rates.items() if rate != RECIPES_RATE}
    names = methods.split(",")
    return ",".join(f"{n}[learner.learning_rate={chosen[n]}]" if n in chosen else n for n in names)


def lower_rates(results: Path) -> Iterator[str]:
    """What to try next, until no method is best at the lowest rate that it has been tried at."""
    for before, rate in zip((RATES[0], *LOWER_RATES), LOWER_RATES, strict=False):
        names = [name for name, best in best_rates(results).items() if best == before]
        if names:
            yield at_rates(names, [rate])


def run(study: Study, folder: Path, jobs: int | None, console: Console) -> bool:
    """False if it was interrupted."""
    chosen: dict[str, str] = {}
    for tuning in study.rates:
        if (results := folder / tuning / "results.jsonl").exists():
            chosen |= best_rates(results)
    methods = at_their_rates(study.methods, chosen)
    console.rule(study.name)
    grid = Grid(
        recipe=study.recipe,
        overrides=study.settings,
        methods=methods,
        lags=study.lags,
        seeds=study.seeds,
        out=folder / study.name,
        jobs=jobs,
        controls=study.controls,
    )
    outcome = compare(grid, console)
    console.print(outcome.text, highlight=False)
    return not outcome.interrupted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer methods, lags and seeds")
    parser.add_argument("--only", default="", help="studies, by comma")
    parser.add_argument("--jobs", type=int, help="runs at once; default: as many as cores")
    parser.add_argument("--out", type=Path, help="where runs and results go")
    arguments = parser.parse_args()
    studies = QUICK if arguments.quick else FULL
    folder = arguments.out or (QUICK_DATA if arguments.quick else DATA)
    chosen = arguments.only.split(",") if arguments.only else [study.name for study in studies]
    unknown = set(chosen) - {study.name for study in studies}
    if unknown:
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in studies)}")
    for study in studies:
        if study.name not in chosen:
            continue
        ended = run(study, folder, arguments.jobs, Console())
        if study.name.startswith("rates"):
            lower = lower_rates(folder / study.name / "results.jsonl")
            ended = ended and all(
                run(replace(study, methods=methods), folder, arguments.jobs, Console()) for methods in lower
            )
        if not ended:
            sys.exit(130)


if __name__ == "__main__":
    main()
