"""The section about the machines and the software that the results come from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lbi.collect import Row
from lbi.report.facts import Facts, part
from lbi.report.figures import NOTHING, finite, size
from lbi.report.markup import Html, element, grid, joined, paragraph


@dataclass(slots=True)
class Environment:
    """One environment: what `env.json` says, and what the results made in it add."""

    known: dict[str, Any]
    env_ids: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    threads: set[str] = field(default_factory=set)
    attention: set[str] = field(default_factory=set)
    bandwidth: set[float] = field(default_factory=set)
    flops: set[float] = field(default_factory=set)
    results: int = 0


def environments(rows: Sequence[Row], facts: Mapping[int, Facts]) -> list[Environment]:
    """The distinct ones, that of most results first. Equal machines of another host name are one."""
    found: dict[str, Environment] = {}
    for row in rows:
        about = facts[row["cell"]]
        if not about.environment:
            continue
        known = {key: value for key, value in about.environment.items() if key != "host"}
        known["gpus"] = _cards(known.get("gpus"))
        one = found.setdefault(json.dumps([known, row["env_id"]], sort_keys=True), Environment(known))
        one.results += 1
        one.env_ids.add(row["env_id"])
        one.hosts.add(str(about.environment.get("host")))
        for name, texts in (("threads", one.threads), ("attention", one.attention)):
            if about.effective.get(name) is not None:
                texts.add(str(about.effective[name]))
        peaks = part(about.effective, "peaks")
        for name, values in (("read_bytes_per_s", one.bandwidth), ("matmul_flop_per_s", one.flops)):
            if finite(peaks.get(name)):
                values.add(float(peaks[name]))
    return sorted(found.values(), key=lambda one: -one.results)


def _cards(gpus: Any) -> list[str]:
    """The GPUs of a machine, equal ones counted: which of them it was changes no number."""
    cards = [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    texts = Counter(_card(gpu) for gpu in cards)
    return [f"{count} × {text}" if count > 1 else text for text, count in texts.items()]


def _card(gpu: dict[str, Any]) -> str:
    known = gpu.get("memory_bytes")
    memory = f", {size(known)}" if finite(known) else ""
    return f"{gpu.get('name')}{memory}, driver {gpu.get('driver')}, compute capability {gpu.get('compute_capability')}"


def section(found: Sequence[Environment]) -> Html:
    """A table with a column per environment."""
    if not found:
        return paragraph("No result has recorded its environment yet.")
    packages = list(dict.fromkeys(name for one in found for name in part(one.known, "packages")))
    lines = [(name, *(show(one) for one in found)) for name, show in PROPERTIES]
    lines += [(name, *(str(part(one.known, "packages").get(name, NOTHING)) for one in found)) for name in packages]
    heads = [f"environment {index}" if len(found) > 1 else "value" for index in range(1, len(found) + 1)]
    table = grid(["", *heads], lines, class_="facts")
    if len(found) == 1:
        return table
    warning = "Results come from several environments: a difference in speed between two cells may be one of machines."
    return joined([paragraph(warning, class_="note"), table])


def _git(one: Environment) -> str:
    git = part(one.known, "git")
    if not git:
        return "not run from a checkout"
    changed = f", with uncommitted changes {git['dirty']}" if git.get("dirty") else ""
    return f"{git.get('commit')}{changed}"


def _memory(one: Environment) -> str:
    memory = one.known.get("memory_bytes")
    return size(memory) if finite(memory) else NOTHING


def _range(values: set[float], unit: float, name: str) -> str:
    """One value, or the smallest and the largest of several."""
    if not values:
        return NOTHING
    low, high = f"{min(values) / unit:.4g}", f"{max(values) / unit:.4g}"
    return f"{low} {name}" if low == high else f"{low} to {high} {name}"


def _texts(values: set[str]) -> str:
    return ", ".join(sorted(values)) or NOTHING


def _gpus(one: Environment) -> Html | str:
    return joined([element("div", card) for card in one.known["gpus"]]) or "none"


PROPERTIES: tuple[tuple[str, Callable[[Environment], str]], ...] = (
    ("results", lambda one: str(one.results)),
    ("env_id", lambda one: _texts(one.env_ids)),
    ("host", lambda one: _texts(one.hosts)),
    ("GPU", _gpus),
    ("CPU", lambda one: str(one.known.get("cpu", NOTHING))),
    ("cores", lambda one: str(one.known.get("cores", NOTHING))),
    ("threads used", lambda one: _texts(one.threads)),
    ("memory", _memory),
    ("read bandwidth, measured", lambda one: _range(one.bandwidth, 1e9, "GB/s")),
    ("matmul peak, measured", lambda one: _range(one.flops, 1e9, "GFLOP/s")),
    ("attention", lambda one: _texts(one.attention)),
    ("operating system", lambda one: str(one.known.get("os", NOTHING))),
    ("lbi", lambda one: str(one.known.get("lbi", NOTHING))),
    ("lbi's git commit", _git),
    ("python", lambda one: str(one.known.get("python", NOTHING))),
)
