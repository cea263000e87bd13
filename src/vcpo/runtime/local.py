"""Child processes on one machine: ``pipeline.mode = "async"``.

One learner and one or more samplers, each a child of this process, which runs the controller and computes
nothing. Weights travel as a safetensors file in shared memory, removed when every sampler serves them.

=============== ============================== ================================ ========================
who             waits for                      woken by                         gives up after
=============== ============================== ================================ ========================
controller      see :mod:`vcpo.pipeline.controller`
request         a worker's reply               the worker's frame               runtime.timeout_seconds
watch           a worker's end                 end of its channel               never: its end ends the run
worker          a request                      the controller's frame           its parent's end
shutdown        a worker's exit                the closed channel               1 s, then it is killed
=============== ============================== ================================ ========================
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from vcpo.config import Config
from vcpo.errors import WorkerError
from vcpo.monitor.progress import Progress
from vcpo.pipeline.controller import Controller
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.ports import Arrivals, Begun, Outcome, Publication, Rewards, StepResult
from vcpo.pipeline.rollout import GroupOrder
from vcpo.pipeline.run_folder import RunFolder
from vcpo.pipeline.session import Parts, WarmStartPhase, interrupted_summary, train_session
from vcpo.runtime.channel import Channel, ChannelClosed, Frame, join_records
from vcpo.runtime.interrupts import stop_in_order, stop_on_signals
from vcpo.runtime.replies import error_of
from vcpo.runtime.tasks import unless

EXIT_SECONDS = 1.0

EventListener = Callable[[dict[str, Any], bytes], None]


class WorkerProcess:
    """A child process and the channel to it."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, channel: Channel, log: Path, timeout: float
    ) -> None:
        self.name = name
        self._process, self._channel, self._log, self._timeout = process, channel, log, timeout
        self._replies: dict[int, asyncio.Future[Frame]] = {}
        self._ids = itertools.count()
        self._frames = 0
        """Received so far."""
        self.on_event: EventListener = lambda header, body: None

    @staticmethod
    async def start(role: str, name: str, config: Config, logs: Path) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name}.log"
        environment = os.environ | {"OMP_NUM_THREADS": str(config.runtime.threads), "PYTHONUNBUFFERED": "1"}
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "vcpo.runtime.worker", role, str(theirs.fileno()),
                pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, env=environment,
            )  # fmt: skip
        theirs.close()
        return WorkerProcess(name, process, await Channel.over(ours), log, config.runtime.timeout_seconds)

    def request(self, do: str, body: bytes = b"", **header: Any) -> asyncio.Task[Frame]:
        """Send now; await the returned task for the reply."""
        number = next(self._ids)
        self._replies[number] = asyncio.get_running_loop().create_future()
        self._channel.send({"id": number, "do": do, **header}, body)
        return asyncio.ensure_future(self._reply(number, do))

    def tell(self, do: str, **header: Any) -> None:
        """Send a request that has no reply."""
        self._channel.send({"id": next(self._ids), "do": do, **header})

    async def flush(self) -> None:
        with contextlib.suppress(ChannelClosed):  # ``watch`` reports the end of the worker
            await self._channel.flush()

    async def _reply(self, number: int, do: str) -> Frame:
        reply = self._replies[number]
        try:
            while not reply.done():
                heard = self._frames
                await asyncio.wait([reply], timeout=self._timeout)
                if not reply.done() and self._frames == heard:  # not even a sign of progress
                    raise WorkerError(
                        f"{self.name} did not answer {do!r} within {self._timeout:g} s "
                        f"(runtime.timeout_seconds); see {self._log}"
                    )
        finally:
            self._replies.pop(number, None)
        header, body = reply.result()
        if "error" in header:
            raise error_of(header, self.name, self._log)
        return header, body

    async def watch(self) -> None:
        """Receive until the worker is gone, then raise its end as an error."""
        while True:
            try:
                header, body = await self._channel.receive()
                self._frames += 1
            except ChannelClosed:
                code = await self._process.wait()
                how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
                raise WorkerError(f"{self.name} {how}; see {self._log}") from None
            if "event" not in header:
                if (reply := self._replies.get(header["id"])) is not None and not reply.done():
                    reply.set_result((header, body))
            elif header["event"] == "failed":
                raise error_of(header, self.name, self._log)
            else:
                self.on_event(header, body)

    async def end(self) -> None:
        """Close the channel, which ends the worker; kill it if it does not notice, and whatever processes
        its environments have left."""
        self._channel.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                await self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # the worker leads a process group of its own
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


class LocalLearner:
    """The learner in a child process, or in one for each of its ranks: they all get every request, and do it
    together; the first one's answer counts."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self._workers = workers

    async def _request(self, do: str, body: bytes = b"", **header: Any) -> dict[str, Any]:
        """The first error of any rank is raised at once: the others may be waiting for that rank."""
        answers = await asyncio.gather(*(worker.request(do, body, **header) for worker in self._workers))
        return answers[0][0]

    async def begin(self, meeting: Path, *, resume: bool, **settings: Any) -> dict[str, Any]:
        """Several ranks meet in the file ``meeting``, once the first has made the model they all load."""
        await self._request("configure", **settings)
        first, size = self._workers[0], len(self._workers)
        if size == 1:
            return (await first.request("begin", resume=resume, ranks=None))[0]
        await first.request("prepare", resume=resume)
        common = {"size": size, "meeting": f"file://{meeting}", "device": ""}
        requests = (
            worker.request("begin", resume=resume, ranks={"rank": rank, **common})
            for rank, worker in enumerate(self._workers)
        )
        return (await asyncio.gather(*requests))[0][0]

    async def meet(self, **place: Any) -> None:
        """Join the broadcast of weights to engines, as its sender."""
        await self._workers[0].request("meet", **place)

    async def step(self, records: Sequence[bytes], skipped: Sequence[Outcome] = ()) -> StepResult:
        lengths, body = join_records(list(records))
        header = await self._request("step", body, lengths=lengths, skipped=list(skipped))
        return StepResult(_metrics(header["metrics"]), Publication(**header["publication"]))

    def send(self, publication: Publication) -> Awaitable[object]:
        if isinstance(publication.source, str):  # a file, which is there already
            return asyncio.sleep(0)
        # Sent before anything else can be asked of them: a step would change the weights.
        return asyncio.gather(*(worker.request("broadcast") for worker in self._workers))

    async def choose(self, numbers: Sequence[int]) -> list[int]:
        return (await self._request("choose", numbers=list(numbers)))["problems"]

    async def checkpoint(self, position: dict[str, Any]) -> None:
        await self._request("checkpoint", position=position)

    async def export(self, folder: Path) -> None:
        await self._request("export", folder=str(folder))


class LocalSampler:
    """A sampler in a child process."""

    def __init__(self, worker: WorkerProcess, arrivals: Arrivals) -> None:
        self._worker, self._arrivals = worker, arrivals
        self._busy = 0.0
        worker.on_event = self._on_event

    @property
    def name(self) -> str:
        return self._worker.name

    @property
    def busy_seconds(self) -> float:
        return self._busy

    def publish(self, publication: Publication) -> Awaitable[str]:
        request = self._worker.request(
            "publish",
            version=publication.version,
            source=publication.source,
            probe=publication.probe,
        )
        return asyncio.ensure_future(self._checksum(request))

    async def _checksum(self, request: Awaitable[Frame]) -> str:
        return (await request)[0]["checksum"]

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        self._worker.tell("order", orders=[(o.index, o.version, o.problem) for o in orders])
        await self._worker.flush()

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> Rewards:
        header, _ = await self._worker.request("evaluate", first=first, count=count, greedy=greedy)
        self._busy = header["busy"]
        return header["rewards"]

    def _on_event(self, header: dict[str, Any], body: bytes) -> None:
        self._busy = header["busy"]
        self._arrivals.put_nowait((self.name, header["number"], body))


def _metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """JSON has no whole-number keys: the histogram's come back as text."""
    return metrics | {"lag_histogram": {int(k): v for k, v in metrics["lag_histogram"].items()}}


class _Run:
    """One training run: its workers, and the task that a signal or a worker's end cancels."""

    def __init__(self, config: Config, run: RunFolder, progress: Progress, *, resume: bool) -> None:
        self._config, self._run, self._progress, self._resume = config, run, progress, resume
        self._begun_at = time.perf_counter()
        self._workers: list[WorkerProcess] = []
        self._controller: Controller | None = None
        self._transfer: Path | None = None
        self._meeting: Path | None = None

    async def __call__(self) -> dict[str, Any]:
        try:
            names = [f"sampler-{i}" for i in range(self._config.runtime.samplers)]
            count = self._config.runtime.learner_ranks
            ranks = [f"learner-{rank}" for rank in range(count)] if count > 1 else ["learner"]
            learner = [await self._start("learner", name) for name in ranks]
            samplers = [await self._start("sampler", name) for name in names]
            training = asyncio.ensure_future(self._train(learner, samplers))
            stop_on_signals(lambda: stop_in_order(self._controller, training))
            try:
                return await unless([w.watch() for w in self._workers], training)
            except asyncio.CancelledError:
                if not training.cancelled():
                    raise
                return interrupted_summary(self._run)
        finally:
            await asyncio.gather(*(w.end() for w in self._workers))
            for folder in filter(None, (self._transfer, self._meeting)):
                shutil.rmtree(folder, ignore_errors=True)

    async def _start(self, role: str, name: str) -> WorkerProcess:
        worker = await WorkerProcess.start(role, name, self._config, self._run.logs)
        self._workers.append(worker)
        return worker

    async def _train(self, ranks: list[WorkerProcess], samplers: list[WorkerProcess]) -> dict[str, Any]:
        config, progress = self._config, self._progress
        description = config.model_dump(mode="json")
        progress.phase("loading", None)
        warming = WarmStartPhase(progress, config.warm_start.steps)
        ranks[0].on_event = lambda header, body: warming(header["loss"])
        learner, self._meeting = LocalLearner(ranks), Path(tempfile.mkdtemp(prefix="vcpo-"))
        header = await learner.begin(
            self._meeting / "ranks",
            resume=self._resume,
            config=description,
            run_folder=str(self._run.path),
            transfer=config.sampler.transfer,
        )
        begun, initial = Begun(**header["begun"]), Publication(**header["publication"])
        if isinstance(initial.source, str):
            self._transfer = Path(initial.source).parent
        common = {"config": description, "policy": begun.policy, "logs": str(self._run.logs)}
        await asyncio.gather(
            *(s.request("begin", share=(i, len(samplers)), **common) for i, s in enumerate(samplers))
        )
        if not isinstance(initial.source, str):
            await _meet(learner, samplers)
        arrivals: Arrivals = asyncio.Queue()
        parts = Parts(
            learner=learner,
            fleet=Fleet(LocalSampler(worker, arrivals) for worker in samplers),
            arrivals=arrivals,
            begun=begun,
            initial=initial,
            begun_at=self._begun_at,
        )
        return await train_session(config, self._run, parts, progress, self._on_controller)

    def _on_controller(self, controller: Controller) -> None:
        self._controller = controller


async def _meet(learner: LocalLearner, samplers: Sequence[WorkerProcess]) -> None:
    """Bring learner (rank 0) and all workers of all engines into one group for broadcasts."""
    from vcpo.samplers.vllm.process import free_port

    answers = await asyncio.gather(*(sampler.request("ranks") for sampler in samplers))
    counts = [header["ranks"] for header, _ in answers]
    place = {"address": "127.0.0.1", "port": free_port(), "world_size": 1 + sum(counts)}
    offsets = itertools.accumulate(counts, initial=1)
    await asyncio.gather(
        learner.meet(**place),
        *(s.request("meet", offset=o, **place) for s, o in zip(samplers, offsets, strict=False)),
    )


def train_local(config: Config, run: RunFolder, progress: Progress, *, resume: bool) -> dict[str, Any]:
    """Train with a learner and samplers that overlap; the summary, ``completed`` false if interrupted."""
    return asyncio.run(_Run(config, run, progress, resume=resume)())
