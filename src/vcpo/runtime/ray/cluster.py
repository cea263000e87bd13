"""The Ray cluster of a run: one that is there, or one of the run's own on this machine.

A Ray of the run's own listens on the loopback address alone, and ends with the command. Whoever can submit to
a cluster can run code on it, so its ports belong behind a firewall, with Ray's token authentication on
(``RAY_AUTH_MODE=token``); see docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vcpo.config import Config
from vcpo.errors import ConfigError
from vcpo.pipeline.processes import rank_request, sampler_request, smallest, whole

CONNECT_SECONDS = 5.0
"""How long the port of a cluster may take to answer: Ray itself would wait for many minutes."""
CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")
"""Where ``ray start`` writes the address of this machine's cluster."""
LOOPBACK_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What makes Ray listen on 127.0.0.1, as it does by itself on macOS and Windows."""


def import_ray() -> Any:
    """Raises ConfigError if the extra is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"runtime.kind = 'ray' needs Ray ({error}): install vcpo[ray], on every machine of the cluster"
        ) from error
    return ray


@contextlib.contextmanager
def connected(config: Config) -> Iterator[None]:
    """Be the driver of a cluster; of the run's own Ray nothing is left afterwards.

    Raises ConfigError if there is no cluster at the address.
    """
    address = config.runtime.address
    if not address:
        os.environ.update(
            {k: os.environ.get(k, v) for k, v in LOOPBACK_ALONE.items()}
        )  # before Ray is imported
    ray = import_ray()
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "include_dashboard": False,
    }
    if ray.is_initialized():
        raise ConfigError("this process is a driver of Ray already: call ray.shutdown() before training")
    if address:
        common.pop("include_dashboard")
        _connect(ray, _place_of(address), common)
    else:
        # Actors may outnumber the cores of a laptop: they take turns. GPUs cannot be made up.
        cpus = max(os.cpu_count() or 1, math.ceil(whole(config).cpus))
        ray.init(address="local", num_cpus=cpus, **common)  # whatever RAY_ADDRESS says
    try:
        yield
    finally:
        ray.shutdown()


def _place_of(address: str) -> str:
    """HOST:PORT of a cluster."""
    if address != "auto":
        return address
    found = os.environ.get("RAY_ADDRESS", "")
    with contextlib.suppress(OSError):
        found = found or CURRENT_CLUSTER.read_text(encoding="utf-8").strip()
    if not found:
        raise ConfigError(
            "runtime.address = 'auto', and no Ray cluster was started on this machine (RAY_ADDRESS is not "
            "set either): say ray start --head, or leave runtime.address empty for a Ray of the run's own"
        )
    return found


def _connect(ray: Any, place: str, settings: dict[str, Any]) -> None:
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"runtime.address = {place!r} is no address: write HOST:PORT (ray start --head says it)"
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {place} ({error}): start one with ray start --head, or correct "
            "runtime.address"
        ) from error
    try:
        ray.init(address=place, **settings)
    except Exception as error:  # Ray has no class of its own for these
        raise ConfigError(f"cannot join the Ray cluster at {place}: {error}") from error


def check_room(config: Config) -> None:
    """Raise ConfigError if the whole cluster, were it empty, has no place for the smallest form of a run.

    A cluster that grows by itself is given ``runtime.wait_seconds`` to do so.
    """
    ray, needed = import_ray(), smallest(config).bundle
    end = time.monotonic() + (config.runtime.wait_seconds if config.runtime.address else 0.0)
    while True:
        there = ray.cluster_resources()
        missing = {name: value for name, value in needed.items() if there.get(name, 0.0) < value}
        if not missing:
            return
        if time.monotonic() > end:
            break
        time.sleep(1.0)
    said = ", ".join(
        f"{value:g} {name}s, and it has {there.get(name, 0.0):g}" for name, value in missing.items()
    )
    raise ConfigError(f"the Ray cluster is too small: {needs_text(config)} need {said}; {REMEDY}")


REMEDY = (
    "add machines (ray start --address), or lower runtime.learner_ranks, runtime.rank_cpus or "
    "runtime.sampler_cpus (or …_gpus)"
)


def needs_text(config: Config) -> str:
    ranks = config.runtime.learner_ranks
    return (
        f"{ranks} rank{'s' if ranks > 1 else ''} of the learner ({rank_request(config)} each) and a sampler "
        f"({sampler_request(config)})"
    )


def taken_text() -> str:
    """What is free now, for an error."""
    free = import_ray().available_resources()
    return f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs are free"


def reason_of(error: object) -> str:
    """What an error of Ray says, in a few words: of an actor that is gone it says much, and little of use."""
    from ray.exceptions import RayActorError

    if not isinstance(error, RayActorError):
        return str(error).partition("\n")[0][:300]
    said = str(error).lower()
    if "node has died" in said:
        return "its machine is gone"
    return "Ray could not start it" if "creation task" in said else "its process is gone"
