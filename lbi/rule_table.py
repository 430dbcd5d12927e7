"""What a rule is, and the table that rules are entered into; rules.py says more."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lbi import environment
from lbi.config import LbiConfig
from lbi.model_files import ModelFacts


@dataclass(frozen=True, slots=True)
class Machine:
    """What a rule may ask of the machine that will run the cell.

    `capability` is the GPU's compute capability (9.0 for an H100); None where it is not known yet, as it is of a
    node that the plan does not see. `has_gpu` is False only where there is certainly none.
    """

    device: str
    packages: Mapping[str, str]
    has_compiler: bool
    capability: float | None = None
    has_gpu: bool = True

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine, for runs on `device` (cpu or cuda)."""
        compiler = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
        capability = environment.capability() if device == "cuda" else None
        return cls(device, environment.packages(), compiler, capability, bool(environment.gpus()))


Check = Callable[[LbiConfig, ModelFacts, Machine], str | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """A check with its name and the evidence for it."""

    name: str
    evidence: str
    check: Check


ENTERED: list[Rule] = []


def rule(evidence: str) -> Callable[[Check], Check]:
    """Enter a check under its function's name."""

    def register(check: Check) -> Check:
        ENTERED.append(Rule(check.__name__, evidence, check))
        return check

    return register
