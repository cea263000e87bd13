"""Every field of the config by its dotted name, with what it allows in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from vcpo.config.sections import Config, Section

KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list, with commas between its values",
}


@dataclass(frozen=True)
class Setting:
    """One field, as its class declares it."""

    section: str
    name: str
    sentence: str
    schema: dict[str, Any]
    """JSON schema of the value, without the null of a field that may be unset."""
    may_be_unset: bool
    words: tuple[str, ...] = ()
    """What it may be beside a value of its schema, such as ``calibrated`` for a number."""

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def choices(self) -> list[str]:
        """The values allowed, where they can be listed; else empty."""
        return self.schema.get("enum") or [self.schema[key] for key in ("const",) if key in self.schema]

    @property
    def allowed(self) -> str:
        """In words: ``a whole number, at least 2 and at most 26``; ``one of async, exact``."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        bounds = " and ".join(_bounds(self.schema))
        values = KINDS[self.schema["type"]] + (f", {bounds}" if bounds else "")
        return ", or ".join([values, *self.words])


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    low = schema.get("minimum")
    if (above := schema.get("exclusiveMinimum")) is not None:
        if schema["type"] == "integer":
            low = above + 1
        else:
            yield f"above {above}"
    if low is not None:
        yield f"at least {low}"
    if (below := schema.get("exclusiveMaximum")) is not None:
        yield f"below {below}"
    if (high := schema.get("maximum")) is not None:
        yield f"at most {high}"


def settings_of(section: str, cls: type[Section]) -> Iterator[Setting]:
    """The fields of one section, in order."""
    for name, schema in cls.model_json_schema()["properties"].items():
        kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
        sentence = " ".join(schema.get("description", "").split())
        unset = any(kind.get("type") == "null" for kind in schema.get("anyOf", ()))
        words = tuple(kind["const"] for kind in kinds[1:])
        yield Setting(section, name, sentence, kinds[0], may_be_unset=unset, words=words)


SETTINGS = {
    setting.dotted: setting
    for section, info in Config.model_fields.items()
    for setting in settings_of(section, cast(type[Section], info.annotation))
}
"""Every setting, in the order of the classes."""


def nearest(dotted: str) -> str | None:
    """The setting that was probably meant: of this name in another section, else of nearly this name in
    this section, else (the section is unknown too) of nearly this dotted name."""
    section, _, name = dotted.rpartition(".")
    same_name = [known for known in SETTINGS if known.endswith(f".{name}")]
    siblings = {setting.name: setting.dotted for setting in SETTINGS.values() if setting.section == section}
    if same_name:
        found = difflib.get_close_matches(dotted, same_name, 1, cutoff=0)
    elif siblings:
        found = [siblings[near] for near in difflib.get_close_matches(name, siblings, 1)]
    else:
        found = difflib.get_close_matches(dotted, SETTINGS, 1, cutoff=0)
    return found[0] if found else None


def hint(dotted: str, prefix: str = "") -> str:
    """What to write instead of an unknown name."""
    if near := nearest(dotted):
        return f"did you mean {prefix}{near}?"
    section = dotted.partition(".")[0]
    return f"[{section}] has " + ", ".join(s.name for s in SETTINGS.values() if s.section == section)
