"""Tokens per second of vcpo's local sampler and of transformers' ContinuousBatchingManager.

    python -m benchmarks.sampler [--quick] [--json FILE]

Two loads on the small Llama, both engines sampling at temperature 1 with log-probs. ``maze``: every move is
a turn, with an observed token after it; the manager cannot be fed observations, so each turn is a new
request with the whole conversation (its prefix cache is on). ``plain``: no turns. All episodes are in
flight at once. The manager gets its own replica of the model and, for each load, the fastest of several
``max_batch_tokens``. The engines take turns in one process, so that a busy machine slows both alike. The
ratio is the median of the turns' own ratios; every spread is the interquartile range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from vcpo.config import EnvironmentConfig, ModelConfig
from vcpo.environments.maze import Maze
from vcpo.policy.loading import small_policy
from vcpo.samplers.local import LocalSampler

BATCH_TOKENS = (16, 32, 64, 128, 256, 512)
"""``max_batch_tokens`` tried for the manager. Without flash attention it lays a batch in one row under a
dense block-diagonal mask: attention grows with the square of the batch, while small batches need more
passes."""
CONTEXT = 128
OBSERVATION = 5
WANTED = 1.5
"""How much faster an own decode loop must be on the maze to be worth having."""

Play = Callable[[], None]


@dataclass(frozen=True)
class Load:
    """Episodes of several turns; one observed token between two turns. Groups share their prompt."""

    name: str
    prompt_tokens: int
    turns: int
    sampled_tokens: int
    """In each turn."""
    episodes: int = 128
    group_size: int = 8

    @property
    def total_tokens(self) -> int:
        return self.episodes * self.turns * self.sampled_tokens

    def prompts(self) -> list[list[int]]:
        """[episodes][prompt_tokens], the same in every repetition."""
        random = np.random.default_rng(0)
        groups = random.integers(3, 20, (self.episodes // self.group_size, self.prompt_tokens))
        return groups.repeat(self.group_size, axis=0).tolist()


@dataclass(frozen=True)
class Row:
    """One engine under one load; medians. Without figures: the reason why it could not be driven."""

    engine: str
    load: str
    tokens_per_second: float | None
    seconds: float | None
    spread: tuple[float, float] | None
    """Quartiles of ``tokens_per_second``."""
    remark: str = ""


LOADS = (
    Load("maze", prompt_tokens=8, turns=8, sampled_tokens=1),
    Load("plain", prompt_tokens=64, turns=1, sampled_tokens=64),
)
LOCAL, MANAGER = "LocalSampler", "ContinuousBatchingManager"


class EngineFailure(Exception):
    """The manager did not do what the load asks for; the message is its own."""


def build_model() -> PreTrainedModel:
    alphabet = Maze.alphabet(EnvironmentConfig())
    return small_policy(ModelConfig(context_length=CONTEXT), alphabet, seed=0).model


async def play_locally(sampler: LocalSampler, load: Load) -> None:
    async def episode(number: int, tokens: list[int]) -> None:
        for _ in range(load.turns):
            turn = await sampler.generate(
                tokens, max_tokens=load.sampled_tokens, stop=frozenset(), seed=number, session=number
            )
            tokens = [*tokens, *turn.tokens, OBSERVATION]
        sampler.release(number)

    await asyncio.gather(*(episode(i, prompt) for i, prompt in enumerate(load.prompts())))


class Manager:
    """A running ContinuousBatchingManager on a replica of its own."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        model: Any = build_model()  # its mixin's methods are hidden from type checkers
        self._manager: Any = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=16, num_blocks=1024, max_batch_tokens=max_batch_tokens, return_logprobs=True, seed=0
            ),
        )
        self._manager.start()

    def play(self, load: Load) -> None:
        """Each result is answered at once by the episode's next request."""
        conversations, turns = load.prompts(), [0] * load.episodes
        for number in range(load.episodes):
            self._ask(number, conversations[number], load)
        for _ in range(load.episodes * load.turns):
            result = self._manager.get_result(timeout=30)
            if result is None or result.error or len(result.logprobs) != load.sampled_tokens:
                raise EngineFailure(result.error if result and result.error else "no result within 30 s")
            number = int(result.request_id.partition("/")[0])
            conversations[number] = [*conversations[number], *result.generated_tokens, OBSERVATION]
            turns[number] += 1
            if turns[number] < load.turns:
                self._ask(number, conversations[number], load)

    def _ask(self, number: int, tokens: list[int], load: Load) -> None:
        self._manager.add_request(
            tokens, request_id=f"{number}/{len(tokens)}", max_new_tokens=load.sampled_tokens
        )

    def close(self) -> None:
        self._manager.stop(block=True, timeout=30)


def fastest_budget(load: Load, budgets: Sequence[int]) -> int:
    """The ``max_batch_tokens`` with which the manager is fastest, by the better of two runs each."""

    def try_out(max_batch_tokens: int) -> float:
        with closing(Manager(max_batch_tokens)) as manager:
            return min(seconds(lambda: manager.play(load)) for _ in range(2))

    return min(budgets, key=try_out)


def seconds(play: Play) -> float:
    begun = time.perf_counter()
    play()
    return time.perf_counter() - begun


def summarise(engine: str, load: Load, times: np.ndarray, remark: str = "") -> Row:
    rates = load.total_tokens / times
    low, high = np.quantile(rates, [0.25, 0.75])
    return Row(engine, load.name, float(np.median(rates)), float(np.median(times)), (low, high), remark)


def measure(load: Load, budgets: Sequence[int], repetitions: int) -> tuple[list[Row], str]:
    """Both engines in turn under one load, and the sentence that follows from it."""
    sampler = LocalSampler(build_model(), CONTEXT + 1)

    def local() -> None:
        asyncio.run(play_locally(sampler, load))

    local()
    try:
        with closing(Manager(fastest_budget(load, budgets))) as manager:
            manager.play(load)
            pairs = [(seconds(local), seconds(lambda: manager.play(load))) for _ in range(repetitions)]
    except EngineFailure as failure:
        rows = [summarise(LOCAL, load, np.array([seconds(local) for _ in range(repetitions)]))]
        rows.append(Row(MANAGER, load.name, None, None, None, f"could not be driven: {failure}"))
        return rows, f"{load.name}: no ratio, {MANAGER} could not be driven: {failure}"
    turns, remark = np.array(pairs), f"max_batch_tokens={manager.max_batch_tokens}"
    rows = [summarise(LOCAL, load, turns[:, 0]), summarise(MANAGER, load, turns[:, 1], remark)]
    low, middle, high = np.quantile(turns[:, 1] / turns[:, 0], [0.25, 0.5, 0.75])
    ratio = f"{middle:.2f}× ({low:.2f}–{high:.2f})"
    return rows, f"{load.name}: {LOCAL} is {ratio} as fast as {MANAGER} at its best {remark}"


def table_of(rows: Sequence[Row]) -> Table:
    table = Table("load", "engine", "tokens/s", "quartiles", "seconds")
    for row in rows:
        figures = ("–", "–", "–")
        if row.tokens_per_second and row.seconds and row.spread:
            low, high = row.spread
            figures = (f"{row.tokens_per_second:,.0f}", f"{low:,.0f}–{high:,.0f}", f"{row.seconds:.3f}")
        table.add_row(row.load, row.engine, *figures)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="The local sampler against ContinuousBatchingManager.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; ends within a minute")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it wants psutil, for GPUs
    rows: list[Row] = []
    conclusions: list[str] = []
    budgets, repetitions = (BATCH_TOKENS[1::2], 5) if arguments.quick else (BATCH_TOKENS, 15)
    for load in LOADS:
        measured, conclusion = measure(load, budgets, repetitions)
        rows += measured
        conclusions.append(conclusion)
    console = Console(soft_wrap=True)
    console.print(table_of(rows))
    for conclusion in conclusions:
        console.print(conclusion, highlight=False)
    console.print(f"An own decode loop was wanted only if more than {WANTED}× on the maze.", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
