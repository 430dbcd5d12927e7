"""Verbs: look at what was run. They know only the store, so they work from any shell."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbi.config import TrackerConfig
from lbi.errors import InputError
from lbi.store import Store
from lbi.sweep_folder import find

OF_WANDB = ("--project", "--entity", "--timeout-s", "--runs-per-minute")
"""Options of the verbs that talk to W&B."""

SYNC_S = 3600.0
"""Default bound of a verb that talks to W&B: a thousand runs at the default pace, with room."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Carry out a verb; its exit code."""
    if verb == "doctor":
        return _doctor(arguments)
    given = _parse(verb, arguments)
    from_wandb = verb == "collect" and given.from_wandb
    if verb == "collect" and not from_wandb and any(item.startswith(OF_WANDB) for item in arguments):
        raise InputError("collect", " ".join(arguments), "reads the store alone", "Add --from-wandb to ask W&B")
    if not Path(given.store).is_dir() and not from_wandb:
        raise InputError("store", given.store, "there is no such store", "Name it with --store or LBI_STORE")
    store = Store.open(given.store, write=verb not in ("status", "logs", "recipe", "trace"))
    sweep = _fetched(store, given) if from_wandb else find(store, given.sweep)
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
        parser.add_argument("--down", action="store_true", help="end the machines that the sweep has rented, too")
    if verb == "report":
        parser.add_argument("--baseline", help="cell that ratios refer to, by a part of its name or its run id")
        parser.add_argument("--against", help="another sweep, or an env_id, that each cell is compared with")
        parser.add_argument("--max-kld", type=float, help="bound on the mean KLD of an answer, in nats")
    if verb == "collect":
        parser.add_argument("--from-wandb", action="store_true", help="fetch what this store lacks from W&B first")
        parser.add_argument(
            "--from-logs", nargs="+", metavar="FILE", help="put the results that these jobs' logs hold into the store"
        )
        _add_place(parser)
    if verb == "dashboard":
        _add_place(parser)
        parser.add_argument("--baseline", help="cell that ratios refer to, by a part of its name or its run id")
    if verb == "sync":
        _add_place(parser)
        parser.add_argument("--files", choices=("none", "results", "all"), default="all", help="what is attached")
    return parser.parse_args(list(arguments))


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Where in W&B, and how long it may take."""
    parser.add_argument("--project", default="lbi", help="W&B project")
    parser.add_argument("--entity", help="W&B team or user; left out: the key's own")
    parser.add_argument("--timeout-s", type=float, default=SYNC_S, help="bound on the whole, in seconds")
    parser.add_argument("--runs-per-minute", type=float, default=60.0, help="pace after the first so many runs")


def _tracker(given: argparse.Namespace, **changes: Any) -> TrackerConfig:
    for name in ("timeout_s", "runs_per_minute"):
        if not 0 < getattr(given, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')}", getattr(given, name), "is not a number above 0")
    return TrackerConfig(
        name="wandb",
        kind="wandb",
        project=given.project,
        entity=given.entity,
        timeout_s=given.timeout_s,
        runs_per_minute=given.runs_per_minute,
        **changes,
    )


def _status(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi import status

    return status.watch(store, sweep) if given.watch else status.show(store, sweep)


def _logs(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi import logs

    return logs.show(store, sweep, given.cell, given.follow)


def _cancel(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi import cancel

    return cancel.cancel(store, sweep, given.filter, given.down)


def _report(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.comparing import resolve
    from lbi.report.write import write_reports
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
    from lbi.executors import homecoming

    if given.from_logs:
        print(homecoming.collect_logs(store, sweep, [Path(name) for name in given.from_logs]))
    elif not given.from_wandb:
        said = homecoming.collect(store, sweep)
        if said:
            print(f"From rented machines: {said}")
    table = rows(store, sweep)
    folder = store.sweep_folder(sweep)
    write_tables(folder, table)
    measured = sum(row["status"] == "ok" for row in table)
    print(f"{len(table)} cells, {measured} measured: {folder / 'results.csv'}, {folder / 'results.parquet'}")
    return 0


def _fetched(store: Store, given: argparse.Namespace) -> str:
    """The sweep, after its results came from W&B. Raises `InputError` where they cannot be had."""
    from lbi.trackers.wandb_collect import collect_in_process

    if given.sweep is None:
        raise InputError("sweep", None, "W&B is asked for a sweep by its whole name", "collect NAME --from-wandb")
    print(collect_in_process(store, given.sweep, _tracker(given)))
    return str(given.sweep)


def _sync(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.trackers import track

    print(track(store, sweep, _tracker(given, files=given.files)))
    return 0


def _dashboard(store: Store, sweep: str, given: argparse.Namespace) -> int:
    from lbi.collect import rows
    from lbi.sweep_folder import change_header
    from lbi.trackers import track
    from lbi.trackers.wandb_dashboard import check_package, save_in_process

    check_package()
    if given.baseline:
        names = [row["name"] for row in rows(store, sweep) if row["status"] == "ok"]
        ids = [row["run_id"] for row in rows(store, sweep) if row["status"] == "ok"]
        if given.baseline not in ids and not any(given.baseline in name for name in names):
            known = f"Measured are: {', '.join(names[:10])}"
            raise InputError("--baseline", given.baseline, "no measured cell has this in its name", known)
        change_header(store, sweep, baseline=given.baseline)
    config = _tracker(given, mode="online")
    print(track(store, sweep, config))
    print(save_in_process(store, sweep, config))
    return 0


VERBS = {
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "report": _report,
    "collect": _collect,
    "sync": _sync,
    "dashboard": _dashboard,
    "recipe": _recipe,
    "trace": _trace,
}
