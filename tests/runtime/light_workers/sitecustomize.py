"""Makes workers light: with this folder in PYTHONPATH, ``python -m vcpo.runtime.worker`` and Ray's workers
run as they are, but over services without torch, so that they start in a fraction of a second. Python imports
this module first.

``VCPO_TEST_NOTES`` names a folder where the workers write down what they did; ``VCPO_TEST_TROUBLE``, or a
file ``trouble`` in that folder, says ``ROLE:PLACE:WHAT`` and makes one of them fail: ``sampler:play:kill``.
A file says it once: whoever fails removes it first, unless it ends with ``:always``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def note(name: str, **content: Any) -> None:
    """One JSON line in NAME.jsonl of the folder of notes."""
    with (Path(os.environ["VCPO_TEST_NOTES"]) / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(content) + "\n")


def trouble(here: str) -> str:
    """What is to go wrong ``here`` (role:place), if it is more than this function can do."""
    file = Path(os.environ["VCPO_TEST_NOTES"]) / "trouble"
    try:
        said, once = file.read_text(), True
    except FileNotFoundError:
        said, once = os.environ.get("VCPO_TEST_TROUBLE", "::"), False
    role, place, what, *always = said.split(":")
    if f"{role}:{place}" != here:
        return ""
    if once and not always:
        try:
            file.unlink()
        except FileNotFoundError:  # another worker was quicker
            return ""
    note("told", here=here, what=what, process=os.getpid())
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
        case "block":
            time.sleep(600)
        case "DataError":
            from vcpo.errors import DataError

            raise DataError("problems.jsonl, line 3: is not JSON; correct or remove the line")
        case "NonFiniteError":
            from vcpo.errors import NonFiniteError

            raise NonFiniteError("logits", 5, "policy version 0 is broken")
        case "EngineLost":
            from vcpo.errors import EngineLost

            raise EngineLost("vLLM server 0 is gone; no other vLLM server is left")
        case "RuntimeError":
            raise RuntimeError("out of luck")
    return what


class LightLearner:
    """A policy is its version; a checkpoint is a file with version and position."""

    def __init__(self, config: Any, run_folder: Path) -> None:
        self._config, self._file = config, run_folder / "light-checkpoint.json"
        self._version = 0

    def prepare(self, *, resume: bool, listener: Callable[[float], None]) -> None:
        pass

    def begin(self, *, resume: bool, listener: Callable[[float], None], ranks: Any = None) -> Any:
        from vcpo.pipeline.ports import Begun

        self._rank = 0 if ranks is None else ranks.rank
        for _ in range(self._config.warm_start.steps):
            listener(0.5)
        trouble("learner:begin")
        state = json.loads(self._file.read_text()) if resume and self._file.exists() else {}
        self._version = state.get("version", 0)
        return Begun(self._version, "light", state.get("position", {}), 1)

    def step(self, records: Sequence[bytes], skipped: Sequence[tuple[int, float]] = ()) -> dict[str, Any]:
        from vcpo.trajectory import Group

        if self._version == 3:
            trouble(f"learner-{self._rank}:step" if self._rank else "learner:step")
        time.sleep(0.005)
        groups = [Group.from_bytes(record) for record in records]
        note(
            "trained" if self._rank == 0 else f"trained-{self._rank}",
            version=self._version,
            groups=[g.index for g in groups],
        )
        lags = [self._version - g.oldest_version for g in groups]
        self._version += 1
        return {
            "tokens": 1,
            "lag_max": max(lags),
            "lag_histogram": {lag: lags.count(lag) for lag in set(lags)},
        }

    def choose(self, numbers: Sequence[int]) -> list[int]:
        note("chosen", numbers=list(numbers))
        return [3 * number + 1 for number in numbers]

    def probe(self) -> None:
        return None

    def weights(self) -> tuple[int, dict[str, Any], str]:
        return (
            self._version,
            {"version": LightTensor(self._version)},
            f"checksum-{self._version - self._rank}",
        )

    def checkpoint(self, position: dict[str, Any]) -> None:
        if self._rank:
            return
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps({"version": self._version, "position": position}))
        partial.replace(self._file)

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)


class LightTensor:
    """As much of a tensor as weights need on their way."""

    dtype, shape, nbytes = "torch.uint8", (8,), 8

    def __init__(self, content: Any) -> None:
        import numpy as np

        is_version = isinstance(content, int)
        self._array = np.array([content]).view(np.uint8) if is_version else content

    def detach(self) -> LightTensor:
        return self

    cpu = contiguous = flatten = detach

    def view(self, how: Any) -> LightTensor:
        return self

    def numpy(self) -> Any:
        return self._array


class LightSampler:
    """Plays a group by waiting a little."""

    def __init__(self, config: Any, share: Any) -> None:
        self._config, self._version = config, 0
        self.busy_seconds = 0.0

    def begin(self, policy: str) -> None:
        trouble("sampler:begin")
        assert policy == "light"

    async def ready(self) -> None:
        pass

    async def play(self, orders: Sequence[Any], on_group: Callable[[int, bytes], None]) -> None:
        await asyncio.gather(*(self._play(order, on_group) for order in orders))

    async def _play(self, order: Any, on_group: Callable[[int, bytes], None]) -> None:
        import numpy as np

        from vcpo.trajectory import Group, Trajectory

        version, empty = self._version, np.zeros(1)
        if trouble("sampler:play") == "hang":
            await asyncio.sleep(600)
        await asyncio.sleep(0.002 * (1 + order.index % 3))
        sampled = np.array([version])
        trajectory = Trajectory(empty, np.array([True]), empty, sampled, reward=1.0)
        note("played", group=order.index, problem=order.problem)
        on_group(order.index, Group(order.index, order.index, (trajectory,) * 2, 0.0, version).to_bytes())

    async def publish(self, version: int, weights: dict[str, Any], probe: object) -> str:
        assert probe is None
        arrived = weights["version"]
        arrived = arrived.numpy().view(int)[0] if isinstance(arrived, LightTensor) else arrived
        assert arrived == version, "the weights are of another version"
        self._version = version
        what = trouble("sampler:publish") if version == 2 else ""
        if what == "hang":
            await asyncio.sleep(600)
        return "nonsense" if what == "wrong" else f"checksum-{version}"

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> list[float]:
        if trouble("sampler:evaluate") == "hang":
            await asyncio.sleep(600)
        return [1.0] * count

    async def close(self) -> None:
        pass


def write_weights(path: Path, weights: dict[str, Any]) -> None:
    note("transfers", folder=str(path.parent))
    path.write_text(json.dumps({"version": int(path.stem.removeprefix("version-"))}))


def read_weights(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def join(rank: int, *place: Any) -> SimpleNamespace:
    note("met", rank=rank)
    return SimpleNamespace(rank=rank)


def install(name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


if "vcpo.runtime.worker" in sys.orig_argv or any("default_worker.py" in a for a in sys.orig_argv):
    install("torch", set_num_threads=lambda count: None, from_numpy=LightTensor, uint8=None)
    install("vcpo.pipeline.services", LearnerService=LightLearner, RolloutService=LightSampler)
    install("vcpo.learner", __path__=[])
    install("vcpo.learner.ranks", join=join, device_of=lambda rank, device: device)
    install("vcpo.pipeline.engines", Share=lambda index, count, logs: None)
    install(
        "vcpo.weights",
        write_weights=write_weights,
        WeightFile=read_weights,
        Probe=SimpleNamespace,
        announced_weights=dict,
    )
