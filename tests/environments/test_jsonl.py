"""A user's own file: what is read, what is refused and how, how answers are judged."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.config import EnvironmentConfig
from vcpo.environments.jsonl import JsonLines, contains, last_number, matches_exactly, matches_number
from vcpo.environments.protocol import (
    ContextChecked,
    DemonstratingEnvironment,
    Environment,
    Episode,
    FiniteEnvironment,
    SmallModelEnvironment,
)
from vcpo.errors import ConfigError, ContextOverflowError, DataError
from vcpo.samplers.protocol import Completion

END = 0


class ByteCodec:
    """Code point c is token c + 1; 0 ends; a prompt is preceded by token 9999, as by a chat template."""

    end_id = END

    def encode(self, text: str) -> list[int]:
        return [1 + ord(char) for char in text]

    def encode_prompt(self, text: str) -> list[int]:
        return [9999, *self.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token - 1) for token in tokens if token != END)


class OneAnswer:
    """Samples one given answer, cut at the limit."""

    version = 3

    def __init__(self, answer: Sequence[int], context_length: int = 64) -> None:
        self.answer, self.context_length = list(answer), context_length

    async def generate(
        self, tokens: Sequence[int], *, max_tokens: int, stop: frozenset[int], **_: Any
    ) -> Completion:
        sampled = self.answer[:max_tokens]
        finish = "stop" if sampled and sampled[-1] in stop else "length"
        return Completion(sampled, [-0.5] * len(sampled), [self.version] * len(sampled), finish)

    def release(self, session: int) -> None: ...

    async def update(self, version: int, weights: Mapping[str, Any]) -> str:
        return ""


CODEC = ByteCodec()


def config_of(path: Path | str, **settings: Any) -> EnvironmentConfig:
    return EnvironmentConfig.model_validate({"kind": "jsonl", "path": str(path), **settings})


def write(folder: Path, *lines: str | dict[str, Any]) -> Path:
    path = folder / "problems.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "answer": str(i)} for i in range(count)]


def prompts(environment: JsonLines, split: Any, count: int) -> list[str]:
    return [environment.problem(i, split).prompt for i in range(count)]


def test_protocols(tmp_path: Path) -> None:
    environment = JsonLines(CODEC, config_of(write(tmp_path, *numbered(3))))
    assert isinstance(environment, Environment)
    assert isinstance(environment, ContextChecked)
    assert isinstance(environment, FiniteEnvironment)
    assert not isinstance(environment, DemonstratingEnvironment)
    assert isinstance(JsonLines, SmallModelEnvironment)


def test_fields_are_read_as_text(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '\ufeff{"prompt": "1+1", "answer": 2, "source": ["ignored"]}',
        "",
        '{"prompt": 7, "answer": 1.50}',
        '{"prompt": "naïve ∑", "answer": "Ω"}\r',
    )
    environment = JsonLines(CODEC, config_of(path))
    read = [environment.problem(i, split) for split in ("train", "held_out") for i in range(2)]
    assert {(p.prompt, p.answer) for p in read} == {("1+1", "2"), ("7", "1.50"), ("naïve ∑", "Ω")}
    assert JsonLines.alphabet(config_of(path)) == "".join(sorted("1+27.50naïve ∑Ω"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": ', "line 2: is not JSON in UTF-8"),
        ("[" * 100_000, "line 2: is not JSON in UTF-8"),
        ('{"prompt": "a", "answer": 1e99999999999999999999}', "line 2: is not JSON in UTF-8"),
        ('["a", "b"]', "line 2: is not a JSON object"),
        ('{"prompt": "a"}', "line 2: has no field 'answer'"),
        ('{"answer": "a"}', "line 2: has no field 'prompt'"),
        ('{"prompt": ["a"], "answer": "b"}', "line 2: prompt must be a string or a number"),
        ('{"prompt": "a", "answer": null}', "line 2: answer must be a string or a number"),
        ('{"prompt": "a", "answer": true}', "line 2: answer must be a string or a number"),
        ('{"prompt": "a", "answer": NaN}', "line 2: answer must be a string or a number"),
        ('{"prompt": " ", "answer": "b"}', "line 2: prompt is empty"),
        ('{"prompt": "a", "answer": ""}', "line 2: answer is empty"),
        ('{"prompt": "\\ud800", "answer": "b"}', "line 2: prompt holds half of a surrogate pair"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, {"prompt": "fine", "answer": "1"}, line)
    for read in (lambda: JsonLines(CODEC, config_of(path)), lambda: JsonLines.alphabet(config_of(path))):
        with pytest.raises(DataError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}, {message}")
        assert str(caught.value).endswith("correct or remove the line")
        assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xe9", "answer": "b"}\n')
    with pytest.raises(DataError, match="line 2: is not JSON in UTF-8"):
        JsonLines(CODEC, config_of(path))


def test_an_answer_without_a_number_cannot_be_matched_as_one(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "one"})
    JsonLines(CODEC, config_of(path))
    with pytest.raises(DataError, match=r"line 2: answer 'one' holds no number"):
        JsonLines(CODEC, config_of(path, match="number"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set environment\.path"):
        JsonLines(CODEC, config_of(""))
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read \(No such file"):
        JsonLines(CODEC, config_of(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory"):
        JsonLines(CODEC, config_of(tmp_path))
    with pytest.raises(DataError, match=r"has no problems; write one JSON object a line"):
        JsonLines(CODEC, config_of(write(tmp_path, "", " ")))


def test_splits_of_a_large_file(tmp_path: Path) -> None:
    """Equal prompts stay on one side, every line is in one split, an eighth is held out."""
    lines = numbered(2000) + numbered(2000)
    environment = JsonLines(CODEC, config_of(write(tmp_path, *lines)))
    sizes = environment.problem_count("train"), environment.problem_count("held_out")
    train, held_out = prompts(environment, "train", sizes[0]), prompts(environment, "held_out", sizes[1])
    assert not {*train} & {*held_out}
    assert Counter(train + held_out) == {f"question {i}": 2 for i in range(2000)}
    assert 2 * 190 < sizes[1] < 2 * 310  # 250 of 2,000 within four standard errors


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (7, 1)])
def test_few_lines_are_split_by_place(tmp_path: Path, count: int, held_out: int) -> None:
    environment = JsonLines(CODEC, config_of(write(tmp_path, *numbered(count))))
    assert environment.problem_count("train") == count - held_out
    assert prompts(environment, "held_out", 2) == [f"question {count - 1}"] * 2
    assert {*prompts(environment, "train", count)} == {f"question {i}" for i in range(count - 1)}


@pytest.mark.parametrize("start", range(40))
def test_neither_split_is_ever_empty(tmp_path: Path, start: int) -> None:
    """Eight lines are often all on one side of the hash."""
    lines = [{"prompt": f"{start}.{i}", "answer": "x"} for i in range(8)]
    environment = JsonLines(CODEC, config_of(write(tmp_path, *lines)))
    counts = environment.problem_count("train"), environment.problem_count("held_out")
    assert min(counts) >= 1
    assert sum(counts) == 8


def test_one_prompt_is_shared_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {"prompt": "only", "answer": "1"})
    with caplog.at_level(logging.WARNING):
        environment = JsonLines(CODEC, config_of(path))
    assert prompts(environment, "train", 3) == prompts(environment, "held_out", 3) == ["only"] * 3
    assert f"{path} has a single prompt" in caplog.text


def test_every_line_comes_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    path = write(tmp_path, *numbered(50))
    environment = JsonLines(CODEC, config_of(path))
    count = environment.problem_count("train")
    epochs = [prompts(environment, "train", 3 * count)[e * count : (e + 1) * count] for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    assert all(len({*epoch}) == count for epoch in epochs)
    far = 2**40 - 7
    assert environment.problem(far, "train") == JsonLines(CODEC, config_of(path)).problem(far, "train")


def test_a_prompt_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, *numbered(20), {"prompt": "x" * 30, "answer": "1"}, *numbered(30)[20:])
    environment = JsonLines(CODEC, config_of(path))
    environment.check_context(32)  # 31 tokens with the template's, and one for an answer
    with pytest.raises(DataError, match=rf"{path}, line 21: the prompt takes 31 tokens .* holds 31"):
        environment.check_context(31)


def play(path: Path, response: str, ending: Sequence[int] = (END,), **settings: Any) -> tuple[float, str]:
    environment = JsonLines(CODEC, config_of(path, **settings))
    episode = Episode(
        OneAnswer([*CODEC.encode(response), *ending]), seed=0, session=0, stop=frozenset((END,))
    )
    record = episode.trajectory(asyncio.run(environment.play(environment.problem(0, "train"), episode)))
    shown = CODEC.encode_prompt("6*7=")
    assert record.tokens.tolist()[: len(shown)] == shown
    assert record.action_mask.tolist() == [False] * len(shown) + [True] * (len(record.tokens) - len(shown))
    return record.reward, record.outcome


@pytest.mark.parametrize(
    ("match", "response", "reward"),
    [
        ("exact", " 42\n", 1.0),
        ("exact", "42.0", 0.0),
        ("exact", "", 0.0),
        ("contains", "it is 42!", 1.0),
        ("contains", "it is 24!", 0.0),
        ("contains", "", 0.0),
        ("number", "6*7=42.00.", 1.0),
        ("number", "42, not 41", 0.0),
        ("number", "", 0.0),
    ],
)
def test_play(tmp_path: Path, match: str, response: str, reward: float) -> None:
    path = write(tmp_path, {"prompt": "6*7=", "answer": 42})
    assert play(path, response, match=match) == (reward, "finished")


def test_an_answer_cut_by_its_limit(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "6*7=", "answer": 42})
    assert play(path, "42424242", match="exact", max_tokens=2) == (1.0, "truncated")


def test_playing_an_unchecked_prompt_overflows(tmp_path: Path) -> None:
    environment = JsonLines(CODEC, config_of(write(tmp_path, {"prompt": "6*7=", "answer": 42})))
    episode = Episode(OneAnswer([END], context_length=4), seed=0, session=0, stop=frozenset((END,)))
    with pytest.raises(ContextOverflowError, match="5 observed tokens do not fit"):
        asyncio.run(environment.play(environment.problem(0, "train"), episode))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.0", "1234"),
        ("total: $1,234,567.89.", "1234567.89"),
        ("-3", "-3"),
        ("= -3.", "-3"),
        ("\N{MINUS SIGN}3", "-3"),
        ("+3", "3"),
        ("10-3", "3"),
        ("(10)-3", "3"),
        ("x-3", "3"),
        ("10 - 3", "3"),
        ("(-3)", "-3"),
        ("1,2", "2"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("3.", "3"),
        ("3. and 4.5.", "4.5"),
        ("007", "7"),
        ("2e3", "2000"),
        ("2E-3", "0.002"),
        ("**42**", "42"),
        ("\\boxed{42}", "42"),
        ("0.1", "0.1"),
        ("٣ then 4", "4"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "-", ".", ",", "٣", "−", "e5"[:1]])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@settings(deadline=None)
@given(
    value=st.decimals(-(10**12), 10**12, places=3, allow_nan=False),
    words=st.text("abc =:$(", max_size=5),
    grouped=st.booleans(),
)
def test_a_formatted_number_is_read_back_exactly(value: Decimal, words: str, grouped: bool) -> None:
    text = f"first 17, then {words} {value:,}" if grouped else f"17 {words} {value:f} {words}"
    assert last_number(text) == value
    assert matches_number(text, str(value))
    assert not matches_number(text, str(value + Decimal("0.001")))


@settings(deadline=None)
@given(text=st.text() | st.text("0123456789,.-+eE ", max_size=60))
def test_any_text_is_judged(text: str) -> None:
    assert matches_number(text, "5") in (True, False)


@settings(deadline=None)
@given(answer=st.text(min_size=1).filter(str.strip), before=st.text(), after=st.text())
def test_exact_and_contains(answer: str, before: str, after: str) -> None:
    assert contains(before + answer + after, answer)
    assert matches_exactly(f"\n {answer}\t", answer)
    assert not matches_exactly(answer + "x", answer)
    assert not matches_exactly("", answer)
    assert not contains("", answer)
