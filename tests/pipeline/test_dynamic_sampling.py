"""Groups without a signal are skipped, others take their place, and nothing is lost or paid for twice."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_controller import Rig, config_of, stop_after

from vcpo.config import Config
from vcpo.errors import NonFiniteError
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline.dynamic_sampling import dynamic_sampling
from vcpo.pipeline.window import lag_bound
from vcpo.trajectory import Group, Trajectory


def sifted(**settings: Any) -> Config:
    return config_of(pipeline__dynamic_sampling=True, **settings)


def some(seed: int) -> Callable[[int], bool]:
    """Two groups in five are barren."""
    barren = set(random.Random(seed).sample(range(200), 80))
    return barren.__contains__


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("samplers", [1, 3])
def test_every_group_is_trained_once_or_skipped_once(tmp_path: Path, seed: int, samplers: int) -> None:
    config, barren = sifted(pipeline__lag=seed % 4, pipeline__window=1 + seed), some(seed)

    async def scenario() -> Rig:
        rig = Rig.build(tmp_path, config, samplers=samplers, seed=seed, barren=barren)
        assert await rig.run() is True
        return rig

    rig = asyncio.run(scenario())
    ordered = sorted(n for s in rig.samplers for n in s.ordered)
    assert ordered == list(range(len(ordered))), "ordered once each"
    assert sorted(rig.learner.numbers) == [n for n in ordered if not barren(n)]
    for step, groups in enumerate(rig.learner.trained):
        assert all(0 <= step - g["served"] <= lag_bound(seed % 4, 1 + seed, 2) for g in groups)
    skipped = [n for n in ordered if barren(n)]
    rows = read_metrics(tmp_path)
    assert sum(row["skipped_groups"] for row in rows) == len(skipped) > 0
    assert sum(row["skipped_tokens"] for row in rows) == sum(2 * (3 + n) for n in skipped)
    assert sum(row["skipped_failed_episodes"] for row in rows) == 2 * len(skipped)
    [(_, position)] = rig.learner.checkpoints
    assert (position["anchor"], position["trained"]) == (len(ordered), [])
    assert rig.journaled(200) == [], "a checkpoint knows them all"


def test_what_is_skipped_while_the_learner_steps_is_replaced_meanwhile(tmp_path: Path) -> None:
    """A step that waits for six groups more than there is room for: they come in the place of others."""

    async def scenario() -> None:
        rig = Rig.build(tmp_path, sifted(pipeline__lag=1), barren=lambda n: 2 <= n < 8)
        step = rig.learner.step

        async def patient(records: Any, skipped: Any = ()) -> Any:
            while rig.learner.version == 0 and len(rig.samplers[0].ordered) < 10:
                await asyncio.sleep(0)
            return await step(records, skipped)

        rig.learner.step = patient
        await asyncio.wait_for(rig.run(), 5)
        assert rig.learner.numbers[:6] == [0, 1, 8, 9, 10, 11]

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_a_stopped_and_a_crashed_run_go_on_with_the_same_groups(tmp_path: Path, seed: int) -> None:
    """Stopped at a checkpoint, then dead at step 7 after a checkpoint of version 4 at the latest."""
    config, barren = sifted(learner__checkpoint_every=4), some(seed)

    async def scenario() -> None:
        first = Rig.build(tmp_path, config, seed=seed, samplers=2, barren=barren)
        await stop_after(first, 2)
        version, position = first.learner.checkpoints[-1]
        kept, paid = list(first.learner.numbers), set(first.journaled(200))
        first.controller.journal.close()

        second = Rig.build(tmp_path, config, seed=9 + seed, version=version, position=position, barren=barren)
        second.learner.fails_at = 7
        with pytest.raises(NonFiniteError):
            await second.run()
        assert not set(second.samplers[0].ordered) & (paid | set(kept))
        done = [(v, p) for v, p in second.learner.checkpoints if v > version] or [(version, position)]
        resumed_at, position = done[-1]
        kept += [g["number"] for groups in second.learner.trained[: resumed_at - version] for g in groups]
        paid = set(second.journaled(200))
        second.controller.journal.close()

        third = Rig.build(
            tmp_path, config, seed=20 + seed, version=resumed_at, position=position, barren=barren
        )
        assert await third.run() is True
        assert not set(third.samplers[0].ordered) & (paid | set(kept))
        trained = sorted(kept + third.learner.numbers)
        assert trained == [n for n in range(trained[-1] + 1) if not barren(n)]
        assert len(trained) == 24

    asyncio.run(scenario())


def test_without_any_signal_it_gives_up_after_ten_batches_until_there_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P = 2: 20 are skipped, then the next come as they are; number 30 ends that, and 20 more are skipped."""
    config = sifted(pipeline__lag=0, pipeline__window=1, pipeline__steps=7)

    async def scenario() -> list[int]:
        rig = Rig.build(tmp_path, config, barren=lambda n: n != 30)
        with caplog.at_level(logging.WARNING):
            await rig.run()
        return rig.learner.numbers

    assert asyncio.run(scenario()) == [*range(20, 31), 51, 52, 53]
    assert [r.message.partition(":")[0] for r in caplog.records] == ["20 groups in a row had equal rewards"]
    assert sum(row["skipped_groups"] for row in read_metrics(tmp_path)) == 40


def test_the_method_decides_where_the_config_does_not() -> None:
    assert [dynamic_sampling(config_of(algorithm__name=name)) for name in ("grpo", "dapo")] == [False, True]
    overridden = {"pipeline__dynamic_sampling": False, "algorithm__name": "dapo"}
    assert not dynamic_sampling(config_of(**overridden))
    assert dynamic_sampling(sifted(algorithm__name="grpo"))


def test_an_outline_says_what_the_record_says() -> None:
    group = Group(
        index=3,
        problem=4,
        trajectories=tuple(
            Trajectory(
                tokens=np.arange(n, dtype=np.int32),
                action_mask=np.arange(n) > 1,
                log_probs=np.zeros(n, np.float32),
                versions=np.full(n, 10, np.int32),  # byte 10 is the end of a line
                reward=n / 7,
                outcome="failed" if n == 2 else "finished",
            )
            for n in (4, 9, 2)
        ),
    )
    assert Group.outline_of(group.to_bytes()) == (4, group.rewards, 15, 1)
