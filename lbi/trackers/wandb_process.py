"""A process that uses wandb, within bounds: ended with all its helpers when its time is up.

wandb waits for its server in places without a limit, and starts a helper in a session of its own.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbi.files import BadFile, read_json, write_json
from lbi.store import SCHEMA

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


def run_bounded(
    module: str, arguments: Sequence[str], scratch: Path, seconds: float, stop: threading.Event | None = None
) -> int | None:
    """Exit code of `python -m module`, None if its time was up, or `stop` was set.

    Nothing that it started is alive afterwards. What it printed is in `scratch/log.txt`.
    """
    mark = secrets.token_hex(8)
    with (scratch / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
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


def ask(module: str, arguments: Sequence[str], request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What a process answers: it finds request.json in the folder that is its last argument, and leaves done.json.

    `problem` in the answer is why there is none, empty if all went well.
    """
    with tempfile.TemporaryDirectory(prefix="lbi-wandb-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        write_json(scratch / "request.json", {"schema": SCHEMA, "deadline": time.time() + seconds, **request})
        code = run_bounded(module, [*arguments, name], scratch, seconds)
        if code is None:
            return {"problem": f"took longer than {seconds:g} s, see --timeout-s"}
        with contextlib.suppress(BadFile):
            done = read_json(scratch / "done.json", SCHEMA)
            if done is not None and code == 0:
                return done
        said = (scratch / "log.txt").read_text(errors="replace").strip().splitlines()
        return {"problem": said[-1] if said else f"exit code {code}"}


def brief(error: Exception) -> str:
    """An exception in a line; wandb raises classes of its own, Python's, and some that it does not export."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
