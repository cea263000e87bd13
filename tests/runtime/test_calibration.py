"""``vcpo calibrate`` and runs that use it, with a sampler whose logits are not quite the learner's."""

from __future__ import annotations

import json
import math
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcpo import expected_ess_ratio
from vcpo.cli import main
from vcpo.config import Config, load_config
from vcpo.errors import ConfigError
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline import engines
from vcpo.pipeline.calibration import (
    calibrate_command,
    calibrated_settings,
    calibration_path,
    find_calibration,
    read_calibration,
)
from vcpo.pipeline.plan import plan_text
from vcpo.policy.loading import Policy
from vcpo.runtime import calibrate, train
from vcpo.samplers.protocol import Sampler

torch.set_num_threads(1)

TINY = {
    "model.hidden_size": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.intermediate_size": 32,
    "model.context_length": 64,
    "warm_start.steps": 0,
    "environment.kind": "worlds:Letters",
    "learner.learning_rate": 1e-6,
    "learner.checkpoint_every": 1,
    "pipeline.mode": "exact",
    "pipeline.lag": 0,
    "pipeline.prompts": 4,
    "pipeline.group_size": 8,
    "pipeline.steps": 12,
    "evaluation.every": 0,
    "evaluation.final_problems": 4,
}
CALIBRATED = {"algorithm.on_policy_ratio": "calibrated"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No calibration of another test."""
    monkeypatch.setenv("VCPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's logits z become z + 0.4 sin(1000 z): another policy, from the same weights, as another
    number type would make of them. It samples from what it records."""

    def engine(config: Config, policy: str | Policy, share: engines.Share) -> tuple[engines.Speaker, Sampler]:
        speaker, sampler = engines.local_engine(config, policy, share)
        assert isinstance(speaker, Policy)
        head: Any = speaker.model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, z: z + 0.4 * torch.sin(1000 * z))
        return speaker, sampler

    monkeypatch.setitem(engines.ENGINES, "local", engine)


def arguments(**changes: Any) -> list[str]:
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


def config_of(**changes: Any) -> Config:
    return load_config(None, arguments(**changes))


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of a finished run."""
    changes = {"run__folder": folder, "run__name": "run"} | changes
    assert train(config_of(**changes))["completed"] is True
    return read_metrics(folder / "run")


@pytest.mark.usefixtures("perturbed")
def test_mismatch_is_not_lag(tmp_path: Path) -> None:
    """At lag 0 a perturbed sampler costs ESS. Calibrated, no step is shortened for that; with a ratio of 1
    each is."""
    record, path = calibrate(config_of(), groups=40)
    assert path == calibration_path(config_of())
    rate = record["rate"]["value"]
    assert rate > 0.02
    rows = run(tmp_path / "calibrated", algorithm__on_policy_ratio="calibrated")
    plain = run(tmp_path / "plain")
    assert rows[0]["ess_ratio"] == plain[0]["ess_ratio"]
    measured = np.mean([row["ess_ratio"] for row in rows])
    expected = np.mean([row["on_policy_ratio"] for row in rows])
    assert measured < 0.9
    assert expected == pytest.approx(measured, abs=0.06)
    assert np.mean([row["step_scale"] for row in rows]) > 0.96
    assert np.mean([row["step_scale"] for row in plain]) == pytest.approx(measured**0.5, abs=0.03)
    for row in rows:
        scale = min(1.0, row["ess_ratio"] / row["on_policy_ratio"]) ** 0.5
        assert row["step_scale"] == pytest.approx(scale, rel=1e-6)
        # Sequences of at most 7 tokens: a mean length gives nearly what all of them do.
        mean_lengths = torch.full((32,), rate * row["response_length"])
        assert row["on_policy_ratio"] == pytest.approx(expected_ess_ratio(mean_lengths), abs=0.01)


@pytest.mark.usefixtures("perturbed")
def test_the_record_says_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, figure = tmp_path / "deep" / "a.json", tmp_path / "a.svg"
    command = ["calibrate", *arguments(), "--groups", "24", "--out", str(out), "--figure", str(figure)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    found = record["per_token"]
    assert (found["clusters"], found["sequences"]) == (24, 24 * 8)
    assert f"{found['tokens']:,} tokens in 192 sequences of 24 prompts" in printed
    assert f"written to {out}" in printed
    assert [row["length"] for row in record["lengths"]] == [4, 8, 16, 32, 64]
    for row in record["lengths"]:
        assert row["endless"] == pytest.approx(math.exp(-record["rate"]["value"] * row["length"]))
        step = row["in_minibatch"]
        assert step["low"] <= step["value"] <= step["high"]
    assert "measured" in record["lengths"][0] and "measured" not in record["lengths"][1]  # 7 tokens at most
    whole = record["whole"]
    assert whole["expected"]["low"] < whole["measured"] < whole["expected"]["high"]
    drawing = ElementTree.parse(figure).getroot()
    assert drawing.get("aria-label") == "on-policy ESS ratio by response length"
    assert "sampled tokens" in {text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert not calibration_path(config_of()).exists()


def test_without_perturbation_the_floor_is_the_last_digit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *arguments(), "--groups", "8", "--tokens", "60"]) == 0
    assert "numerics cost nothing that a step could notice" in capsys.readouterr().out
    calibration = read_calibration(calibration_path(config_of()))
    assert calibration.rate < 1e-10
    assert calibration.record["per_token"]["clusters"] == 4  # one round of prompts had 60 tokens
    assert calibration.on_policy_ratio(torch.tensor([5, 9])) == pytest.approx(1.0, abs=1e-5)


def test_a_missing_calibration_is_told_with_its_command_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "runs", **CALIBRATED, sampler__temperature=0.7)
    assert not (tmp_path / "runs").exists()
    command = re.search("run `vcpo (.*)`", str(caught.value))
    assert command is not None
    asked = shlex.split(command[1])
    assert "--sampler.temperature" in asked
    assert main([*asked, "--groups", "4"]) == 0
    assert find_calibration(config_of(sampler__temperature=0.7)).record["per_token"]["clusters"] == 4
    with pytest.raises(ConfigError, match="have no calibration"):
        plan_text(config_of(**CALIBRATED, sampler__temperature=0.8))


def test_the_command_gives_back_the_settings() -> None:
    changes = {"model.name": "a folder/b", "lora.rank": 4, "lora.targets": "q_proj,v_proj", "model.layers": 3}
    for kind in ("sort", "countdown", "jsonl", "worlds:Letters"):
        config = load_config(kind if ":" not in kind else None, [
            *(f"--{key}={value}" for key, value in changes.items()), f"--environment.kind={kind}",
        ])  # fmt: skip
        _, _, recipe, *overrides = shlex.split(calibrate_command(config))
        assert calibrated_settings(load_config(recipe, overrides)) == calibrated_settings(config)


def test_where_nothing_can_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*arguments: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("vcpo.runtime.calibration.calibrate_inline", measure)
    (tmp_path / "file").touch()
    missing = tmp_path / "missing"
    for options, reason in (
        (["--out", str(tmp_path)], f"cannot write {tmp_path}: Is a directory; say --out FILE"),
        (["--out", str(tmp_path / "file" / "a.json")], "File exists; say --out FILE"),
        (["--figure", str(missing / "a.svg")], f"there is no folder {missing}"),
    ):
        assert main(["calibrate", "sort", *options]) == ConfigError.exit_code
        assert reason in capsys.readouterr().err


def test_the_command_gives_back_options_of_vllm_as_the_command_line_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["--sampler.kind=vllm", "--sampler.options=--gpu-memory-utilization=0.8,--swap-space=1"]
    config, heard = load_config("sort", given), list[Config]()

    def hear(config: Config, **options: Any) -> None:
        heard.append(config)
        raise ConfigError("heard")

    monkeypatch.setattr("vcpo.runtime.calibrate", hear)
    assert main(shlex.split(calibrate_command(config))[1:]) == ConfigError.exit_code
    assert [calibrated_settings(found) for found in heard] == [calibrated_settings(config)]


def test_lengths_and_seeds_share_a_calibration_and_numerics_do_not() -> None:
    path = calibration_path(config_of())
    for same in ({"run.seed": 3}, {"environment.max_tokens": 9}, {"pipeline.lag": 4}, {"sampler.slots": 8}):
        assert calibration_path(config_of(**same)) == path, same
    for other in (
        {"sampler.dtype": "bfloat16"}, {"model.dtype": "bfloat16"}, {"lora.rank": 2}, {"model.layers": 2},
        {"sampler.temperature": 0.5}, {"warm_start.steps": 1}, {"model.name": "x"},
    ):  # fmt: skip
        assert calibration_path(config_of(**other)) != path, other


@pytest.mark.usefixtures("perturbed")
def test_a_resumed_run_keeps_its_calibration(tmp_path: Path, cache: Path) -> None:
    calibrate(config_of(), groups=8)
    rows = run(tmp_path, algorithm__on_policy_ratio="calibrated", pipeline__steps=2)
    kept = (tmp_path / "run" / "calibration.json").read_bytes()
    assert kept == calibration_path(config_of()).read_bytes()
    for file in cache.rglob("*.json"):
        if file.parent.name == "calibration":
            file.unlink()
    more = {"run.folder": tmp_path, "run.name": "run", "pipeline.steps": 4} | CALIBRATED
    assert "as calibrated" in plan_text(config_of(**more), tmp_path / "run")
    assert train(config_of(**more), resume=tmp_path / "run")["completed"] is True
    longer = read_metrics(tmp_path / "run")
    assert [row["on_policy_ratio"] for row in longer[:2]] == [row["on_policy_ratio"] for row in rows]
    assert len(longer) == 4 and all(0 < row["on_policy_ratio"] < 0.95 for row in longer)
    assert (tmp_path / "run" / "calibration.json").read_bytes() == kept
    # Another sampler is another calibration, which there is none of.
    other = config_of(**more, sampler__temperature=0.5)
    with pytest.raises(ConfigError, match="have no calibration"):
        train(other, resume=tmp_path / "run")


def test_a_named_file_must_be_of_the_model_and_sampler(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    calibrate(config_of(), groups=4, out=file)
    named = CALIBRATED | {"algorithm.calibration": file}
    rate = json.loads(file.read_text())["rate"]["value"]
    for kind in ("worlds:Letters", "worlds:Slow"):  # the text may be another
        assert find_calibration(config_of(**named, environment__kind=kind)).rate == rate
    with pytest.raises(
        ConfigError, match=r"is of sampler.top_k = 0, and the run has 3: run `vcpo calibrate "
    ):
        find_calibration(config_of(**named, sampler__top_k=3))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no calibration"),
        ('{"rate": {"value": 1}}', "is no calibration"),
        ('{"vcpo_calibration": 9, "rate": {"value": 0.1}, "settings": {"model": {}}}', "format 9"),
    ],
)
def test_files_that_are_no_calibration_are_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_calibration(file)
    with pytest.raises(ConfigError, match="cannot read the calibration"):
        read_calibration(tmp_path / "none.json")
