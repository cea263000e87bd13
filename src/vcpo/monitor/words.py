"""Numbers as a person reads them; the progress bar, the summary and the report share these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOTHING = "–"
"""Stands where a figure is not known."""


def number(summary: Mapping[str, Any], key: str) -> float | None:
    """``summary[key]`` as a finite float; None if absent or anything else."""
    value = summary.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def interval(summary: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The pair ``summary[key + "_interval"]``; None if absent or not two numbers."""
    pair = summary.get(f"{key}_interval")
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    low, high = (number({"value": bound}, "value") for bound in pair)
    return None if low is None or high is None else (low, high)


def duration(seconds: float | None) -> str:
    """4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float | None) -> str:
    """0:42, 12:05, 1:02:03: the short form beside a progress bar."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(fraction: float | None) -> str:
    """0.4712 as 47 %."""
    return NOTHING if fraction is None else f"{100 * fraction:.0f} %"


def amount(value: float | None) -> str:
    """Three significant digits, thousands short: 0.123, 12.3, 1 234, 45.6 k, 7.89 M."""
    if value is None:
        return NOTHING
    size = abs(value)
    if size >= 999_500:
        return f"{value / 1e6:.3g} M"
    if size >= 9_999.5:
        return f"{value / 1e3:.3g} k"
    if size >= 999.5:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"
