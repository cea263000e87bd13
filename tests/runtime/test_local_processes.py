"""Child processes that work, fail, hang and are killed: real workers and channels, over services that need no
torch (``light_workers``), so that each run takes a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vcpo.compare import children
from vcpo.config import Config, load_config
from vcpo.errors import ConfigError, DataError, NonFiniteError, PublicationError, VcpoError, WorkerError
from vcpo.monitor.progress import SilentProgress
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline.run_folder import RunFolder
from vcpo.runtime import interrupts, local, train

LIGHT = Path(__file__).parent / "light_workers"
PATIENCE = 30.0
"""Seconds before a test gives up; nothing waits that long unless it is broken."""

DRIVER = """
import json, sys
from pathlib import Path
from vcpo.config import load_config
from vcpo.runtime import train
run = Path(sys.argv[1])
print(json.dumps(train(load_config(run / "config.toml"), resume=run)))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
"""A process of its own that takes up (or begins) the run in a folder that has a config."""


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Workers are light and write down what they do; in the end none is left, and no weights either."""
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(LIGHT))
    monkeypatch.setenv("VCPO_TEST_NOTES", str(folder))
    monkeypatch.delenv("VCPO_TEST_TROUBLE", raising=False)
    yield folder
    assert workers_of(folder) == []
    assert not any(Path(folder).exists() for folder in {t["folder"] for t in noted(folder, "transfers")})


def noted(notes: Path, name: str) -> list[dict[str, Any]]:
    path = notes / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def workers_of(notes: Path) -> list[int]:
    """Processes of this test's runs: those with its folder of notes in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"vcpo.runtime.worker" in command and str(notes).encode() in environment:
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def config_of(folder: Path, **changes: Any) -> Config:
    settings = {
        "run__folder": folder,
        "run__name": "run",
        "warm_start__steps": 0,
        "learner__checkpoint_every": 4,
        "pipeline__prompts": 2,
        "pipeline__group_size": 2,
        "pipeline__steps": 10,
        "pipeline__window": 4,
        "evaluation__every": 0,
        "evaluation__final_problems": 5,
        "runtime__timeout_seconds": 20,
    }
    pairs = (settings | changes).items()
    return load_config(None, [f"--{k.replace('__', '.')}={v}" for k, v in pairs])


def surviving(notes: Path) -> list[int]:
    """Groups trained on in the history that counts: of each version, the step that was taken last."""
    steps = {row["version"]: row["groups"] for row in noted(notes, "trained")}
    return [number for version in sorted(steps) for number in steps[version]]


def test_a_run_from_begin_to_end(tmp_path: Path, notes: Path) -> None:
    summary = train(config_of(tmp_path, pipeline__steps=30, runtime__samplers=2, pipeline__lag=3))
    assert (summary["completed"], summary["steps"], summary["accuracy_after"]) == (True, 30, 1.0)
    assert sorted(row["group"] for row in noted(notes, "played")) == list(range(60))
    assert sorted(surviving(notes)) == list(range(60))
    rows = read_metrics(tmp_path / "run")
    assert max(row["lag_max"] for row in rows) <= summary["lag_bound"] == 5
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == ["learner.log", "sampler-0.log", "sampler-1.log"]
    assert len({t["folder"] for t in noted(notes, "transfers")}) == 1


def test_the_learner_chooses_what_is_played(tmp_path: Path, notes: Path) -> None:
    """Asked once for every group, while it takes steps too, and heard by the samplers."""
    changes = {"pipeline__selection": "goldilocks", "runtime__samplers": 2, "pipeline__lag": 2}
    assert train(config_of(tmp_path, **changes))["completed"]
    assert sorted(n for row in noted(notes, "chosen") for n in row["numbers"]) == list(range(20))
    played = sorted((row["group"], row["problem"]) for row in noted(notes, "played"))
    assert played == [(n, 3 * n + 1) for n in range(20)]


def test_warm_start_steps_are_shown(tmp_path: Path) -> None:
    class Listening(SilentProgress):
        heard: list[Any] = []  # noqa: RUF012

        def phase(self, title: str, total: int | None) -> None:
            self.heard.append((title, total))

        def advance(self, figures: Any) -> None:
            self.heard.append(sorted(figures)[0] if len(figures) == 1 else figures["step"])

    train(config_of(tmp_path, warm_start__steps=3, pipeline__steps=2), progress=Listening())
    warming, training = Listening.heard.index(("warm start", 3)), Listening.heard.index(("training", 2))
    assert Listening.heard[warming + 1 : warming + 4] == ["loss"] * 3
    assert Listening.heard[training + 1 : training + 3] == [1, 2]
    assert warming + 3 < training


def test_every_rank_of_the_learner_takes_every_step_and_the_first_one_speaks(
    tmp_path: Path, notes: Path
) -> None:
    summary = train(config_of(tmp_path, runtime__learner_ranks=3))
    assert (summary["completed"], summary["steps"]) == (True, 10)
    assert sorted(row["rank"] for row in noted(notes, "met")) == [0, 1, 2]
    first = noted(notes, "trained")
    assert [row["version"] for row in first] == list(range(10))
    assert noted(notes, "trained-1") == noted(notes, "trained-2") == first
    assert len({row["folder"] for row in noted(notes, "transfers")}) == 1  # of the first rank
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == ["learner-0.log", "learner-1.log", "learner-2.log", "sampler-0.log"]


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("learner-1:step:kill", WorkerError, "learner-1 was killed by signal 9; see LOGS/learner-1.log"),
        (
            "learner-1:step:RuntimeError",
            WorkerError,
            "learner-1: RuntimeError: out of luck; see LOGS/learner-1.log",
        ),
        (
            "learner-1:step:block",
            WorkerError,
            "learner-1 did not answer 'step' within 3 s (runtime.timeout_seconds); see LOGS/learner-1.log",
        ),
    ],
)
def test_a_rank_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, kind: type[VcpoError], message: str
) -> None:
    monkeypatch.setenv("VCPO_TEST_TROUBLE", trouble)
    with pytest.raises(kind) as raised:
        train(config_of(tmp_path, runtime__learner_ranks=2, runtime__timeout_seconds=3))
    assert str(raised.value) == message.replace("LOGS", str(tmp_path / "run" / "logs"))


def test_ranks_need_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner_ranks = 2 needs pipeline\.mode = 'async'"):
        train(config_of(tmp_path, runtime__learner_ranks=2, pipeline__mode="exact"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        (
            "sampler:begin:DataError",
            DataError,
            "problems.jsonl, line 3: is not JSON; correct or remove the line",
        ),
        (
            "learner:begin:DataError",
            DataError,
            "problems.jsonl, line 3: is not JSON; correct or remove the line",
        ),
        (
            "sampler:play:NonFiniteError",
            NonFiniteError,
            "non-finite logits at trajectory index 5: policy version 0 is broken",
        ),
        (
            "sampler:evaluate:NonFiniteError",
            NonFiniteError,
            "non-finite logits at trajectory index 5: policy version 0 is broken",
        ),
        (
            "learner:step:NonFiniteError",
            NonFiniteError,
            "non-finite logits at trajectory index 5: policy version 0 is broken",
        ),
        (
            "learner:step:RuntimeError",
            WorkerError,
            "learner: RuntimeError: out of luck; see LOGS/learner.log",
        ),
        (
            "sampler:play:RuntimeError",
            WorkerError,
            "sampler-0: RuntimeError: out of luck; see LOGS/sampler-0.log",
        ),
        ("sampler:play:kill", WorkerError, "sampler-0 was killed by signal 9; see LOGS/sampler-0.log"),
        ("learner:step:kill", WorkerError, "learner was killed by signal 9; see LOGS/learner.log"),
        ("learner:begin:exit", WorkerError, "learner exited with code 7; see LOGS/learner.log"),
        (
            "sampler:publish:wrong",
            PublicationError,
            "sampler-0 serves other weights than version 2: "
            "its checksum is nonsense, the learner's checksum-2",
        ),
    ],
)
def test_trouble_in_a_worker_ends_the_run_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, kind: type[VcpoError], message: str
) -> None:
    monkeypatch.setenv("VCPO_TEST_TROUBLE", trouble)
    with pytest.raises(kind) as raised:
        train(config_of(tmp_path))
    logs = tmp_path / "run" / "logs"
    assert str(raised.value) == message.replace("LOGS", str(logs))
    assert type(raised.value) is kind
    if "RuntimeError" in trouble:
        log = logs / ("learner.log" if trouble.startswith("learner") else "sampler-0.log")
        assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            "learner:step:block",
            r"learner did not answer 'step' within 3 s \(runtime.timeout_seconds\); see .*log",
        ),
        ("sampler:publish:hang", r"sampler-0 did not answer 'publish' within 3 s"),
        ("sampler:play:hang", r"no group finished within 3 s .*; waiting for sampler-0 \(6 groups\)"),
        ("sampler:evaluate:hang", r"sampler-0 did not answer 'evaluate' within 3 s"),
    ],
)
def test_a_worker_that_is_silent_is_named_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, message: str
) -> None:
    monkeypatch.setenv("VCPO_TEST_TROUBLE", trouble)
    with pytest.raises(WorkerError, match=message):
        train(config_of(tmp_path, runtime__timeout_seconds=3))


# The parent is killed, or asked to end


def start_driver(
    config: Config, last_seconds: float = interrupts.LAST_SECONDS
) -> tuple[subprocess.Popen[str], Path]:
    """A driver of a new run. In a session of its own, as a terminal would give it."""
    run = RunFolder.create(config)
    return resume_driver(run.path, last_seconds), run.path


def resume_driver(run: Path, last_seconds: float = interrupts.LAST_SECONDS) -> subprocess.Popen[str]:
    shorter = f"from vcpo.runtime import interrupts; interrupts.LAST_SECONDS = {last_seconds}\n"
    return subprocess.Popen(
        [sys.executable, "-c", shorter + DRIVER, str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("checkpoint_every", [4, 0])
def test_a_killed_parent_leaves_nothing_and_its_run_resumes(
    tmp_path: Path, notes: Path, checkpoint_every: int
) -> None:
    """Killed with and without a checkpoint: every group is trained on exactly once in what counts, each step
    is written down once, and no group that the journal had is played again."""
    config = config_of(tmp_path, learner__checkpoint_every=checkpoint_every, pipeline__steps=2000)
    driver, run = start_driver(config)
    wait_until(lambda: steps_of(run) >= 9)
    driver.kill()
    driver.communicate()
    wait_until(lambda: workers_of(notes) == [])
    assert not any(Path(t["folder"]).exists() for t in noted(notes, "transfers"))
    done, played = steps_of(run), [row["group"] for row in noted(notes, "played")]

    summary = train(load_config(run / "config.toml", [f"--pipeline.steps={done + 5}"]), resume=run)
    assert summary["completed"] is True
    assert [row["step"] for row in read_metrics(run)] == list(range(1, done + 6))
    assert sorted(surviving(notes)) == list(range(2 * (done + 5)))
    again = [row["group"] for row in noted(notes, "played")][len(played) :]
    # A group that was on its way to the journal at the kill may be lost; the window holds at most 6.
    assert len(set(again) & set(played)) <= 6


def test_a_sampler_that_waits_for_something_notices_that_its_parent_is_gone(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is about to take new weights, as when running episodes must end first."""
    monkeypatch.setenv("VCPO_TEST_TROUBLE", "sampler:publish:hang")
    driver, run = start_driver(config_of(tmp_path))
    wait_until(lambda: steps_of(run) >= 2)
    driver.kill()
    driver.communicate()
    wait_until(lambda: workers_of(notes) == [])


def test_ctrl_c_ends_the_run_in_order(tmp_path: Path, notes: Path) -> None:
    driver, run = start_driver(config_of(tmp_path, pipeline__steps=100000))
    wait_until(lambda: steps_of(run) >= 5)
    driver.send_signal(signal.SIGINT)
    output, errors = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, errors) == (0, "")
    summary = json.loads(output)
    assert summary == {"completed": False, "steps": steps_of(run), "run_folder": str(run)}
    checkpoint = json.loads((run / "light-checkpoint.json").read_text())
    assert checkpoint["version"] == summary["steps"], "a checkpoint of the last step"
    assert load_config(run / "config.toml").pipeline.steps == 100000
    assert workers_of(notes) == []


def test_ctrl_c_does_not_wait_for_a_worker_that_is_stuck(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner hangs in a step: it is waited for up to the limit, and the checkpoint before stays."""
    monkeypatch.setenv("VCPO_TEST_TROUBLE", "learner:step:block")
    driver, run = start_driver(config_of(tmp_path, learner__checkpoint_every=2), last_seconds=3.0)
    wait_until(lambda: steps_of(run) >= 3)
    driver.send_signal(signal.SIGINT)
    output, errors = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, errors, json.loads(output)["steps"]) == (0, "", 3)
    assert json.loads((run / "light-checkpoint.json").read_text())["version"] == 2
    assert interrupts.LAST_SECONDS + local.EXIT_SECONDS < children.STOP_SECONDS


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCPO_TEST_TROUBLE", "learner:step:block")
    driver, run = start_driver(config_of(tmp_path, learner__checkpoint_every=2))
    wait_until(lambda: steps_of(run) >= 3)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=PATIENCE)
    assert driver.returncode != 0 and steps_of(run) == 3
    assert json.loads((run / "light-checkpoint.json").read_text())["version"] == 2
    wait_until(lambda: workers_of(notes) == [])


def test_ctrl_c_before_there_is_anything_to_train(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCPO_TEST_TROUBLE", "learner:begin:block")
    driver, run = start_driver(config_of(tmp_path))
    wait_until(lambda: len(workers_of(notes)) == 2)
    time.sleep(0.3)  # the parent has asked the learner to begin
    driver.send_signal(signal.SIGINT)
    output, errors = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, errors) == (0, "")
    assert json.loads(output) == {"completed": False, "steps": 0, "run_folder": str(run)}


def test_a_termination_is_as_good_as_ctrl_c(tmp_path: Path) -> None:
    driver, run = start_driver(config_of(tmp_path, pipeline__steps=100000))
    wait_until(lambda: steps_of(run) >= 2)
    driver.terminate()
    output, errors = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, errors, json.loads(output)["completed"]) == (0, "", False)


@pytest.mark.parametrize("role", ["sampler-0", "learner"])
def test_a_worker_killed_from_outside_is_named(tmp_path: Path, notes: Path, role: str) -> None:
    driver, run = start_driver(config_of(tmp_path, pipeline__steps=100000))
    wait_until(lambda: steps_of(run) >= 2)
    kind = role.partition("-")[0].encode()
    [victim] = [p for p in workers_of(notes) if kind in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")]
    os.kill(victim, signal.SIGKILL)
    _, errors = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last == f"vcpo.errors.WorkerError: {role} was killed by signal 9; see {run}/logs/{role}.log"
