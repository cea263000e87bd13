"""What runs inside the actors. Arguments and answers are JSON, bytes, and references to weights.

An error is an answer too (:mod:`vcpo.runtime.replies`): what is raised is Ray's own and means that the actor
is gone.

=============== ============================== ================================ ========================
who             waits for                      woken by                         gives up after
=============== ============================== ================================ ========================
SamplerActor    the weights a group is to be   publish                          never: the controller
                played with                                                     drops the call
=============== ============================== ================================ ========================
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from vcpo import __version__
from vcpo.config import Config
from vcpo.errors import ConfigError, LearnerLost, SamplerLost
from vcpo.runtime.learner_worker import LearnerWorker, configured
from vcpo.runtime.outbox import BroadcastOutbox
from vcpo.runtime.ray.network import free_port, interface_of
from vcpo.runtime.ray.weights import Announcement, ObjectStoreOutbox, Source, arriving
from vcpo.runtime.replies import Reply, error_reply


def settle(name: str, run_folder: Path, version: str) -> None:
    """Write what this process prints to the run's logs; let gloo listen where Ray does.

    Raises ConfigError if this machine does not see the run's folder, or has another vcpo.
    """
    here = ray.util.get_node_ip_address()
    if version != __version__:
        raise ConfigError(
            f"{name} is on {here}, which has vcpo {__version__}; the command is of vcpo {version}: install "
            "the same on all machines of the cluster"
        )
    if not (run_folder / "config.toml").exists():
        raise ConfigError(
            f"{name} is on {here}, where {run_folder} is not to be seen: set run.folder to a folder that all "
            "machines of the cluster share"
        )
    if sys.platform == "linux" and (interface := interface_of(here)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    logs = run_folder / "logs"
    logs.mkdir(exist_ok=True)
    log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


def placed(description: dict[str, Any]) -> Config:
    """The config of the run, for an actor: Ray shows it its own GPUs alone, and so chooses them."""
    config = configured(description)
    on_cuda = config.model.device.startswith("cuda")
    model = config.model.model_copy(update={"device": "cuda:0" if on_cuda else config.model.device})
    sampler = config.sampler.model_copy(update={"devices": []})
    return config.model_copy(update={"model": model, "sampler": sampler})


class LearnerActor:
    """The learner, or one of its ranks. Requests are taken in turn; ``signs`` answers meanwhile."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._worker: LearnerWorker
        self._device: str
        self._losses: list[float] = []
        self._store = ObjectStoreOutbox()

    def configure(self, config: dict[str, Any], run_folder: str, version: str) -> Reply:
        try:
            settle(self._name, Path(run_folder), version)
            here = placed(config)
            self._device = here.model.device
            collective = here.sampler.transfer == "collective"
            outbox = BroadcastOutbox(here) if collective else self._store
            self._worker = LearnerWorker(here, Path(run_folder), outbox, self._losses.append)
        except Exception as error:
            return error_reply(error)
        return {}

    def place(self) -> Reply:
        """Address and port where others may meet this one."""
        here = ray.util.get_node_ip_address()
        try:
            return {"place": (here, free_port(here))}
        except OSError as error:
            return error_reply(error)

    def do(self, what: str, arguments: dict[str, Any]) -> Reply:
        try:
            if what == "begin" and arguments["ranks"] is not None:
                arguments["ranks"]["device"] = self._device
            return getattr(self._worker, what)(**arguments)
        except Exception as error:
            return error_reply(error)

    def step(self, records: Sequence[bytes], skipped: Sequence[tuple[int, float]]) -> Reply:
        return self.do("step", {"records": records, "skipped": skipped})

    def offer(self) -> Reply:
        """The weights of now, in the object store."""
        try:
            return {"publication": self._worker.publication(self._store)}
        except Exception as error:
            return error_reply(error)

    @ray.method(concurrency_group="signs")
    def signs(self, heard: int) -> list[float]:
        """Losses of the warm start, from the ``heard``-th on: signs of life while a request is worked on."""
        return self._losses[heard:]


class SamplerActor:
    """A sampler with its environments; groups are played while other calls are answered."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._service: Any = None
        """None after a restart, until the sampler begins anew."""
        self._version = -1
        self._served = asyncio.Condition()
        self._updating = asyncio.Lock()
        self._playing: set[asyncio.Task[Any]] = set()
        self._life = uuid.uuid4().hex

    async def here(self) -> str:
        """Answers as soon as Ray has found a place for the actor, with what tells this process from the one
        before."""
        return self._life

    async def begin(
        self, config: dict[str, Any], run_folder: str, version: str, policy: str, share: tuple[int, int]
    ) -> Reply:
        """Be ready to be given weights; whatever was played for a learner that is gone is given up."""
        try:
            for playing in self._playing:
                playing.cancel()
            self._version = -1
            if self._service is None:
                settle(self._name, Path(run_folder), version)
                self._service = await self._started(placed(config), Path(run_folder), policy, share)
        except Exception as error:
            return error_reply(error)
        return {"busy": self._service.busy_seconds}

    async def _started(self, config: Any, run_folder: Path, policy: str, share: tuple[int, int]) -> Any:
        from vcpo.pipeline.engines import Share

        # Servers that run are shared out; a server of its own is the only one that a sampler has.
        index, count = share if config.sampler.urls else (0, 1)
        service = self.service(config, Share(index, count, logs=run_folder / "logs" / self._name))
        service.begin(policy)
        await service.ready()
        return service

    def service(self, config: Any, share: Any) -> Any:
        """What plays."""
        from vcpo.pipeline.services import RolloutService

        return RolloutService(config, share)

    @property
    def _begun(self) -> Any:
        """What plays. Raises SamplerLost for who talks to the process that was here before."""
        if self._service is None:
            raise SamplerLost("its process is gone")
        return self._service

    async def ranks(self) -> Reply:
        """How many ranks of a broadcast its engine's workers take."""
        try:
            return {"ranks": await self._begun.ranks()}
        except Exception as error:
            return error_reply(error)

    async def meet(self, address: str, port: int, offset: int, world_size: int) -> Reply:
        """Join the learner's broadcast."""
        try:
            await self._begun.meet(address, port, offset, world_size)
        except Exception as error:
            return error_reply(error)
        return {}

    async def publish(
        self, version: int, source: Source | Announcement, probe: dict[str, Any] | None
    ) -> Reply:
        from vcpo.weights import Probe

        try:
            async with self._updating:
                service = self._begun
                if version < self._version:  # it was overtaken on the way here
                    return {"checksum": None}
                weights = await arriving(source)
                said = None if probe is None else Probe(**probe)
                checksum = await service.publish(version, weights, said)
                async with self._served:
                    self._version = version
                    self._served.notify_all()
        except ObjectLostError as error:  # its owner was the learner
            return error_reply(LearnerLost(f"the weights of version {version} are gone: {error}"))
        except Exception as error:
            return error_reply(error)
        return {"checksum": checksum}

    async def play(self, index: int, version: int, problem: int | None) -> Reply:
        """Play one group once its weights, or newer ones, are served. Calls may overtake each other on the
        way here, so that the order of sending is not relied on."""
        playing = asyncio.ensure_future(self._play(index, version, problem))
        self._playing.add(playing)
        try:
            return {"record": await playing}
        except asyncio.CancelledError:
            return {"given up": True}
        except Exception as error:
            return error_reply(error)
        finally:
            self._playing.discard(playing)

    async def _play(self, index: int, version: int, problem: int | None) -> bytes:
        from vcpo.pipeline.rollout import GroupOrder

        service = self._begun
        async with self._served:
            await self._served.wait_for(lambda: self._version >= version)
        records: list[bytes] = []
        order = GroupOrder(index, version, problem)
        await service.play([order], lambda number, record: records.append(record))
        return records[0]

    async def evaluate(self, first: int, count: int, greedy: bool) -> Reply:
        try:
            rewards = await self._begun.evaluate(first, count, greedy=greedy)
        except Exception as error:
            return error_reply(error)
        return {"rewards": rewards}

    async def busy(self) -> Reply:
        """Time its engine has spent computing; the answer is the sign that it lives."""
        try:
            return {"busy": self._begun.busy_seconds}
        except Exception as error:
            return error_reply(error)
