"""Real models in real processes: few runs, as each imports transformers in two children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vcpo.config import Config, load_config
from vcpo.learner.checkpoint import latest_checkpoint, read_state
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline.run_folder import RunFolder
from vcpo.runtime import train

PATIENCE = 120.0
"""Seconds before a test gives up: two processes that import transformers on a busy machine."""

DRIVER = """
import json, sys
from pathlib import Path
from vcpo.config import load_config
from vcpo.runtime import train
run = Path(sys.argv[1])
print(json.dumps(train(load_config(run / "config.toml"), resume=run)))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find ``worlds`` beside this file."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def config_of(folder: Path, name: str, **changes: Any) -> Config:
    settings = {
        "run__folder": folder,
        "run__name": name,
        "model__hidden_size": 16,
        "model__layers": 1,
        "model__heads": 2,
        "model__intermediate_size": 32,
        "model__context_length": 32,
        "warm_start__steps": 0,
        "environment__kind": "worlds:Letters",
        "learner__learning_rate": 0.01,
        "pipeline__prompts": 2,
        "pipeline__group_size": 2,
        "pipeline__window": 4,
        "pipeline__steps": 6,
        "evaluation__every": 0,
        "evaluation__final_problems": 8,
    }
    pairs = (settings | changes).items()
    return load_config(None, [f"--{k.replace('__', '.')}={v}" for k, v in pairs])


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


def workers_of(parent: int) -> list[int]:
    """Children of ``parent``; read while it lives."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def shared_weights(workers: list[int]) -> list[Path]:
    return [path for worker in workers for path in Path("/dev/shm").glob(f"vcpo-weights-{worker}-*")]


def weights_of(run: Path) -> dict[str, bytes]:
    tensors = load_file(run / "model" / "model.safetensors")
    return {name: t.contiguous().numpy().tobytes() for name, t in sorted(tensors.items())}


def test_lag_zero_in_processes_is_the_exact_run_to_the_bit(tmp_path: Path) -> None:
    """``test_exact_runs`` shows that the exact run is the plain hand-written loop."""
    for mode in ("exact", "async"):
        assert train(config_of(tmp_path, mode, pipeline__mode=mode, pipeline__lag=0))["completed"]
    exact, processes = tmp_path / "exact", tmp_path / "async"
    assert weights_of(exact) == weights_of(processes)
    figures = [
        [(row["reward"], row["loss"], row["grad_norm"], row["lag_histogram"]) for row in read_metrics(run)]
        for run in (exact, processes)
    ]
    assert figures[0] == figures[1]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (exact, processes)]
    for key in ("accuracy_after_reward", "greedy_accuracy_after_reward", "action_tokens"):
        assert summaries[0][key] == summaries[1][key]
    assert any(row["grad_norm"] > 0 for row in read_metrics(exact))


def test_a_broadcast_brings_what_a_file_brings(tmp_path: Path) -> None:
    """At lag 0 to the bit. With a lag the learner is soon asked for the next step: each sampler's checksum
    says that what it got is what the learner had before that step, also when nothing is left to order."""
    for name, transfer in (("files", "files"), ("broadcast", "collective")):
        assert train(config_of(tmp_path, name, pipeline__lag=0, sampler__transfer=transfer))["completed"]
    assert weights_of(tmp_path / "files") == weights_of(tmp_path / "broadcast")
    several = {"runtime__samplers": 2, "pipeline__lag": 2, "pipeline__steps": 20}
    assert train(config_of(tmp_path, "several", sampler__transfer="collective", **several))["completed"]
    assert {name for row in read_metrics(tmp_path / "several") for name in row["samplers"]} == {
        "sampler-0",
        "sampler-1",
    }


def test_two_ranks_train_as_one_and_go_on_as_one(tmp_path: Path) -> None:
    """With lag 0 nothing depends on timing; a rank's sums are rounded otherwise than one process's."""
    for name, ranks in (("one", 1), ("two", 2)):
        settings = {"pipeline__lag": 0, "pipeline__steps": 4, "runtime__learner_ranks": ranks}
        assert train(config_of(tmp_path, name, **settings))["completed"]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    rewards = [[row["reward"] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert rewards[0] == rewards[1]

    run = tmp_path / "two"
    config = load_config(run / "config.toml", ["--runtime.learner_ranks=1", "--pipeline.steps=6"])
    assert train(config, resume=run)["steps"] == 6
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def start(run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_killed_resumed_and_interrupted(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", pipeline__steps=1_000_000, learner__checkpoint_every=5)
    run = RunFolder.create(config).path

    killed = start(run)
    wait_until(lambda: steps_of(run) >= 8)
    workers = workers_of(killed.pid)
    assert len(workers) == 2
    assert len(shared_weights(workers)) == 1
    killed.kill()
    killed.communicate()
    wait_until(lambda: not any(map(alive, workers)), 10)
    assert shared_weights(workers) == []
    done = steps_of(run)
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    begun = read_state(checkpoint)["step"]
    assert begun >= 5

    interrupted = start(run)
    wait_until(lambda: steps_of(run) > done + 3)
    workers = workers_of(interrupted.pid)
    os.kill(interrupted.pid, signal.SIGINT)
    output, errors = interrupted.communicate(timeout=5)
    assert (interrupted.returncode, errors) == (0, "")
    assert len(workers) == 2
    assert not any(map(alive, workers))
    assert shared_weights(workers) == []

    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert json.loads(output) == {"completed": False, "steps": len(rows), "run_folder": str(run)}
    last = latest_checkpoint(run)
    assert last is not None
    assert read_state(last)["step"] == len(rows)
    assert load_config(run / "config.toml") == config
    assert max(row["lag_max"] for row in rows) <= 2 + 2  # lag + ceil((window - 1) / prompts)
