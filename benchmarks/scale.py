"""Many samplers on one controller: a real Ray, real actors and the real controller, over simulated engines.

    python -m benchmarks.scale [--quick] [--json FILE] [--repetitions N]

A simulated engine has as many slots as a real one and waits as long as that would compute, so that eight
fit on two cores; everything around it is what a run has: environment, rollout loop, object store, calls of
actors, fleet, window, journal. The learner is a stub that takes no time.

- **scaling**: 1, 2, 4 and 8 samplers, in turn; episodes a second, over as many times what one sampler did.
  The controller's milliseconds are CPU time of its whole process, Ray's threads included, per group.
- **in flight**: 10,000 groups given out at once to eight samplers, most of which wait for a slot. Memory of
  the controller, and how late its event loop wakes up, in the first and the last third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.simulated import SimulatedSampler
from vcpo.config import Config, load_config
from vcpo.monitor.progress import SilentProgress
from vcpo.monitor.sinks import MetricsWriter
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.ports import Begun, Outcome, Publication, StepResult
from vcpo.pipeline.run_folder import RunFolder
from vcpo.pipeline.session import Parts, make_controller
from vcpo.runtime.ray.cluster import connected
from vcpo.trajectory import Group
from vcpo.weights import checksum

WEIGHTS = 250_000
"""Numbers of a publication: one megabyte."""
SECONDS = 2.0
"""A sequence takes so long on average."""
SLOTS = 32
GROUP = 8
PROMPTS = 4
WARM_UP = 10.0
"""Seconds before anything counts."""


class Stub:
    """A learner that takes no time, and publishes one megabyte a step."""

    def __init__(self) -> None:
        from vcpo.runtime.ray.weights import ObjectStoreOutbox

        self._outbox, self._weights = ObjectStoreOutbox(), {"w": torch.zeros(WEIGHTS)}
        self._checksum, self._version = checksum(self._weights), 0
        self.finished: list[tuple[float, int]] = []
        """When groups were trained on, and how many."""

    def publication(self) -> Publication:
        return Publication(self._version, self._checksum, self._outbox.put(self._version, self._weights))

    async def step(self, records: Sequence[bytes], skipped: Sequence[Outcome] = ()) -> StepResult:
        self.finished.append((time.monotonic(), len(records)))
        tokens = sum(Group.outline_of(record)[2] for record in records)
        self._version += 1
        return StepResult({"tokens": tokens}, self.publication())

    async def send(self, publication: Publication) -> None:
        pass

    async def choose(self, numbers: Sequence[int]) -> list[int]:
        return list(numbers)

    async def checkpoint(self, position: dict[str, Any]) -> None:
        pass

    async def export(self, folder: Path) -> None:
        pass


@dataclass
class Watch:
    """How late the event loop wakes up, and what memory the process has."""

    delays: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, milliseconds late)."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, MiB)."""

    async def __call__(self, nap: float = 0.02) -> None:
        begun = time.monotonic()
        page = os.sysconf("SC_PAGE_SIZE") / 2**20
        while True:
            before = time.monotonic()
            await asyncio.sleep(nap)
            now = time.monotonic()
            self.delays.append((now - begun, 1000 * (now - before - nap)))
            self.memory.append((now - begun, int(Path("/proc/self/statm").read_text().split()[1]) * page))


@dataclass(frozen=True)
class Load:
    """What a run of the controller has to do."""

    samplers: int
    in_flight: int
    """Groups that are given out at once."""
    group: int
    prompts: int
    slots: int
    seconds: float

    def config(self, folder: Path) -> Config:
        settings: dict[str, object] = {
            "run.folder": folder,
            "environment.kind": "benchmarks.simulated:Answers",
            "pipeline.prompts": self.prompts,
            "pipeline.group_size": self.group,
            "pipeline.lag": self.in_flight // self.prompts - 1,
            "pipeline.window": self.in_flight,
            "pipeline.steps": 10**6,
            "evaluation.every": 0,
            "sampler.slots": self.slots,
            "runtime.kind": "ray",
            "runtime.samplers": self.samplers,
            "runtime.sampler_cpus": 0.1,
            "runtime.rank_cpus": 0.1,
        }
        return load_config(
            None, [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        )

    @property
    def ideal(self) -> float:
        """Episodes a second of engines that never wait."""
        return self.samplers * self.slots / self.seconds


@dataclass(frozen=True)
class Measured:
    episodes_per_second: float
    controller_milliseconds_per_group: float
    watch: Watch


async def drive(load: Load, config: Config, lasting: float) -> Measured:
    """Run the controller for so many seconds after the warm-up."""
    from vcpo.runtime.ray.delivery import ByObjectStore
    from vcpo.runtime.ray.samplers import Samplers

    run, learner, watch = RunFolder.create(config), Stub(), Watch()
    samplers = Samplers(config, run, lambda text: None, SimulatedSampler)
    arrivals: Any = asyncio.Queue()
    fleet, begun = Fleet(timeout_seconds=60), Begun(0, str(load.seconds), {}, 1)
    parts = Parts(learner, fleet, arrivals, begun, learner.publication(), time.perf_counter())
    with MetricsWriter(run.path) as writer:
        controller = make_controller(config, run, parts, writer, SilentProgress())
        samplers.serve(fleet, arrivals, begun.policy, ByObjectStore(), controller.fail)
        work = [asyncio.ensure_future(controller.collect())]
        try:
            await controller.publish_initial(parts.initial)
            while len(fleet.members) < load.samplers or not all(m.serving for m in fleet.members.values()):
                await asyncio.sleep(0.05)
            work += [asyncio.ensure_future(controller.run()), asyncio.ensure_future(watch())]
            await asyncio.wait(work, timeout=WARM_UP, return_when=asyncio.FIRST_EXCEPTION)
            begin, spent = time.monotonic(), time.process_time()
            await asyncio.wait(work, timeout=lasting, return_when=asyncio.FIRST_EXCEPTION)
            end, spent = time.monotonic(), time.process_time() - spent
            for task in work:
                if task.done():
                    task.result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await samplers.close()
            controller.journal.close()
    groups = sum(count for when, count in learner.finished if begin <= when < end)
    return Measured(load.group * groups / (end - begin), 1000 * spent / max(groups, 1), watch)


def measure(load: Load, lasting: float) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        config = load.config(Path(folder).resolve())
        with connected(config):
            return asyncio.run(drive(load, config, lasting))


def scaling(counts: Sequence[int], repetitions: int, lasting: float) -> list[dict[str, Any]]:
    found: dict[int, list[Measured]] = {n: [] for n in counts}
    for _ in range(repetitions):
        for n in counts:
            load = Load(n, 3 * n * SLOTS // GROUP, GROUP, PROMPTS, SLOTS, SECONDS)
            found[n].append(measure(load, lasting))
    rows = []
    for n in counts:
        rates = [m.episodes_per_second for m in found[n]]
        linear = [r / (n * one.episodes_per_second) for r, one in zip(rates, found[counts[0]], strict=True)]
        rows.append(
            {
                "study": "scaling",
                "samplers": n,
                "episodes_per_second": statistics.median(rates),
                "spread": [min(rates), max(rates)],
                "of_linear": statistics.median(linear),
                "of_linear_spread": [min(linear), max(linear)],
                "controller_milliseconds_per_group": statistics.median(
                    m.controller_milliseconds_per_group for m in found[n]
                ),
                "repetitions": repetitions,
            }
        )
    return rows


def in_flight(groups: int, lasting: float) -> dict[str, Any]:
    load = Load(8, groups, 2, 100, 64, 4.0)
    measured = measure(load, lasting)
    end = measured.watch.delays[-1][0]
    thirds = [(WARM_UP, WARM_UP + (end - WARM_UP) / 3), (end - (end - WARM_UP) / 3, end)]

    def within(series: list[tuple[float, float]], span: tuple[float, float]) -> list[float]:
        return [value for when, value in series if span[0] <= when <= span[1]]

    delays = [sorted(within(measured.watch.delays, third)) for third in thirds]
    return {
        "study": "in flight",
        "groups_in_flight": groups,
        "samplers": load.samplers,
        "episodes_per_second": measured.episodes_per_second,
        "engines_could": load.ideal,
        "controller_milliseconds_per_group": measured.controller_milliseconds_per_group,
        "delay_milliseconds_median": [statistics.median(d) for d in delays],
        "delay_milliseconds_99": [d[int(0.99 * (len(d) - 1))] for d in delays],
        "memory_mib": [statistics.median(within(measured.watch.memory, third)) for third in thirds],
        "seconds": end,
    }


def print_tables(rows: list[dict[str, Any]]) -> None:
    table = Table("samplers", "episodes a second", "of linear", "controller, ms a group")
    for row in (row for row in rows if row["study"] == "scaling"):
        low, high = row["of_linear_spread"]
        table.add_row(
            str(row["samplers"]),
            f"{row['episodes_per_second']:.1f}",
            f"{row['of_linear']:.2f} ({low:.2f} … {high:.2f})",
            f"{row['controller_milliseconds_per_group']:.1f}",
        )
    Console().print(table)
    for row in (row for row in rows if row["study"] == "in flight"):
        Console().print(json.dumps(row, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="1 and 2 samplers for 10 s; 500 groups in flight"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each number of samplers, in turn")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        rows = [*scaling([1, 2], 1, 10.0), in_flight(500, 10.0)]
    else:
        rows = [*scaling([1, 2, 4, 8], arguments.repetitions, 30.0), in_flight(10_000, 120.0)]
    print_tables(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
