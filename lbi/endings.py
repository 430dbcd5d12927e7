"""How a run ended: by the word of its process if that lived to give it, else by how it died."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lbi.children import Ended, Stop, phase_of
from lbi.config import LbiConfig
from lbi.files import BadFile, read_json
from lbi.store import SCHEMA, Attempt


def verdict(attempt: Attempt, ended: Ended, config: LbiConfig, stop: Stop) -> tuple[str, str]:
    """Status and reason: the child's own word if it lived to give it, else what its death says."""
    said = _said(attempt.folder)
    if said:
        return said["status"], said["reason"]
    if ended.stopped:
        return stop.why()
    if ended.timed_out:
        return "timeout", f"took more than resources.run_timeout_s={config.resources.run_timeout_s:g} s"
    phase = phase_of(attempt.folder) or "start"
    if ended.returncode == -signal.SIGKILL and ended.oom_killed:
        return "oom", f"killed by the kernel for lack of memory, in phase {phase}"
    return "crash", f"{ended.describe()} in phase {phase}; see {attempt.folder / 'log.txt'}"


def last_line(log: Path) -> str:
    """What a process said last, for a reason."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    return lines[-1].strip() if lines else "empty log"


def goes_on(folder: Path) -> bool:
    """Whether the run of this attempt ended well, and its process can do another."""
    said = _said(folder)
    return said.get("status") == "ok" and not said.get("spoilt")


def spoilt_by(folder: Path) -> str:
    """Why the model cannot be used again after the run of this attempt; empty if it can, or nobody says."""
    return str(_said(folder).get("spoilt") or "")


def _said(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "verdict.json", SCHEMA) or {}
    except BadFile:
        return {}
