"""The W&B run about a sweep as a whole: the table of all cells with links, and the HTML report.

It is written after the runs that it links to. Its artifact holds the sweep's plan, from which
`lbi collect --from-wandb` makes the sweep anew on another machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lbi.collect import Row, rows, write_tables
from lbi.config import AXES, TrackerConfig
from lbi.errors import InputError
from lbi.files import write_json
from lbi.ranking import Table, tables
from lbi.store import SCHEMA, Store
from lbi.sweep_folder import environments, read_header
from lbi.trackers.wandb_files import MB, Attachment, Attachments
from lbi.trackers.wandb_runs import PAGES, Grid, Ledger, Run, Told, of_sweep, sweep_tag

FORMAT = 1
"""Counted up when this run's content is made otherwise, so that it is written anew."""

PLACE = ("rank", "speed_ratio", "is_baseline", "on_front")
LINKS = ("run", "trace", "artifact")
NOT_SHOWN = ("missing", "folder", "verdict", "overrides")
"""Columns of a row that say nothing on another machine, or what others say."""


def sweep_run_id(sweep: str) -> str:
    """The id of the run about a sweep."""
    return "report-" + hashlib.sha256(sweep.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun(Run):
    """The run about a sweep. `cells` are its rows with place and links, `answers` what came out, in words.

    `results` says which attempt holds the result of each run, and which artifacts have its files.
    """

    store: Store
    sweep: str
    cells: Sequence[Mapping[str, Any]]
    results: Sequence[Mapping[str, Any]]
    answers: str

    job_type: ClassVar[str] = "report"
    keeps: ClassVar[Collection[str]] = (PAGES, "workspace", "wandb_report")

    def tags(self, sweeps: Sequence[str]) -> list[str]:
        """The sweep alone."""
        return [sweep_tag(self.sweep)]

    def config(self, sweep: str) -> dict[str, Any]:
        """What was asked of the report, and which options each group has. The command may hold paths."""
        options = {group: sorted({str(cell[group]) for cell in self.cells}) for group in AXES}
        return {"sweep": sweep, "baseline": self.row["baseline"], "max_kld": self.row["max_kld"], "options": options}

    def metrics(self) -> dict[str, float]:
        """None: its numbers are those of other runs, in its table."""
        return {}

    def summary(self) -> dict[str, Any]:
        """How many cells ended how, and the answers."""
        counts = Counter(cell["status"] for cell in self.cells)
        by_status = {f"cells_{status}": number for status, number in counts.items()}
        return {"cells": len(self.cells), **by_status, "answers": self.answers}

    def grids(self) -> dict[str, Grid]:
        """The table of all cells."""
        columns = list(self.cells[0]) if self.cells else []
        return {"results": (columns, [[cell[name] for name in columns] for cell in self.cells])}

    def pages(self) -> dict[str, Path]:
        """The HTML report, if it was written."""
        page = self.store.sweep_folder(self.sweep) / "report.html"
        return {"report": page} if page.is_file() else {}

    def attachments(self, config: TrackerConfig, scratch: Path) -> Attachments:
        """What makes the sweep anew: its plan, and which results it has."""
        if config.files == "none":
            return Attachments([], [])
        folder = self.store.sweep_folder(self.sweep)
        table = rows(self.store, self.sweep)
        # Two machines that hold the same results attach the same files.
        write_tables(scratch / "sweep", [row | {"folder": ""} for row in table])
        write_json(scratch / "sweep" / "results.json", {"schema": SCHEMA, "results": list(self.results)})
        files = [("plan.jsonl", folder / "plan.jsonl")]
        files += [(name, scratch / "sweep" / name) for name in ("results.csv", "results.parquet", "results.json")]
        files += [(page.name, page) for page in self.pages().values()]
        too_large = [name for name, file in files if file.stat().st_size > config.max_file_mb * MB]
        kept = [(name, file) for name, file in files if name not in too_large]
        return Attachments([Attachment(self.id, "sweep", kept)], too_large)


def _results(runs: Sequence[Run], told: Mapping[str, Told | None]) -> list[dict[str, Any]]:
    return [
        {**{name: run.row[name] for name in ("run_id", "env_id", "attempt")}, "artifacts": sorted(known.artifacts)}
        for run in runs
        if run.folder is not None and (known := told[run.id]) is not None
    ]


def sweep_run(store: Store, sweep: str, ledger: Ledger, table: Sequence[Row] | None = None) -> SweepRun | None:
    """The run about a sweep as the store has it now; None where there is nothing to tell, or no plan.

    `table` are the sweep's rows, where they have been read.
    """
    table = rows(store, sweep) if table is None else table
    runs = of_sweep(store, sweep, table)
    try:
        header = read_header(store, sweep)
    except InputError:
        return None
    if not runs:
        return None
    told = {run.id: ledger.latest(run) for run in runs}
    links = {(run.row["run_id"], run.row["env_id"], run.row["status"]): told[run.id] for run in runs}
    results = _results(runs, told)
    ranked = tables(table, header.get("baseline"), header.get("max_kld") or 0.0)
    cells = [
        _cell(row, place, links.get((row["run_id"], row["env_id"], row["status"]))) for row, place in _placed(ranked)
    ]
    asked = {name: header.get(name) for name in ("command", "baseline", "max_kld")}
    content = json.dumps([FORMAT, asked, cells, environments(store, sweep)], default=str, sort_keys=True)
    row = {"name": f"{sweep} report", "status": "ok", "attempt": 1, "run_id": "", "reason": "", **asked}
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    run = sweep_run_id(sweep)
    return SweepRun(
        run, row, None, digest, store=store, sweep=sweep, cells=cells, results=results, answers=_answers(ranked)
    )


def _placed(ranked: Sequence[Table]) -> list[tuple[Row, dict[str, Any]]]:
    placed = []
    for table in ranked:
        for item in table.ranked:
            ratio = item.ratio.value if item.ratio else None
            placed.append(
                (item.row, dict(zip(PLACE, (item.rank, ratio, item.is_baseline, item.on_front), strict=True)))
            )
    return placed


def _cell(row: Row, place: Mapping[str, Any], told: Told | None) -> dict[str, Any]:
    """A row of the table: who it is, its place, its numbers, and where to look."""
    known = {name: value for name, value in row.items() if name not in NOT_SHOWN}
    artifact = told.artifacts.get(f"result-{told.id}", "") if told else ""
    links = dict(zip(LINKS, (told.url if told else "", told.opens if told else "", artifact), strict=True))
    return {**known, "flags": "; ".join(row["flags"]), **place, **{name: link or "" for name, link in links.items()}}


def _answers(ranked: Sequence[Table]) -> str:
    """The sweep's answers, a line each; with model and workload where there are several."""
    several = len(ranked) > 1
    return "\n".join(
        f"{answer.question}{f' ({table.model}, {table.workload})' if several else ''}: {answer.text}"
        for table in ranked
        for answer in table.answers
    )
