"""What runs in a child process: ``python -m vcpo.runtime.worker ROLE FD``.

A worker answers each request with one reply and may send events in between. It ends when the other end of
its channel is gone, however its parent died, and it has a session of its own, so that Ctrl-C in a terminal
reaches the parent alone. What it prints goes to the run's ``logs`` folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcpo.config import Config
from vcpo.errors import VcpoError
from vcpo.runtime.channel import BlockingChannel, Channel, ChannelClosed, split_records

if TYPE_CHECKING:
    from torch import Tensor

    from vcpo.learner.ranks import Ranks
    from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup

Reply = dict[str, Any]

PARENT_GONE_SECONDS = 3.0
"""Time to end in order when the parent has died."""


def error_reply(error: BaseException) -> Reply:
    """An error as a header: its class if it is in the vocabulary, and its message."""
    traceback.print_exception(error)
    if isinstance(error, VcpoError):
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "WorkerError", "message": f"{type(error).__name__}: {error}"}


def configure(header: dict[str, Any]) -> Config:
    """The config of the run, from the first frame; limits this process's threads."""
    import torch

    config = Config.model_validate(header["config"])
    torch.set_num_threads(config.runtime.threads)
    return config


def meet_ranks(place: dict[str, Any], config: Config) -> Ranks:
    """Join the other ranks of the learner, all of them on this machine."""
    from vcpo.learner.ranks import join

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else is to be let in
    timeout = config.runtime.timeout_seconds
    return join(place["rank"], place["size"], place["meeting"], config.model.device, timeout)


class LearnerProcess:
    """Answers for the learner, or one of its ranks, one request at a time."""

    _config: Config

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._service: Any
        self._first = True
        """Whether this is the first rank, which speaks for all."""
        self._group: WeightGroup | None = None
        self._transfer: Path | None = None

    def serve(self) -> None:
        try:
            while True:
                self._answer(*self._channel.receive())
        except ChannelClosed:
            return
        finally:
            if self._transfer is not None:
                shutil.rmtree(self._transfer, ignore_errors=True)

    def _answer(self, header: dict[str, Any], body: bytes) -> None:
        try:
            reply = getattr(self, f"do_{header['do']}")(header, body)
        except ChannelClosed:
            raise
        except Exception as error:
            reply = error_reply(error)
        self._channel.send({"id": header["id"], **reply})

    def do_prepare(self, header: dict[str, Any], body: bytes) -> Reply:
        self._make(header)
        self._service.prepare(resume=header["resume"], listener=self._on_warm_start)
        return {}

    def do_begin(self, header: dict[str, Any], body: bytes) -> Reply:
        if "ranks" not in header or header["ranks"] is None or header["ranks"]["rank"]:
            self._make(header)  # the first of several ranks has, to prepare
        together = {}
        if place := header.get("ranks"):
            self._first = place["rank"] == 0
            together = {"ranks": meet_ranks(place, self._config)}
        begun = self._service.begin(resume=header["resume"], listener=self._on_warm_start, **together)
        return {"begun": vars(begun), "publication": self._publication()}

    def _make(self, header: dict[str, Any]) -> None:
        from vcpo.pipeline.services import LearnerService

        self._config = configure(header)
        self._service = LearnerService(self._config, Path(header["run_folder"]))

    def do_step(self, header: dict[str, Any], body: bytes) -> Reply:
        skipped = [(problem, reward) for problem, reward in header["skipped"]]
        metrics = self._service.step(split_records(header["lengths"], body), skipped)
        return {"metrics": metrics, "publication": self._publication()}

    def do_choose(self, header: dict[str, Any], body: bytes) -> Reply:
        return {"problems": self._service.choose(header["numbers"])}

    def do_checkpoint(self, header: dict[str, Any], body: bytes) -> Reply:
        self._service.checkpoint(header["position"])
        return {}

    def do_export(self, header: dict[str, Any], body: bytes) -> Reply:
        self._service.export(Path(header["folder"]))
        return {}

    def _on_warm_start(self, loss: float) -> None:
        self._channel.send({"event": "warm start", "loss": loss})

    def _publication(self) -> Reply:
        """Put the current weights where the samplers can map them; the first of several ranks does so.

        When version v is written, every sampler serves v - 2 already: the controller waits for v - 1 to be
        served before it sends v. So older files can go.
        """
        version, weights, checksum = self._service.weights()
        probe = self._service.probe()
        source: Any = None
        if self._first:
            source = self._announced(weights) if self._broadcasts else str(self._file(version, weights))
        return {
            "version": version,
            "checksum": checksum,
            "source": source,
            "probe": None if probe is None else vars(probe),
        }

    @property
    def _broadcasts(self) -> bool:
        return self._config.sampler.transfer == "collective"

    def _announced(self, weights: Mapping[str, Tensor]) -> list[tuple[str, str, list[int]]]:
        """What will be broadcast: name, number type, shape."""
        return [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in sorted(weights.items())
        ]

    def do_meet(self, header: dict[str, Any], body: bytes) -> Reply:
        """Wait for all engines to join."""
        from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup

        device, timeout = self._config.model.device, self._config.runtime.timeout_seconds
        kind = device.partition(":")[0]
        self._group = WeightGroup(header["address"], header["port"], 0, header["world_size"], kind, timeout)
        return {}

    def do_broadcast(self, header: dict[str, Any], body: bytes) -> Reply:
        for _, tensor in self._service.tensors():
            if self._group is not None:
                self._group.broadcast(tensor.contiguous())
        return {}

    def _file(self, version: int, weights: Mapping[str, Tensor]) -> Path:
        from vcpo.samplers.shared_memory import transfer_folder
        from vcpo.weights import write_weights

        if self._transfer is None:
            size = 3 * sum(t.nbytes for t in weights.values())
            self._transfer = transfer_folder(size, self._config.runtime.weights_folder)
        path = self._transfer / f"version-{version}.safetensors"
        write_weights(path, weights)
        (self._transfer / f"version-{version - 2}.safetensors").unlink(missing_ok=True)
        return path


class SamplerProcess:
    """Answers for a sampler with its environments; groups are played while requests are answered.

    Requests are taken in order, and a publication is served before the next request is looked at: groups
    ordered after it are sampled with it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._playing: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer until the other end is gone, which is noticed in the middle of an answer too."""
        requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        ends = [asyncio.ensure_future(self._read(requests)), asyncio.ensure_future(self._answer(requests))]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in done:
            with contextlib.suppress(ChannelClosed):
                end.result()

    async def _read(self, requests: asyncio.Queue[dict[str, Any]]) -> None:
        while True:
            requests.put_nowait((await self._channel.receive())[0])

    async def _answer(self, requests: asyncio.Queue[dict[str, Any]]) -> None:
        while True:
            header = await requests.get()
            handler: Callable[[dict[str, Any]], Awaitable[Reply] | None] = getattr(self, f"do_{header['do']}")
            try:
                if (answer := handler(header)) is not None:
                    self._reply(header, await answer)
            except Exception as error:
                self._reply(header, error_reply(error))
            await self._channel.flush()

    def _reply(self, header: dict[str, Any], reply: Reply) -> None:
        self._channel.send({"id": header["id"], "busy": self._busy, **reply})

    @property
    def _busy(self) -> float:
        service = getattr(self, "_service", None)
        return service.busy_seconds if service else 0.0

    async def do_begin(self, header: dict[str, Any]) -> Reply:
        from vcpo.pipeline.engines import Share
        from vcpo.pipeline.services import RolloutService

        share = Share(*header["share"], logs=Path(header["logs"]))
        self._service = RolloutService(configure(header), share)
        self._service.begin(header["policy"])
        await self._service.ready()
        return {}

    async def do_publish(self, header: dict[str, Any]) -> Reply:
        from vcpo.weights import Probe, WeightFile, announced_weights

        probe = None if header["probe"] is None else Probe(**header["probe"])
        source = header["source"]
        weights = WeightFile(Path(source)) if isinstance(source, str) else announced_weights(source)
        return {"checksum": await self._service.publish(header["version"], weights, probe)}

    async def do_ranks(self, header: dict[str, Any]) -> Reply:
        return {"ranks": await self._service.ranks()}

    async def do_meet(self, header: dict[str, Any]) -> Reply:
        await self._service.meet(header["address"], header["port"], header["offset"], header["world_size"])
        return {}

    def do_order(self, header: dict[str, Any]) -> None:
        """Begin to play; each finished group is an event, and an error ends the sampler's usefulness."""
        from vcpo.pipeline.rollout import GroupOrder

        orders = [GroupOrder(*order) for order in header["orders"]]
        self._spawn(self._play(orders))

    def do_evaluate(self, header: dict[str, Any]) -> None:
        self._spawn(self._evaluate(header))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)

    async def _play(self, orders: list[Any]) -> None:
        try:
            await self._service.play(orders, self._on_group)
        except Exception as error:
            self._channel.send({"event": "failed", **error_reply(error)})

    def _on_group(self, number: int, record: bytes) -> None:
        self._channel.send({"event": "group", "number": number, "busy": self._busy}, record)

    async def _evaluate(self, header: dict[str, Any]) -> None:
        try:
            rewards = await self._service.evaluate(header["first"], header["count"], greedy=header["greedy"])
            self._reply(header, {"rewards": rewards})
        except Exception as error:
            self._reply(header, error_reply(error))


async def _serve_sampler(end: socket.socket) -> None:
    import vcpo.pipeline.services  # noqa: F401  while the learner starts: it takes seconds

    await SamplerProcess(await Channel.over(end)).serve()


def end_with_parent() -> None:
    """Kill this process and its children soon after its parent is gone, whatever they are doing: an
    environment that catches everything could keep the event loop from ending."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(PARENT_GONE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    role, descriptor = sys.argv[1], int(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.Formatter.converter = time.gmtime
    end = socket.socket(fileno=descriptor)
    if role == "learner":
        LearnerProcess(BlockingChannel(end)).serve()
    else:
        asyncio.run(_serve_sampler(end))
    os._exit(0)  # nothing is left to save; library threads must not hold the process


if __name__ == "__main__":
    main()
