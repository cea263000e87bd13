"""Where answers are found in text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.environments.answers import after_hashes, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"so $\boxed{ \frac{1}{2} }$.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{a}{\sqrt{b^{2}}}}", r"\frac{a}{\sqrt{b^{2}}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"} { \boxed{5} {", "5"),
        (r"\boxed {6}", "6"),
        (r"$\boxed 7$.", "7"),
        (r"\boxed 12.", "12"),
        (r"\boxed{}", ""),
        (r"\\boxed{8}", None),
        ("boxed{9}", None),
        (r"\boxed", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


BALANCED = st.recursive(
    st.text("ab1 +^", max_size=4), lambda inner: st.lists(inner.map("{{{}}}".format) | inner).map("".join)
)


@settings(deadline=None)
@given(before=BALANCED, inside=BALANCED, after=BALANCED)
def test_whatever_has_matching_braces_is_found_in_its_box(before: str, inside: str, after: str) -> None:
    text = f"{before}\\boxed{{0}}{before}\\boxed{{{inside}}}{after}"
    assert last_boxed(text) == inside.strip()


@settings(deadline=None)
@given(text=st.text("\\boxed{} 1", max_size=40))
def test_any_text_has_an_answer_that_occurs_in_it_or_none(text: str) -> None:
    answer = last_boxed(text)
    assert answer is None or answer in text


def test_a_text_full_of_open_boxes_takes_one_pass() -> None:
    """A quadratic search would look at 5 thousand million characters here."""
    assert last_boxed(r"\boxed{" * 10_000 + "1") is None
    assert last_boxed(r"\boxed{" * 10_000 + "1" + "}" * 10_000) == "1"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.50"),
        ("#### -3", "-3"),
        ("#### 1,2", "1,2"),
        ("#### 5\nthank you", "5"),
        ("#### 1 #### 2", "2"),
        ("####", ""),
        ("### 5", None),
    ],
)
def test_after_hashes(text: str, answer: str | None) -> None:
    assert after_hashes(text) == answer
