"""Actors of a Ray cluster that work, fail, hang and are killed: real actors, over services that need no torch
(``light_workers``). The cluster has two machines as far as Ray can tell, both of them this one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # listen on the loopback address alone

import ray
from ray.cluster_utils import Cluster
from ray.exceptions import ObjectStoreFullError

from vcpo.cli import main
from vcpo.config import Config, load_config
from vcpo.errors import ConfigError, DataError, LearnerLost, PublicationError, VcpoError, WorkerError
from vcpo.monitor.progress import SilentProgress
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline.processes import elsewhere
from vcpo.pipeline.run_folder import RunFolder
from vcpo.runtime import train
from vcpo.runtime.ray import cluster as cluster_module
from vcpo.runtime.ray.scale import FILE, heard, scale

pytestmark = pytest.mark.xdist_group("ray")

LIGHT = Path(__file__).parent / "light_workers"
CPUS = 5
PATIENCE = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    notes = tmp_path_factory.mktemp("notes")
    settings = {"PYTHONPATH": str(LIGHT), "VCPO_TEST_NOTES": str(notes)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": CPUS - 1, "include_dashboard": False}
        )
        made.add_node(num_cpus=1)
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def notes(cluster: Cluster) -> Iterator[Path]:
    """Where workers write down what they did; in the end all places in the cluster are free again."""
    folder = Path(os.environ["VCPO_TEST_NOTES"])
    for left in folder.iterdir():
        left.unlink()
    yield folder
    assert not ray.is_initialized()
    ray.init(address=cluster.address, log_to_driver=False)
    wait_until(lambda: ray.available_resources().get("CPU", 0) == CPUS)
    ray.shutdown()


class Notes(SilentProgress):
    """Remembers what a person would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def noted(notes: Path, name: str) -> list[dict[str, Any]]:
    path = notes / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def surviving(notes: Path) -> list[int]:
    """Groups trained on in the history that counts: of each version, the step that was taken last."""
    steps = {row["version"]: row["groups"] for row in noted(notes, "trained")}
    return [number for version in sorted(steps) for number in steps[version]]


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def config_of(cluster: Cluster | None, folder: Path, **changes: Any) -> Config:
    settings = {
        "run__folder": folder,
        "run__name": "run",
        "warm_start__steps": 0,
        "learner__checkpoint_every": 4,
        "pipeline__prompts": 2,
        "pipeline__group_size": 2,
        "pipeline__steps": 12,
        "pipeline__window": 4,
        "pipeline__lag": 3,
        "evaluation__every": 0,
        "evaluation__final_problems": 5,
        "runtime__kind": "ray",
        "runtime__address": cluster.address if cluster else "",
        "runtime__samplers": 2,
        "runtime__learner_ranks": 2,
        "runtime__timeout_seconds": 60,
    }
    pairs = (settings | changes).items()
    return load_config(None, [f"--{k.replace('__', '.')}={v}" for k, v in pairs])


def test_a_run_from_begin_to_end(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    summary = train(config_of(cluster, tmp_path, pipeline__steps=30, warm_start__steps=2))
    assert (summary["completed"], summary["steps"], summary["accuracy_after"]) == (True, 30, 1.0)
    assert sorted(row["group"] for row in noted(notes, "played")) == list(range(60))
    assert noted(notes, "trained") == noted(notes, "trained-1")
    assert sorted(surviving(notes)) == list(range(60))
    rows = read_metrics(tmp_path / "run")
    assert max(row["lag_max"] for row in rows) <= summary["lag_bound"] == 5
    assert {name for row in rows for name in row["samplers"]} == {"sampler-0", "sampler-1"}
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == ["learner-0.log", "learner-1.log", "sampler-0.log", "sampler-1.log"]


class Enough(Exception):
    """What was waited for has happened."""


class Watching(Notes):
    """Ends a run that would go on for ever, once all conditions on who is there were true, one after the
    other; each calls its action then."""

    def __init__(self, *stages: tuple[Callable[[set[str]], bool], Callable[[], object]]) -> None:
        super().__init__()
        self._stages = list(stages)
        self._end = time.monotonic() + PATIENCE

    def advance(self, figures: Any) -> None:
        there = set(figures.get("samplers", {}))
        assert time.monotonic() < self._end, f"{len(self._stages)} stages are left; there: {there}"
        if self._stages[0][0](there):
            self._stages.pop(0)[1]()
        if not self._stages:
            raise Enough


def nothing() -> None:
    pass


def check_complete(trained: list[int]) -> None:
    """Nothing twice, and nothing left out but at the end, where the window was open."""
    assert len(set(trained)) == len(trained)
    assert set(range(len(trained) - 20)) <= set(trained)


def test_a_killed_sampler_is_restarted_and_its_groups_are_played_again(
    cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    progress = Watching(
        (lambda there: len(there) == 2, lambda: (notes / "trouble").write_text("sampler:play:kill")),
        (lambda there: len(there) == 1, nothing),
        (lambda there: len(there) == 2, nothing),
    )
    with pytest.raises(Enough):
        train(config_of(cluster, tmp_path, pipeline__steps=10**6), progress=progress)
    check_complete(surviving(notes))
    assert len(progress.lines) == 1
    assert "its process is gone" in progress.lines[0]


def test_a_killed_rank_takes_the_learner_back_to_its_checkpoint(
    cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    (notes / "trouble").write_text("learner-1:step:kill")
    progress = Notes()
    assert train(config_of(cluster, tmp_path), progress=progress)["steps"] == 12
    assert sorted(surviving(notes)) == list(range(24))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 13))
    assert len(progress.lines) == 1
    assert "learner-1 is gone (its process is gone); see" in progress.lines[0]
    assert "begins anew from the last checkpoint" in progress.lines[0]


def test_a_learner_that_dies_again_and_again_ends_the_run(
    cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    (notes / "trouble").write_text("learner-1:step:kill:always")
    progress = Notes()
    with pytest.raises(LearnerLost, match="learner-1 is gone"):
        train(config_of(cluster, tmp_path, runtime__restarts=2), progress=progress)
    assert len(progress.lines) == 3  # the first life got further than nothing


def test_a_sampler_that_never_gets_ready_ends_the_run(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    (notes / "trouble").write_text("sampler:begin:kill:always")
    with pytest.raises(WorkerError, match=r"that was 2 times in a row without having finished a group"):
        train(config_of(cluster, tmp_path, runtime__restarts=1, runtime__samplers=1))


@pytest.mark.parametrize("place", ["play", "publish", "evaluate"])
def test_a_sampler_that_hangs_is_restarted(place: str, cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    (notes / "trouble").write_text(f"sampler:{place}:hang")
    progress = Notes()
    assert train(config_of(cluster, tmp_path, runtime__timeout_seconds=10), progress=progress)["steps"] == 12
    assert sorted(surviving(notes)) == list(range(24))
    assert "did nothing for 7 s (runtime.timeout_seconds)" in progress.lines[0]


def test_a_sampler_that_fails_to_begin_is_restarted_if_others_can(
    cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    (notes / "trouble").write_text("sampler:begin:RuntimeError")
    progress = Notes()
    assert train(config_of(cluster, tmp_path), progress=progress)["steps"] == 12
    assert len(progress.lines) == 1
    assert "it could not begin: " in progress.lines[0] and "RuntimeError: out of luck" in progress.lines[0]


def test_if_no_sampler_can_begin_the_run_ends_at_once(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    (notes / "trouble").write_text("sampler:begin:DataError:always")
    progress = Notes()
    with pytest.raises(DataError, match=r"^problems\.jsonl, line 3"):
        train(config_of(cluster, tmp_path), progress=progress)
    assert len(progress.lines) <= 2


def test_a_new_sampler_that_fails_to_begin_does_not_end_the_run(
    cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    def ask() -> None:
        (notes / "trouble").write_text("sampler:begin:RuntimeError")
        asked(tmp_path / "run", 3)

    progress = Watching((lambda there: len(there) == 2, ask), (lambda there: len(there) == 3, nothing))
    with pytest.raises(Enough):
        train(config_of(cluster, tmp_path, pipeline__steps=10**6), progress=progress)
    assert not (notes / "trouble").exists()


def test_a_sampler_that_finished_groups_may_come_back_without_restarts(
    cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    def both_have_played(there: set[str]) -> bool:
        return len(there) == 2 and len(noted(notes, "played")) > 40

    progress = Watching(
        (both_have_played, lambda: (notes / "trouble").write_text("sampler:play:kill")),
        (lambda there: len(there) == 1, nothing),
        (lambda there: len(there) == 2, nothing),
    )
    with pytest.raises(Enough):
        train(config_of(cluster, tmp_path, pipeline__steps=10**6, runtime__restarts=0), progress=progress)


@pytest.mark.parametrize("place", ["play", "publish"])
def test_a_sampler_without_an_engine_is_restarted(
    place: str, cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    (notes / "trouble").write_text(f"sampler:{place}:EngineLost")
    progress = Notes()
    assert train(config_of(cluster, tmp_path), progress=progress)["steps"] == 12
    assert sorted(surviving(notes)) == list(range(24))
    assert len(progress.lines) == 1
    assert "is gone (it has no engine any more: vLLM server 0 is gone; no other" in progress.lines[0]


def test_a_rank_that_hangs_ends_the_run_by_its_name(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    (notes / "trouble").write_text("learner-1:step:block")
    with pytest.raises(WorkerError, match=r"learner-1 did not answer 'step' within 10 s .*learner-1\.log"):
        train(config_of(cluster, tmp_path, runtime__timeout_seconds=10))


@pytest.mark.parametrize(
    ("trouble", "error", "match"),
    [
        ("sampler:play:DataError", DataError, r"^problems\.jsonl, line 3"),
        ("sampler:publish:wrong", PublicationError, "serves other weights than version 2"),
        ("learner:begin:RuntimeError", WorkerError, r"learner-[01]: RuntimeError: out of luck; see .*log"),
    ],
)
def test_errors_of_actors_end_the_run_as_they_are(
    trouble: str, error: type[VcpoError], match: str, cluster: Cluster, notes: Path, tmp_path: Path
) -> None:
    (notes / "trouble").write_text(trouble)
    with pytest.raises(error, match=match):
        train(config_of(cluster, tmp_path))


def test_a_machine_that_leaves_and_one_that_joins(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    """Samplers of a machine that is switched off wait for another one; the run goes on without them."""
    node = cluster.add_node(num_cpus=1)
    progress = Watching(
        (lambda there: len(there) == 4, lambda: cluster.remove_node(node)),
        (lambda there: len(there) == 3, lambda: cluster.add_node(num_cpus=1)),
        (lambda there: len(there) == 4, nothing),
    )
    try:
        with pytest.raises(Enough):
            train(config_of(cluster, tmp_path, pipeline__steps=10**6, runtime__samplers=4), progress=progress)
    finally:
        for extra in list(cluster.worker_nodes)[1:]:
            cluster.remove_node(extra)
    check_complete(surviving(notes))


def asked(run: Path, count: int) -> None:
    """What ``vcpo scale`` writes; it waits to be heard, and this is the thread that would hear it."""
    (run / FILE).write_text(f"{count}\n")


def test_samplers_join_and_leave_as_asked(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    def ask(count: int) -> None:
        asked(tmp_path / "run", count)

    progress = Watching(
        (lambda there: there == {"sampler-0", "sampler-1"}, lambda: ask(3)),
        (lambda there: there == {"sampler-0", "sampler-1", "sampler-2"}, lambda: ask(1)),
        (lambda there: there == {"sampler-0"}, nothing),
    )
    with pytest.raises(Enough):
        train(config_of(cluster, tmp_path, pipeline__steps=10**6), progress=progress)
    check_complete(surviving(notes))
    assert progress.lines == ["samplers: 3 in place of 2", "samplers: 1 in place of 3"]


def test_only_a_ray_run_can_be_scaled(tmp_path: Path) -> None:
    RunFolder.create(config_of(None, tmp_path, runtime__kind="local"))
    with pytest.raises(ConfigError, match=r"only a ray run can be scaled"):
        scale(tmp_path / "run", 2)
    RunFolder.create(config_of(None, tmp_path, run__name="other"))
    with pytest.raises(ConfigError, match=r"a run needs at least one"):
        scale(tmp_path / "other", 0)


def test_a_request_that_nobody_hears_is_taken_back(tmp_path: Path) -> None:
    RunFolder.create(config_of(None, tmp_path))
    with pytest.raises(ConfigError, match=r"no job of .*run heard it within 0.2 s: .*--runtime.samplers 3"):
        scale(tmp_path / "run", 3, seconds=0.2)
    assert heard(RunFolder.open(tmp_path / "run")) is None


def test_a_request_is_heard_once(tmp_path: Path) -> None:
    RunFolder.create(config_of(None, tmp_path))
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(main, ["scale", str(tmp_path / "run"), "--samplers", "3"])
        run = RunFolder.open(tmp_path / "run")
        while (count := heard(run)) is None:
            time.sleep(0.01)
        assert count == 3
        asking.result()
    assert heard(run) is None


def test_what_answers_but_is_no_ray_is_named(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ConfigError, match=rf"what answers at {place} is no Ray: correct runtime.address"):
            train(config_of(None, tmp_path, runtime__address=place))
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"no Ray cluster answers at {place} \(timed out\)"):
            train(config_of(None, tmp_path, runtime__address=place))


def test_a_cluster_that_others_cannot_reach_is_looked_for_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where Ray would look by itself, nobody answers, and it would wait for minutes."""
    with socket.create_server(("127.0.0.2", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(cluster_module, "ELSEWHERE", ("127.0.0.3", 80))  # reached from 127.0.0.1
        assert cluster_module._is_on_loopback_alone("127.0.0.2", port)
        assert not cluster_module._is_on_loopback_alone("10.0.0.1", port)
    with socket.create_server(("0.0.0.0", 0)) as listening:
        assert not cluster_module._is_on_loopback_alone("127.0.0.1", listening.getsockname()[1])


def test_paths_are_whole_for_processes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = config_of(None, tmp_path, model__name="model", environment__path="not-there.jsonl")
    assert elsewhere(config).model.name == str(tmp_path / "model")
    assert elsewhere(config).environment.path == "not-there.jsonl"


def test_too_small_a_cluster_is_told_at_once(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    config = config_of(cluster, tmp_path, runtime__learner_ranks=6, runtime__wait_seconds=1)
    with pytest.raises(ConfigError, match=r"6 ranks .* need 7 CPUs, and it has 5; add machines"):
        train(config)
    with pytest.raises(ConfigError, match=r"need .*1 GPUs, and it has 0"):
        train(config_of(cluster, tmp_path, runtime__sampler_gpus=1, runtime__wait_seconds=1))
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_is_full_is_told_after_a_while(cluster: Cluster, notes: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cluster.address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(
            ConfigError, match=r"no room for 2 ranks .* within 2 s .*: 1 CPUs and 0 GPUs are free"
        ):
            train(config_of(cluster, tmp_path, runtime__wait_seconds=2))
    finally:
        holder.kill()
        holder.wait()


HOLD = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote
class Holder:
    def here(self): pass
held = [Holder.options(num_cpus=1).remote() for _ in range(4)]
ray.get([h.here.remote() for h in held])
print("held", flush=True)
sys.stdin.read()
"""


def test_no_cluster_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for address, match in (
        (f"127.0.0.1:{port}", rf"no Ray cluster answers at 127\.0\.0\.1:{port} .*ray start --head"),
        ("here", r"'here' is no address: write HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(config_of(None, tmp_path, runtime__address=address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no Ray cluster was started on this machine .*ray start --head"):
        train(config_of(None, tmp_path, runtime__address="auto"))
    assert list(tmp_path.iterdir()) == []


def test_settings_that_ray_has_no_place_for(tmp_path: Path) -> None:
    for changes, match in (
        ({"pipeline__mode": "exact", "runtime__learner_ranks": 1}, "needs pipeline.mode = 'async'"),
        ({"runtime__address": "ray://head:10001"}, "Ray Client"),
        ({"runtime__kind": "local", "runtime__address": "auto"}, "is for runtime.kind = 'ray'"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(config_of(None, tmp_path, **changes))


def test_a_full_object_store_names_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vcpo.runtime.ray import weights

    def full(value: object) -> object:
        raise ObjectStoreFullError("Failed to put object: 3 bytes")

    monkeypatch.setattr(weights.ray, "put", full)
    with pytest.raises(
        WorkerError, match=r"no room for version 4 of the weights \(12 bytes\).*--object-store-memory"
    ):
        weights.ObjectStoreOutbox().put(4, {"w": torch.zeros(3)})


def test_weights_are_the_same_bytes_beyond_the_object_store() -> None:
    import torch

    from vcpo.runtime.ray.weights import ObjectWeights
    from vcpo.weights import checksum

    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).to(torch.bfloat16),
        "c": torch.zeros(0, 2),
        "d": torch.tensor(7),
    }
    source = [
        (n, str(t.dtype).removeprefix("torch."), list(t.shape), t.flatten().view(torch.uint8).numpy())
        for n, t in tensors.items()
    ]
    assert checksum(ObjectWeights(source, [array for *_, array in source])) == checksum(tensors)
