"""What may stand in a template, and what becomes of it."""

from __future__ import annotations

import pytest

from vcpo.environments.templates import check_template, fill
from vcpo.errors import ConfigError


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        "Solve {prompt} and put the answer in \\boxed{}.",
        "{prompt} \\boxed{answer} \\frac{a}{b}",
        '{prompt} {"json": [1]} {1} {}',
    ],
)
def test_braces_that_are_no_placeholders(template: str) -> None:
    check_template(template, ["prompt"])
    assert fill(template, prompt="1+1") == template.replace("{prompt}", "1+1")


@pytest.mark.parametrize(
    ("template", "names", "message"),
    [
        ("Solve it.", ["prompt"], r"environment.template lacks {prompt}: it must contain {prompt}"),
        (
            "{prompt} {question}",
            ["prompt"],
            r"environment.template has {question}, and all it can show is {prompt}",
        ),
        ("{numbers}", ["numbers", "target"], r"lacks {target}: it must contain {numbers} and {target}"),
        (
            "{numbers} {target} {prompt}",
            ["numbers", "target"],
            r"has {prompt}, and all it can show is {numbers} and",
        ),
    ],
)
def test_wrong_templates(template: str, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_template(template, names)
    assert message in str(caught.value)


def test_what_is_put_in_is_not_read_again() -> None:
    assert fill("{a}{b}", a="{b}", b=r"\1") == r"{b}\1"
