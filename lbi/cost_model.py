"""How long runs will take, learnt phase by phase from what the store's runs took.

A run's parts depend on different things: loading on the model, quantizing on the quantizer and the
model, compiling on the graph and on whether an earlier run has compiled it, measuring on the speed and the
tokens; a quality pass and a reference are paid once. So each part is looked up by what it depends on,
from the most alike runs to less alike ones, and what an earlier run of the same plan will have paid is
not counted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lbi.config import LbiConfig
from lbi.cost import OWN
from lbi.cost_keys import Kinds

PRIOR_S = {
    ("cpu", "eager"): 20.0,
    ("cpu", "inductor"): 80.0,
    ("cpu", "cudagraph"): 20.0,
    ("cuda", "eager"): 40.0,
    ("cuda", "inductor"): 120.0,
    ("cuda", "cudagraph"): 40.0,
}
"""Seconds a run is guessed to take where the store has no history: SmolLM2 on two cores, an 8B model on a GPU."""

SPEED_BY = (
    ("model", "quantizer", "compiler", "engine", "cache", "decoding", "workload"),
    ("model", "quantizer", "compiler", "engine", "workload"),
    ("model", "quantizer", "compiler"),
    ("model", "method", "backend"),
    ("model", "backend"),
    ("model",),
)
COMPILE_BY = (
    ("graph",),
    ("model", "quantizer", "compiler", "engine"),
    ("model", "compiler", "engine"),
    ("model", "backend"),
)
BY: dict[str, tuple[tuple[str, ...], ...]] = {
    "start": (("fork",), ()),
    "import": (("fork",), ()),
    "load": (("model", "quantizer"), ("model",)),
    "quantize": (("model", "quantizer"), ("model", "method"), ("model",)),
    "check": SPEED_BY,
    "warm up": SPEED_BY,
    "measure": SPEED_BY,
    "compile cold": COMPILE_BY,
    "compile warm": COMPILE_BY,
    "compile held": COMPILE_BY,
    "compile": COMPILE_BY,
    "quality": (("model", "quantizer", "quality", "own_pass"), ("model", "method", "quality"), ("model", "quality")),
    "quality shared": (("model",), ()),
    "reference": (("model", "quality", "workload"), ("model", "quality"), ("model",)),
    "trace": SPEED_BY,
    "other": (("model",), ()),
}
"""For each part what runs must have in common to be compared, the most alike first."""

INSTEAD = {
    "compile": ("compile cold",),
    "compile cold": ("compile warm",),
    "compile warm": ("compile cold",),
    "compile held": ("compile warm", "compile cold"),
}
"""What stands in for a part of which nothing is known yet."""

PAID_BY_THE_FIRST = ("import", "load", "quantize")
"""Parts that only the first of the runs pays for which share a process."""

QUALITY_OF = ("model", "quantizer", "quality", "own_pass")
REFERENCE_OF = ("model", "quality", "workload")


@dataclass(slots=True)
class Paid:
    """What runs before this one have paid for: by earlier results of the environment, or earlier in the plan."""

    once: set[tuple[Any, ...]] = field(default_factory=set)

    def first(self, *what: Any) -> bool:
        """Whether this is the first time; from then on it is not."""
        if what in self.once:
            return False
        self.once.add(what)
        return True


class CostModel:
    """`known` are the env_id and the cost of results, as the store has them."""

    def __init__(self, known: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        self._taken: dict[tuple[Any, ...], list[float]] = {}
        self._paid = Paid()
        self._kinds = Kinds()
        for env_id, cost in known:
            self._learn(env_id, cost)

    def _learn(self, env_id: str, cost: Mapping[str, Any]) -> None:
        kind: Any
        kind, phases = cost.get("kind"), cost["phases_s"]
        try:
            parts = _parts(kind or {}, cost, phases)
        except (KeyError, TypeError, ZeroDivisionError):
            # Another version's idea of a kind; there is nothing to learn from it.
            return
        for part, amount in parts.items():
            for place in (env_id, kind.get("device")):
                for level in BY[part]:
                    self._taken.setdefault((place, part, level, *_values(kind, level)), []).append(amount)
        if cost.get("compile") and kind.get("graph"):
            self._paid.first(env_id, "graph", kind["graph"])
        if "quality" in cost:
            self._paid.first(env_id, "quality", *_values(kind, QUALITY_OF))
        if cost.get("reference"):
            self._paid.first(env_id, "reference", *_values(kind, REFERENCE_OF))

    def paid(self) -> Paid:
        """What the store's results have paid for, for a walk over a plan to add to."""
        return Paid(set(self._paid.once))

    def seconds(self, config: LbiConfig, env_id: str, paid: Paid) -> tuple[float, bool]:
        """Seconds for one run after what is `paid`, which it adds to; and whether that is a guess."""
        kind = self._kinds.of(config)
        if self._look_up(env_id, "measure", kind) is None:
            # Nothing of this model was ever run here. What it shares counts as paid all the same.
            self._shares(env_id, kind, paid)
            return PRIOR_S[config.engine.device, config.compiler.backend], True
        total, guess = 0.0, False
        for part, times in self._shares(env_id, kind, paid).items():
            found = self._look_up(env_id, part, kind)
            if found is None and part in INSTEAD:
                others = (self._look_up(env_id, other, kind) for other in INSTEAD[part])
                found = next((other for other in others if other is not None), None)
                if found is None:
                    device = config.engine.device
                    found, guess = PRIOR_S[device, config.compiler.backend] - PRIOR_S[device, "eager"], True
            total += times * (found or 0.0)
        return total, guess

    def _shares(self, env_id: str, kind: Mapping[str, Any], paid: Paid) -> dict[str, float]:
        """The parts that the run pays for, and how many times what is learnt of each."""
        times = {"import": 1.0, "load": 1.0, "quantize": 1.0, "trace": 1.0, "other": 1.0, "check": 1.0}
        times["measure"] = float(kind["repetitions"] * kind["tokens"])
        if kind.get("shares") and not paid.first(env_id, "model", kind["shares"]):
            times = {part: count for part, count in times.items() if part not in PAID_BY_THE_FIRST}
        elif paid.first(env_id, "server") or not kind["fork"]:
            times["start"] = 1.0
        if kind["backend"] == "eager":
            times["warm up"] = float(kind["warmup"] * kind["tokens"])
        elif kind["graph"] is None:
            times["compile"] = 1.0
        else:
            first = paid.first(env_id, "graph", kind["graph"])
            held = kind.get("holds") and not paid.first(env_id, "held", kind.get("shares"), kind["holds"])
            times["compile cold" if first else "compile held" if held else "compile warm"] = 1.0
        if kind["quality"]:
            first = paid.first(env_id, "quality", *_values(kind, QUALITY_OF))
            times["quality" if first else "quality shared"] = 1.0
        if paid.first(env_id, "reference", *_values(kind, REFERENCE_OF)):
            times["reference"] = 1.0
        return times

    def _look_up(self, env_id: str, part: str, kind: Mapping[str, Any]) -> float | None:
        """The median of the most alike runs: of this environment, else of this kind of device."""
        for level in BY[part]:
            for place in (env_id, kind["device"]):
                found = self._taken.get((place, part, level, *_values(kind, level)))
                if found:
                    return median(found)
        return None


def _parts(kind: Mapping[str, Any], cost: Mapping[str, Any], phases: Mapping[str, float]) -> dict[str, float]:
    """What a finished run says about each part: seconds, or seconds a token where the amount varies."""
    parts = {part: phases.get(part, 0.0) for part in ("import", "load", "quantize", "trace", "other", "check")}
    tokens = kind["tokens"]
    parts["measure"] = phases.get("measure", 0.0) / (cost.get("samples") or kind["repetitions"]) / tokens
    if "warm up" in phases:
        parts["warm up"] = phases["warm up"] / kind["warmup"] / tokens
    if cost.get("shared_from"):
        # It used the process, with its compiler, and the model of another run: it says nothing about what these take.
        parts = {part: amount for part, amount in parts.items() if part not in PAID_BY_THE_FIRST}
        parts |= {"compile held": phases.get("compile", 0.0)} if cost.get("compile") == "held" else {}
        return parts | _passes(cost, phases)
    if not kind["fork"] or not cost.get("forked") or cost.get("new_server"):
        parts["start"] = phases.get("start", 0.0)
    if "compile" in phases:
        state = cost.get("compile")
        # Of layers compiled one by one the first run is mixed, and costs what a cold one does.
        warm = state == "warm" and "compile ahead" not in phases
        part = "compile" if state is None else "compile warm" if warm else "compile cold"
        parts[part] = phases["compile"] + phases.get("compile ahead", 0.0)
    return parts | _passes(cost, phases)


def _passes(cost: Mapping[str, Any], phases: Mapping[str, float]) -> dict[str, float]:
    """What a finished run says about the passes over the quality's text."""
    parts = {}
    if "quality" in phases:
        parts["quality" if cost.get("quality") == OWN else "quality shared"] = phases["quality"]
    if cost.get("reference") == "computed":
        parts["reference"] = phases.get("reference", 0.0)
    return parts


def _values(kind: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(kind.get(name) for name in names)
