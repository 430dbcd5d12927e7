"""Which quantizer runs on which hardware: the plan's own rules, asked about machines that are not here.

The made-up machines have every optional package, so that a "no" is the hardware's (or the
model's, where all of them say it).
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lbi import environment, rules
from lbi.config import LbiConfig
from lbi.model_files import ModelFacts
from lbi.quantizers import FAMILIES, Method
from lbi.rules import Machine

CAPABILITIES = (8.0, 8.9, 9.0, 10.0)
"""An A100, an L4 or RTX 4090, an H100 or H200, a B200."""

NOT_ASKED = frozenset({"gpu_is_there"})
"""Rules about this machine alone."""

WIDTH = 120


@dataclass(frozen=True, slots=True)
class Line:
    """An option: why it cannot run here (None if it can), and whether it can on each kind of hardware."""

    option: str
    here: str | None
    runs_on: Mapping[str, bool]


def kinds() -> dict[str, Machine]:
    """The made-up machines, by what their column is called."""
    installed = {**dict.fromkeys(_optional_packages(), ""), **environment.packages()}
    made = {"CPU": Machine("cpu", installed, has_compiler=True)}
    for capability in CAPABILITIES:
        made[f"sm_{round(10 * capability)}"] = Machine("cuda", installed, has_compiler=True, capability=capability)
    return made


def _optional_packages() -> set[str]:
    """What any method of any family asks for."""
    tables: list[dict[str, Method]] = [
        importlib.import_module(f"lbi.quantizers.{family}").METHODS for family in FAMILIES
    ]
    return {name.rpartition(":")[2] for table in tables for method in table.values() for name in method.needs.packages}


def runs_on(config: LbiConfig, facts: ModelFacts) -> dict[str, bool]:
    """Whether each kind of hardware can run the cell, `engine.device` set to suit it."""
    found = {}
    for name, machine in kinds().items():
        engine = replace(config.engine, device=machine.device)  # type: ignore[arg-type]
        found[name] = rules.refuse(replace(config, engine=engine), facts, machine, NOT_ASKED) is None
    return found


def table(lines: list[Line]) -> Iterator[str]:
    """A line an option, then the reasons of this machine; none longer than `WIDTH`."""
    heads = ["here", *lines[0].runs_on] if lines else []
    first = max(len(name) for name in ("quantizer", *(line.option for line in lines))) + 2
    yield f"{'quantizer':<{first}}" + "".join(f"{head:<8}" for head in heads).rstrip()
    for line in lines:
        cells = [line.here is None, *line.runs_on.values()]
        yield f"{line.option:<{first}}" + "".join(f"{'yes' if cell else 'no':<8}" for cell in cells).rstrip()
    refused = [line for line in lines if line.here is not None]
    if refused:
        yield ""
        yield "Why not here:"
    for line in refused:
        yield from textwrap.wrap(
            f"{line.option:<{first}}{line.here}", WIDTH - 2, subsequent_indent=" " * first, break_on_hyphens=False
        )
