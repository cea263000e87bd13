"""The supervisor of the runs, with shell scripts in place of runs: how each can end."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from vcpo.cli import main
from vcpo.compare.children import Metrics, run_cells
from vcpo.compare.grid import Cell, make_grid, parse_methods
from vcpo.config import load_config

Stub = Callable[[str], None]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Makes a shell script the interpreter that runs are started with."""

    def put(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\nread order\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


class Listener:
    """Remembers what it hears."""

    def __init__(self, on_running: Callable[[Sequence[Cell]], None] = lambda cells: None) -> None:
        self.heard: list[str] = []
        self.most = 0
        self._on_running = on_running

    def steps(self, count: int) -> None: ...

    def ended(self, cell: Cell, error: str | None) -> None:
        self.heard.append(cell.name)

    def running(self, cells: Sequence[Cell]) -> None:
        self.most = max(self.most, len(cells))
        self._on_running(cells)


def cells_of(out: Path, *overrides: str, seeds: int = 1) -> list[Cell]:
    base = load_config("maze", ["--warm_start.steps=0", *overrides])
    return make_grid(base, parse_methods("vcpo"), [0], range(seeds), out)


@pytest.mark.parametrize(
    ("script", "timeout", "reason"),
    [
        ("echo 'error: no luck' >&2; echo bye; exit 1", 60, "no luck"),
        ("kill -KILL $$", 60, "ended by SIGKILL; its log is "),
        ("kill -40 $$", 60, "ended by signal 40; its log is "),
        ("exit 3", 60, "exit code 3; its log is "),
        (
            "exec sleep 60",
            0.3,
            "killed after 0.3 s without a row of metrics (runtime.timeout_seconds); its log is ",
        ),
    ],
)
def test_why_a_run_failed(tmp_path: Path, stub: Stub, script: str, timeout: float, reason: str) -> None:
    stub(script)
    (cell,) = cells_of(tmp_path, f"--runtime.timeout_seconds={timeout}")
    failed = run_cells([cell], tmp_path, 1, Listener())
    assert list(failed) == [cell.name]
    assert failed[cell.name].startswith(reason)
    assert (tmp_path / "logs" / f"{cell.name}.log").exists()


def test_an_error_of_an_earlier_attempt_is_not_told_again(tmp_path: Path, stub: Stub) -> None:
    (cell,) = cells_of(tmp_path)
    stub("echo 'error: the first'; exit 1")
    run_cells([cell], tmp_path, 1, Listener())
    stub("exit 1")
    assert run_cells([cell], tmp_path, 1, Listener())[cell.name].startswith("exit code 1")


def test_as_many_run_at_once_as_are_asked_for(tmp_path: Path, stub: Stub) -> None:
    stub("exit 0")
    listener, cells = Listener(), cells_of(tmp_path, seeds=5)
    assert run_cells(cells, tmp_path, 2, listener) == {}
    assert (sorted(listener.heard), listener.most) == (sorted(cell.name for cell in cells), 2)


def test_runs_that_share_a_warm_start_wait_for_the_one_that_makes_it(tmp_path: Path, stub: Stub) -> None:
    """Two seeds, two lags: never two of a seed before its model is there, which these runs never make."""
    stub("sleep 0.3")
    cells = make_grid(load_config("maze"), parse_methods("vcpo"), [0, 8], [0, 1], tmp_path)
    together: list[list[int]] = []
    listener = Listener(lambda now: together.append(sorted(cell.seed for cell in now)))
    run_cells(cells, tmp_path, 4, listener)
    assert [0, 1] in together
    assert all(len(set(seeds)) == len(seeds) for seeds in together)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Where the suite runs in the background of a script, SIGINT is ignored, and a shell that was started so
    cannot trap it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_the_children_in_order(tmp_path: Path, stub: Stub) -> None:
    stub("trap 'echo in order; exit 130' INT; echo ready; while :; do sleep 0.05; done")
    (cell,) = cells_of(tmp_path)
    log = tmp_path / "logs" / f"{cell.name}.log"

    def interrupt(cells: Sequence[Cell]) -> None:
        end = time.monotonic() + 30
        while "ready" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], tmp_path, 1, Listener(interrupt))
    assert log.read_text().endswith("ready\nin order\n")


def test_rows_are_counted_over_a_file_that_resuming_makes_shorter(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    assert metrics.update() == 0
    path.write_text("{}\n{}\n{}")
    assert (metrics.update(), metrics.rows) == (2, 2)
    path.write_text("{}\n")
    assert (metrics.update(), metrics.rows) == (-1, 1)


def test_a_checkpoint_without_the_metrics_of_its_steps_is_not_resumed(tmp_path: Path, stub: Stub) -> None:
    (cell,) = cells_of(tmp_path)
    checkpoint = cell.folder / "checkpoints" / "step-000002"
    for rows, resumed in ((2, True), (1, False)):
        checkpoint.mkdir(parents=True)
        (cell.folder / "config.toml").touch()
        (cell.folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, rows + 1)))
        stub(f"test -d {checkpoint}")
        failed = run_cells([cell], tmp_path, 1, Listener())
        assert (failed == {}) is resumed
        if resumed:
            shutil.rmtree(cell.folder)


def test_what_the_file_system_refuses_is_told_in_one_line(
    tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub("exit 0")
    out = tmp_path / "out"
    (out / "table.md").mkdir(parents=True)
    assert main(["compare", "maze", "--methods", "vcpo", "--seeds", "1", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the comparison in {out} could not go on: [Errno 21] Is a directory" in error
    assert "the same command goes on" in error


def test_failed_runs_are_rows_and_exit_code_1(
    tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub("echo 'error: no luck'; exit 1")
    out = tmp_path / "out"
    arguments = ["compare", "maze", "--methods", "vcpo,grpo", "--seeds", "1", "--out", str(out), "--controls"]
    assert main(arguments) == 1
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["status"], row["accuracy_after"]) for row in rows] == [
        (method, "failed", None)
        for method in ("vcpo", "grpo", "vcpo+constant-lr", "vcpo+permuted", "vcpo+zero-baseline")
    ]
    assert rows[1]["error"] == "no luck"
    assert rows[2]["error"] == "vcpo-lag0-seed0 was not completed: there is nothing to control"
    printed = capsys.readouterr().out
    assert "5 runs: 0 completed, 5 failed, 0 collapsed" in printed
    assert "failed: grpo, lag 0, seed 0: no luck" in printed
    assert (out / "table.md").read_text().count("0, 1 failed") == 5
    assert "failed: grpo, lag 0, seed 0: no luck" in (out / "compare.html").read_text()
