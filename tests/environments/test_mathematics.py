"""Answers judged by math-verify in processes with limits, and the environment that uses them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vcpo.config import EnvironmentConfig
from vcpo.environments import checking_process
from vcpo.environments.checking import AnswerChecker
from vcpo.environments.mathematics import Mathematics
from vcpo.environments.protocol import DataEnvironment, Environment, Episode, FiniteEnvironment
from vcpo.errors import ConfigError, EnvironmentFailure
from vcpo.samplers.protocol import Completion

END = 0


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    """One, because its process takes seconds to start."""
    made = AnswerChecker()
    yield made
    made._finalizer()


def is_right(checker: AnswerChecker, response: str, reference: str) -> bool:
    return asyncio.run(checker.is_right(response, reference))


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"\frac{1}{2}", r"\frac12"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", "1/2"),
        (r"\frac{3}{4}", r"\frac{6}{8}"),
        (r"-\frac{2}{3}", r"\frac{-2}{3}"),
        ("1234", "1,234"),
        ("1,234", "1234"),
        ("1234567", r"\$1,234,567.00"),
        ("18", "18.0"),
        ("50", r"50\text{ cm}"),
        ("50", r"50\%"),
        ("90", r"90^\circ"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\{1,2\}", r"\{2, 1\}"),
        ("[1,2)", r"\left[1, 2\right)"),
        ("5", "x = 5"),
        (r"\text{(C)}", "C"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1.0 \\ \frac{4}{2} \end{pmatrix}"),
    ],
)
def test_equal_answers(checker: AnswerChecker, reference: str, answer: str) -> None:
    assert is_right(checker, f"We see that $\\boxed{{{answer}}}$.", reference)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        (r"\frac{1}{2}", "0.51"),
        ("1234", "12,34"),
        ("1234", "1,235"),
        ("3", "-3"),
        ("3", "4"),
        ("3", ""),
        ("3", "three"),
        ("3", r"\text{no idea}"),
        ("3", "3, 4"),
        (r"2\sqrt{3}", r"3\sqrt{2}"),
        ("(1,2)", "(2,1)"),
        ("[1,2)", "[1,2]"),
        ("x+1", "x-1"),
        ("3", "\\frac{"),
        ("3", "3" * 1001),
    ],
)
def test_unequal_answers(checker: AnswerChecker, reference: str, answer: str) -> None:
    assert not is_right(checker, f"We see that $\\boxed{{{answer}}}$.", reference)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"\boxed{1} no, \boxed{72}", True),
        (r"\boxed{72} no, \boxed{1}", False),
        ("48 + 24 = 72\n#### 72", True),
        ("48 + 24 = 72\n#### 71", False),
        ("#### 1\n\\boxed{72}", True),
        ("The answer is 72.", True),
        ("So the final answer is $72$.", True),
        ("The answer is 73.", False),
        ("Then 48 + 24 = 72", False),  # perhaps cut off in the middle of its argument
        ("72", False),
        ("", False),
        ("\N{SNOWMAN} \\boxed{72}", True),
        ("\\boxed{\ud800}", False),
    ],
)
def test_where_the_answer_of_a_response_is(checker: AnswerChecker, response: str, right: bool) -> None:
    assert is_right(checker, response, "72") is right


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", r"\sum_{k=1}^{1000000000} \frac{1}{k^3+1}"])
def test_an_endless_check_costs_its_own_answer(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its process is ended, it is logged, and others are checked meanwhile and after."""
    checker = AnswerChecker(cpu_seconds=1.5)
    caplog.set_level(logging.WARNING)

    async def check() -> list[bool]:
        return await asyncio.gather(*(checker.is_right(f"\\boxed{{{a}}}", "3") for a in (answer, "3.0")))

    assert asyncio.run(check()) == [False, True]
    assert "checking an answer took more than 1.5 s of CPU time, so it counts as wrong" in caplog.text
    assert len(checker._idle) == 1
    checker._finalizer()


def test_the_child_is_ended_by_the_system_not_by_python() -> None:
    """Its limits' signals are not handled: a handler would wait for C code that never returns."""
    checker = AnswerChecker(cpu_seconds=1.5)
    assert not is_right(checker, r"\boxed{2}", "3")
    (process,) = checker._idle
    status = Path(f"/proc/{process._child.pid}/status").read_text()
    caught, ignored = (int(status.split(f"{name}:\t")[1].split()[0], 16) for name in ("SigCgt", "SigIgn"))
    for ending in (signal.SIGPROF, signal.SIGALRM):
        assert not (caught | ignored) >> (ending - 1) & 1
    assert ignored >> (signal.SIGINT - 1) & 1  # Ctrl-C is for the run
    checker._finalizer()
    assert process._child.returncode == -signal.SIGKILL


def test_a_child_that_died_is_an_error_and_then_replaced(checker: AnswerChecker) -> None:
    assert not is_right(checker, r"\boxed{2}", "3")
    (process,) = checker._idle
    os.kill(process._child.pid, signal.SIGTERM)
    process._child.wait()
    with pytest.raises(EnvironmentFailure, match=r"ended with code -15; it is started anew"):
        is_right(checker, r"\boxed{2}", "3")
    assert is_right(checker, r"\boxed{3.0}", "3")


def test_a_child_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text('print(\'{"error": "ImportError: antlr"}\')')
    monkeypatch.setattr(checking_process, "__file__", str(broken))
    with pytest.raises(
        EnvironmentFailure, match=r"cannot be used: ImportError: antlr; pip install 'vcpo\[math\]'"
    ):
        is_right(AnswerChecker(), r"\boxed{2}", "3")
    broken.write_text("raise SystemExit(7)")
    with pytest.raises(EnvironmentFailure, match=r"cannot be used: .* ended with code 7"):
        is_right(AnswerChecker(), r"\boxed{2}", "3")


@pytest.mark.parametrize("package", ["math_verify", "antlr4"])
def test_without_math_verify(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else real(name, *rest),
    )
    with pytest.raises(ConfigError, match=rf"\({package} is not installed\): pip install 'vcpo\[math\]'"):
        AnswerChecker()


class ByteCodec:
    """Code point c is token c + 1; 0 ends; a prompt is preceded by token 9999, as by a chat template."""

    end_id = END

    def encode(self, text: str) -> list[int]:
        return [1 + ord(char) for char in text]

    def encode_prompt(self, text: str) -> list[int]:
        return [9999, *self.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token - 1) for token in tokens if token not in (END, 9999))


CODEC = ByteCodec()


class OneAnswer:
    """Samples one given answer."""

    version, context_length = 3, 500

    def __init__(self, answer: str) -> None:
        self.answer = [*CODEC.encode(answer), END]

    async def generate(
        self, tokens: Sequence[int], *, max_tokens: int, stop: frozenset[int], **_: Any
    ) -> Completion:
        return Completion(self.answer, [-0.5] * len(self.answer), [self.version] * len(self.answer), "stop")

    def release(self, session: int) -> None: ...


def played(environment: Mathematics, answer: str) -> tuple[float, str]:
    """Reward, and what the model was shown."""
    sampler: Any = OneAnswer(answer)
    episode = Episode(sampler, seed=0, session=0, stop=frozenset((END,)))
    reward = asyncio.run(environment.play(environment.problem(0, "train"), episode))
    record = episode.trajectory(reward)
    return reward, CODEC.decode(
        [t for t, acted in zip(record.tokens, record.action_mask, strict=True) if not acted]
    )


def test_episodes(tmp_path: Path, checker: AnswerChecker) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"problem": "Halve {1}.", "solution": "It is $\\boxed{\\frac12}$."}) + "\n")
    settings = {
        "path": str(path),
        "prompt_field": "problem",
        "answer_field": "solution",
        "answer_form": "boxed",
    }
    config = EnvironmentConfig.model_validate({"kind": "math", "max_tokens": 99, **settings})
    environment = Mathematics(CODEC, config)
    for protocol in (Environment, DataEnvironment, FiniteEnvironment):
        assert isinstance(environment, protocol)
    environment._checker = checker
    shown = "Halve {1}.\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert played(environment, "\\boxed{0.5}") == (1.0, shown)
    assert played(environment, "\\boxed{0.6}") == (0.0, shown)
    own = config.model_copy(update={"template": "Q: {prompt}\nA: \\boxed{"})
    assert Mathematics.alphabet(own) == "".join(sorted({*"Q: Halve {1}.\nA: \\boxed{", *"\\frac12"}))
    assert played(Mathematics(CODEC, own), "\\boxed{\\frac12}") == (1.0, "Q: Halve {1}.\nA: \\boxed{")
    with pytest.raises(ConfigError, match=r"template lacks \{prompt\}"):
        Mathematics(CODEC, config.model_copy(update={"template": "Solve."}))
    environment.check_context(len(CODEC.encode_prompt(shown)) + 1)
    with pytest.raises(ConfigError, match=r"problems\.jsonl, line 1: the prompt takes"):
        environment.check_context(len(CODEC.encode_prompt(shown)))
