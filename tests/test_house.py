"""The house of CONTRIBUTING.md: a room imports what lies below it, never above, never across the wings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

import vcpo

PACKAGE = Path(vcpo.__file__).parent
CONTRIBUTING = PACKAGE.parents[1] / "CONTRIBUTING.md"


class Room(NamedTuple):
    floor: int
    wing: Literal["samples", "learns", "both"] = "both"


ROOMS = {
    "cli": Room(8),
    "compare": Room(7),
    "runtime": Room(6),
    "pipeline": Room(5),
    "environments": Room(4, "samples"),
    "learner": Room(4, "learns"),
    "samplers": Room(3, "samples"),
    "policy": Room(3, "learns"),
    "algorithms": Room(2),
    "monitor": Room(2),
    "integrations": Room(2),
    "trajectory": Room(2),
    "weights": Room(2),
    "": Room(2),  # vcpo itself, which exports the estimators
    "estimators": Room(1),
    "scores": Room(1),
    "config": Room(1),
    "errors": Room(0),
}


def room_of(module: str) -> str:
    """``vcpo.policy.loading.load_policy`` is in policy."""
    parts = module.split(".")[1:]
    if parts and parts[0] in ROOMS:
        return parts[0]
    # What is no module is a name that vcpo itself exports.
    exists = parts and ((PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file())
    if exists:
        raise AssertionError(f"the room {parts[0]!r} has no floor: add it to ROOMS and to CONTRIBUTING.md")
    return ""


def imported(source: str) -> Iterator[str]:
    """Dotted names of all that ``source`` imports from vcpo, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "vcpo")


def offences(module: str, source: str) -> list[str]:
    """The imports of ``module`` that break the rule."""
    found = []
    here = room_of(module)
    for name in imported(source):
        there = room_of(name)
        if there == here:
            continue
        if ROOMS[there].floor >= ROOMS[here].floor:
            found.append(f"{module} (floor {ROOMS[here].floor}) imports {name} (floor {ROOMS[there].floor})")
        elif {ROOMS[here].wing, ROOMS[there].wing} == {"samples", "learns"}:
            found.append(f"{module} (the wing that {ROOMS[here].wing}) imports {name} of the other wing")
    return found


def test_nothing_imports_from_above_or_across() -> None:
    found = []
    files = sorted(PACKAGE.rglob("*.py"))
    for path in files:
        module = ".".join(("vcpo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        found += offences(module, path.read_text(encoding="utf-8"))
    assert len(files) > 20
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("vcpo.estimators.ess", "from vcpo.algorithms.catalog import ALGORITHMS", True),
        ("vcpo.samplers.local", "from vcpo.policy.loading import load_policy", True),
        ("vcpo.samplers.local", "from vcpo.weights import checksum", False),
        ("vcpo.environments.maze", "def f():\n    import vcpo.learner.learner", True),
        ("vcpo.environments.maze", "from vcpo.samplers.protocol import Sampler", False),
        ("vcpo.learner.learner", "from vcpo.samplers import protocol", True),
        ("vcpo.pipeline.controller", "from vcpo import runtime", True),
        ("vcpo.runtime.local", "from vcpo.compare import grid", True),
        ("vcpo.cli", "from vcpo.compare.command import compare", False),
        ("vcpo.pipeline.build", "from vcpo import __version__", False),
        ("vcpo.weights", "from vcpo.policy.loading import load_policy", True),
        ("vcpo.monitor.report", "from vcpo.algorithms import catalog", True),
        ("vcpo.errors", "from vcpo.config import Config", True),
        ("vcpo.runtime.local", "import torch, vcpo.learner.learner, vcpo.samplers.local", False),
    ],
)
def test_the_rule_itself(module: str, source: str, broken: bool) -> None:
    assert bool(offences(module, source)) is broken


def test_every_room_is_in_the_table_people_read() -> None:
    """CONTRIBUTING.md names every room on its floor: rows are ``| floor | `room/` ...``."""
    rows = [
        line.split("|")[1:3] for line in CONTRIBUTING.read_text(encoding="utf-8").splitlines() if "|" in line
    ]
    told = {room.strip(" `").removesuffix("/").removesuffix(".py"): floor.strip() for floor, room in rows}
    assert {name: told.get(name) for name in ROOMS if name} == {
        name: str(room.floor) for name, room in ROOMS.items() if name
    }
