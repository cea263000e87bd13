"""A small real grid through the command: run, and gone on with after a part of it was lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vcpo.cli import main
from vcpo.compare.children import INTERRUPTED
from vcpo.config import load_config
from vcpo.monitor.sinks import read_metrics

TINY = [
    "--warm_start.steps=1",
    "--pipeline.steps=3",
    "--pipeline.prompts=2",
    "--pipeline.group_size=2",
    "--evaluation.every=2",
    "--evaluation.problems=4",
    "--evaluation.final_problems=8",
]


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {row["run"]: row for row in rows}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "wall_seconds"}


def test_a_grid_is_run_once_and_goes_on_where_it_was_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        "compare",
        "maze",
        "--methods",
        "grpo,vcpo",
        "--lags",
        "0,2",
        "--seeds",
        "1",
        "--out",
        str(out),
    ]
    assert main([*command, *TINY]) == 0
    first = rows_of(out)
    assert list(first) == [f"{name}-lag{lag}-seed0" for name in ("grpo", "vcpo") for lag in (0, 2)]
    assert {row["status"] for row in first.values()} == {"completed"}
    for name, row in first.items():
        metrics = read_metrics(out / "runs" / name)
        assert [m["lag_mean"] for m in metrics] == [min(m["step"] - 1, row["lag"]) for m in metrics]
        assert row["ess_ratio_mean"] == pytest.approx(sum(m["ess_ratio"] for m in metrics) / 3)
        assert row["held_out_problems"] == 8

    lost = "vcpo-lag2-seed0"
    shutil.rmtree(out / "runs" / lost)
    (out / "results.jsonl").unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
    capsys.readouterr()
    assert main([*command, *TINY]) == 0
    assert "3 of 4 runs are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {k: timeless(v) for k, v in rows_of(out).items()} == {k: timeless(v) for k, v in first.items()}

    assert main([*command, *TINY, "--pipeline.steps", "4"]) == 2
    assert "has a run with other settings (pipeline.steps was 3 and is now 4)" in capsys.readouterr().err

    # A damaged run's row counts; without it nobody can tell whose run it is.
    config, rows = out / "runs" / lost / "config.toml", (out / "results.jsonl").read_text()
    for damage, told in (
        (config.unlink, "config.toml is gone"),
        (lambda: config.write_text("["), "broken TOML"),
    ):
        damage()
        capsys.readouterr()
        assert main([*command, *TINY]) == 0
        assert "4 of 4 runs are there already" in capsys.readouterr().out
        (out / "results.jsonl").unlink()
        assert main([*command, *TINY]) == 2
        error = capsys.readouterr().err
        assert told in error and f"restore it, or remove {out / 'runs' / lost} to have it run again" in error
        (out / "results.jsonl").write_text(rows)

    # Without the runs their rows still count, and rows that are not asked for stay.
    shutil.rmtree(out / "runs")
    assert main([*command[:3], "vcpo", *command[4:], *TINY]) == 0
    assert "2 of 2 runs are there already" in capsys.readouterr().out
    assert {k: timeless(v) for k, v in rows_of(out).items()} == {k: timeless(v) for k, v in first.items()}
    assert not (out / "runs").exists() and (out / "compare.html").exists()


def test_a_worker_that_inherited_an_ignored_sigint_stops_when_its_comparison_is_gone(tmp_path: Path) -> None:
    config = load_config(
        "sort", [*TINY, "--pipeline.steps=100000", f"--run.folder={tmp_path}", "--run.name=a"]
    )
    order = {"config": config.model_dump(mode="json"), "resume": ""}
    log = tmp_path / "log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "vcpo.compare.worker"],
            stdin=subprocess.PIPE, stdout=output, stderr=output,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )  # fmt: skip
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(order).encode() + b"\n")
        worker.stdin.close()  # as if the comparison had been killed
        try:
            # By the signal itself if it comes while modules are imported.
            assert worker.wait(120) in (INTERRUPTED, -signal.SIGINT), log.read_text()
        finally:
            worker.kill()
