"""The plan: every cell of the grid with a verdict, before anything is paid for.

A cell is composed once, checked against the types and the rules, given its
identity, and looked up in the store. The result is a list in which no cell is
missing: it will RUN, is DONE, is a DUPLICATE, or is PRUNED with the reason.

Sections (the subtree of one config group) are shared between cells, so whatever
depends on one section alone is worked out once per section, not once per cell.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from lbi import identity, rules, tracing
from lbi.compose import Composed
from lbi.config import AXES, IDENTITY, LbiConfig
from lbi.errors import InputError
from lbi.hydra_compose import NO_SUCH_KNOB
from lbi.model_files import ModelFacts, inspect
from lbi.reuse import Reuse
from lbi.sites import Cluster, Here, Site
from lbi.store import Result, Store
from lbi.typed import build, plain
from lbi.verdicts import DONE, DUPLICATE, PRUNED, RUN


@dataclass(slots=True)
class Cell:
    """One combination of the grid.

    `name` says how it differs from the others; `config` is None where the
    combination does not even compose; `run_id` is empty then.
    """

    index: int
    overrides: tuple[str, ...]
    choices: dict[str, str]
    config: LbiConfig | None
    run_id: str = ""
    env_id: str = ""
    verdict: str = RUN
    reason: str = ""
    rule: str = ""
    name: str = ""

    def row(self) -> dict[str, Any]:
        """The cell as a line of plan.jsonl."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self) if spec.name != "config"}


@dataclass(slots=True)
class Plan:
    """All cells, and what making the plan found out on the way."""

    cells: list[Cell]
    seconds: float
    problems: list[str] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        return Counter(cell.verdict for cell in self.cells)

    def having(self, verdict: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.verdict == verdict]


def make_plan(composed: Iterable[Composed], store: Store, started: float, sites: Here | Cluster | None = None) -> Plan:
    """Give every composed cell its verdict; `started` is when composing began, by time.perf_counter,
    and `sites` where cells will run (this machine).

    Raises `InputError` where the request itself is wrong: a value of the wrong
    type, a model that is not there, an override that fits no cell at all.
    """
    sections = _Sections(sites or Here())
    cells, first_error = [], None
    for index, item in enumerate(composed):
        cell = _cell(index, item, sections)
        if cell.verdict == PRUNED and cell.config is None:
            first_error = first_error or cell
        cells.append(cell)
    if first_error is not None and all(cell.config is None for cell in cells):
        raise InputError("overrides", " ".join(first_error.overrides), first_error.reason, "See python -m lbi --help")
    _judge(cells, sections, store)
    _name(cells)
    return Plan(cells, time.perf_counter() - started, [str(problem) for problem in store.problems])


class _Sections:
    """What is known of each section, by the identity of its (shared) content."""

    def __init__(self, sites: Here | Cluster) -> None:
        self.sites = sites
        self._typed: dict[tuple[str, int], tuple[Any, Any]] = {}
        self._placed: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._canonical: dict[tuple[str, int], tuple[Any, str]] = {}
        self._facts: dict[int, tuple[Any, ModelFacts]] = {}
        self._hints = get_type_hints(LbiConfig)

    def typed(self, group: str, content: Any) -> Any:
        """The section as its dataclass."""
        key = (group, id(content))
        if key not in self._typed:
            if not isinstance(content, Mapping):
                raise InputError(group, content, "is a group of knobs, not a value")
            self._typed[key] = (content, build(self._hints[group], content, group))
        return self._typed[key][1]

    def config(self, composed: Mapping[str, Any]) -> LbiConfig:
        """The cell's config, with `engine.device=auto` decided by where it will run."""
        made = {group: self.typed(group, content) for group, content in composed.items()}
        engine = made["engine"]
        if engine.device == "auto":
            device = self.sites.device(made["resources"])
            # Shared between cells as every section is: what is known of a section goes by its identity.
            placed = self._placed.setdefault((id(engine), device), (engine, dataclasses.replace(engine, device=device)))
            made["engine"] = placed[1]
        return LbiConfig(**made)

    def canonical(self, group: str, section: Any) -> str:
        """The section's part of the run_id."""
        key = (group, id(section))
        if key not in self._canonical:
            if group == "model":
                text = identity.canonical_model(section, self.facts(section))
            elif group == "quantizer":
                text = identity.canonical_quantizer(section)
            elif group == "engine":
                text = identity.canonical_engine(section)
            elif group == "decoding":
                text = identity.canonical_decoding(section)
            elif group == "cache":
                text = identity.canonical_cache(section)
            elif group == "workload":
                text = identity.canonical_workload(section)
            elif group == "measure":
                text = identity.canonical_measure(section)
            else:
                text = identity.canonical(plain(section))
            self._canonical[key] = (section, text)
        return self._canonical[key][1]

    def facts(self, model: Any) -> ModelFacts:
        key = id(model)
        if key not in self._facts:
            self._facts[key] = (model, inspect(model))
        return self._facts[key][1]


def _cell(index: int, composed: Composed, sections: _Sections) -> Cell:
    if composed.error is not None:
        if NO_SUCH_KNOB not in composed.error:
            raise InputError("overrides", " ".join(composed.overrides), composed.error, "See python -m lbi --help")
        return Cell(index, composed.overrides, {}, None, verdict=PRUNED, reason=composed.error, rule="no_such_knob")
    unknown = set(composed.sections) - set(sections._hints)
    if unknown:
        raise InputError(
            sorted(unknown)[0], None, "is not a config group of lbi", f"Groups: {', '.join(sections._hints)}"
        )
    config = sections.config(composed.sections)
    choices = {group: getattr(config, group).name for group in AXES}
    if config.workload.batch > 1:
        # Tables are made by workload: the speed of one of many sequences is not to be compared with that of one alone.
        choices["workload"] += f" batch={config.workload.batch}"
    return Cell(index, composed.overrides, choices, config)


def _judge(cells: list[Cell], sections: _Sections, store: Store) -> None:
    seen: dict[str, Cell] = {}
    reuse = Reuse(store)
    for cell in cells:
        config = cell.config
        if config is None:
            continue
        site = sections.sites.site(config)
        cell.run_id = identity.run_id({group: sections.canonical(group, getattr(config, group)) for group in IDENTITY})
        cell.env_id = site.env_ids[0]
        refused = rules.refuse(config, sections.facts(config.model), site.machine) if config.sweep.prune else None
        if refused:
            cell.verdict, cell.rule, cell.reason = PRUNED, refused[0].name, refused[1]
        elif cell.run_id in seen:
            cell.verdict, cell.reason = DUPLICATE, f"the same setting as cell {seen[cell.run_id].index}"
        else:
            seen[cell.run_id] = cell
            cell.verdict, cell.reason = _verdict(cell, config, reuse, site)


def _verdict(cell: Cell, config: LbiConfig, reuse: Reuse, site: Site) -> tuple[str, str]:
    sweep = config.sweep
    if sweep.mode == "force":
        return RUN, "forced"
    found = reuse.find(cell.run_id, site, config)
    if found is None:
        if sweep.mode == "read_only":
            return PRUNED, "no result in the store, and sweep.mode=read_only measures nothing"
        return RUN, ""
    cell.env_id = found.env_id
    if found.ok:
        return DONE, f"ok{_untraced(found, config)}"
    if sweep.mode == "retry":
        return RUN, f"was {found.status}"
    if sweep.mode == "cached" and reuse.deserves_another(found):
        return RUN, f"was {found.status}: tried again"
    return DONE, f"{found.status}: {found.reason}"


def _untraced(found: Result, config: LbiConfig) -> str:
    """What to know of a finished result that does not have the traces that are asked for now."""
    missing = tracing.not_taken(found.folder, config)
    return f"; it has no {' and no '.join(missing)} trace, which sweep.mode=force takes" if missing else ""


def _name(cells: list[Cell]) -> None:
    """Name each cell by what varies in the grid: options first, then single knobs."""
    _choose_for_failed(cells)
    groups = [group for group in AXES if len({cell.choices[group] for cell in cells}) > 1] or ["quantizer"]
    knobs = _varying_knobs(cells)
    for cell in cells:
        values = dict(_split(override) for override in cell.overrides)
        parts = [cell.choices[group] for group in groups]
        parts += [f"{key.split('.')[-1]}={_unescaped(values[key])}" for key in knobs if key in values]
        cell.name = " ".join(parts)


def _unescaped(value: str) -> str:
    """A value as it was typed: Hydra escapes the colon and the like of one that is not quoted."""
    return value if value.startswith(("'", '"')) else re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value)


def _choose_for_failed(cells: list[Cell]) -> None:
    """A cell that does not compose has the options its overrides name, and the defaults of the others."""
    whole = next((cell for cell in cells if cell.choices), None)
    for cell in cells:
        if not cell.choices:
            named = dict(_split(override) for override in cell.overrides)
            default = whole.choices if whole else {}
            cell.choices = {group: named.get(group, default.get(group, "")) for group in AXES}


def _varying_knobs(cells: list[Cell]) -> list[str]:
    """Keys of single knobs ("quantizer.group_size") that not every cell sets to one value."""
    values: dict[str, set[str]] = {}
    given: Counter[str] = Counter()
    for cell in cells:
        for override in cell.overrides:
            key, value = _split(override)
            # The workload's own name has its batch already.
            if "." in key and not key.startswith("hydra") and key != "workload.batch":
                values.setdefault(key, set()).add(value)
                given[key] += 1
    return [key for key, found in values.items() if len(found) > 1 or given[key] < len(cells)]


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def sole_cell(sections: Mapping[str, Any]) -> tuple[LbiConfig, ModelFacts, str | None]:
    """A single composed config, what is known of its model, and why it cannot run on this machine (None if it can)."""
    known = _Sections(Here())
    config = known.config(sections)
    try:
        facts = inspect(config.model)
    except InputError as error:
        return config, ModelFacts(None, config.model.arch, None), str(error)
    refused = rules.refuse(config, facts, known.sites.site(config).machine)
    return config, facts, refused[1] if refused else None
