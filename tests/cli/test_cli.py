"""The command as a person meets it: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from vcpo.algorithms import ALGORITHMS
from vcpo.cli import app, main
from vcpo.config import Config, dump_toml, load_config
from vcpo.errors import UnsupportedLayerError, VcpoError


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr; nothing may be on stdout."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return code, err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with nothing but its config."""
    folder = tmp_path / "maze-1"
    folder.mkdir()
    config = load_config("maze", ["--pipeline.steps", "5", "--pipeline.lag", "4"])
    (folder / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls to a runtime that does nothing."""
    made: list[dict[str, Any]] = []

    def train(config: Config, *, resume: Path | None, progress: object) -> dict[str, Any]:
        made.append({"config": config, "resume": resume})
        completed = config.run.name != "stopped"
        return {
            "accuracy_before": 0.25,
            "accuracy_after": 0.75,
            "run_folder": "runs/a",
            "completed": completed,
        }

    def evaluate(
        path: Path, overrides: list[str], *, problems: int | None, progress: object
    ) -> dict[str, Any]:
        made.append({"path": path, "overrides": overrides, "problems": problems})
        return {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "model": str(path)}

    monkeypatch.setitem(sys.modules, "vcpo.runtime", SimpleNamespace(train=train, evaluate=evaluate))
    return made


@pytest.mark.parametrize(
    ("arguments", "taught"),
    [
        ([], "vcpo train --dry-run"),
        (["--help"], "vcpo config "),
        (["train", "--help"], "vcpo train my.toml --pipeline.lag 8"),
        (["eval", "-h"], "vcpo eval runs/a --problems 1000"),
        (["report", "--help"], "vcpo report runs/a"),
        (["methods", "--help"], "vcpo methods vcpo"),
        (["config", "--help"], "vcpo config sort --pipeline.lag 8 > my.toml"),
    ],
)
def test_help_shows_examples(arguments: list[str], taught: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert taught in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--pipeline.step", "3"], "unknown option --pipeline.step; did you mean --pipeline.steps?"),
        (
            ["train", "--pipeline.steps", "0"],
            "--pipeline.steps is '0': it must be a whole number, at least 1",
        ),
        (["train", "--pipeline.steps", "--pipeline.lag", "3"], "--pipeline.steps needs a value"),
        (["train", "--pipeline.steps"], "--pipeline.steps needs a value"),
        (["train", "--dryrun"], "unknown option --dryrun; did you mean --dry-run?"),
        (["train", "-x"], "unknown option -x; options are --resume, --dry-run"),
        (["train", "mazes"], "no recipe 'mazes'; did you mean maze?"),
        (["train", "maze", "sort"], "unexpected argument 'sort'"),
        (["train", "--resume"], "requires an argument"),
        (["config", "--run.nam=x"], "unknown option --run.nam; did you mean --run.name?"),
        (["eval"], "name a run folder or a model: vcpo eval RUN_OR_MODEL"),
        (["eval", "x", "--problems", "0"], "--problems"),
        (["methods", "vcpp"], "did you mean 'vcpo'?"),
        (
            ["compare", "maze", "--method", "vcpo", "--out", "o"],
            "did you mean --methods?",
        ),
        (["compare", "maze", "--out", "o"], "vcpo compare needs --methods vcpo,grpo"),
        (["compare", "maze", "--methods", "vcpo"], "vcpo compare needs --out FOLDER"),
        (["report"], "RUN"),
        (["trian"], "train"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    code, line = failure(capsys, *arguments)
    assert code == 2
    assert expected in line


@pytest.mark.parametrize("command", [["report"], ["train", "--resume"]])
def test_a_missing_run_names_the_nearest(
    capsys: pytest.CaptureFixture[str], run: Path, command: list[str]
) -> None:
    code, line = failure(capsys, *command, str(run.with_name("maze-2")))
    assert (code, line) == (2, f"no run in '{run.parent}/maze-2'; did you mean {run}?")


def test_train_takes_a_recipe_and_settings_in_any_order(calls: list[dict[str, Any]]) -> None:
    assert main(["train", "--pipeline.lag", "8", "sort", "--algorithm.truncation=", "--run.name=a=b"]) == 0
    assert main(["train", "--environment.size", "5"]) == 0
    sort, maze = (call["config"] for call in calls)
    assert sort == load_config("sort", ["--pipeline.lag", "8", "--run.name", "a=b"])
    assert maze == load_config("maze", ["--environment.size", "5"])


def test_train_prints_the_summary(capsys: pytest.CaptureFixture[str], calls: list[dict[str, Any]]) -> None:
    assert main(["train"]) == 0
    out = capsys.readouterr().out
    assert "25.0 % → 75.0 %" in out
    assert "runs/a" in out


def test_a_run_that_was_stopped_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], calls: list[dict[str, Any]]
) -> None:
    assert main(["train", "--run.name", "stopped"]) == 130
    assert capsys.readouterr().err == "error: interrupted; to go on: vcpo train --resume runs/a\n"


def test_resume_reads_the_runs_own_config(calls: list[dict[str, Any]], run: Path) -> None:
    assert main(["train", "--resume", str(run), "--pipeline.steps", "9"]) == 0
    (call,) = calls
    assert call["resume"] == run
    assert (call["config"].pipeline.steps, call["config"].pipeline.lag) == (9, 4)


def test_resume_and_a_recipe_exclude_each_other(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    code, line = failure(capsys, "train", "maze", "--resume", str(run))
    assert code == 2
    assert line.startswith("give a recipe or --resume, not both")


def test_dry_run_prints_the_plan_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]
) -> None:
    def plan_text(config: Config, run_folder: Path | None) -> str:
        return f"lag {config.pipeline.lag}"

    monkeypatch.setitem(sys.modules, "vcpo.pipeline.plan", SimpleNamespace(plan_text=plan_text))
    assert main(["train", "--dry-run", "--pipeline.lag", "7"]) == 0
    assert capsys.readouterr().out == "lag 7\n"
    assert calls == []


def test_eval_passes_on_what_it_was_given(
    capsys: pytest.CaptureFixture[str], calls: list[dict[str, Any]]
) -> None:
    assert main(["eval", "a/b", "--problems", "7", "--environment.size", "5"]) == 0
    assert calls == [{"path": Path("a/b"), "overrides": ["--environment.size", "5"], "problems": 7}]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] == ["accuracy", "accuracy", "model"]
    assert lines[1].endswith("0.400 to 0.600")


def test_config_is_itself_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "sort", "--pipeline.lag", "8"]) == 0
    out = capsys.readouterr().out
    assert (
        "# Target policy lag S in optimizer steps; 0 is the synchronous loop. (a whole number, at least 0)"
        in out
    )
    (tmp_path / "mine.toml").write_text(out)
    assert load_config(tmp_path / "mine.toml") == load_config("sort", ["--pipeline.lag", "8"])


def test_methods_lists_all_and_describes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ALGORITHMS)
    assert main(["methods", "grpo"]) == 0
    assert capsys.readouterr().out.startswith("grpo: ")
    assert main(["methods", "--all"]) == 0
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page, "docs/methods.md ends with what vcpo methods --all prints"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (VcpoError("two\nlines"), 1, "two lines"),
        (UnsupportedLayerError("no norm for Conv1d"), 2, "no norm for Conv1d"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x (not foreseen; VCPO_DEBUG=1 shows where)"),
    ],
)
def test_what_goes_wrong_inside_is_one_line_too(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    line: str,
) -> None:
    monkeypatch.delenv("VCPO_DEBUG", raising=False)
    monkeypatch.setattr("vcpo.config.load_config", _raising(raised))
    assert main(["config"]) == code
    assert line in capsys.readouterr().err


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCPO_DEBUG", "1")
    monkeypatch.setattr("vcpo.config.load_config", _raising(VcpoError("x")))
    with pytest.raises(VcpoError):
        main(["config"])


def _raising(error: BaseException) -> Callable[..., None]:
    def raises(*_: object) -> None:
        raise error

    return raises


def test_as_a_program_a_mistake_is_exit_code_2_and_one_line() -> None:
    command = [sys.executable, "-m", "vcpo.cli", "train", "--pipeline.lagg", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown option --pipeline.lagg; did you mean --pipeline.lag?\n"


def test_help_config_and_mistakes_need_no_heavy_import() -> None:
    """The slow packages stay out of a process that only parses; report of modules as JSON."""
    program = (
        "import contextlib, io, json, sys\n"
        "from vcpo.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    codes = [main(['--help']), main(['config', 'sort']), main(['train', 'nothing'])]\n"
        "print(json.dumps([codes, sorted({name.partition('.')[0] for name in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    codes, modules = json.loads(done.stdout)
    assert codes == [0, 0, 2]
    assert not {"torch", "transformers", "tokenizers", "matplotlib", "tensorboard"} & set(modules)


def test_the_console_script_is_main() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["scripts"] == {"vcpo": "vcpo.cli:main"}
