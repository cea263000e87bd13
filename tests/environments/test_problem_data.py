"""Files and data sets of problems: what is read, what is held out, what is refused and how. No network."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from vcpo.config import EnvironmentConfig
from vcpo.environments.data import read_problems
from vcpo.environments.jsonl import JsonLines
from vcpo.environments.splits import split_of
from vcpo.errors import ConfigError, DataError, UnreachableDataError

GSM8K = {"prompt_field": "question", "answer_field": "answer", "answer_form": "hashes"}
MATH = {"prompt_field": "problem", "answer_field": "solution", "answer_form": "boxed"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config_of(**settings: Any) -> EnvironmentConfig:
    return EnvironmentConfig.model_validate({"kind": "math", **settings})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k(first: int, count: int) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": f"think\n#### {i:,}"} for i in range(first, first + count)]


def message(**settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_problems(config_of(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parquet_and_json_lines_are_read_alike(tmp_path: Path) -> None:
    rows = gsm8k(1990, 40)
    read = [
        read_problems(config_of(path=write(tmp_path / name, rows), **GSM8K))
        for name in ("a.jsonl", "b.parquet")
    ]
    for problems in read:
        found = {line.prompt: line.answer for line in problems.train + problems.held_out}
        assert found == {f"q{i}": str(i) for i in range(1990, 2030)}
        assert {line.prompt for line in problems.held_out} == {
            f"q{i}" for i in range(1990, 2030) if split_of(f"q{i}") == "held_out"
        }
    assert [line.prompt for line in read[0].held_out] == [line.prompt for line in read[1].held_out]


def test_numbers_in_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 7}, {"prompt": "b", "answer": 12}]
    (train,), (held_out,), _ = read_problems(config_of(path=write(tmp_path / "n.parquet", rows)))
    assert (train.answer, held_out.answer) == ("7", "12")


def test_a_held_out_file_is_held_out_of_training(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", gsm8k(0, 30))
    test = write(tmp_path / "test.parquet", gsm8k(25, 10))
    problems = read_problems(config_of(path=train, held_out_path=test, **GSM8K))
    assert [line.prompt for line in problems.train] == [f"q{i}" for i in range(25)]
    assert {line.prompt for line in problems.held_out} == {f"q{i}" for i in range(25, 35)}
    assert [line.number for line in problems.held_out] != list(range(1, 11))  # mixed
    assert "every problem is held out" in message(path=train, held_out_path=train, **GSM8K)


def data_set(folder: Path, **splits: list[dict[str, Any]]) -> str:
    for name, rows in splits.items():
        write(folder / "data" / f"{name}-00000-of-00001.parquet", rows)
    return str(folder)


def test_a_data_set_and_its_test_split(tmp_path: Path) -> None:
    rows = [
        {"problem": f"p{i}", "solution": f"$\\boxed{{\\frac{{{i}}}{{7}}}}$", "level": 1} for i in range(20)
    ]
    name = data_set(tmp_path / "math", train=rows[:12], test=rows[10:])
    problems = read_problems(config_of(dataset=name, **MATH))
    assert [line.answer for line in problems.train] == [f"\\frac{{{i}}}{{7}}" for i in range(10)]
    assert {line.prompt for line in problems.held_out} == {f"p{i}" for i in range(10, 20)}
    environment = JsonLines(None, config_of(dataset=name, **MATH))  # pyright: ignore[reportArgumentType]
    counts = environment.problem_count("train"), environment.problem_count("held_out")
    assert counts == (10, 10)
    assert JsonLines.data_text(config_of(dataset=name, **MATH)) == (
        f"{name}: 10 problems to train on, 10 held out"
    )


def test_which_split_is_held_out(tmp_path: Path) -> None:
    parts = {"train": gsm8k(0, 30), "validation": gsm8k(30, 3), "test": gsm8k(40, 4), "extra": gsm8k(50, 5)}
    name = data_set(tmp_path / "many", **parts)

    def counts(**settings: Any) -> tuple[int, int]:
        problems = read_problems(config_of(dataset=name, **GSM8K, **settings))
        return len(problems.train), len(problems.held_out)

    assert counts() == (30, 3)
    assert counts(held_out_split="extra") == (30, 5)
    assert counts(split="validation") == (3, 4)
    alone = data_set(tmp_path / "alone", train=gsm8k(0, 30))
    problems = read_problems(config_of(dataset=alone, **GSM8K))
    expected = {f"q{i}" for i in range(30) if split_of(f"q{i}") == "held_out"}
    assert {line.prompt for line in problems.held_out} == expected


def test_a_configuration_of_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "configured"
    write(folder / "main" / "train.jsonl", gsm8k(0, 3))
    write(folder / "other" / "train.jsonl", gsm8k(10, 4))
    names = ("main", "other")
    configs = "".join(f"- config_name: {n}\n  data_files: [{{split: train, path: {n}/*}}]\n" for n in names)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    problems = read_problems(config_of(dataset=str(folder), dataset_config="other", **GSM8K))
    assert len(problems.train + problems.held_out) == 4
    wrong = message(dataset=str(folder), dataset_config="third", **GSM8K)
    assert wrong.startswith(f"cannot load the data set '{folder}'") and "'main', 'other'" in wrong


def test_unknown_splits_and_fields_list_those_there_are(tmp_path: Path) -> None:
    name = data_set(tmp_path / "set", train=gsm8k(0, 9), test=gsm8k(10, 3))
    assert message(dataset=name, split="trian", **GSM8K) == (
        f"the data set '{name}' has no split 'trian'; it has train, test: set environment.split"
    )
    assert "has no split 'dev'; it has train, test: set environment.held_out_split" in message(
        dataset=name, held_out_split="dev", **GSM8K
    )
    assert message(dataset=name) == (
        f"{name} (train): has no field 'prompt'; its fields are question, answer: "
        "set environment.prompt_field"
    )
    table = write(tmp_path / "t.parquet", gsm8k(0, 9))
    assert message(path=table, prompt_field="question", answer_field="solution") == (
        f"{table}: has no field 'solution'; its fields are question, answer: set environment.answer_field"
    )
    lines = write(tmp_path / "t.jsonl", gsm8k(0, 9))
    assert message(path=lines).startswith(
        f"{lines}, line 1: has no field 'prompt' (environment.prompt_field); its fields are question, answer;"
    )


def test_answers_that_are_not_in_their_form(tmp_path: Path) -> None:
    rows = [*gsm8k(0, 2), {"question": "x", "answer": "no hashes"}]
    for name, place in (("a.jsonl", "line 3"), ("a.parquet", "row 3")):
        path = write(tmp_path / name, rows)
        assert message(path=path, **GSM8K).startswith(f"{path}, {place}: answer has no ####, with the answer")
    path = write(tmp_path / "b.jsonl", [{"problem": "x", "solution": "it is 5"}])
    assert "solution has no \\boxed{}, with the answer in it" in message(path=path, **MATH)
    chats = write(tmp_path / "c.parquet", [{"prompt": [{"role": "user", "content": "x"}], "answer": "1"}])
    assert "row 1: prompt must be a string or a number" in message(path=chats)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", gsm8k(0, 9))
    missing = tmp_path / "missing.parquet"
    assert message(path=str(missing)) == (
        f"{missing}: cannot be read (No such file or directory); check environment.path"
    )
    assert "check environment.held_out_path" in message(path=train, held_out_path=str(missing), **GSM8K)
    missing.write_bytes(b"PAR1 but nothing more")
    assert f"{missing}: is not readable as Parquet" in message(path=str(missing))
    empty = write(tmp_path / "empty.jsonl", [])
    assert "has no problems; write one JSON object a line, with question and answer" in message(
        path=empty, **GSM8K
    )
    none = pyarrow.table({"prompt": pyarrow.array([], "string"), "answer": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(none, tmp_path / "none.parquet")
    assert "has no problems" in message(path=str(tmp_path / "none.parquet"))
    with pytest.raises(ConfigError, match=r"set environment\.path .* or environment\.dataset"):
        read_problems(config_of())


def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(UnreachableDataError) as caught:
        read_problems(config_of(dataset="openai/gsm8k", dataset_config="main", **GSM8K))
    assert "hf download openai/gsm8k --repo-type dataset --local-dir FOLDER" in str(caught.value)
    assert "environment.dataset to the folder, or environment.path to a file of it" in str(caught.value)


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    table = write(tmp_path / "t.parquet", gsm8k(0, 9))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    source = {"dataset": str(tmp_path)} if package == "datasets" else {"path": table}
    with pytest.raises(ConfigError, match=r"pip install 'vcpo\[data\]'"):
        read_problems(config_of(**source, **GSM8K))


def test_no_program_of_a_data_set_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    with pytest.raises(DataError, match=r"cannot load the data set|no data set"):
        read_problems(config_of(dataset=str(folder)))
    assert not (tmp_path / "was_run").exists()
