"""Results to W&B after a sweep, without a risk to the driver.

The driver never waits for W&B longer than `tracker.timeout_s`, and wandb never runs in its
process: another one does the writing and is ended with all its helpers when time is up. What
was not written then, the next call writes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lbi.config import TrackerConfig
from lbi.files import BadFile, read_json, write_json, write_text
from lbi.store import SCHEMA, Store
from lbi.trackers.wandb_access import may_be_online_now, wished_mode
from lbi.trackers.wandb_runs import Ledger, Run, of_sweep
from lbi.trackers.wandb_sweep_run import SweepRun, sweep_run
from lbi.typed import plain

MARK = "LBI_WANDB_WRITER"
"""Environment variable by which a writer's helpers are known: wandb puts them in a session of their own."""

KILL_S = 5.0

STOP_S = 0.1
"""How long a sweep that ends may wait for a writer beside it to be noticed."""

ABOUT_ONE_RUN = (
    "WANDB_CONFIG_PATHS",
    "WANDB_DIR",
    "WANDB_JOB_TYPE",
    "WANDB_NAME",
    "WANDB_NOTES",
    "WANDB_PROGRAM",
    "WANDB_RESUME",
    "WANDB_RUN_GROUP",
    "WANDB_RUN_ID",
    "WANDB_SERVICE",
    "WANDB_SWEEP_ID",
    "WANDB_TAGS",
)
"""Variables that are meant for another W&B run than ours, or for another helper process."""


def track_in_process(store: Store, sweep: str, config: TrackerConfig) -> str:
    """Have the sweep's results written to W&B; what became of them, for the user."""
    started = time.monotonic()
    wish, who = wished_mode(config.mode)
    if wish == "disabled":
        return f"W&B: off ({who})"
    try:
        runs, ledger = of_sweep(store, sweep), Ledger(store, sweep, config)
        problem = ""
        if _is_pending(runs, ledger, wish) or _is_untold(sweep_run(store, sweep, ledger), ledger, wish):
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
            code = _run_writer([str(store.root), sweep, name], scratch, left, meanwhile)
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


def _run_writer(
    arguments: Sequence[str], scratch: Path, seconds: float, stop: threading.Event | None = None
) -> int | None:
    """Exit code of a writer, None if its time was up, or `stop` was set. Nothing it started is alive afterwards."""
    mark = secrets.token_hex(8)
    with (scratch / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lbi.trackers.wandb_writer", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(mark, scratch),
            start_new_session=True,
        )
    end = time.monotonic() + seconds
    try:
        while not (stop and stop.is_set()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=max(0.0, min(end - time.monotonic(), STOP_S if stop else seconds)))
            if time.monotonic() >= end:
                break
        return None
    finally:
        _kill(process.pid)
        process.wait()
        _kill_marked(mark)


def _environment(mark: str, scratch: Path) -> dict[str, str]:
    """The user's keys and addresses, nothing that is about another run, and no files in the home folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ABOUT_ONE_RUN}
    return kept | {
        MARK: mark,
        "LBI_PARENT": str(os.getpid()),
        # Otherwise its helper reports to its makers, also when offline.
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CACHE_DIR": str(scratch / "cache"),
        "WANDB_DATA_DIR": str(scratch / "data"),
    }


def _kill_marked(mark: str) -> None:
    """End every process that has the mark in its environment, and wait until none has."""
    end = time.monotonic() + KILL_S
    while (found := list(_marked(mark))) and time.monotonic() < end:
        for pid in found:
            _kill(pid)
        time.sleep(0.02)


def _marked(mark: str) -> Iterator[int]:
    """Processes with the mark. Where there is no /proc there are none; wandb-core then ends with its parent."""
    wanted = f"{MARK}={mark}".encode()
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in Path(entry.path, "environ").read_bytes().split(b"\0"):
                        yield int(entry.name)


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


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
