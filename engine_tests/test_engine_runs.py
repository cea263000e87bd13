"""A whole ``vcpo train`` with vLLM. Its server is killed: alone, the run says so, and ends well when resumed;
on Ray the others go on, and the sampler comes back with another server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import playing
import pytest
from playing import wait_until

from vcpo.learner.checkpoint import latest_checkpoint
from vcpo.monitor.sinks import read_metrics

pytestmark = pytest.mark.xdist_group("runs")

LAG, PROMPTS, WINDOW, STEPS = 2, 4, 8, 8
BOUND = LAG + 2
"""lag + ceil((window - 1) / prompts)"""


def vcpo_train(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vcpo.cli", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


def test_a_run_that_loses_its_server_names_it_and_goes_on_when_resumed(
    engine_python: str, tmp_path: Path
) -> None:
    run = tmp_path / "maze"
    settings = {
        "run.folder": tmp_path, "run.name": "maze", "sampler.kind": "vllm", "sampler.python": engine_python,
        "warm_start.steps": 20, "pipeline.lag": LAG, "pipeline.prompts": PROMPTS, "pipeline.group_size": 4,
        "pipeline.window": WINDOW, "pipeline.steps": 100_000, "evaluation.every": 0,
        "evaluation.final_problems": 16, "learner.checkpoint_every": 2,
    }  # fmt: skip
    training = vcpo_train("maze", *(f"--{name}={value}" for name, value in settings.items()))
    wait_until(lambda: steps_of(run) >= 3 or training.poll() is not None)
    assert training.poll() is None, training.communicate()
    (server,) = playing.servers_of(run)
    playing.kill_server(server)
    _, errors = training.communicate(timeout=playing.PATIENCE)
    assert training.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "vLLM server 0 at http://127.0.0.1:" in last
    assert f"it was killed by signal 9; see {run / 'logs' / 'vllm-0.log'}" in last
    assert latest_checkpoint(run) is not None

    done = steps_of(run)
    resumed = vcpo_train("--resume", str(run), f"--pipeline.steps={done + STEPS}")
    output, errors = resumed.communicate(timeout=playing.PATIENCE)
    assert resumed.returncode == 0, output + errors
    assert playing.servers_of(run) == []

    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, done + STEPS + 1))
    assert max(row["lag_max"] for row in rows) <= BOUND
    fresh = [row for row in rows if row["lag_max"] == 0]
    assert rows[0] in fresh
    assert all(abs(row["ess_ratio"] - 1) < 1e-3 for row in fresh)
    assert all(0 < row["ess_ratio"] <= 1 + 1e-6 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["completed"], summary["failed_episodes"]) == (True, 0)
    assert (run / "model" / "model.safetensors").exists()


def test_on_ray_a_lost_server_is_replaced_and_the_broadcast_finds_it(
    engine_python: str, tmp_path: Path
) -> None:
    run = tmp_path / "maze"
    settings = {
        "run.folder": tmp_path, "run.name": "maze", "sampler.kind": "vllm", "sampler.python": engine_python,
        "sampler.transfer": "collective", "runtime.kind": "ray", "runtime.samplers": 2,
        "warm_start.steps": 20, "pipeline.lag": LAG, "pipeline.prompts": PROMPTS, "pipeline.group_size": 4,
        "pipeline.window": WINDOW, "pipeline.steps": 100_000, "evaluation.every": 0,
        "evaluation.final_problems": 16,
    }  # fmt: skip

    def serving() -> set[str]:
        """Samplers that have the newest weights but one."""
        rows = read_metrics(run) if steps_of(run) else []
        return {name for name, row in rows[-1]["samplers"].items() if row["lag"] <= 1} if rows else set()

    training = vcpo_train("maze", *(f"--{name}={value}" for name, value in settings.items()))
    try:
        wait_until(lambda: len(serving()) == 2 or training.poll() is not None)
        first, _ = sorted(playing.servers_of(run))
        playing.kill_server(first)
        wait_until(lambda: len(serving()) == 1 or training.poll() is not None)
        wait_until(lambda: len(serving()) == 2 or training.poll() is not None)
        done = steps_of(run)
        wait_until(lambda: steps_of(run) >= done + STEPS or training.poll() is not None)
        assert training.poll() is None, training.communicate()
        last = playing.servers_of(run)
        assert len(last) == 2
        assert all(len(playing.left_of(group)) >= 3 for group in last)
        training.send_signal(signal.SIGINT)
        output, errors = training.communicate(timeout=playing.PATIENCE)
    finally:
        training.kill()
    assert "it has no engine any more: vLLM server 0 at http://127.0.0.1:" in output + errors
    assert playing.servers_of(run) == []
    for group in (first, *last):
        wait_until(lambda group=group: playing.left_of(group) == [])
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(abs(row["ess_ratio"] - 1) < 1e-3 for row in rows if row["lag_max"] == 0)
    assert max(row["lag_max"] for row in rows) <= BOUND
