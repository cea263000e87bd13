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
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vcpo.runtime.channel import BlockingChannel, Channel, ChannelClosed, split_records
from vcpo.runtime.learner_worker import LearnerWorker, configured
from vcpo.runtime.outbox import BroadcastOutbox, FileOutbox
from vcpo.runtime.replies import Reply, error_reply

PARENT_GONE_SECONDS = 3.0
"""Time to end in order when the parent has died."""


class LearnerProcess:
    """Answers for the learner, or one of its ranks, one request at a time."""

    _worker: LearnerWorker

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel

    def serve(self) -> None:
        try:
            while True:
                self._answer(*self._channel.receive())
        except ChannelClosed:
            return
        finally:
            if hasattr(self, "_worker"):
                self._worker.close()

    def _answer(self, header: dict[str, Any], body: bytes) -> None:
        number, do = header.pop("id"), header.pop("do")
        try:
            reply = self._do(do, header, body)
        except ChannelClosed:
            raise
        except Exception as error:
            reply = error_reply(error)
        self._channel.send({"id": number, **reply})

    def _do(self, do: str, header: dict[str, Any], body: bytes) -> Reply:
        if do == "configure":
            outbox = FileOutbox if header["transfer"] == "files" else BroadcastOutbox
            config = configured(header["config"])
            self._worker = LearnerWorker(config, Path(header["run_folder"]), outbox(config), self._on_loss)
            return {}
        if do == "step":
            header["records"] = split_records(header.pop("lengths"), body)
        return getattr(self._worker, do)(**header)

    def _on_loss(self, loss: float) -> None:
        self._channel.send({"event": "warm start", "loss": loss})


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
        self._service = RolloutService(configured(header["config"]), share)
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
