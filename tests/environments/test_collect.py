"""Coins to collect: a walk worked out by hand, and a twin written with coordinates."""

from __future__ import annotations

from itertools import islice, pairwise
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


SETTINGS = {"coins": 3, "max_turns": 12}
GRADED, CODEC = collect_of(**SETTINGS)
ALL, _ = collect_of(reward="all", **SETTINGS)


@pytest.mark.parametrize(
    ("moves", "text", "graded", "every"),
    [
        ("DRDLU", "bk>f:aDeR>i:fDjL>e:iU", 1.0, 1.0),  # the last coin ends it, though e was crossed before
        ("RDDRUURRDDDD", "bk>f:aRaDeDiRjU>i:fUfRgRhDlDpDpD", 1 / 3, 0.0),  # bumps into b, b and the edge
        ("RRRRRRRRRRDR", "bk>f:aRaRaRaRaRaRaRaRaRaRaDeR", 1 / 3, 0.0),  # a coin with the last move counts
        ("UUUUUUUUUUUU", "bk>f:a" + "Ua" * 11 + "U", 0.0, 0.0),
    ],
)
def test_walks_worked_out_by_hand(moves: str, text: str, graded: float, every: float) -> None:
    """a b c d    The grid with b and k walled; coins lie at f, then at i, then at e.
    e f g h
    i j k l"""
    problem = hand_problem("bk>f:a", later="ie")
    record = play(GRADED, problem, ScriptedSampler(CODEC.encode(moves)))
    assert CODEC.decode(record.tokens.tolist()) == text
    assert record.action_mask.tolist() == [char in DELTAS for char in text]
    assert record.reward == pytest.approx(graded)
    assert play(ALL, problem, ScriptedSampler(CODEC.encode(moves))).reward == every


@settings(deadline=None)
@given(index=st.integers(0, 2**40), split=st.sampled_from(["train", "held_out"]))
def test_every_problem_is_solved_by_shortest_paths(index: int, split: Any) -> None:
    problem = GRADED.problem(index, split)
    twin, coins = Twin(problem.prompt, 4), problem.answer.targets
    assert len({twin.start, *twin.walls, *(twin.at(LETTERS[coin]) for coin in coins)}) == 1 + 3 + 3
    assert twin.goal == twin.at(LETTERS[coins[0]])
    stations = [twin.start, *(twin.at(LETTERS[coin]) for coin in coins)]
    moves = "".join(twin.path(*leg) or "?" for leg in pairwise(stations))
    record = play(GRADED, problem, ScriptedSampler(CODEC.encode(moves)))
    assert (record.reward, record.action_count) == (1.0, len(moves))
    assert len(moves) <= 12


def test_problems_are_all_that_their_turns_allow() -> None:
    """Every grid of side 3 with a wall and two coins within three moves, by enumeration; one prompt in
    eight, whatever its later coins, is held out."""
    collect, _ = collect_of(size=3, walls=1, coins=2, max_turns=3)
    draws: dict[Split, int] = {"train": 10000, "held_out": 2500}

    def drawn(split: Split) -> set[tuple[str, str]]:
        problems = [collect.problem(index, split) for index in range(draws[split])]
        return {(problem.prompt, LETTERS[problem.answer.targets[1]]) for problem in problems}

    found: dict[Split, set[tuple[str, str]]] = {split: drawn(split) for split in draws}
    expected = set()
    for prompt in (f"{w}>{c}:{s}" for w in LETTERS[:9] for c in LETTERS[:9] for s in LETTERS[:9]):
        twin = Twin(prompt, 3)
        for last in set(LETTERS[:9]) - set(prompt):
            first, second = twin.path(twin.start, twin.goal), twin.path(twin.goal, twin.at(last))
            if len({*prompt}) == 5 and first and second and len(first + second) <= 3:
                expected.add((prompt, last))
    assert found["train"] | found["held_out"] == expected
    prompts = {split: {prompt for prompt, _ in pairs} for split, pairs in found.items()}
    assert not prompts["train"] & prompts["held_out"]
    assert 0.07 < len(prompts["held_out"]) / len(prompts["train"] | prompts["held_out"]) < 0.18


def test_demonstrations_are_walks_that_play_as_they_are_shown() -> None:
    """The moves of a demonstration, played, give its text. Where it names fewer than three coins, others
    are put at y, which no walk on 16 cells reaches."""
    ends = []
    for demonstration in islice(GRADED.demonstrations(5), 200):
        text = CODEC.decode(demonstration.tokens)
        moves = "".join(char for char in text if char in DELTAS)
        twin = Twin(text[:7], 4)
        coins = [text[at + 1] for at, char in enumerate(text) if char == ">"]
        record = play(
            GRADED,
            hand_problem(text[:7], later=("".join(coins) + "yy")[1:3]),
            ScriptedSampler(CODEC.encode(moves)),
        )

        assert CODEC.decode(record.tokens.tolist()) == text
        assert demonstration.action_mask == record.action_mask.tolist()
        cell, last = twin.start, ""
        for move in moves:
            assert move in twin.walk_moves(cell, last)
            cell, last = twin.step(cell, move), move
        ends.append((record.reward == 1, len(moves)))
    assert {length for done, length in ends if not done} == {12}
    assert 5 < sum(done for done, _ in ends) < 35  # about one walk in eleven


def test_context_is_checked_to_the_token() -> None:
    longest = 7 + 12 + 11 + 2 * 3  # prompt, moves, cells between them, and two coins announced
    GRADED.check_context(longest)
    with pytest.raises(ConfigError, match=rf"needs {longest} tokens .* holds {longest - 1}"):
        GRADED.check_context(longest - 1)


def test_no_room_for_the_coins() -> None:
    with pytest.raises(
        ConfigError, match=r"too few for 5 walls, a start and 4 to reach; lower .* or environment.coins"
    ):
        collect_of(size=3, walls=5, coins=4)
