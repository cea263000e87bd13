"""The local sampler and vLLM at the same model and load: tokens/s, time of a publication, error of log-probs.

    python -m benchmarks.engines --python ENVIRONMENT/bin/python [--quick] [--json FILE]

ENVIRONMENT has vLLM (``make test-engines`` makes one: .venv-engines). Three loads, all episodes in flight at
once: answers of equal length, answers of long-tailed lengths (log-normal, as episodes end when they end), and
turns of one token (the maze). Engines take turns, load by load, so that a busy machine slows all alike;
ratios are medians of the turns' own ratios, spreads are interquartile ranges. A publication is a whole
update: writing the weights, taking them over, and for vLLM the probe that compares it with the learner.
Errors are |log μ(y_t) − log π(y_t)| over all sampled tokens, π from the learner's float32 forward pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vcpo.config import Config, load_config
from vcpo.pipeline.engines import ENGINES, Share
from vcpo.policy.loading import Policy, hide_loading_bars, load_policy, small_policy
from vcpo.policy.log_probs import TokenLogProbs
from vcpo.policy.packing import pack
from vcpo.policy.probe import make_probe
from vcpo.samplers.protocol import Sampler
from vcpo.trajectory import NOT_SAMPLED, Trajectory
from vcpo.weights import checksum, weight_tensors

LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"
PROMPT_TOKENS = 32
CONTEXT = 512
OBSERVATION = 5
"""The token that the environment says between two turns."""


@dataclass(frozen=True)
class Load:
    """Episodes by the tokens that each of their turns samples."""

    name: str
    episodes: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.episodes))


def loads(episodes: int) -> list[Load]:
    tail = np.random.default_rng(1).lognormal(np.log(32), 1.0, episodes).round().clip(1, 384).astype(int)
    return [
        Load("equal", [[64]] * episodes),
        Load("long-tailed", [[length] for length in tail.tolist()]),
        Load("turns", [[1] * 8] * episodes),
    ]


@dataclass(frozen=True)
class Row:
    """One engine under one load; medians, with quartiles."""

    engine: str
    load: str
    tokens_per_second: float
    tokens_per_second_quartiles: tuple[float, float]
    ratio_to_local: float
    publication_seconds: float
    publication_quartiles: tuple[float, float]
    log_prob_error_mean: float
    log_prob_error_max: float


@dataclass
class Measured:
    """What was seen of one engine under one load."""

    seconds: list[float]
    publications: list[float]
    errors: list[np.ndarray]


@dataclass(frozen=True)
class Engine:
    name: str
    sampler: Sampler


def config_of(kind: str, dtype: str, python: str) -> Config:
    settings = {
        "model.context_length": CONTEXT, "sampler.kind": kind, "sampler.dtype": dtype,
        "sampler.slots": 64, "environment.kind": "sort",
    }  # fmt: skip
    if kind == "vllm":
        settings["sampler.python"] = python
    return load_config(None, [part for key, value in settings.items() for part in (f"--{key}", str(value))])


async def play(sampler: Sampler, load: Load, round_: int) -> list[Trajectory]:
    """All episodes at once."""
    prompts = np.random.default_rng(round_).integers(3, 3 + len(LETTERS), (len(load.episodes), PROMPT_TOKENS))

    async def episode(number: int, turns: Sequence[int]) -> Trajectory:
        tokens, log_probs = prompts[number].tolist(), [0.0] * PROMPT_TOKENS
        versions = [NOT_SAMPLED] * PROMPT_TOKENS
        session = 1_000_000 * round_ + number
        for place, wanted in enumerate(turns):
            if place:
                tokens, log_probs = [*tokens, OBSERVATION], [*log_probs, 0.0]
                versions = [*versions, NOT_SAMPLED]
            done = await sampler.generate(
                tokens, max_tokens=wanted, stop=frozenset(), seed=session, session=session
            )
            tokens, log_probs = [*tokens, *done.tokens], [*log_probs, *done.log_probs]
            versions = [*versions, *done.versions]
        sampler.release(session)
        sampled = np.array(versions) != NOT_SAMPLED
        return Trajectory(
            np.array(tokens, np.int32), sampled, np.array(log_probs, np.float32),
            np.array(versions, np.int32), 0.0,
        )  # fmt: skip

    return list(await asyncio.gather(*(episode(i, turns) for i, turns in enumerate(load.episodes))))


@torch.no_grad()
def errors_of(learner: Policy, log_probs: TokenLogProbs, played: Sequence[Trajectory]) -> np.ndarray:
    found = []
    for trajectory in played:
        rows = pack([trajectory], packed=False).to(learner.model.device)
        told = trajectory.log_probs[trajectory.action_mask]
        found.append(np.abs(log_probs(rows).float().cpu().numpy() - told))
    return np.concatenate(found)


async def publish(engine: Engine, learner: Policy, version: int) -> float:
    """Seconds until the engine serves, and is seen to serve, the learner's weights."""
    weights = {name: tensor.clone() for name, tensor in weight_tensors(learner.model).items()}
    probe, begun = make_probe(learner), time.perf_counter()
    answer = await engine.sampler.update(version, weights, probe)
    seconds = time.perf_counter() - begun
    assert answer == checksum(weights)
    return seconds


def step_like_change(learner: Policy, seed: int) -> None:
    """A change of the size of an optimizer step, so that a publication has something to publish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in weight_tensors(learner.model).values():
            tensor.add_(1e-3 * torch.randn(tensor.shape, generator=generator))


async def measure(
    engines: Sequence[Engine], learner: Policy, chosen: Sequence[Load], repetitions: int
) -> dict[tuple[str, str], Measured]:
    measured = {(e.name, load.name): Measured([], [], []) for e in engines for load in chosen}
    log_probs = TokenLogProbs(learner.model)
    for round_ in range(repetitions + 1):  # the first warms up
        for number, load in enumerate(chosen):
            step_like_change(learner, round_)
            for engine in engines:
                published = await publish(engine, learner, 1 + round_ * len(chosen) + number)
                begun = time.perf_counter()
                played = await play(engine.sampler, load, round_)
                seconds = time.perf_counter() - begun
                if round_:
                    row = measured[engine.name, load.name]
                    row.seconds.append(seconds)
                    row.publications.append(published)
                    row.errors.append(errors_of(learner, log_probs, played))
    return measured


def rows_of(measured: dict[tuple[str, str], Measured], chosen: Sequence[Load]) -> list[Row]:
    rows = []
    for (engine, name), found in measured.items():
        load = next(load for load in chosen if load.name == name)
        rates, times = load.tokens / np.array(found.seconds), np.array(found.publications)
        local = load.tokens / np.array(measured["local", name].seconds)
        errors = np.concatenate(found.errors)
        rows.append(
            Row(
                engine=engine,
                load=name,
                tokens_per_second=float(np.median(rates)),
                tokens_per_second_quartiles=_quartiles(rates),
                ratio_to_local=float(np.median(rates / local)),
                publication_seconds=float(np.median(times)),
                publication_quartiles=_quartiles(times),
                log_prob_error_mean=float(errors.mean()),
                log_prob_error_max=float(errors.max()),
            )
        )
    return rows


def _quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def table_of(rows: Sequence[Row]) -> Table:
    table = Table("engine", "load", "tokens/s", "÷ local", "publication, ms", "error, mean", "error, max")
    for row in rows:
        rates, times = row.tokens_per_second_quartiles, row.publication_quartiles
        table.add_row(
            row.engine,
            row.load,
            f"{row.tokens_per_second:,.0f} ({rates[0]:,.0f}–{rates[1]:,.0f})",
            f"{row.ratio_to_local:.2f}",
            f"{1e3 * row.publication_seconds:.0f} ({1e3 * times[0]:.0f}–{1e3 * times[1]:.0f})",
            f"{row.log_prob_error_mean:.1e}",
            f"{row.log_prob_error_max:.1e}",
        )
    return table


async def run(python: str, episodes: int, repetitions: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shape = {"hidden_size": 256, "layers": 4, "heads": 8, "intermediate_size": 1024}
        local = config_of("local", "same", python)
        model = local.model.model_copy(update=shape)
        small_policy(model, LETTERS, seed=0).save(folder)
        learner = load_policy(str(folder), model)
        async with AsyncExitStack() as stack:
            engines = []
            for name, kind, dtype in (
                ("local", "local", "same"),
                ("vllm", "vllm", "same"),
                ("vllm bfloat16", "vllm", "bfloat16"),
            ):
                config = config_of(kind, dtype, python)
                _, sampler = ENGINES[kind](config, str(folder), Share(logs=Path(temporary) / name))
                stack.push_async_callback(sampler.close)
                await sampler.ready()
                engines.append(Engine(name, sampler))
            chosen = loads(episodes)
            return rows_of(await measure(engines, learner, chosen, repetitions), chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="Python of the environment that has vLLM")
    parser.add_argument("--quick", action="store_true", help="fewer episodes and repetitions")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hide_loading_bars()
    episodes, repetitions = (16, 2) if arguments.quick else (64, 7)
    rows = asyncio.run(run(arguments.python, episodes, repetitions))
    console = Console(soft_wrap=True)
    console.print(table_of(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
