"""A config as TOML that :func:`vcpo.config.load_config` reads back.

The standard library reads TOML and does not write it. Flat sections of text, numbers, booleans and lists
take a few lines, which is less than a dependency.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vcpo.config.sections import Config
from vcpo.config.settings import SETTINGS


def dump_toml(config: Config, *, explain: bool = False) -> str:
    """The resolved config, every field; a field that is unset stays as a comment.

    Args:
        config: what to write.
        explain: put each field's sentence, and what it allows, above it.
    """
    return "\n\n".join("\n".join(_section(config, name, explain)) for name in Config.model_fields) + "\n"


def _section(config: Config, section: str, explain: bool) -> Iterator[str]:
    yield f"[{section}]"
    values = getattr(config, section).model_dump()
    for name, value in values.items():
        if explain:
            setting = SETTINGS[f"{section}.{name}"]
            yield f"# {setting.sentence}" + ("" if setting.allowed == "text" else f" ({setting.allowed})")
        yield f"# {name} is unset" if value is None else f"{name} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str | Path):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
