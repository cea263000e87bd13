"""The controller between a learner and samplers that are a few lines each: no torch, no process."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vcpo.config import Config, load_config
from vcpo.errors import CheckpointError, NonFiniteError, PublicationError, WorkerError
from vcpo.monitor.progress import SilentProgress
from vcpo.monitor.sinks import MetricsWriter, read_metrics
from vcpo.pipeline.controller import Controller, GivenUpError
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.ports import Arrivals, Begun, Outcome, Publication, StepResult
from vcpo.pipeline.rollout import GroupOrder
from vcpo.pipeline.run_folder import RunFolder
from vcpo.pipeline.session import Parts, make_controller
from vcpo.pipeline.window import lag_bound


def config_of(**settings: Any) -> Config:
    base = {
        "pipeline__prompts": 2,
        "pipeline__lag": 2,
        "pipeline__window": 4,
        "pipeline__steps": 12,
        "evaluation__every": 0,
        "learner__checkpoint_every": 0,
    }
    pairs = (base | settings).items()
    return load_config(None, [part for k, v in pairs for part in (f"--{k.replace('__', '.')}", str(v))])


def publication_of(version: int) -> Publication:
    return Publication(version, f"checksum-{version}", None)


@dataclass
class FakeLearner:
    """Notes what it is given; ``turns``: how often a step lets the others run."""

    turns: int = 0
    version: int = 0
    trained: list[list[dict[str, Any]]] = field(default_factory=list)
    checkpoints: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    fails_at: int | None = None

    async def step(self, records: Sequence[bytes], skipped: Sequence[Outcome] = ()) -> StepResult:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if self.version == self.fails_at:
            raise NonFiniteError("gradient norm", None)
        groups = [json.loads(record) for record in records]
        self.trained.append(groups)
        lags = Counter(self.version - g["served"] for g in groups)
        self.version += 1
        metrics = {"tokens": len(groups), "lag_max": max(lags), "lag_histogram": dict(lags)}
        return StepResult(metrics, publication_of(self.version))

    def send(self, publication: Publication) -> Awaitable[object]:
        return asyncio.sleep(0)

    async def choose(self, numbers: Sequence[int]) -> list[int]:
        raise AssertionError("nothing is selected")

    async def checkpoint(self, position: dict[str, Any]) -> None:
        self.checkpoints.append((self.version, position))

    async def export(self, folder: Path) -> None:
        raise AssertionError("the controller exports nothing")

    @property
    def numbers(self) -> list[int]:
        return [g["number"] for groups in self.trained for g in groups]


class FakeSampler:
    """Handles what it is sent in order, like a channel, each after a while; groups finish in any order."""

    def __init__(self, name: str, arrivals: Arrivals, seed: int) -> None:
        self.name, self._arrivals, self._rng = name, arrivals, random.Random(seed)
        self._inbox: asyncio.Queue[tuple[Any, asyncio.Future[str] | None]] = asyncio.Queue()
        self._tasks = {asyncio.ensure_future(self._serve())}
        self.served = -1
        self.busy_seconds = 0.0
        self.ordered: list[int] = []
        self.evaluated: list[tuple[int, int, bool]] = []
        self.slowest = 12
        self.lost: set[int] = set()
        """Groups that never finish."""
        self.blocked_from: float = math.inf
        """Orders of this group and later ones are never taken, as where a sampler plays while it is asked."""
        self.checksum: str | None = None
        """A wrong answer."""
        self.barren: Callable[[int], bool] = lambda number: False
        """Groups whose two rewards are equal."""

    def publish(self, publication: Publication) -> Awaitable[str]:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((publication, answer))
        return answer

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        if orders and orders[-1].index >= self.blocked_from:
            await asyncio.Event().wait()
        self.ordered += [o.index for o in orders]
        self._inbox.put_nowait((list(orders), None))

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> list[float]:
        self.evaluated.append((first, count, greedy))
        if self.blocked_from <= 0:
            await asyncio.Event().wait()
        return [float(i % 2 == 0 or greedy) for i in range(first, first + count)]

    async def _serve(self) -> None:
        while True:
            what, answer = await self._inbox.get()
            await self._idle(3)
            if answer is not None:
                self.served = what.version
                answer.set_result(self.checksum or what.checksum)
                continue
            for order in what:
                self._tasks.add(asyncio.ensure_future(self._play(order)))

    async def _play(self, order: GroupOrder) -> None:
        record = {"number": order.index, "served": self.served, "admitted": order.version, "by": self.name}
        barren = self.barren(order.index)
        rewards = (1, 1) if barren else (0, 1)
        record["problem"] = order.index
        record["trajectories"] = [
            {
                "length": 3 + order.index,
                "reward": reward,
                "outcome": "failed" if barren else "finished",
            }
            for reward in rewards
        ]
        await self._idle(self.slowest)
        if order.index not in self.lost:
            self._arrivals.put_nowait((self.name, order.index, json.dumps(record).encode()))

    async def _idle(self, turns: int) -> None:
        for _ in range(self._rng.randrange(turns + 1)):
            await asyncio.sleep(0)


@dataclass
class Rig:
    """A controller with everything around it."""

    controller: Controller
    learner: FakeLearner
    samplers: list[FakeSampler]
    folder: Path

    @staticmethod
    def build(
        folder: Path,
        config: Config,
        *,
        samplers: int = 1,
        seed: int = 0,
        version: int = 0,
        position: dict[str, Any] | None = None,
        barren: Callable[[int], bool] = lambda number: False,
    ) -> Rig:
        """``version`` and ``position`` resume a run."""
        arrivals: Arrivals = asyncio.Queue()
        fakes = [FakeSampler(f"sampler-{i}", arrivals, seed + i) for i in range(samplers)]
        for fake in fakes:
            fake.barren = barren
        learner = FakeLearner(turns=seed % 5, version=version)
        parts = Parts(
            learner=learner,
            fleet=Fleet(fakes),
            arrivals=arrivals,
            begun=Begun(version, "", position or {}, 0, bool(config.pipeline.dynamic_sampling)),
            initial=publication_of(version),
            begun_at=0.0,
        )
        writer = MetricsWriter(folder, resume_step=version)
        controller = make_controller(config, RunFolder(folder), parts, writer, SilentProgress())
        return Rig(controller, learner, fakes, folder)

    async def run(self) -> bool:
        collecting = asyncio.ensure_future(self.controller.collect())
        try:
            await self.controller.publish_initial(publication_of(self.controller.version))
            return await self.controller.run()
        finally:
            collecting.cancel()
            self.controller.writer.close()

    def journaled(self, upto: int) -> list[int]:
        return [n for n in range(upto) if self.controller.journal.read(n) is not None]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("samplers", [1, 3])
def test_every_group_is_trained_once_within_the_bound_whatever_the_order(
    tmp_path: Path, seed: int, samplers: int
) -> None:
    spare = seed % 3
    config = config_of(pipeline__lag=seed % 4, pipeline__window=1 + seed, pipeline__over_provision=spare)

    async def scenario() -> None:
        rig = Rig.build(tmp_path, config, samplers=samplers, seed=seed)
        assert await rig.run() is True
        assert sorted(rig.learner.numbers) == list(range(24))
        assert sorted(n for s in rig.samplers for n in s.ordered) == list(range(24)), "ordered once each"
        for step, groups in enumerate(rig.learner.trained):
            for group in groups:
                assert group["served"] >= group["admitted"], "sampled under weights older than its admission"
                assert 0 <= step - group["served"] <= lag_bound(seed % 4, 1 + seed, 2, spare)
        assert rig.learner.checkpoints == [(12, {"anchor": 24, "trained": []})]

    asyncio.run(scenario())
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all({"seconds_waiting", "seconds_training", "tokens_per_second"} <= row.keys() for row in rows)


def test_groups_are_shared_out_evenly(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of(pipeline__prompts=4, pipeline__steps=20), samplers=4)
        await rig.run()
        counts = [len(s.ordered) for s in rig.samplers]
        assert sum(counts) == 80
        assert max(counts) - min(counts) <= 12, counts
        assert all(set(s.ordered[:3]) == {i, i + 4, i + 8} for i, s in enumerate(rig.samplers))

    asyncio.run(scenario())


def test_a_sampler_that_is_stuck_gets_nothing_new(tmp_path: Path) -> None:
    """It keeps what it has, within the window; the others go on until the oldest of its groups is needed."""

    async def scenario() -> None:
        rig = Rig.build(
            tmp_path,
            config_of(pipeline__lag=3, pipeline__window=100, pipeline__steps=9, runtime__timeout_seconds=0.2),
            samplers=2,
        )
        rig.samplers[0].lost = set(range(100))
        with pytest.raises(WorkerError, match=r"no group finished within 0.2 s .*waiting for sampler-0 \(\d"):
            await rig.run()
        assert rig.samplers[0].ordered[:4] == [0, 2, 4, 6]
        assert len(rig.samplers[1].ordered) > len(rig.samplers[0].ordered)
        assert 0 not in rig.learner.numbers

    asyncio.run(scenario())


def test_wrong_weights_are_found_and_their_sampler_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of(), samplers=2)
        await rig.controller.publish_initial(publication_of(0))
        rig.samplers[1].checksum = "checksum-0"  # from here on it does not take what it is given
        with pytest.raises(PublicationError) as raised:
            await rig.run()
        assert str(raised.value) == (
            "sampler-1 serves other weights than version 1: its checksum is checksum-0, "
            "the learner's checksum-1"
        )
        assert rig.learner.version == 2, "found while the next step ran"

    asyncio.run(scenario())


def test_wrong_initial_weights_are_found_before_anything_is_played(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of(), samplers=2)
        rig.samplers[0].checksum = "nonsense"
        with pytest.raises(PublicationError, match="sampler-0 serves other weights than version 0"):
            await rig.run()
        assert rig.samplers[0].ordered == []

    asyncio.run(scenario())


def test_silence_names_who_was_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of(runtime__timeout_seconds=0.05), samplers=2)
        rig.samplers[1].lost = {1}
        with pytest.raises(WorkerError) as raised:
            await rig.run()
        assert str(raised.value) == (
            "no group finished within 0.05 s (runtime.timeout_seconds); waiting for sampler-1 (1 groups)"
        )

    asyncio.run(scenario())


def test_an_error_of_the_learner_ends_the_run_as_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of())
        rig.learner.fails_at = 3
        with pytest.raises(NonFiniteError, match="gradient norm"):
            await rig.run()
        assert rig.learner.checkpoints == [], "the state after a failed step is not to be kept"

    asyncio.run(scenario())
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_journal_that_cannot_be_written_ends_the_run_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of())

        def full(records: Any) -> None:
            raise CheckpointError("cannot use the journal: database or disk is full")

        rig.controller.journal.append = full
        with pytest.raises(CheckpointError, match="disk is full"):
            await asyncio.wait_for(rig.run(), 5)

    asyncio.run(scenario())


def test_a_group_that_vanished_from_the_journal_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of(pipeline__window=1))
        read = rig.controller.journal.read
        rig.controller.journal.read = lambda number: None if number == 5 else read(number)
        with pytest.raises(CheckpointError, match="group 5 is missing from the journal"):
            await rig.run()

    asyncio.run(scenario())


async def stop_after(rig: Rig, steps: int) -> bool:
    running = asyncio.ensure_future(rig.run())
    while rig.learner.version < steps:
        await asyncio.sleep(0)
    rig.controller.stop()
    return await running


@pytest.mark.parametrize("seed", range(6))
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, seed: int) -> None:
    """Stop in the middle: False, a checkpoint of the last whole step. A new controller from there trains
    every group that was not trained, none twice, and orders none that the journal holds."""
    config = config_of()

    async def scenario() -> None:
        first = Rig.build(tmp_path, config, seed=seed, samplers=2)
        assert await stop_after(first, 5) is False
        [(version, position)] = first.learner.checkpoints
        assert version == first.controller.version
        assert 5 <= version < 12
        paid = set(first.journaled(24))
        assert not paid & set(first.learner.numbers), "what the checkpoint has used is forgotten"
        first.controller.journal.close()

        second = Rig.build(tmp_path, config, seed=seed + 100, version=version, position=position)
        assert await second.run() is True
        assert sorted(first.learner.numbers + second.learner.numbers) == list(range(24))
        assert not set(second.samplers[0].ordered) & paid

    asyncio.run(scenario())
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 13))


def test_a_run_that_must_stop_in_a_hurry_keeps_its_complete_steps(tmp_path: Path) -> None:
    """An order that takes for ever holds up the run after some steps: ``stop`` does not help, ``hurry`` does,
    and nothing is lost or played twice."""
    config = config_of()

    async def scenario() -> None:
        first = Rig.build(tmp_path, config)
        first.samplers[0].blocked_from = 15
        running = asyncio.ensure_future(first.run())
        await asyncio.sleep(0.1)  # as many steps as it can take
        first.controller.stop()
        await asyncio.sleep(0.02)
        assert not running.done()
        first.controller.hurry()
        assert await asyncio.wait_for(running, 5) is False
        [(version, position)] = first.learner.checkpoints
        assert version == first.learner.version == len(read_metrics(tmp_path)) > 2
        first.controller.journal.close()

        second = Rig.build(tmp_path, config, seed=1, version=version, position=position)
        assert await second.run() is True
        assert sorted(first.learner.numbers + second.learner.numbers) == list(range(24))

    asyncio.run(scenario())
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 13))


def test_an_evaluation_is_given_up_in_a_hurry(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of())
        rig.samplers[0].blocked_from = 0
        evaluating = asyncio.ensure_future(rig.controller.evaluate(2, greedy=False))
        await asyncio.sleep(0)
        rig.controller.hurry()
        with pytest.raises(GivenUpError):
            await asyncio.wait_for(evaluating, 5)

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_a_crash_after_a_checkpoint_repeats_the_steps_since_with_the_same_groups(
    tmp_path: Path, seed: int
) -> None:
    """The learner dies at step 7, the last checkpoint is of version 4: groups of steps 4 … 6 are trained
    on again from the journal, and are not generated again."""
    config = config_of(learner__checkpoint_every=4)

    async def scenario() -> None:
        first = Rig.build(tmp_path, config, seed=seed)
        first.learner.fails_at = 7
        with pytest.raises(NonFiniteError):
            await first.run()
        [(version, position)] = first.learner.checkpoints
        assert version == 4
        lost = {g["number"] for groups in first.learner.trained[4:] for g in groups}
        kept = [g["number"] for groups in first.learner.trained[:4] for g in groups]
        first.controller.journal.close()

        second = Rig.build(tmp_path, config, seed=seed + 50, version=version, position=position)
        assert await second.run() is True
        assert sorted(kept + second.learner.numbers) == list(range(24))
        assert not set(second.samplers[0].ordered) & lost
        assert [v for v, _ in second.learner.checkpoints] == [8, 12, 12]

    asyncio.run(scenario())
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 13))


def test_stopping_while_nothing_arrives_does_not_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of())
        rig.samplers[0].lost = set(range(100))
        running = asyncio.ensure_future(rig.run())
        await asyncio.sleep(0.02)
        rig.controller.stop()
        assert await asyncio.wait_for(running, 5) is False
        assert rig.learner.checkpoints == [(0, {"anchor": 0, "trained": []})]

    asyncio.run(scenario())


def test_a_run_that_has_its_steps_takes_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of(), version=12, position={"anchor": 24, "trained": []})
        assert await rig.run() is True
        assert (rig.learner.trained, rig.samplers[0].ordered) == ([], [])

    asyncio.run(scenario())


def test_evaluations_are_shared_out_and_written_down(tmp_path: Path) -> None:
    config = config_of(evaluation__every=5, evaluation__problems=7, pipeline__steps=10)

    async def scenario() -> None:
        rig = Rig.build(tmp_path, config, samplers=3)
        await rig.run()
        expected = [[(0, 3)], [(3, 3)], [(6, 1)]]
        for sampler, share in zip(rig.samplers, expected, strict=True):
            asked = [(first, count, greedy) for greedy in (False, True) for first, count in share]
            assert sampler.evaluated == asked, "at step 5 only: the last step is evaluated after the run"
        assert await rig.controller.evaluate(2, greedy=False) == [1.0, 0.0]
        assert rig.samplers[2].evaluated[2:] == [], "two problems are for two samplers"

    asyncio.run(scenario())
    rows = read_metrics(tmp_path)
    assert [("accuracy" in row, "greedy_accuracy" in row) for row in rows] == [
        (step == 5, step == 5) for step in range(1, 11)
    ]
    assert rows[4]["accuracy"] == pytest.approx(4 / 7)  # even ones of 0 … 6
    assert rows[4]["greedy_accuracy"] == 1.0


def test_lag_zero_orders_a_step_only_when_the_one_before_is_complete(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig.build(tmp_path, config_of(pipeline__lag=0), seed=3, samplers=2)
        await rig.run()
        for step, groups in enumerate(rig.learner.trained):
            assert [(g["number"], g["served"]) for g in groups] == [(2 * step, step), (2 * step + 1, step)]

    asyncio.run(scenario())
