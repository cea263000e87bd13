"""The maze against a twin written with coordinates and breadth-first search."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from grids import DELTAS, LETTERS, CharCodec, ScriptedSampler, Twin, hand_problem, play
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.config import EnvironmentConfig
from vcpo.environments.maze import Maze
from vcpo.environments.protocol import (
    ContextChecked,
    DemonstratingEnvironment,
    Environment,
    SmallModelEnvironment,
)
from vcpo.errors import ConfigError


def maze_of(**settings: int) -> tuple[Maze, CharCodec]:
    config = EnvironmentConfig.model_validate(settings)
    codec = CharCodec(Maze.alphabet(config))
    return Maze(codec, config), codec


DEFAULT, CODEC = maze_of()


def test_protocols() -> None:
    assert isinstance(DEFAULT, Environment)
    assert isinstance(DEFAULT, DemonstratingEnvironment)
    assert isinstance(DEFAULT, ContextChecked)
    assert isinstance(Maze, SmallModelEnvironment)
    assert sorted(Maze.alphabet(EnvironmentConfig.model_validate({}))) == sorted("abcdefghijklmnopUDLR>:")


def test_hand_played_walk_with_bumps() -> None:
    """a b c d    The grid with b walled: from a, U and L leave the grid, R meets the wall, an end token
    e f g h    is no move; each leaves the walker at a. Then D R reaches f."""
    moves = [*CODEC.encode("ULR"), CODEC.end_id, *CODEC.encode("DR")]
    record = play(DEFAULT, hand_problem("bkp>f:a"), ScriptedSampler(moves))
    assert record.reward == 1.0
    shown = [*CODEC.encode("bkp>f:aUaLaRa"), CODEC.end_id, *CODEC.encode("aDeR")]
    assert record.tokens.tolist() == shown
    assert record.action_mask.tolist() == [False] * 7 + [True, False] * 5 + [True]
    assert record.versions[record.action_mask].tolist() == [1, 2, 3, 4, 5, 6]
    assert record.log_probs[record.action_mask].tolist() == [-0.25, -0.5, -0.75, -1.0, -1.25, -1.5]
    assert set(record.versions[~record.action_mask]) == {-1}
    assert record.outcome == "finished"


def test_a_lost_episode_ends_with_its_last_move() -> None:
    record = play(DEFAULT, hand_problem("bkp>f:a"), ScriptedSampler(CODEC.encode("DUDUDUDU")))
    assert record.reward == 0.0
    assert CODEC.decode(record.tokens.tolist()) == "bkp>f:aDeUaDeUaDeUaDeU"
    assert record.outcome == "finished"


def test_the_goal_on_the_last_move_counts() -> None:
    record = play(DEFAULT, hand_problem("bkp>f:a"), ScriptedSampler(CODEC.encode("UUUUUUDR")))
    assert (record.reward, record.action_count) == (1.0, 8)


def test_no_room_for_a_move_loses_the_episode() -> None:
    record = play(DEFAULT, hand_problem("bkp>f:a"), ScriptedSampler(CODEC.encode("DR"), context_length=9))
    assert (record.reward, record.outcome, record.action_count) == (0.0, "truncated", 1)


@settings(deadline=None)
@given(index=st.integers(0, 2**40), split=st.sampled_from(["train", "held_out"]))
def test_every_problem_is_solved_by_its_shortest_path(index: int, split: Any) -> None:
    problem = DEFAULT.problem(index, split)
    twin = Twin(problem.prompt, 4)
    path = twin.shortest()
    assert path is not None
    assert 1 <= len(path) <= 8
    assert len(twin.walls) == 3
    assert list(twin.wall_letters) == sorted(twin.wall_letters)
    assert not twin.walls & {twin.start, twin.goal}
    assert problem == maze_of()[0].problem(index, split)
    record = play(DEFAULT, problem, ScriptedSampler(CODEC.encode(path)))
    assert (record.reward, record.action_count) == (1.0, len(path))


@settings(deadline=None)
@given(index=st.integers(0, 2**40), moves=st.text("UDLR>a", min_size=8, max_size=8))
def test_any_play_equals_the_twin(index: int, moves: str) -> None:
    problem = DEFAULT.problem(index, "train")
    twin = Twin(problem.prompt, 4)
    cell, text, reward = twin.start, problem.prompt, 0.0
    for turn, move in enumerate(moves):
        cell = twin.step(cell, move) if move in DELTAS else cell
        text += move
        if cell == twin.goal:
            reward = 1.0
            break
        text += twin.letter(cell) if turn < 7 else ""
    record = play(DEFAULT, problem, ScriptedSampler(CODEC.encode(moves)))
    assert (CODEC.decode(record.tokens.tolist()), record.reward) == (text, reward)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 5, "walls": 8, "max_turns": 6},
        {"size": 3, "walls": 0, "max_turns": 2},
        {"size": 4, "walls": 11, "max_turns": 3},
    ],
)
def test_other_sizes_are_solvable_within_their_turns(settings: dict[str, int]) -> None:
    maze, _ = maze_of(**settings)
    for index in range(100):
        twin = Twin(maze.problem(index, "train").prompt, settings["size"])
        assert len(twin.walls) == settings["walls"]
        assert 1 <= len(twin.shortest() or "x" * 99) <= settings["max_turns"]


def test_splits_are_disjoint_and_of_the_promised_size() -> None:
    train = [DEFAULT.problem(i, "train").prompt for i in range(6000)]
    held_out = [DEFAULT.problem(i, "held_out").prompt for i in range(2000)]
    shown = {CODEC.decode(d.tokens)[:7] for d in islice(DEFAULT.demonstrations(0), 4000)}
    assert not {*train, *shown} & {*held_out}
    assert len({*train}) > 5700  # of some 92,000 prompts
    # Candidates of one generator are held out with probability 1/8, so that train problems need
    # 8/7 draws; both streams drawing from all prompts shows in the count of distinct ones.
    assert len({*held_out}) > 1700


def test_one_prompt_in_eight_is_held_out() -> None:
    """Over every maze of side 3 with 2 walls, by enumeration: the streams, drawn long enough, meet all."""
    maze, _ = maze_of(size=3, walls=2)
    train = {maze.problem(i, "train").prompt for i in range(20000)}
    held_out = {maze.problem(i, "held_out").prompt for i in range(3000)}
    cells = LETTERS[:9]
    prompts = {
        f"{v}{w}>{goal}:{start}"
        for v in cells
        for w in cells
        for goal in cells
        for start in cells
        if v < w and len({v, w, goal, start}) == 4
    }
    solvable = {p for p in prompts if (path := Twin(p, 3).shortest()) and len(path) <= 8}
    assert train | held_out == solvable
    assert not train & held_out
    assert 0.095 < len(held_out) / len(solvable) < 0.155  # 1/8 within three standard errors of 1,288


def test_demonstrations_are_legal_walks() -> None:
    for demonstration in islice(DEFAULT.demonstrations(5), 500):
        text = CODEC.decode(demonstration.tokens)
        twin = Twin(text[:7], 4)
        assert demonstration.action_mask == [False] * 7 + [i % 2 == 0 for i in range(len(text) - 7)]
        cell, last, moves = twin.start, "", text[7::2]
        for turn, move in enumerate(moves):
            assert move in twin.walk_moves(cell, last)
            cell, last = twin.step(cell, move), move
            assert (cell == twin.goal or turn == 7) == (turn == len(moves) - 1)
            assert text[8 + 2 * turn : 9 + 2 * turn] in ("", twin.letter(cell))
        assert text[-1] in DELTAS


def test_demonstrations_reach_the_goal_as_often_as_uniform_walks() -> None:
    """The share of successes equals the exact chance, worked out move by move over the same mazes."""
    reached, expected = [], []
    for demonstration in islice(DEFAULT.demonstrations(1), 1500):
        text = CODEC.decode(demonstration.tokens)
        twin = Twin(text[:7], 4)
        cell = twin.start
        for move in text[7::2]:
            cell = twin.step(cell, move)
        reached.append(cell == twin.goal)
        expected.append(twin.chance(twin.start, "", 8))
    chance = np.array(expected)
    standard_error = np.sqrt((chance * (1 - chance)).sum()) / len(chance)
    assert abs(np.mean(reached) - chance.mean()) < 4 * standard_error
    assert 0.47 < chance.mean() < 0.57  # the warm start has much to learn, and something to learn from


def test_demonstrations_follow_their_seed() -> None:
    assert list(islice(DEFAULT.demonstrations(2), 20)) == list(islice(DEFAULT.demonstrations(2), 20))
    assert list(islice(DEFAULT.demonstrations(2), 20)) != list(islice(DEFAULT.demonstrations(3), 20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 6}, "size = 6: a maze's side is at most 5"),
        (
            {"size": 3, "walls": 8},
            "a maze of side 3 has 9 cells: too few for 8 walls, a start and 1 to reach",
        ),
    ],
)
def test_impossible_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        maze_of(**settings)


def test_tokenizer_without_a_token_for_each_letter() -> None:
    class Merging(CharCodec):
        def encode(self, text: str) -> list[int]:
            return [1] if text in "ab" else super().encode(text)

    with pytest.raises(ConfigError, match="token of its own"):
        Maze(Merging(CODEC.alphabet), EnvironmentConfig.model_validate({}))


def test_context_is_checked_to_the_token() -> None:
    longest = 7 + 8 + 7  # prompt, moves, and a cell after each move but the last
    DEFAULT.check_context(longest)
    with pytest.raises(ConfigError, match=r"needs 22 tokens .* holds 21"):
        DEFAULT.check_context(longest - 1)
