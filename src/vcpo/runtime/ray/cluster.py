"""The Ray cluster of a run: one that is there, or one of the run's own on this machine.

A Ray of the run's own listens on the loopback address alone, and ends with the command; what it leaves is
Ray's token in the home folder, which it makes for all Rays of that user. Whoever can submit to a cluster can
run code on it, so its ports belong behind a firewall, with that token asked for
(``RAY_AUTH_MODE=token``); see docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vcpo.config import Config
from vcpo.errors import ConfigError
from vcpo.pipeline.processes import rank_request, sampler_request, smallest

CONNECT_SECONDS = 5.0
"""How long the port of a cluster may take to answer: Ray itself would wait for many minutes."""
ELSEWHERE = ("8.8.8.8", 80)
"""No packet goes there: the system is asked by which of its addresses one would, as Ray asks it."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a conversation over HTTP/2, as Ray has them, begins: with settings, of which there are none."""
SETTINGS = 4
"""The type of the frame that answers it."""
LOOPBACK_ALONE = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
"""What makes Ray listen on 127.0.0.1, as it does by itself on macOS and Windows, and look there. Without it
Ray reads 127.0.0.1 as the machine's address in its network."""


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
    """Be the driver of a cluster; a Ray of the run's own ends afterwards.

    Raises ConfigError if there is no cluster at the address.
    """
    address = config.runtime.address
    if not address or _is_on_loopback_alone(*_greeted(address)):
        os.environ.setdefault(*LOOPBACK_ALONE)  # before Ray is imported
    ray = import_ray()
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "include_dashboard": False,
    }
    if ray.is_initialized():
        raise ConfigError("this process is a driver of Ray already: call ray.shutdown() before training")
    _spare_obituaries()
    session: Path | None = None
    try:
        if address:
            common.pop("include_dashboard")
            _connect(ray, address, common)
        else:
            session = _start(ray, common)
        yield
    finally:
        ray.shutdown()
    if session is not None:  # after an error it is of use
        shutil.rmtree(session, ignore_errors=True)


def _spare_obituaries() -> None:
    """Ray prints a thousand characters for every process that is gone, and the run says so itself."""
    from ray._private import worker

    told = getattr(worker, "print_to_stdstream", None)
    if told is None or hasattr(told, "spares"):  # another version of Ray, or done before
        return

    def tell(data: dict[str, Any], *arguments: Any, **settings: Any) -> None:
        if not any("A worker died or was killed" in line for line in data.get("lines", ())):
            told(data, *arguments, **settings)

    tell.spares = True
    worker.print_to_stdstream = tell


def _start(ray: Any, settings: dict[str, Any]) -> Path:
    """Start a Ray of the run's own, whatever RAY_ADDRESS says; its folder."""
    try:
        context = ray.init(address="local", **settings)
    except Exception as error:  # Ray has no class of its own for these
        raise ConfigError(
            f"cannot start Ray on this machine: {error}; if its folder is the reason, set RAY_TMPDIR to a "
            "short path on a disk with room"
        ) from error
    return Path(context.address_info["session_dir"])


def current_cluster() -> Path:
    """Where ``ray start`` writes the address of this machine's cluster."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(folder) / "ray" / "ray_current_cluster"


def _place_of(address: str) -> str:
    """HOST:PORT of a cluster."""
    if address != "auto":
        return address
    found = os.environ.get("RAY_ADDRESS", "")
    with contextlib.suppress(OSError):
        found = found or current_cluster().read_text(encoding="utf-8").strip()
    if not found:
        raise ConfigError(
            "runtime.address = 'auto', and no Ray cluster was started on this machine (RAY_ADDRESS is not "
            "set either): say ray start --head, or leave runtime.address empty for a Ray of the run's own"
        )
    return found


def _greeted(address: str) -> tuple[str, int]:
    """The IP address and the port at which the cluster has answered."""
    place = _place_of(address)
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"runtime.address = {place!r} is no address: write HOST:PORT (ray start --head says it)"
        )
    return _greet(host, int(port)), int(port)


def _is_on_loopback_alone(ip: str, port: int) -> bool:
    """Whether nobody answers at the address that this machine has for others."""
    if not ipaddress.ip_address(ip).is_loopback:
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect(ELSEWHERE)
        with socket.create_connection((asking.getsockname()[0], port), CONNECT_SECONDS):
            return False
    return True


def _connect(ray: Any, address: str, settings: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **settings)  # for auto, Ray finds this user's token too
    except Exception as error:  # Ray has no class of its own for these
        raise ConfigError(
            f"cannot join the Ray cluster at {_place_of(address)}: {error}; if it asks for a token, set "
            "RAY_AUTH_MODE=token here, and have the same token as the cluster (ray get-auth-token)"
        ) from error


def _greet(host: str, port: int) -> str:
    """The IP address at which a Ray answered. Raises ConfigError if none does; Ray itself would wait for many
    minutes."""
    place, answer = f"{host}:{port}", b""
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
            ip = connection.getpeername()[0]
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return ip  # it does not talk to strangers
            connection.sendall(PREFACE)
            while len(answer) < 4 and (more := connection.recv(4 - len(answer))):
                answer += more
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {place} ({error}): start one with ray start --head, or correct "
            "runtime.address"
        ) from error
    if answer[3:] != bytes([SETTINGS]):
        raise ConfigError(
            f"what answers at {place} is no Ray: correct runtime.address (ray start --head says it; its port "
            "is 6379 unless another was asked for)"
        )
    return ip


def check_room(config: Config) -> None:
    """Raise ConfigError if the whole cluster, were it empty, has no place for the smallest form of a run.

    A cluster that grows by itself hears what is asked for, and is given ``runtime.wait_seconds``.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    ranks, sampler = [rank_request(config)] * config.runtime.learner_ranks, sampler_request(config)
    bundles = [request.bundle for request in (*ranks, sampler) if request.bundle]
    if not _missing(config):
        return
    asked = placement_group(bundles) if config.runtime.address else None
    end = time.monotonic() + config.runtime.wait_seconds
    try:
        while missing := _missing(config):
            if asked is None or time.monotonic() > end:
                remedy = REMEDY if config.runtime.address else REMEDY_HERE
                raise ConfigError(
                    f"the Ray cluster is too small: {needs_text(config)} need {missing}; {remedy}"
                )
            time.sleep(1.0)
    finally:
        if asked is not None:
            remove_placement_group(asked)


def _missing(config: Config) -> str:
    """What the cluster lacks, in words; empty if it has enough of everything."""
    ray, needed = import_ray(), smallest(config).bundle
    there = ray.cluster_resources()
    lacking = [
        f"{value:g} {name}s, and it has {there.get(name, 0.0):g}"
        for name, value in needed.items()
        if there.get(name, 0.0) < value
    ]
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for who, request in (("a rank", rank_request(config)), ("a sampler", sampler_request(config))):
        if not any(all(m.get(n, 0.0) >= v for n, v in request.bundle.items()) for m in machines):
            lacking.append(f"a machine with {request} for {who}, and there is none")
    return ", ".join(lacking)


REMEDY_HERE = "lower runtime.learner_ranks, runtime.rank_gpus or runtime.sampler_gpus, or join a cluster"
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
    said = str(error)
    if "node has died" in said.lower():
        return "its machine is gone"
    if "creation task" not in said.lower():
        return "its process is gone"
    last = said.strip().splitlines()[-1].strip()[:300]
    return f"Ray could not start it: {last}; is vcpo installed there, for the same Python?"
