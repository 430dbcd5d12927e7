"""Turns a composed mapping into frozen dataclasses, or says which field is wrong.

OmegaConf could check types itself, but its frozen nodes refuse command line
overrides, its bounds are none, and its errors speak of nodes. Here a knob
carries its documentation and bounds, and a bad value is an `InputError`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lbi.errors import InputError

T = TypeVar("T")


def knob(
    doc: str,
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its documentation and its bounds.

    `low` and `high` are allowed themselves, `above` is not.
    """
    metadata = {"doc": doc, "low": low, "high": high, "above": above}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make a `cls` from `values`; `path` is the dotted name of the mapping itself.

    Raises `InputError` for a missing, unknown, ill-typed or out-of-bounds knob.
    """
    known, hints = _fields(cls), _hints(cls)  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in known:
            raise InputError(
                f"{prefix}{name}", values[name], "there is no such knob", f"{path or 'lbi'} has: {', '.join(known)}"
            )
    made = {}
    for name, spec in known.items():
        if name in values:
            made[name] = _convert(hints[name], values[name], prefix + name, spec)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise InputError(prefix + name, None, "is not given", f"Add it to the YAML of {path or 'the config'}")
    return cls(**made)


def plain(value: Any) -> Any:
    """The JSON form of a config: dataclasses as dicts, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name)) for spec in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@cache
def _fields(cls: type) -> dict[str, Field[Any]]:
    return {spec.name: spec for spec in fields(cls)}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _convert(hint: Any, value: Any, name: str, spec: Field[Any]) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(name, value, "is a group of knobs, not a value")
        return build(hint, value, name)  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if value is None:
        raise InputError(name, None, "must have a value", f"It is: {spec.metadata['doc']}")
    if get_origin(hint) is Literal:
        return _choice(get_args(hint), value, name)
    origin = get_origin(hint) or hint
    if origin is tuple:
        return tuple(_scalar(str, item, name) for item in _sequence(value, name))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(name, value, "must be a mapping", "For example {key: value}")
        return dict(value)
    made = _scalar(origin, value, name)
    _check_bounds(made, name, spec)
    return made


def _sequence(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise InputError(name, value, "must be a list", "For example [a,b]")
    return list(value)


def _choice(allowed: tuple[Any, ...], value: Any, name: str) -> Any:
    # `in` alone would take True for 1 and 0.0 for 0.
    for option in allowed:
        if type(option) is type(value) and option == value:
            return option
    raise InputError(name, value, "is not one of its values", f"Choose from: {', '.join(map(str, allowed))}")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _scalar(kind: type, value: Any, name: str) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise InputError(name, value, "must be true or false")
    if kind is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise InputError(name, value, "must be text")
    number = _number(value)
    if kind is int:
        if number is None or number != number or abs(number) == float("inf") or number != int(number):
            raise InputError(name, value, "must be a whole number")
        return int(number)
    if number is None or number != number:
        raise InputError(name, value, "must be a number")
    return number


def _check_bounds(value: Any, name: str, spec: Field[Any]) -> None:
    low, high, above = (spec.metadata.get(key) for key in ("low", "high", "above"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    checks: list[tuple[float | None, Callable[[float], bool], str]] = [
        (low, lambda bound: value >= bound, "at least"),
        (high, lambda bound: value <= bound, "at most"),
        (above, lambda bound: value > bound, "more than"),
    ]
    for bound, holds, words in checks:
        if bound is not None and not holds(bound):
            raise InputError(name, value, f"must be {words} {bound:g}", f"It is: {spec.metadata['doc']}")
