"""A Ray of the run's own, with real models: few runs, as each starts a Ray, and actors with transformers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vcpo.config import Config, load_config
from vcpo.monitor.sinks import read_metrics

pytestmark = pytest.mark.xdist_group("ray")

PATIENCE = 180.0
DRIVER = """
import json, sys
from pathlib import Path
from vcpo.config import load_config
from vcpo.monitor.progress import SilentProgress
from vcpo.runtime import train
class Notes(SilentProgress):
    def note(self, text):
        print("note:", text)
run = Path(sys.argv[1])
print(json.dumps(train(load_config(run / "config.toml"), resume=run, progress=Notes())))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def config_of(folder: Path, **changes: Any) -> Config:
    settings = {
        "run__folder": folder,
        "run__name": "run",
        "model__hidden_size": 16,
        "model__layers": 1,
        "model__heads": 2,
        "model__intermediate_size": 32,
        "model__context_length": 32,
        "warm_start__steps": 0,
        "environment__kind": "worlds:Letters",
        "learner__learning_rate": 0.01,
        "learner__checkpoint_every": 3,
        "pipeline__prompts": 2,
        "pipeline__group_size": 2,
        "pipeline__window": 4,
        "evaluation__every": 0,
        "evaluation__final_problems": 8,
        "runtime__kind": "ray",
        "runtime__samplers": 2,
        "runtime__learner_ranks": 2,
    }
    pairs = (settings | changes).items()
    return load_config(None, [f"--{k.replace('__', '.')}={v}" for k, v in pairs])


def start(config: Config) -> tuple[subprocess.Popen[str], Path]:
    """A driver of its own, in a session of its own; it finds ``worlds`` beside this file."""
    from vcpo.pipeline.run_folder import RunFolder

    run = RunFolder.create(config).path
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "VCPO_TEST_RUN": str(run)},
        start_new_session=True,
    )
    return driver, run


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


def processes_of(run: Path) -> dict[int, str]:
    """Those that the driver has started, and what they started: id and title."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"VCPO_TEST_RUN={run}".encode() in (entry / "environ").read_bytes()
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if mine and title and "-c" not in title.split()[:2]:
            found[int(entry.name)] = title
    return found


def actors_of(run: Path, kind: str) -> list[int]:
    return sorted(number for number, title in processes_of(run).items() if title.startswith(f"ray::{kind}"))


def listening(processes: dict[int, str]) -> set[str]:
    """Addresses, in hexadecimal, that the processes listen on."""
    owned: set[str] = set()
    for number in processes:
        for link in Path(f"/proc/{number}/fd").glob("*"):
            try:
                owned.add(str(link.readlink()))
            except OSError:
                continue
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in owned}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_ctrl_c_ends_a_run_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    """Meanwhile nobody but this machine can reach its ports."""
    driver, run = start(config_of(tmp_path, pipeline__steps=100000, sampler__transfer="collective"))
    try:
        wait_until(lambda: steps_of(run) >= 3)
        addresses = listening(processes_of(run))
        assert addresses and addresses <= LOOPBACK
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=PATIENCE)
        assert driver.returncode == 0
        summary = json.loads(output.splitlines()[-1])
        assert summary == {"completed": False, "steps": steps_of(run), "run_folder": str(run)}
        assert list((run / "checkpoints").glob("step-*"))
        wait_until(lambda: not processes_of(run))
    finally:
        driver.kill()


def test_a_driver_that_is_killed_takes_its_ray_with_it(tmp_path: Path) -> None:
    driver, run = start(config_of(tmp_path, pipeline__steps=100000, runtime__learner_ranks=1))
    try:
        wait_until(lambda: steps_of(run) >= 1)
        assert actors_of(run, "SamplerActor")
    finally:
        driver.kill()
    wait_until(lambda: not processes_of(run))


@pytest.mark.parametrize("transfer", ["files", "collective"])
def test_a_run_survives_the_death_of_a_sampler_and_of_a_rank(transfer: str, tmp_path: Path) -> None:
    driver, run = start(config_of(tmp_path, pipeline__steps=120, sampler__transfer=transfer))
    try:
        for steps, kind in ((5, "SamplerActor"), (20, "LearnerActor")):
            wait_until(lambda steps=steps: steps_of(run) >= steps)
            os.kill(actors_of(run, kind)[-1], signal.SIGKILL)
        output, errors = driver.communicate(timeout=PATIENCE)
    finally:
        driver.kill()
    assert driver.returncode == 0, errors
    summary = json.loads(output.splitlines()[-1])
    assert (summary["completed"], summary["steps"]) == (True, 120)
    losses = re.findall(r"^note: (\w+)-\d is gone \(its process is gone\)", output, re.MULTILINE)
    assert losses == ["sampler", "learner"], output
    assert output.count("begins anew from the last checkpoint") == 1
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert all(0 <= lag <= summary["lag_bound"] for row in rows for lag in map(int, row["lag_histogram"]))
    for logged in ("learner-0", "learner-1", "sampler-0", "sampler-1"):
        assert (run / "logs" / f"{logged}.log").exists()
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    weights = load_file(run / "model" / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.values())
    wait_until(lambda: not processes_of(run))
