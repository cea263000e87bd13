"""What score norms cost: forward + norms + backward on the retained graph, against forward + backward.

    python -m benchmarks.score_norms [--quick] [--json FILE]

Both variants take turns in one process on one thread, and what is counted is processor time: on an idle
machine it is the wall time, on a busy one it is still theirs alone. The ratio is the median of the turns'
own ratios; its spread is the interquartile range.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vcpo.scores import ScoreTape


@dataclass(frozen=True)
class Setting:
    """A small Llama and its batch, one trajectory a row."""

    hidden_size: int
    layers: int
    trajectories: int
    tokens: int
    ragged: bool = False
    """Lengths spread over [tokens/2, tokens] instead of all equal."""
    vocabulary: int = 64
    heads: int = 4
    quick_repetitions: int = 15
    """Turns with ``--quick``; three times as many without."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds of processor time a step, medians; ratio with the quartiles of its turns."""

    plain_ms: float
    with_norms_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]


SETTINGS = (
    Setting(hidden_size=64, layers=2, trajectories=128, tokens=25),
    Setting(hidden_size=64, layers=2, trajectories=128, tokens=25, ragged=True),
    Setting(hidden_size=256, layers=4, trajectories=64, tokens=128, quick_repetitions=3),
)


def build(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden_size,
        intermediate_size=4 * setting.hidden_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=setting.tokens,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """Token ids and segments, both [trajectories, tokens]; the end of a short row is padding."""
    ids = torch.randint(setting.vocabulary, (setting.trajectories, setting.tokens))
    shortest = setting.tokens // 2 if setting.ragged else setting.tokens
    lengths = torch.linspace(shortest, setting.tokens, setting.trajectories).long()
    owners = torch.arange(setting.trajectories)[:, None].expand_as(ids)
    return ids, owners.where(torch.arange(setting.tokens) < lengths[:, None], -1)


def objective(model: nn.Module, ids: Tensor, segments: Tensor) -> Tensor:
    """Σ log π of the second half of every row."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sampled = segments[:, 1:] >= 0
    sampled[:, : ids.shape[1] // 2] = False
    return log_probs[sampled].sum()


def measure(setting: Setting, repetitions: int) -> Cost:
    model = build(setting)
    ids, segments = batch(setting)
    tape = ScoreTape(model)

    def plain() -> None:
        objective(model, ids, segments).backward()
        model.zero_grad()

    def with_norms() -> None:
        with tape:
            total = objective(model, ids, segments)
        tape.squared_norms(total, segments, setting.trajectories, retain_graph=True)
        total.backward()
        model.zero_grad()

    for warm_up in (plain, with_norms):
        warm_up()
    turns = np.array([(seconds(plain), seconds(with_norms)) for _ in range(repetitions)]) * 1e3
    ratios = turns[:, 1] / turns[:, 0]
    low, high = np.quantile(ratios, [0.25, 0.75])
    middle = np.median(turns, axis=0)
    return Cost(float(middle[0]), float(middle[1]), float(np.median(ratios)), (float(low), float(high)))


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="What score norms cost, against a plain step.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; ends within a minute")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for setting in SETTINGS:
        cost = measure(setting, setting.quick_repetitions * (1 if arguments.quick else 3))
        records.append({"setting": asdict(setting), "cost": asdict(cost)})
        print(
            f"d={setting.hidden_size} layers={setting.layers} {setting.trajectories}×{setting.tokens}"
            f"{' ragged' if setting.ragged else ''}: plain {cost.plain_ms:.1f} ms, with norms "
            f"{cost.with_norms_ms:.1f} ms, {cost.ratio:.2f}× "
            f"({cost.ratio_quartiles[0]:.2f}–{cost.ratio_quartiles[1]:.2f})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
