"""The parts of the vLLM engine that need no server: commands, logs, the gate, the probe's arithmetic."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_stub import Stub

from vcpo.config import Config
from vcpo.errors import ConfigError, PublicationError, WorkerError
from vcpo.pipeline.engines import check_engine
from vcpo.samplers.vllm.handshake import Expected
from vcpo.samplers.vllm.probe import Prober, distance
from vcpo.samplers.vllm.process import Command, ServerProcess, last_error, server_command
from vcpo.samplers.vllm.sampler import VllmSampler
from vcpo.samplers.vllm.server import Server
from vcpo.samplers.vllm.traffic import BusyClock, Gate
from vcpo.weights import Probe

EXPECTED = Expected("no-model", {}, lambda text: [], 10, 64)


def config_of(**sections: Any) -> Config:
    return Config.model_validate(sections | {"sampler": {"kind": "vllm", **sections.get("sampler", {})}})


# Commands


def options(config: Config, **more: Any) -> dict[str, str]:
    """Option → the word after it."""
    words = server_command(config, "m", 9000, **more).arguments
    return dict(zip(words, [*words[1:], ""], strict=True))


def test_the_command_says_all_that_the_recipe_does() -> None:
    config = config_of(
        model={"context_length": 77, "dtype": "bfloat16"},
        run={"seed": 5},
        sampler={"slots": 3, "prefill_tokens": 2, "python": "py", "options": ["--swap-space=1"]},
    )
    found = options(config, host="0.0.0.0")
    wanted = {
        "--model": "m", "--port": "9000", "--host": "0.0.0.0", "--max-model-len": "77", "--max-num-seqs": "3",
        "--max-num-batched-tokens": "3", "--dtype": "bfloat16", "--seed": "5",
        "--logprobs-mode": "processed_logprobs",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert json.loads(found["--weight-transfer-config"]) == {"backend": "vcpo"}
    arguments = server_command(config, "m", 9000).arguments
    assert (arguments[0], arguments[-1]) == ("py", "--swap-space=1")
    assert "--enable-lora" not in arguments


@pytest.mark.parametrize(("rank", "allowed"), [(1, "8"), (8, "8"), (9, "16"), (300, "320"), (512, "512")])
def test_the_rank_of_adapters_is_rounded_up_to_what_vllm_has(rank: int, allowed: str) -> None:
    config = config_of(lora={"rank": rank})
    assert options(config)["--max-lora-rank"] == allowed
    assert server_command(config, "m", 1).environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"rank": 513}}, "lora.rank = 513: vLLM serves adapters up to rank 512"),
        ({"sampler": {"quantization": "int8"}}, "sampler.quantization = 'int8' is not offered for vLLM"),
        ({"sampler": {"quantization": "int4"}}, "sampler.quantization = 'int4' is not offered for vLLM"),
    ],
)
def test_what_vllm_cannot_do_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server_command(config_of(**sections), "m", 1)


def test_servers_get_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model={"device": "cuda"}, sampler={"servers": 2, "devices": ["1", "2+3"]})
    seen = [server_command(config, "m", 1, place=i).environment["CUDA_VISIBLE_DEVICES"] for i in (0, 1)]
    assert seen == ["1", "2,3"]
    assert "--enforce-eager" not in server_command(config, "m", 1).arguments


def test_settings_for_a_cpu_give_way_to_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    environment = server_command(config_of(runtime={"threads": 3}), "m", 1).environment
    names = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")
    assert [environment[name] for name in names] == ["3", "1", "0-3"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"runtime": {"samplers": 2}},
            "runtime.samplers = 2 share out vLLM servers, and sampler.servers is 1",
        ),
        (
            {"runtime": {"samplers": 3}, "sampler": {"urls": ["http://a:1", "http://b:2"]}},
            "runtime.samplers = 3 share out vLLM servers, and sampler.urls names 2",
        ),
        (
            {"sampler": {"transfer": "collective"}, "lora": {"rank": 4}},
            "needs lora.rank = 0 with vLLM",
        ),
        (
            {"sampler": {"transfer": "collective"}, "pipeline": {"mode": "exact"}},
            "needs pipeline.mode = 'async'",
        ),
        (
            {"sampler": {"urls": ["http://a:1"], "transfer": "collective"}},
            "'collective' reaches servers of this machine, and sampler.urls has 'http://a:1'",
        ),
        ({"sampler": {"urls": ["localhost:8000"]}}, "'localhost:8000', which is no address: write http://"),
        ({"sampler": {"urls": ["http://"]}}, "'http://', which is no address"),
        ({"sampler": {"urls": ["http://a:1", "http://a:99999"]}}, "'http://a:99999', which is no address"),
    ],
)
def test_settings_that_do_not_go_together(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine(config_of(**sections))


# Starting


def start_failure(config: Config, logs: Path | None, error: type[Exception]) -> str:
    async def run() -> None:
        sampler = VllmSampler(config, EXPECTED, logs=logs)
        try:
            await sampler.ready()
        finally:
            await sampler.close()

    with pytest.raises(error) as failed:
        asyncio.run(run())
    return str(failed.value)


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    message = start_failure(config_of(sampler={"python": str(tmp_path / "python")}), tmp_path, ConfigError)
    assert message == (
        f"cannot start vLLM with '{tmp_path / 'python'}' (No such file or directory): "
        "set sampler.python to the Python of the environment that has vLLM"
    )


def test_a_python_without_vllm(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    message = start_failure(config_of(sampler={"python": str(bare)}), tmp_path / "logs", WorkerError)
    assert message.startswith("vLLM server 0 did not start: ImportError: ")
    remedy = "has no vLLM: set sampler.python to the Python of the environment that has it"
    assert message.endswith(f"{remedy}; see {tmp_path / 'logs' / 'vllm-0.log'}")


def test_without_a_folder_for_logs_they_are_in_one_of_their_own_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        start_failure(config_of(sampler={"python": "/bin/false"}), None, WorkerError)
    folders = sorted({log.parent for log in tmp_path.rglob("vllm-0.log")})
    assert len(folders) == 2 and tmp_path not in folders


def test_a_server_that_takes_too_long(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec cat\n")  # until its standard input ends
    slow.chmod(0o755)
    config = config_of(sampler={"python": str(slow)}, runtime={"timeout_seconds": 0.3})
    message = start_failure(config, tmp_path, WorkerError)
    wanted = "vLLM server 0 was not ready within 0.27 s (of runtime.timeout_seconds); see "
    assert message == f"{wanted}{tmp_path / 'vllm-0.log'}"


def test_a_server_that_ended_is_not_the_one_that_answers_in_its_place(tmp_path: Path) -> None:
    """Another run's, which took the port. The error is of this start, not of the one before."""
    log = tmp_path / "vllm-0.log"
    log.write_text("ValueError: of the start before\n")
    command = Command(["/bin/sh", "-c", "echo OSError: Address already in use; exit 1"], dict(os.environ))

    async def run() -> None:
        async with Stub().running() as another:
            process = await ServerProcess.start("vLLM server 0", command, log)
            server = Server("vLLM server 0", another.url, 60.0)
            try:
                await process.end_in_words()
                await process.wait_until_ready(server, 60.0)
            finally:
                await server.close()
                await process.end()

    with pytest.raises(WorkerError, match="did not start: OSError: Address already in use; see"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "it printed nothing"),
        ("Killed\n", "Killed"),
        ("INFO a\nValueError: too long\nINFO b\n", "ValueError: too long"),
        (
            "(EngineCore pid=1) ERROR 11-25 [core.py:1] ValueError: no memory\n"
            "(APIServer pid=2) RuntimeError: EngineCore initialization failed. See root cause above.\n",
            "ValueError: no memory",
        ),
        ("/usr/bin/python: Error while finding module\nNo module named vllm\n", "No module named vllm"),
        ("RuntimeError: " + "x" * 400, "RuntimeError: " + "x" * 286),
    ],
)
def test_the_last_error_of_a_log(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "log").write_text(log)
    assert last_error(tmp_path / "log") == said


# The gate and the clock


def test_the_gate_lets_conversations_end_and_no_new_one_in() -> None:
    async def run() -> list[str]:
        gate, happened = Gate(), list[str]()
        await gate.enter("a")
        await gate.enter("b")

        async def update() -> None:
            async with gate.closed():
                happened.append("updated")

        async def enter(name: str) -> None:
            await gate.enter(name)
            happened.append(f"{name} in")

        updating = asyncio.ensure_future(update())
        await asyncio.sleep(0)
        late = asyncio.ensure_future(enter("c"))
        await enter("a")  # its next turn
        gate.leave("a")
        gate.leave("unknown")
        for _ in range(10):
            await asyncio.sleep(0)
        assert happened == ["a in"]
        gate.leave("b")
        await asyncio.gather(updating, late)
        return happened

    assert asyncio.run(run()) == ["a in", "updated", "c in"]


def test_a_gate_that_was_given_up_opens_again() -> None:
    async def run() -> None:
        gate = Gate()
        await gate.enter("a")

        async def update() -> None:
            async with gate.closed():
                raise AssertionError("a is inside")

        updating = asyncio.ensure_future(update())
        await asyncio.sleep(0)
        updating.cancel()
        await asyncio.gather(updating, return_exceptions=True)
        await gate.enter("b")

    asyncio.run(run())


def test_the_clock_counts_overlapping_work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 14.0, 14.5, 20.0, 21.0])
    monkeypatch.setattr("vcpo.samplers.vllm.traffic.time.perf_counter", lambda: next(now))
    clock = BusyClock()
    assert clock.seconds == 0
    with clock.running(), clock.running():  # 10
        assert clock.seconds == 4  # 14
    assert clock.seconds == 4.5  # 14.5
    with clock.running():  # 20
        pass  # 21
    assert clock.seconds == 5.5


# The probe


class Says:
    """A server that says these log-probs."""

    def __init__(self, *log_probs: float) -> None:
        self.now(*log_probs)

    def now(self, *log_probs: float) -> None:
        self._log_probs = list(log_probs)

    async def log_probs(self, tokens: list[int]) -> list[float]:
        return self._log_probs

    def __str__(self) -> str:
        return "vLLM server 3"


def probe(*log_probs: float) -> Probe:
    return Probe([[0] * (len(log_probs) + 1)], [list(log_probs)])


def check(prober: Prober, server: Says, version: int, wanted: Probe) -> float:
    asyncio.run(prober.check(server, version, wanted))  # pyright: ignore[reportArgumentType]
    return prober.error


def test_the_distance_is_the_mean_over_all_tokens() -> None:
    assert distance([[-1.0], [-2.0, -3.0]], [[-1.5], [-2.0, -2.0]]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("sections", "tolerance"),
    [
        ({}, 0.01),
        ({"model": {"dtype": "bfloat16"}}, 0.1),
        ({"sampler": {"dtype": "bfloat16"}}, 0.1),
        ({"sampler": {"quantization": "fp8"}}, 0.5),
        ({"sampler": {"quantization": "fp8", "probe_tolerance": 0.3}}, 0.3),
    ],
)
def test_the_tolerance_follows_the_numbers(sections: dict[str, Any], tolerance: float) -> None:
    prober = Prober(config_of(**sections))
    near, far = -1.0 - 0.99 * tolerance, -1.0 - 1.01 * tolerance
    assert check(prober, Says(near, near), 1, probe(-1.0, -1.0)) == pytest.approx(0.99 * tolerance)
    with pytest.raises(PublicationError, match="vLLM server 3 does not serve version 2"):
        check(prober, Says(far, far), 2, probe(-1.0, -1.0))


def test_a_nan_is_no_small_difference() -> None:
    with pytest.raises(PublicationError, match="does not serve version 1"):
        check(Prober(config_of()), Says(float("nan")), 1, probe(-1.0))


def test_a_server_much_closer_to_the_version_before_is_found() -> None:
    prober = Prober(config_of())
    prober.accept(probe(-1.0))
    assert check(prober, Says(-1.002), 2, probe(-1.004)) == pytest.approx(0.002)  # as close to both
    with pytest.raises(PublicationError, match="still serves the version before 2"):
        check(prober, Says(-1.0005), 2, probe(-1.004))  # 0.0005 from the old, 0.0035 from the new
    assert check(prober, Says(-1.0), 2, probe(-1.0)) == 0  # nothing has changed: nothing to find


def test_a_stuck_server_is_found_below_the_noise_of_few_bits() -> None:
    """Noise of 0.03 nats hides steps of 0.0004 from both other rules; after three steps, 0.0012 have gone."""
    prober, stuck = Prober(config_of(model={"dtype": "bfloat16"})), Says(-1.03, -0.97)
    for version, moved in ((1, 0.0), (2, 0.0004), (3, 0.0008)):
        wanted = probe(-1.0 + moved, -1.0 - moved)
        assert check(prober, stuck, version, wanted) == pytest.approx(0.03, abs=0.001)
        prober.accept(wanted)
    with pytest.raises(PublicationError, match=r"does not serve version 4.* moved by 0.0012 nats"):
        check(prober, stuck, 4, probe(-0.9988, -1.0012))


def test_a_server_whose_answers_move_is_not_stuck() -> None:
    prober, server = Prober(config_of(model={"dtype": "bfloat16"})), Says(-1.03, -0.97)
    for version in range(1, 20):
        server.now(-1.03 + 0.0004 * version, -0.97)
        wanted = probe(-1.0 + 0.0004 * version, -1.0)
        check(prober, server, version, wanted)
        prober.accept(wanted)


def test_the_environment_of_this_process_is_handed_on() -> None:
    assert server_command(config_of(), "m", 1).environment["PATH"] == os.environ["PATH"]
