"""How each number is written in a report: its scale, its digits, its unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeGuard

from lbi.collect import Row
from lbi.metrics import METRICS, WITH_ERROR, WITH_INTERVAL

NOTHING = "-"


def scaled(value: float | None, unit: float, form: str) -> str:
    """The value over `unit`, or a dash."""
    return NOTHING if value is None else form.format(value / unit)


def with_noise(row: Row, name: str) -> str:
    """A median with half its interval; from a thousand on, decimals would be below any noise."""
    value, low, high = row[name], row[f"{name}_lo"], row[f"{name}_hi"]
    if value is None:
        return NOTHING
    digits = 0 if value >= 1000 else 1
    spread = "" if low is None or high is None else f" ±{(high - low) / 2:.{digits}f}"
    return f"{value:.{digits}f}{spread}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share in percent; below ten percent one digit more, so that small shares do not all read 0%."""
    if value is None:
        return NOTHING
    return f"{100 * value:.{digits if abs(value) >= 0.1 else max(digits, 1)}f}%"


def small(value: float | None) -> str:
    """Quality figures span many orders: four decimals, and an exponent for what these would hide."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3g}"


def size(value: float) -> str:
    """Bytes, in powers of a thousand as the table's MB are."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """A duration, in the unit that suits it."""
    if abs(value) >= 90:
        return f"{value / 60:.1f} min"
    return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1e3:.3g} ms"


def moment(stamp: Any) -> str:
    """A time of the store as date and time here."""
    if not finite(stamp):
        return "unknown"
    return datetime.fromtimestamp(stamp).astimezone().strftime("%Y-%m-%d %H:%M %z")


def quantity(value: float, unit: str) -> str:
    """A number with its unit."""
    if unit == "B":
        return size(value)
    if unit == "s":
        return seconds(value)
    text = f"{value:,.1f}" if unit == "tok/s" else small(value) if unit in ("nat", "1") else f"{value:.4g}"
    return text if unit == "1" else f"{text} {unit}"


def with_spread(row: Row, name: str) -> str:
    """A metric with its unit and its interval or standard error."""
    unit = METRICS[name].unit
    text = quantity(row[name], unit)
    if name in WITH_INTERVAL and finite(row[f"{name}_lo"]) and finite(row[f"{name}_hi"]):
        return f"{text} ({quantity(row[f'{name}_lo'], unit)} to {quantity(row[f'{name}_hi'], unit)})"
    if name in WITH_ERROR and finite(row[f"{name}_se"]):
        return f"{text} (standard error {small(row[f'{name}_se'])})"
    return text


def finite(value: Any) -> TypeGuard[float]:
    """Whether this is a number that JSON and a chart can take."""
    return isinstance(value, int | float) and math.isfinite(value)


def listed(known: Mapping[str, Any]) -> list[str]:
    """A flat mapping as "name value" texts, nulls left out."""
    return [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in known.items() if value is not None]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
