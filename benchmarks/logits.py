"""What the head costs: peak memory and time of log-probs, gradient and score norms, against the vocabulary.

    python -m benchmarks.logits [--quick] [--json FILE] [--device cpu|cuda]

One decoder layer under an untied head, eight trajectories whose second halves are sampled, one micro-batch:

- ``full``: the logits of all positions (``sampled_log_probs``, as most trainers do it);
- ``selected``: ``TokenLogProbs`` without a limit, the logits of the sampled positions alone;
- ``pieces``: ``TokenLogProbs`` with at most BUDGET logits at once, in both directions.

Each with ``gradient`` (forward, backward), and with ``norms``, sketched: forward, ``ScoreTape.measure``,
``Record.backward``.

``memory_mb`` is the peak of all tensors alive beside weights: activations, logits, gradients. ``weight_mb``
is the head's weight, whose gradient is as large and part of that peak. The variants take turns, each turn in
another order; counted is processor time on a CPU, wall time on a GPU. Ratios are to ``full`` of the same
pass, and of the same turn; the time's spread is the interquartile range.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step import clock
from benchmarks.step_profile import peak_on_cpu, peak_on_gpu
from vcpo.policy.log_probs import TokenLogProbs, predicting, sampled_log_probs
from vcpo.policy.packing import PackedRows, pack
from vcpo.scores import ScoreTape
from vcpo.trajectory import NOT_SAMPLED, Trajectory

REPETITIONS = 3
BUDGET, QUICK_BUDGET = 2**22, 2**16
TRAJECTORIES = 8
PASSES = ("gradient", "norms")
VARIANTS = ("full", "selected", "pieces")
PROGRESS = Console(stderr=True)


@dataclass(frozen=True)
class Setting:
    """A model of random weights and a micro-batch of random tokens."""

    vocabulary: int
    width: int
    tokens: int
    """Of all trajectories together; half of them are sampled."""
    budget: int


SETTINGS = tuple(
    Setting(vocabulary, width, 2048, BUDGET)
    for vocabulary, width in ((8192, 64), (32768, 64), (131072, 64), (8192, 256), (32768, 256))
)
QUICK = tuple(Setting(vocabulary, 32, 512, QUICK_BUDGET) for vocabulary in (1024, 4096))


@dataclass(frozen=True)
class Row:
    """What one variant costs in one setting."""

    variant: str
    work: str
    """``gradient`` or ``norms``."""
    vocabulary: int
    width: int
    tokens: int
    budget: int
    memory_mb: float
    memory_ratio: float
    weight_mb: float
    time_ratio: float
    time_ratio_quartiles: tuple[float, float]
    milliseconds: float
    gradient_difference: float
    """‖gradient − full's‖ / ‖full's‖, over all parameters."""


class Bench:
    """Model and micro-batch of a setting: float32 on a CPU, bfloat16 on a GPU."""

    def __init__(self, setting: Setting, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        config = LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=setting.width,
            intermediate_size=4 * setting.width,
            num_hidden_layers=1,
            num_attention_heads=max(setting.width // 32, 1),
        )
        number: Any = torch.bfloat16 if device == "cuda" else torch.float32
        model: Any = LlamaForCausalLM(config)
        self.model: Any = model.to(device=device, dtype=number).eval()
        self.rows: PackedRows = pack(trajectories(setting)).to(device)
        self._selecting = {  # made here, since each tries its model out when it is made
            "selected": TokenLogProbs(self.model, logit_budget=2**62),
            "pieces": TokenLogProbs(self.model, logit_budget=setting.budget),
        }

    def step(self, variant: str, work: str) -> None:
        """Forward pass, norms where they are wanted, and the gradient in ``.grad``."""
        self.model.zero_grad()
        selecting = self._selecting.get(variant)

        def objective() -> Tensor:
            found = sampled_log_probs(self.model, self.rows) if selecting is None else selecting(self.rows)
            return found.sum()

        if work == "gradient":
            objective().backward()
            return
        tape = ScoreTape(self.model, method="sketched")
        with tape:
            total = objective()
        selected = None if selecting is None else predicting(self.rows)
        record = tape.measure(total, self.rows.segments, self.rows.count, selected)
        record.backward(torch.ones_like(record.squared_norms))
        tape.remove()

    def gradient(self, variant: str, work: str) -> Tensor:
        self.step(variant, work)
        return torch.cat([p.grad.flatten().float() for p in self.model.parameters()])

    def peak(self, variant: str, work: str) -> int:
        self.model.zero_grad()
        run = partial(self.step, variant, work)
        if self.device == "cpu":
            return peak_on_cpu(run)
        before = torch.cuda.memory_allocated()
        return peak_on_gpu(run) - before

    def seconds(self, variant: str, work: str) -> float:
        gc.collect()  # nobody pays for another one's garbage
        start = clock(self.device)
        self.step(variant, work)
        return clock(self.device) - start


def trajectories(setting: Setting) -> list[Trajectory]:
    random = np.random.default_rng(0)
    length = setting.tokens // TRAJECTORIES
    sampled = np.arange(length) >= length // 2
    return [
        Trajectory(
            tokens=random.integers(setting.vocabulary, size=length, dtype=np.int32),
            action_mask=sampled,
            log_probs=np.zeros(length, np.float32),
            versions=np.where(sampled, 0, NOT_SAMPLED).astype(np.int32),
            reward=0.0,
        )
        for _ in range(TRAJECTORIES)
    ]


def measure(setting: Setting, device: str) -> list[Row]:
    bench = Bench(setting, device)
    name = f"{setting.vocabulary:,} × {setting.width}"
    combinations: list[tuple[str, str]] = list(itertools.product(PASSES, VARIANTS))
    differences, peaks = {}, {}
    for work in PASSES:
        reference = bench.gradient("full", work)
        differences[work, "full"] = 0.0
        for variant in ("selected", "pieces"):
            difference = bench.gradient(variant, work) - reference
            differences[work, variant] = float(difference.norm() / reference.norm())
        del reference, difference
    for work, variant in track(combinations, f"{name}: memory", console=PROGRESS):
        peaks[work, variant] = bench.peak(variant, work)
    times = take_turns(bench, combinations, name)
    rows = []
    for work, variant in combinations:
        ratios = times[work, variant] / times[work, "full"]
        low, high = np.quantile(ratios, [0.25, 0.75])
        rows.append(
            Row(
                variant=variant,
                work=work,
                vocabulary=setting.vocabulary,
                width=setting.width,
                tokens=setting.tokens,
                budget=setting.budget,
                memory_mb=peaks[work, variant] / 1e6,
                memory_ratio=peaks[work, variant] / peaks[work, "full"],
                weight_mb=bench.model.lm_head.weight.nbytes / 1e6,
                time_ratio=float(np.median(ratios)),
                time_ratio_quartiles=(float(low), float(high)),
                milliseconds=1e3 * float(np.median(times[work, variant])),
                gradient_difference=differences[work, variant],
            )
        )
    return rows


def take_turns(
    bench: Bench, combinations: list[tuple[str, str]], name: str
) -> dict[tuple[str, str], np.ndarray]:
    """Seconds of each; one of each a turn, and the order is rotated."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in combinations}
    count = len(combinations)
    turns = [combinations[(turn + i) % count] for turn in range(REPETITIONS) for i in range(count)]
    for work, variant in track(turns, f"{name}: in turn", console=PROGRESS):
        times[work, variant].append(bench.seconds(variant, work))
    return {key: np.array(values) for key, values in times.items()}


def print_rows(rows: list[Row]) -> None:
    headers = ("vocabulary", "width", "work", "variant", "memory, MB", "÷ full", "time ÷ full", "gradient")
    first = rows[0]
    title = f"{first.tokens:,} tokens, half of them sampled; pieces of {first.budget:,} logits"
    table = Table(*headers, title=title, box=SIMPLE, padding=0)
    for row in rows:
        table.add_row(
            f"{row.vocabulary:,}",
            str(row.width),
            row.work,
            row.variant,
            f"{row.memory_mb:,.0f}",
            f"{row.memory_ratio:.2f}",
            "{:.2f} ({:.2f}–{:.2f})".format(row.time_ratio, *row.time_ratio_quartiles),
            f"{row.gradient_difference:.0e}",
        )
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small vocabularies, few tokens")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after every setting")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    for setting in QUICK if given.quick else SETTINGS:
        rows += measure(setting, device)
        if given.json:
            given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print_rows(rows)


if __name__ == "__main__":
    main()
