"""Results to W&B after a sweep, without a risk to the driver.

The driver never waits for W&B longer than `tracker.timeout_s`, and wandb never runs in its
process: another one does the writing and is ended with all its helpers when time is up. What
was not written then, the next call writes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lbi.collect import rows
from lbi.config import TrackerConfig
from lbi.files import BadFile, read_json, write_json, write_text
from lbi.store import SCHEMA, Store
from lbi.trackers.wandb_access import may_be_online_now, wished_mode
from lbi.trackers.wandb_process import run_bounded
from lbi.trackers.wandb_runs import Ledger, Run, of_sweep
from lbi.trackers.wandb_sweep_run import SweepRun, sweep_run
from lbi.typed import plain


def track_in_process(store: Store, sweep: str, config: TrackerConfig) -> str:
    """Have the sweep's results written to W&B; what became of them, for the user."""
    started = time.monotonic()
    wish, who = wished_mode(config.mode)
    if wish == "disabled":
        return f"W&B: off ({who})"
    try:
        table, ledger = rows(store, sweep), Ledger(store, sweep, config)
        runs, problem = of_sweep(store, sweep, table), ""
        if _is_pending(runs, ledger, wish) or _is_untold(sweep_run(store, sweep, ledger, table), ledger, wish):
            problem = _write(store, sweep, config, started)
        return _line(store, sweep, config, runs, problem)
    except Exception as error:
        # A full disk, a lost network folder, an edited file: never worth a finished sweep, whose results are safe.
        return f"W&B: not everything was written ({type(error).__name__}: {error})"


def write_meanwhile(store: Store, sweep: str, config: TrackerConfig, stop: threading.Event) -> bool:
    """Have new results written online while others are still measured; whether that went well.

    Ends, with its writer, soon after `stop` is set.
    """
    wish, _ = wished_mode(config.mode)
    if wish not in ("auto", "online"):
        return True
    try:
        ledger = Ledger(store, sweep, config)
        if all(ledger.state(run) == "online" for run in of_sweep(store, sweep)):
            return True
        if not may_be_online_now(ledger.last):
            return False
        # What cannot be written online is left to the end: no offline runs from the middle of a sweep.
        now = time.monotonic()
        problem, _ = _write_once(store, sweep, replace(config, mode="online"), now, "", meanwhile=stop)
        return not problem
    except Exception:
        # Reported at the end, when it is tried again.
        return False


def _is_pending(runs: Sequence[Run], ledger: Ledger, wish: str) -> bool:
    """Whether a writer would find something to do."""
    states = {ledger.state(run) for run in runs}
    if "" in states:
        return True
    return "offline" in states and (wish == "online" or (wish == "auto" and may_be_online_now(ledger.last)))


def _is_untold(whole: SweepRun | None, ledger: Ledger, wish: str) -> bool:
    """Whether the run about the sweep is to be written; that is online or not at all."""
    online = wish == "online" or (wish == "auto" and may_be_online_now(ledger.last))
    return whole is not None and online and ledger.state(whole) == ""


def _write(store: Store, sweep: str, config: TrackerConfig, started: float) -> str:
    """Have a writer write; why it did not write everything, empty if it did."""
    problem, refused = _write_once(store, sweep, config, started, "")
    if refused and config.mode == "auto":
        # A new process: in one that was refused, wandb holds on to the run that it did not get through.
        problem, _ = _write_once(store, sweep, config, started, problem)
    return problem


def _write_once(
    store: Store,
    sweep: str,
    config: TrackerConfig,
    started: float,
    refused: str,
    meanwhile: threading.Event | None = None,
) -> tuple[str, bool]:
    """A writer's problem, and whether the server refused; with `refused`, why, it writes offline.

    With `meanwhile` the sweep is not over: the writer stands back, and is ended when that is set.
    """
    with tempfile.TemporaryDirectory(prefix="lbi-wandb-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        left = config.timeout_s - (time.monotonic() - started)
        request = {"schema": SCHEMA, "config": plain(config), "deadline": time.time() + left, "refused": refused}
        request["meanwhile"] = meanwhile is not None
        write_json(scratch / "request.json", request)
        try:
            code = run_bounded("lbi.trackers.wandb_writer", [str(store.root), sweep, name], scratch, left, meanwhile)
        except KeyboardInterrupt:
            return "stopped by Ctrl-C", False
        if code is None:
            return f"took longer than tracker.timeout_s={config.timeout_s:g}", False
        if code != 0:
            log = (scratch / "log.txt").read_text(errors="replace").strip()
            kept = store.sweep_folder(sweep) / "wandb.log"
            write_text(kept, log + "\n")
            return f"{log.splitlines()[-1] if log else f'exit code {code}'}; see {_shown(kept)}", False
        try:
            said = read_json(scratch / "problem.json", SCHEMA) or {"problem": "", "refused": False}
        except BadFile as bad:
            return str(bad), False
        return str(said["problem"]), bool(said["refused"])


def _line(store: Store, sweep: str, config: TrackerConfig, runs: Sequence[Run], problem: str) -> str:
    """How many runs are where, and what brings the rest online."""
    ledger = Ledger(store, sweep, config)
    states = [ledger.state(run) for run in runs]
    online, offline, missing = (states.count(state) for state in ("online", "offline", ""))
    folder = _shown(store.root / "wandb")
    parts = []
    if online:
        urls = [told.project_url for run in runs if (told := ledger.latest(run)) and told.project_url]
        parts.append(f"{_count(online)} online{f' at {urls[0]}' if urls else ''}")
    if offline:
        reason = ledger.last.reason if ledger.last else "unknown"
        parts.append(f"{_count(offline)} offline under {folder} ({reason})")
    if missing:
        parts.append(f"{_count(missing)} not written ({problem or 'the sweep went on meanwhile'})")
    elif problem and not offline:
        parts.append(problem)
    line = f"W&B: {'; '.join(parts) or 'no results to write yet'}"
    again = _sync_command(store, sweep, config)
    if offline:
        return f"{line}. To upload: {again}, or wandb sync {folder}/offline-run-*"
    return f"{line}. To write the rest: {again}" if missing else line


def _sync_command(store: Store, sweep: str, config: TrackerConfig) -> str:
    words = ["python -m lbi sync", sweep]
    if store.root != Path(os.environ.get("LBI_STORE", "lbi_store")).expanduser().absolute():
        words.append(f"--store {_shown(store.root)}")
    if config.project != "lbi":
        words.append(f"--project {config.project}")
    if config.entity:
        words.append(f"--entity {config.entity}")
    return " ".join(words)


def _count(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def _shown(path: Path) -> str:
    """A path as short as it can be given in a command."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
