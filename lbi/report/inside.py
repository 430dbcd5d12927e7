"""What a cell's details say of its inside: the kernels of its decode step, and what autoquant chose among.

Read from `effective.json`, which other versions of lbi may have written: what is not
there is left out, and what is no such thing is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbi.report.facts import part
from lbi.report.figures import finite, percent, seconds, size

MOST_KERNELS = 6

MOST_HOLDERS = 3


def kernels(effective: dict[str, Any]) -> list[str]:
    """One text a kernel, the longest first, after one with the sum."""
    seen = part(effective, "kernels")
    missing, total = seen.get("missing"), seen.get("ms_per_step")
    if missing:
        return [str(missing)]
    if not finite(total):
        return []
    top = [item for item in seen.get("top") or [] if isinstance(item, dict) and finite(item.get("share"))]
    head = f"{seconds(total / 1e3)} a decode step (time {seen.get('time', '')})"
    return [head, *(f"{percent(item['share'])} {item.get('name')}, {_calls(item)}" for item in top[:MOST_KERNELS])]


def _calls(item: Mapping[str, Any]) -> str:
    calls = item.get("calls")
    return f"{calls:.4g} calls" if finite(calls) else "? calls"


def unpacked(effective: dict[str, Any]) -> list[str]:
    """What a decode step writes of unpacked weights, and how that is known."""
    found = part(effective, "dequantized")
    total = found.get("per_token_bytes")
    return [f"{size(total)} a token: {found.get('evidence')}"] if finite(total) else []


def one_row(effective: dict[str, Any]) -> list[str]:
    """How far the kernels of a decode step are from those of the prefill, in the worst layer."""
    found = part(effective, "one_row")
    error = found.get("error")
    if not finite(error):
        return []
    return [f"{percent(error, 2)} in {found.get('layer')} ({found.get('shape')}), against {found.get('rows')} rows"]


def traces(effective: dict[str, Any]) -> list[str]:
    """One text a trace: its file in the attempt's folder, or why there is none."""
    return [f"{name}: {_trace(about)}" for name, about in part(effective, "traces").items() if isinstance(about, dict)]


def _trace(about: Mapping[str, Any]) -> str:
    if "missing" in about:
        return f"none, {about['missing']}"
    words = [str(about.get("pages") or about.get("file"))]
    if finite(about.get("peak_bytes")):
        words.append(f"{about.get('taken')}, peak {size(about['peak_bytes'])}")
        lines = [item for item in _list(about.get("largest")) if isinstance(item, dict) and finite(item.get("bytes"))]
        words += [f"{size(item['bytes'])} by {item.get('where')}" for item in lines[:MOST_HOLDERS]]
    if finite(about.get("graphs")):
        words.append(f"{about['graphs']} graphs, {about.get('recompiled')} recompiled")
    return "; ".join([*words, *(str(about[name]) for name in ("note", "failed") if about.get(name))])


def weights_from(effective: dict[str, Any]) -> list[str]:
    """Whether the run has quantized its weights itself, and why they were not kept for others if they were not."""
    notes = [note for note in _list(effective.get("quantized_notes")) if isinstance(note, str)]
    origin = effective.get("quantized")
    return [origin, *notes] if isinstance(origin, str) else notes


def choices(effective: dict[str, Any]) -> list[str]:
    """One text a shape: what was chosen for how many layers, each candidate's time, error, or why it was left out."""
    known = part(effective, "choices")
    shapes = [item for item in _list(known.get("by_shape")) if isinstance(item, dict)]
    if not shapes:
        return []
    return [*_conditions(known), *(_shape(item) for item in shapes)]


def _conditions(known: dict[str, Any]) -> list[str]:
    """What the times and the bound on the error mean, as far as it is known, in one text."""
    tokens, bound = known.get("tokens"), known.get("max_error")
    timed = f"timed at {tokens:g} {'row' if tokens == 1 else 'rows'}" if finite(tokens) else ""
    limit = f"largest error allowed {percent(bound)}" if finite(bound) else ""
    text = ", ".join(word for word in (timed, limit, known.get("from")) if word and isinstance(word, str))
    return [text] if text else []


def _shape(item: dict[str, Any]) -> str:
    sizes = [str(value) for value in _list(item.get("shape"))]
    what = f"{item.get('layers', '?')} × {' → '.join(sizes) or 'unknown shape'}"
    chosen = ", ".join(f"{name} for {count}" for name, count in part(item, "chosen").items())
    return f"{what}: {chosen or 'nothing chosen'} ({'; '.join(_candidates(item)) or 'no times'})"


def _candidates(item: dict[str, Any]) -> list[str]:
    """Every candidate with a time, the fastest first, and then those that were left out."""
    errors, refused = part(item, "error"), part(item, "refused")
    timed = {name: value for name, value in part(item, "timed_us").items() if finite(value)}
    made = []
    for name in sorted(timed, key=timed.__getitem__):
        error = f", error {percent(errors[name], 1)}" if finite(errors.get(name)) else ""
        out = f", left out: {refused[name]}" if name in refused else ""
        made.append(f"{name} {timed[name]:.3g} µs{error}{out}")
    made += [f"{name} left out: {reason}" for name, reason in refused.items() if name not in timed]
    untimed = {name: error for name, error in errors.items() if name not in {*timed, *refused} and finite(error)}
    return made + [f"{name} error {percent(error, 1)}" for name, error in untimed.items()]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def isolation(effective: dict[str, Any]) -> list[str]:
    """Whether the run had a process of its own, why if it was to share one, and what it came after."""
    found = part(effective, "isolation")
    if not found:
        return []
    if found.get("how") == "process":
        return ["a process of its own", *([str(found["why"])] if found.get("why") else [])]
    earlier = [str(run) for run in _list(found.get("after"))]
    after = [f"after {', '.join(earlier)}" if earlier else "the first of its process"]
    left = [f"{size(found['left_bytes'])} left by those runs"] if finite(found.get("left_bytes")) else []
    held = [f"with the graph that {found['graph_of']} compiled"] if found.get("graph_of") else []
    return [
        "a process that runs share",
        *after,
        *held,
        *left,
        *([str(found["compared"])] if found.get("compared") else []),
    ]
