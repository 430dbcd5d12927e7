"""Joins a sweep's plan with the store: one row per cell, none missing.

The rows are what every report is made of. They can be made again at any time, on any
machine that sees the store, and while the sweep is running.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbi.config import AXES
from lbi.cost import PHASES
from lbi.files import write_bytes, write_text
from lbi.metrics import METRICS, WITH_ERROR, WITH_INTERVAL
from lbi.store import UNFINISHED, Result, Store
from lbi.sweep_folder import environments, find_result, read_plan
from lbi.verdicts import DUPLICATE, PRUNED

Row = dict[str, Any]

OTHER_METRICS = (
    "repetitions",
    "interval_coverage",
    "void_samples",
    "foreign_cpu",
    "idle_cpu",
    "mean_nll",
    "quality_positions",
)
"""Numbers beside the metrics proper that say how those came about."""


NO_FUSION = "weight-only without fusion"
"""The flag of a cell whose decode step writes out whole weights before it multiplies by them."""


RACED_OUT = "raced out after"
"""Begins the flag of a cell that was not repeated as often as asked, for another one beats it on every axis."""


def metric_columns() -> list[str]:
    """Every numeric column of a row, in order."""
    columns = []
    for name in METRICS:
        columns.append(name)
        if name in WITH_INTERVAL:
            columns += [f"{name}_lo", f"{name}_hi"]
        if name in WITH_ERROR:
            columns.append(f"{name}_se")
    return columns + list(OTHER_METRICS)


def cost_columns() -> list[str]:
    """What a cell cost: wall seconds in all, and by phase of `cost.PHASES`."""
    return ["cell_s", *(f"spent_{phase.replace(' ', '_')}_s" for phase in PHASES)]


def rows(store: Store, sweep: str) -> list[Row]:
    """One row per cell of the plan, in the plan's order.

    `status` is the result's status, or `pruned`, `duplicate`, `running`, `missing` (no result
    yet). Numbers that a cell does not have are None; `flags` are what its number must not be read without.
    """
    found = environments(store, sweep)
    return [_row(store, cell, found) for cell in read_plan(store, sweep)]


def in_environment(store: Store, sweep: str, env_id: str) -> list[Row]:
    """The rows as `rows` has them, with the results of one environment alone."""
    return [_row(store, {**cell, "env_id": env_id}, ()) for cell in read_plan(store, sweep)]


def _row(store: Store, cell: dict[str, Any], found: Sequence[str]) -> Row:
    row: Row = {
        "cell": cell["index"],
        "name": cell["name"],
        "verdict": cell["verdict"],
        "status": "missing",
        "reason": cell["reason"],
        "rule": cell["rule"],
        **{group: cell["choices"].get(group, "") for group in AXES},
        "overrides": " ".join(cell["overrides"]),
        "run_id": cell["run_id"],
        "env_id": cell["env_id"],
        "attempt": None,
        "finished": None,
        "folder": "",
        "missing": {},
        "flags": [],
        "cost": {},
        "compile_cache": None,
        "isolation": None,
        "raced_out_by": None,
        **dict.fromkeys(cost_columns()),
        **dict.fromkeys(metric_columns()),
    }
    if cell["verdict"] in (PRUNED, DUPLICATE):
        return row | {"status": cell["verdict"].lower()}
    result = find_result(store, found, cell["run_id"], cell["env_id"])
    if result is None or result.status in UNFINISHED:
        for env_id in dict.fromkeys((cell["env_id"], *found)):
            running = store.running(cell["run_id"], env_id)
            if running:
                return row | {"status": "running", "reason": "", "folder": str(running), "env_id": env_id}
    if result is None:
        return row
    row |= {
        "env_id": result.env_id,
        "status": result.status,
        "reason": result.reason,
        "attempt": result.attempt,
        "finished": result.finished,
        "folder": str(result.folder),
        **_cost(result),
    }
    measured = store.read(result, "metrics.json") if result.ok else None
    if measured:
        known = measured.get("metrics", {})
        row |= {name: known.get(name) for name in metric_columns()}
        row["missing"] = measured.get("missing", {})
        row["flags"] = [NO_FUSION] if row["unpacked_bytes_per_token"] else []
        row["flags"] += [f"{RACED_OUT} {result.cost.get('repetitions')} samples"] if row["raced_out_by"] else []
    return row


def _cost(result: Result) -> Row:
    """What the result cost; by phase where that was kept."""
    spent = result.cost.get("phases_s", {})
    by_phase = {f"spent_{phase.replace(' ', '_')}_s": spent.get(phase) for phase in PHASES}
    told = {"compile_cache": result.cost.get("compile")}
    told |= {name: result.cost.get(name) for name in ("isolation", "raced_out_by")}
    return {"cost": result.cost, **told, "cell_s": result.seconds, **by_phase}


def write_tables(folder: Path, table: Sequence[Row]) -> None:
    """results.csv and results.parquet in the sweep's folder; `flags` is one text in them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [row | {"flags": "; ".join(row["flags"])} for row in table]
    names = [name for name in (table[0] if table else {}) if name not in ("missing", "cost")]
    columns = {name: [row[name] for row in table] for name in names}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*columns.values(), strict=True))
    write_text(folder / "results.csv", text.getvalue())
    numbers = {*metric_columns(), *cost_columns(), "finished"}
    fields = [
        (name, pa.float64() if name in numbers else pa.int64() if name in ("cell", "attempt") else pa.string())
        for name in names
    ]
    schema = pa.schema(fields, metadata={"lbi_schema": "1"})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pydict(columns, schema=schema), sink)
    write_bytes(folder / "results.parquet", sink.getvalue().to_pybytes())
