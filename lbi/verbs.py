"""Verbs: look at what was run. They know only the store, so they work from any shell."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lbi.config import TrackerConfig
from lbi.errors import InputError
from lbi.store import Store
from lbi.sweep_folder import find


def run(verb: str, arguments: Sequence[str]) -> int:
    """Carry out a verb; its exit code."""
    if verb == "doctor":
        return _doctor(arguments)
    given = _parse(verb, arguments)
    if not Path(given.store).is_dir():
        raise InputError("store", given.store, "there is no such store", "Name it with --store or LBI_STORE")
    store = Store.open(given.store, write=verb not in ("status", "logs", "recipe", "trace"))
    sweep = find(store, given.sweep)
    return VERBS[verb](store, sweep, given)


def _doctor(arguments: Sequence[str]) -> int:
    from lbi import doctor

    parser = argparse.ArgumentParser(prog="python -m lbi doctor")
    parser.add_argument("--roofline", action="store_true", help="the speed that the memory allows each quantizer")
    parser.add_argument("overrides", nargs="*", help="with --roofline: model=..., workload=... and other overrides")
    given = parser.parse_args(list(arguments))
    return doctor.roofline(given.overrides) if given.roofline else doctor.examine()


def _parse(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m lbi {verb}")
    if verb == "logs":
        parser.add_argument("sweep", help="name of a sweep, or its beginning")
        parser.add_argument("cell", help="number of a cell, a part of its name, or its run id")
        parser.add_argument("-f", "--follow", action="store_true", help="go on as the log grows")
    elif verb == "trace":
        parser.add_argument("run", help="run id, or number or part of the name of a cell of the sweep")
        parser.add_argument("other", nargs="?", help="another one, which the first is compared with")
        parser.add_argument("--sweep", help="name of a sweep, or its beginning; left out: the newest")
    elif verb == "recipe":
        parser.add_argument("run", help="run id, or number or part of the name of a cell of the sweep")
        parser.add_argument("--sweep", help="name of a sweep, or its beginning; left out: the newest")
        parser.add_argument("-o", "--output", help="file to write; left out: the script is printed")
    else:
        parser.add_argument("sweep", nargs="?", help="name of a sweep, or its beginning; left out: the newest")
    parser.add_argument("--store", default=os.environ.get("LBI_STORE", "lbi_store"), help="folder of the store")
    if verb == "status":
        parser.add_argument("--watch", action="store_true", help="look again every few seconds until all is over")
    if verb == "cancel":
        parser.add_argument("filter", nargs="?", help="only cells whose name has this part")
    if verb == "report":
        parser.add_argument("--baseline", help="cell that ratios refer to, by a part of its name or its run id")
        parser.add_argument("--against", help="another sweep, or an env_id, that each cell is compared with")
        parser.add_argument("--max-kld", type=float, help="bound on the mean KLD of an answer, in nats")
    if verb == "sync":
        parser.add_argument("--project", default="lbi", help="W&B project")
        parser.add_argument("--entity", help="W&B team or user")
    return parser.parse_args(list(arguments))


def _status(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi import status

    return status.watch(store, sweep) if given.watch else status.show(store, sweep)


def _logs(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi import logs

    return logs.show(store, sweep, given.cell, given.follow)


def _cancel(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi import cancel

    return cancel.cancel(store, sweep, given.filter)


def _report(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.comparing import resolve
    from lbi.drive import write_reports
    from lbi.sweep_folder import change_header

    against = resolve(store, given.against) if given.against else None
    if given.baseline or against or given.max_kld is not None:
        change_header(store, sweep, baseline=given.baseline, max_kld=given.max_kld, against=against)
    write_reports(store, sweep)
    return 0


def _recipe(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.recipe import script

    return script.show(store, sweep, given.run, given.output)


def _trace(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi import compare_traces

    return compare_traces.show(store, sweep, given.run, given.other)


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


VERBS = {
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "report": _report,
    "collect": _collect,
    "sync": _sync,
    "recipe": _recipe,
    "trace": _trace,
}
