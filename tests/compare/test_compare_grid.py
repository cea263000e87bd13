"""What is asked for becomes cells, each once, and what cannot be run is told before anything is."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcpo.compare.grid import (
    Cell,
    Method,
    check_files,
    fingerprint,
    identity,
    make_grid,
    parse_lags,
    parse_methods,
    parse_seeds,
    warm_start_key,
)
from vcpo.config import load_config
from vcpo.errors import ConfigError

MAZE = load_config("maze")


def grid(methods: str, lags: str, seeds: str, *overrides: str) -> list[Cell]:
    base = load_config("maze", overrides)
    return make_grid(base, parse_methods(methods), parse_lags(lags), parse_seeds(seeds), Path("out"))


def test_settings_of_a_method_are_in_brackets_commas_and_all() -> None:
    text = "vcpo, grpo[pipeline.group_size=16; lora.targets=q_proj,v_proj],vcpo"
    methods = parse_methods(text)
    assert methods == [
        Method("vcpo"),
        Method("grpo", (("pipeline.group_size", "16"), ("lora.targets", "q_proj,v_proj"))),
    ]
    assert parse_methods(",".join(method.label for method in methods)) == methods


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("4", [0, 1, 2, 3]),
        ("10-12", [10, 11, 12]),
        ("3,7", [3, 7]),
        ("3,", [3]),
        ("1-2,9,2", [1, 2, 9]),
    ],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


def test_every_cell_has_its_own_settings_and_folder() -> None:
    cells = grid("vcpo,grpo[pipeline.group_size=4]", "0,8", "2", "--pipeline.steps=7")
    assert [(c.seed, c.config.algorithm.name, c.lag) for c in cells] == [
        (seed, name, lag) for seed in (0, 1) for name in ("vcpo", "grpo") for lag in (0, 8)
    ]
    assert {(c.config.algorithm.name, c.config.pipeline.group_size) for c in cells} == {
        ("vcpo", 8),
        ("grpo", 4),
    }
    assert {(c.config.pipeline.steps, c.config.pipeline.mode) for c in cells} == {(7, "exact")}
    assert len({cell.folder for cell in cells}) == 8
    assert cells[1].folder == Path("out/runs/vcpo-lag8-seed0")


def test_labels_that_look_alike_in_a_path_have_folders_of_their_own() -> None:
    cells = grid("vcpo[sampler.options=a b],vcpo[sampler.options=a:b]", "0", "1", "--sampler.kind=vllm")
    assert len({cell.folder for cell in cells}) == 2


def test_a_long_label_has_a_folder_that_file_systems_take() -> None:
    long = ";".join(f"lora.targets={'q' * 100}{n}" for n in range(4))
    first, second = grid(f"vcpo[{long}0],vcpo[{long}1]", "128", "20261127,")
    assert first.name != second.name
    assert all(len(f"{cell.name}.json.new".encode()) <= 255 for cell in (first, second))


@pytest.mark.parametrize(
    ("methods", "overrides", "told"),
    [
        ("vcpo,vcpo[model.context_length=8]", (), "vcpo[model.context_length=8] at lag 4: "),
        ("vcpo", ("--environment.kind=mazes",), "did you mean 'maze'?"),
        ("vcpo", ("--environment.kind=jsonl", "--environment.path=none.jsonl"), "none.jsonl"),
        ("grpo,vcpo[algorithm.step_scales=none.json]", (), "cannot read algorithm.step_scales none.json"),
        ("vcpo[algorithm.on_policy_ratio=calibrated]", (), "vcpo calibrate"),
    ],
)
def test_files_that_cannot_be_used_are_told(methods: str, overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_files(grid(methods, "4", "1", *overrides))
    assert told in str(raised.value)


def test_step_scales_of_two_files_are_two_runs_and_those_of_a_control_are_known_by_name() -> None:
    cells = grid("vcpo[algorithm.step_scales=a/f.json],vcpo[algorithm.step_scales=b/f.json]", "0", "1")
    assert len(cells) == 2
    assert len({fingerprint(cell.config) for cell in cells}) == 2
    moved = [load_config("maze", [f"--algorithm.step_scales={place}/controls/f.json"]) for place in "ab"]
    assert len({identity(config) for config in moved}) == len({fingerprint(config) for config in moved}) == 1


def test_a_grid_that_nobody_can_mean_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 methods, 1000 lags and 1000 seeds are 1000000 runs, and 20000"):
        grid("vcpo", "0-999", "1000")


def test_duplicates_are_run_once_also_when_written_in_another_way() -> None:
    cells = grid("vcpo,vcpo[learner.learning_rate=0.0004],vcpo[learner.learning_rate=4e-3]", "0,0", "1")
    assert [cell.method for cell in cells] == ["vcpo", "vcpo[learner.learning_rate=4e-3]"]
    assert [cell.method for cell in grid("vcpo,grpo,vcpo", "0", "1")] == ["vcpo", "grpo"]


def test_a_warm_start_is_shared_by_methods_and_lags_of_a_seed_only() -> None:
    cells = grid("vcpo,grpo,grpo[warm_start.steps=9]", "0,8", "2")
    assert len({warm_start_key(cell.config) for cell in cells}) == 4
    assert warm_start_key(load_config("maze", ["--warm_start.steps", "0"])) is None


@pytest.mark.parametrize(
    ("methods", "lags", "seeds", "told"),
    [
        ("vcpp", "0", "1", "did you mean 'vcpo'?"),
        ("", "0", "1", "at least one algorithm"),
        ("vcpo[pipeline.lag=3]", "0", "1", "pipeline.lag cannot be set in a comparison: --lags sets it"),
        ("vcpo[learner.learning_rate]", "0", "1", "learner.learning_rate needs a value"),
        ("vcpo[learner.learning_rate=1", "0", "1", "write NAME, or NAME["),
        ("vcpo[learner.learning_rat=1]", "0", "1", "did you mean --learner.learning_rate?"),
        ("grpo[algorithm.truncation=3]", "0,8", "1", "grpo[algorithm.truncation=3] at lag 0: grpo clips"),
        ("vcpo", "0,x", "1", "'x' is no whole number"),
        ("vcpo", "0", "0", "at least one seed"),
        ("vcpo", "0", "5-4", "there is no number in it"),
        ("vcpo", "0", "20261127", "0 to 20261126, and 1000 are the most; write 20261127, with a comma"),
        ("vcpo", "0", "3,0-99999999999999999999", "more than 1000 numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_told_first(methods: str, lags: str, seeds: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        grid(methods, lags, seeds)
    assert told in str(raised.value)
