"""Coins to collect: walks worked out by hand, and a twin written with coordinates and permutations."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from grids import DELTAS, LETTERS, CharCodec, ScriptedSampler, Twin, hand_problem, play
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.config import EnvironmentConfig
from vcpo.environments.collect import Collect
from vcpo.environments.protocol import Split
from vcpo.errors import ConfigError


def collect_of(**settings: Any) -> tuple[Collect, CharCodec]:
    config = EnvironmentConfig.model_validate(settings)
    codec = CharCodec(Collect.alphabet(config))
    return Collect(codec, config), codec


SETTINGS = {"coins": 3, "max_turns": 8}
GRADED, CODEC = collect_of(**SETTINGS)
ALL, _ = collect_of(reward="all", **SETTINGS)


@pytest.mark.parametrize(
    ("moves", "text", "graded", "every"),
    [
        ("RDRRUULL", "bk>fgi:aRaDeRfRgUcUcLcL", 2 / 3, 0.0),  # bumps into b and the edge; f and g
        ("UUUUUUDD", "bk>efi:aUaUaUaUaUaUaDeD", 2 / 3, 0.0),  # a coin with the last move counts
        ("DRLRLRLR", "bk>fgi:aDeRfLeRfLeRfLeR", 1 / 3, 0.0),  # a coin is there once
        ("DDURR", "bk>fgi:aDeDiUeRfR", 1.0, 1.0),  # the last coin ends it, in whatever order
        ("UUUUUUUU", "bk>fgi:a" + "Ua" * 7 + "U", 0.0, 0.0),
    ],
)
def test_walks_worked_out_by_hand(moves: str, text: str, graded: float, every: float) -> None:
    """a b c d    The grid with b and k walled, the walker at a.
    e f g h
    i j k l"""
    problem = hand_problem(text[: text.index(":") + 2])
    record = play(GRADED, problem, ScriptedSampler(CODEC.encode(moves)))
    assert CODEC.decode(record.tokens.tolist()) == text
    assert record.action_mask.tolist() == [char in DELTAS for char in text]
    assert record.reward == pytest.approx(graded)
    assert play(ALL, problem, ScriptedSampler(CODEC.encode(moves))).reward == every


@settings(deadline=None)
@given(index=st.integers(0, 2**40), split=st.sampled_from(["train", "held_out"]))
def test_every_problem_is_solved_by_its_shortest_walk(index: int, split: Any) -> None:
    problem = GRADED.problem(index, split)
    twin = Twin(problem.prompt, 4)
    assert len({twin.start, *twin.walls, *twin.targets}) == 1 + 3 + 3
    walk = twin.shortest()
    assert walk is not None
    record = play(GRADED, problem, ScriptedSampler(CODEC.encode(walk)))
    assert (record.reward, record.action_count) == (1.0, len(walk))
    assert play(ALL, problem, ScriptedSampler(CODEC.encode(walk))).reward == 1
    assert len(walk) <= 8


def test_problems_are_all_that_their_turns_allow() -> None:
    """Every grid of side 3 with a wall and two coins within three moves, by enumeration; one in eight is
    held out."""
    collect, _ = collect_of(size=3, walls=1, coins=2, max_turns=3)

    def drawn(split: Split, count: int) -> set[str]:
        return {collect.problem(index, split).prompt for index in range(count)}

    train, held_out = drawn("train", 6000), drawn("held_out", 1500)
    cells = LETTERS[:9]
    prompts = {f"{w}>{b}{c}:{s}" for w in cells for b in cells for c in cells for s in cells if b < c}
    solvable = {
        prompt
        for prompt in prompts
        if len({*prompt}) == 6 and (walk := Twin(prompt, 3).shortest()) and len(walk) <= 3
    }
    assert train | held_out == solvable
    assert not train & held_out
    assert 0.08 < len(held_out) / len(solvable) < 0.17


def test_demonstrations_are_legal_walks_that_play_as_they_are_shown() -> None:
    """The moves of a demonstration, played, give its text and its mask."""
    ends = []
    for demonstration in islice(GRADED.demonstrations(5), 300):
        text = CODEC.decode(demonstration.tokens)
        moves = "".join(char for char in text if char in DELTAS)
        prompt = text[: text.index(":") + 2]
        record = play(GRADED, hand_problem(prompt), ScriptedSampler(CODEC.encode(moves)))
        assert record.tokens.tolist() == demonstration.tokens
        assert record.action_mask.tolist() == demonstration.action_mask
        twin = Twin(prompt, 4)
        cell, last = twin.start, ""
        for move in moves:
            assert move in twin.walk_moves(cell, last)
            cell, last = twin.step(cell, move), move
        ends.append((record.reward == 1, len(moves)))
    assert {length for done, length in ends if not done} == {8}
    assert 20 < sum(done for done, _ in ends) < 90  # about one walk in six


def test_context_is_checked_to_the_token() -> None:
    longest = 3 + 1 + 3 + 2 + 8 + 7  # walls, >, coins, : and start, moves, a cell after each but the last
    GRADED.check_context(longest)
    with pytest.raises(ConfigError, match=rf"needs {longest} tokens .* holds {longest - 1}"):
        GRADED.check_context(longest - 1)


def test_no_room_for_the_coins() -> None:
    with pytest.raises(ConfigError, match=r"5 walls, a start and 4 to reach; lower .* or environment.coins"):
        collect_of(size=3, walls=5, coins=4)
