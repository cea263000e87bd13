"""The windowed FIFO under attack: every schedule keeps the bound, loses nothing, repeats nothing."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.pipeline.window import Window, lag_bound

Chooser = Callable[[Sequence[int]], int]
"""Which of the groups being generated (ascending) finishes next."""


@dataclass
class Simulation:
    """A learner that takes as soon as it can, and samplers whose groups finish as ``choose`` says."""

    prompts: int
    lag: int
    width: int
    choose: Chooser
    window: Window
    meanwhile: int = 0
    """How many groups finish while a step runs."""
    barren: Callable[[int], bool] = lambda number: False
    """Which groups are skipped when they are finished."""
    skipped: list[int] = field(default_factory=list)
    spare: int = 0
    """M."""
    version: int = 0
    admitted_at: dict[int, int] = field(default_factory=dict)
    lags: dict[int, int] = field(default_factory=dict)
    generating: list[int] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)

    @staticmethod
    def of(prompts: int, lag: int, width: int, choose: Chooser, spare: int = 0) -> Simulation:
        window = Window(prompts, lag, width, over_provision=spare)
        return Simulation(prompts, lag, width, choose, window, spare=spare)

    def run(self, steps: int) -> Simulation:
        """Each step: fill the window, finish groups one at a time until a step can be taken, train."""
        for _ in range(steps):
            self.admit()
            while (taken := self.window.take()) is None:
                self.finish(self.choose(self.generating))
            self.train(taken)
        return self

    def admit(self) -> None:
        for number in self.window.admit():
            self.admitted_at[number] = self.version
            self.generating.append(number)
        self.generating.sort()
        assert self.window.active <= (self.lag + 1) * self.prompts + self.spare

    def finish(self, number: int) -> None:
        self.generating.remove(number)
        self.window.finish(number)
        if self.barren(number):
            self.window.skip(number)
            self.skipped.append(number)
            self.admit()

    def train(self, taken: list[int]) -> None:
        """The lag is measured with the version at taking."""
        assert len(taken) == self.prompts
        assert taken == sorted(taken)
        for number in taken:
            assert number not in self.lags, "trained twice"
            self.lags[number] = self.version - self.admitted_at[number]
        self.trained.append(taken)
        for _ in range(min(self.meanwhile, len(self.generating))):
            self.finish(self.choose(self.generating))
        self.window.complete()
        self.version += 1

    @property
    def greatest_lag(self) -> int:
        return max(self.lags.values())


def oldest_last(generating: Sequence[int]) -> int:
    return generating[-1]


def oldest_first(generating: Sequence[int]) -> int:
    return generating[0]


def late(slow: set[int]) -> Chooser:
    """Groups of ``slow`` finish only when nothing else is being generated."""
    return lambda generating: next((n for n in generating if n not in slow), generating[0])


def shuffled(seed: int) -> Chooser:
    rng = random.Random(seed)
    return lambda generating: rng.choice(list(generating))


shapes = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 24))
"""P, S, W."""


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    order=st.randoms(use_true_random=False),
    steps=st.integers(1, 30),
    meanwhile=st.integers(0, 8),
    spare=st.integers(0, 9),
)
def test_no_random_schedule_exceeds_the_bound_or_loses_a_group(
    shape: tuple[int, int, int], order: random.Random, steps: int, meanwhile: int, spare: int
) -> None:
    prompts, lag, width = shape
    done = Simulation.of(*shape, lambda generating: order.choice(list(generating)), spare)
    done.meanwhile = meanwhile
    done.run(steps)
    assert done.greatest_lag <= lag_bound(lag, width, prompts, spare)
    # Nothing is dropped: whatever was admitted is trained, or is among the active ones still.
    assert len(done.lags) == steps * prompts
    assert len(done.admitted_at) - len(done.lags) == done.window.active
    assert sorted(done.admitted_at) == list(range(len(done.admitted_at)))


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    order=st.randoms(use_true_random=False),
    steps=st.integers(1, 20),
    meanwhile=st.integers(0, 8),
    barren=st.sets(st.integers(0, 80), max_size=60),
    spare=st.integers(0, 5),
)
def test_skipping_keeps_the_bound_and_every_group_is_trained_or_skipped(
    shape: tuple[int, int, int],
    order: random.Random,
    steps: int,
    meanwhile: int,
    barren: set[int],
    spare: int,
) -> None:
    prompts, lag, width = shape
    done = Simulation.of(*shape, lambda generating: order.choice(list(generating)), spare)
    done.meanwhile, done.barren = meanwhile, barren.__contains__
    done.run(steps)
    assert done.greatest_lag <= lag_bound(lag, width, prompts, spare)
    assert len(done.lags) == steps * prompts
    assert not set(done.lags) & barren
    assert set(done.skipped) <= barren
    ended = sorted([*done.lags, *done.skipped])
    assert len(set(ended)) == len(ended)
    position = done.window.position()
    assert ended == [*range(position["anchor"]), *position["trained"]]  # pyright: ignore


@settings(max_examples=150, deadline=None)
@given(shape=shapes, slow=st.sets(st.integers(0, 60), max_size=12), spare=st.integers(0, 9))
def test_no_choice_of_slow_groups_exceeds_the_bound(
    shape: tuple[int, int, int], slow: set[int], spare: int
) -> None:
    prompts, lag, width = shape
    done = Simulation.of(*shape, late(slow), spare).run(40)
    assert done.greatest_lag <= lag_bound(lag, width, prompts, spare)


@pytest.mark.parametrize("choose", [oldest_last, oldest_first])
@pytest.mark.parametrize("prompts", [1, 2, 3, 5])
@pytest.mark.parametrize("lag", [0, 1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 16, 100])
def test_worst_case_orders_keep_the_bound(choose: Chooser, prompts: int, lag: int, width: int) -> None:
    done = Simulation.of(prompts, lag, width, choose).run(60)
    assert done.greatest_lag <= lag_bound(lag, width, prompts)


@pytest.mark.parametrize(
    ("prompts", "lag", "width", "spare", "bound"),
    [
        (1, 1, 1, 0, 1),
        (1, 1, 2, 0, 2),
        (1, 3, 6, 0, 8),
        (2, 1, 1, 0, 1),
        (2, 1, 2, 0, 2),
        (2, 1, 4, 0, 3),
        (2, 2, 9, 0, 6),
        (3, 2, 2, 0, 3),
        (3, 2, 8, 0, 5),
        (4, 1, 5, 0, 2),
        (4, 1, 6, 0, 3),
        (16, 2, 16, 0, 3),
        (1, 0, 1, 1, 1),
        (2, 0, 1, 1, 1),
        (2, 0, 1, 3, 2),
        (2, 0, 4, 2, 3),
        (3, 0, 2, 1, 1),
        (2, 1, 2, 2, 3),
        (3, 2, 8, 2, 5),
        (3, 2, 8, 3, 6),
        (16, 0, 16, 8, 2),
    ],
)
def test_the_bound_is_reached(prompts: int, lag: int, width: int, spare: int, bound: int) -> None:
    """One slow group, at every position in turn: the worst one has exactly the lag of the bound."""
    assert lag_bound(lag, width, prompts, spare) == bound
    begin = 2 * (lag + 1) * prompts + spare  # past the start, where the window is not yet full of old groups
    worst = max(
        Simulation.of(prompts, lag, width, choose, spare).run(3 * (lag + 1) + bound + 2).lags.get(slow, 0)
        for slow in range(begin, begin + 2 * prompts + spare)
        for choose in (late({slow}), oldest_first)
    )
    assert worst == bound


@pytest.mark.parametrize("prompts", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 16])
def test_lag_zero_is_the_synchronous_loop(prompts: int, width: int) -> None:
    """P groups, a step, the next P groups: in this order whatever finishes first, also with a window."""
    done = Simulation.of(prompts, 0, width, oldest_last).run(10)
    assert done.trained == [list(range(t * prompts, (t + 1) * prompts)) for t in range(10)]
    assert set(done.lags.values()) == {0}


def test_a_window_of_one_is_first_in_first_out() -> None:
    done = Simulation.of(3, 4, 1, shuffled(5)).run(30)
    assert [n for taken in done.trained for n in taken] == list(range(90))
    assert set(list(done.lags.values())[12:]) == {4}


def test_at_most_width_minus_one_younger_groups_pass_a_slow_one() -> None:
    """P = 2, S = 2, W = 4 and group 0 never done: 1, 2, 3 may pass, then everything waits for it."""
    window = Window(2, 2, 4)
    for number in window.admit()[1:]:
        window.finish(number)
    assert window.take() == [1, 2]
    window.complete()
    assert window.admit() == [6, 7]
    window.finish(6)
    assert window.take() is None  # 3 may be taken, but 4 is four places behind group 0
    window.finish(0)
    assert window.take() == [0, 3]
    window.complete()
    assert window.take() == [4, 5]


def test_a_failed_take_changes_nothing() -> None:
    window = Window(2, 1, 1)
    window.admit()
    for number in (0, 2, 3):
        window.finish(number)
        assert window.take() is None
    assert (window.ready, window.active, window.position()) == (3, 4, {"anchor": 0, "trained": []})
    window.finish(1)
    assert window.take() == [0, 1]


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 2**32),
    stops=st.lists(st.integers(0, 6), min_size=1, max_size=5),
)
def test_resuming_from_the_position_skips_and_repeats_nothing(
    shape: tuple[int, int, int], seed: int, stops: list[int]
) -> None:
    """Stop after some steps, forget all but the position, go on; again and again. Every number below the
    anchor and each above it that the position lists has been trained on exactly once, and nothing else."""
    simulation = Simulation.of(*shape, shuffled(seed))
    trained: list[int] = []
    for steps in stops:
        simulation.run(steps)
        trained += [n for taken in simulation.trained for n in taken]
        position = simulation.window.position()
        anchor, above = position["anchor"], position["trained"]
        assert isinstance(anchor, int)
        assert isinstance(above, list)
        assert sorted(trained) == [*range(anchor), *above]
        simulation = Simulation.of(*shape, shuffled(seed + 1))
        simulation.window = Window(*shape, anchor=anchor, trained=above)
        if steps:
            assert not set(simulation.window.admit()) & set(trained)
            simulation.window = Window(*shape, anchor=anchor, trained=above)


def test_a_resumed_window_goes_on_as_the_first_would_have() -> None:
    """With what the journal holds finished at once, as a controller does, the next steps are the same."""
    straight = Simulation.of(2, 2, 6, late({1, 9})).run(3)
    position = straight.window.position()
    assert position == {"anchor": 1, "trained": [2, 3, 4, 5, 6]}
    resumed = Simulation.of(2, 2, 6, late({1, 9}))
    resumed.window = Window(2, 2, 6, **position)  # pyright: ignore[reportArgumentType]
    assert resumed.run(6).trained == straight.run(6).trained[3:]


def test_the_end_of_a_run_admits_only_what_it_will_train_on() -> None:
    steps, prompts = 7, 3
    window, admitted, finished = Window(prompts, 2, 5), [], deque[int]()
    for step in range(steps):
        new = window.admit((steps - step) * prompts)
        admitted += new
        finished.extend(new)
        while (taken := window.take()) is None:
            window.finish(finished.pop())
        assert len(taken) == prompts
        window.complete()
    assert admitted == list(range(steps * prompts))
    assert window.admit(0) == []
    assert window.admit(-3) == []
    assert window.active == 0


def test_misuse_is_refused() -> None:
    window = Window(1, 1, 1)
    with pytest.raises(ValueError, match="group 0 is not being generated"):
        window.finish(0)
    window.admit()
    window.finish(0)
    with pytest.raises(ValueError, match="group 0 is not being generated"):
        window.finish(0)
    assert window.take() == [0]
    with pytest.raises(ValueError, match="group 0 is not being generated"):
        window.finish(0)
    with pytest.raises(ValueError, match="group 0 is not waiting for a step"):
        window.skip(0)
    with pytest.raises(ValueError, match="the step before is not complete"):
        window.take()
