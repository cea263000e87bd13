"""What the model is shown around a problem: a text in which ``{prompt}`` and the like stand for its parts.

Not :meth:`str.format`, because templates about mathematics are full of braces that mean themselves, as in
``\\boxed{}`` and ``\\frac{a}{b}``. Only a word in braces that no command or brace comes right before is taken
for a placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vcpo.errors import ConfigError

_PLACEHOLDER = re.compile(r"(?<![A-Za-z}])\{([A-Za-z_]+)\}")


def check_template(template: str, names: Sequence[str]) -> None:
    """Raise ConfigError for a template that lacks one of ``names`` in braces, or has another one."""
    allowed = " and ".join(f"{{{name}}}" for name in names)
    if missing := [name for name in names if f"{{{name}}}" not in template]:
        raise ConfigError(f"environment.template lacks {{{missing[0]}}}: it must contain {allowed}")
    if unknown := [name for name in _PLACEHOLDER.findall(template) if name not in names]:
        raise ConfigError(
            f"environment.template has {{{unknown[0]}}}, and all it can show is {allowed}; remove it"
        )


def fill(template: str, **values: str) -> str:
    """``template`` with each name in braces replaced, in one pass: what is put in is not read again."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)
