"""Verbs: look at what was run. They know only the store, so they work from any shell."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lbi.config import TrackerConfig
from lbi.errors import InputError
from lbi.store import Store
from lbi.sweep_folder import find, read_header


def run(verb: str, arguments: Sequence[str]) -> int:
    """Carry out a verb; its exit code."""
    if verb == "doctor":
        from lbi.doctor import examine

        return examine()
    given = _parse(verb, arguments)
    if not Path(given.store).is_dir():
        raise InputError("store", given.store, "there is no such store", "Name it with --store or LBI_STORE")
    store = Store.open(given.store, write=verb != "status")
    sweep = find(store, given.sweep)
    return {"status": _status, "report": _report, "collect": _collect, "sync": _sync}[verb](store, sweep, given)


def _parse(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m lbi {verb}")
    parser.add_argument("sweep", nargs="?", help="name of a sweep, or its beginning; left out: the newest")
    parser.add_argument("--store", default=os.environ.get("LBI_STORE", "lbi_store"), help="folder of the store")
    if verb == "report":
        parser.add_argument("--baseline", help="cell that ratios refer to, by a part of its name or its run id")
        parser.add_argument("--max-kld", type=float, help="bound on the mean KLD of an answer, in nats")
    if verb == "sync":
        parser.add_argument("--project", default="lbi", help="W&B project")
        parser.add_argument("--entity", help="W&B team or user")
    return parser.parse_args(list(arguments))


def _status(store: Store, sweep: str, given: argparse.Namespace) -> int:
    """How many cells are in which state, and what is going on now."""
    from lbi.children import phase_of
    from lbi.collect import rows

    table = rows(store, sweep)
    counts = Counter(row["status"] for row in table)
    planned = time.strftime("%Y-%m-%d %H:%M", time.localtime(read_header(store, sweep)["planned"]))
    print(f"{sweep}, planned {planned}: {len(table)} cells")
    for status, count in counts.most_common():
        print(f"  {count:>5} {status}")
    for row in table:
        if row["status"] == "running":
            print(f"  running: {row['name']}, {phase_of(Path(row['folder']))}")
        elif row["status"] not in ("ok", "pruned", "duplicate", "missing"):
            print(f"  {row['status']}: {row['name']}: {row['reason']}")
    for problem in store.problems:
        print(f"  ignored in the store: {problem}")
    if counts["missing"]:
        print(f"The same command runs what is missing: {read_header(store, sweep)['command']}")
    return 0 if set(counts) <= {"ok", "pruned", "duplicate"} else 1


def _report(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.drive import write_reports
    from lbi.sweep_folder import change_header

    if given.baseline or given.max_kld is not None:
        change_header(store, sweep, baseline=given.baseline, max_kld=given.max_kld)
    write_reports(store, sweep)
    return 0


def _collect(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.collect import rows, write_tables

    table = rows(store, sweep)
    folder = store.sweep_folder(sweep)
    write_tables(folder, table)
    measured = sum(row["status"] == "ok" for row in table)
    print(f"{len(table)} cells, {measured} measured: {folder / 'results.csv'}, {folder / 'results.parquet'}")
    return 0


def _sync(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.trackers import track

    config = TrackerConfig(name="wandb", kind="wandb", project=given.project, entity=given.entity)
    print(track(store, sweep, config))
    return 0
