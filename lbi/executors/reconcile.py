"""What became of the cells of a job that is over: the part of the truth that its processes did not live to write.

A job that ends by its own hand leaves a result for each of its cells. One that was killed,
cancelled while it waited, or lost with its node leaves some without: the one in progress is
judged by how the job ended, the others have simply not been run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lbi.executors.scheduler import Job
from lbi.store import AlreadyRunning, Attempt, Store, may_live
from lbi.submissions import CellRef, UnitJob

MEMORY_SIGNS = ("oom-kill", "oom_kill", "exceeded memory limit", "Exceeded job memory limit", "Out Of Memory")
"""What SLURM's step daemon prints when it kills for memory without control groups to say so."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a cell of an ended job stands. `status` is empty for one that has not begun and may be run again."""

    cell: CellRef
    status: str
    reason: str
    attempt: Attempt | None
    elsewhere: bool = False
    """Whether it had begun on a machine that leaves no attempt in this store."""

    @property
    def begun(self) -> bool:
        return self.attempt is not None or self.elsewhere


def endings(store: Store, job: UnitJob, state: Job, cells: list[CellRef]) -> list[Ending] | None:
    """How each of `cells`, which have no result, stands now that the job is over.

    None while an attempt's heart still beats: the node may be cut off and its processes alive.
    """
    found = []
    status, reason = verdict(job, state)
    for cell in cells:
        attempt = store.abandoned(cell.run_id, job.job)
        if attempt is not None and may_live(attempt.folder):
            return None
        if attempt is not None:
            found.append(Ending(cell, status, reason, attempt))
        elif status == "cancelled":
            found.append(Ending(cell, status, reason, None))
        else:
            found.append(Ending(cell, "", reason, None))
    return found


def publish(store: Store, ending: Ending, status: str, reason: str) -> bool:
    """Write an ending into the store; False if another process has the run by now."""
    attempt = ending.attempt
    if attempt is None:
        try:
            attempt = store.claim(ending.cell.run_id, ending.cell.env_id, {})
        except AlreadyRunning:
            return False
    store.publish(attempt, status, reason, 0.0)
    return True


def verdict(job: UnitJob, state: Job) -> tuple[str, str]:
    """Status and reason of the run that was in progress when its job ended so."""
    where = f" on {state.node}" if state.node and state.node != "(null)" else ""
    if state.state == "OUT_OF_MEMORY" or _killed_for_memory(job.log):
        return "oom", f"SLURM killed job {job.job}{where} for lack of memory; raise resources.memory_gb"
    if state.state in ("CANCELLED", "REVOKED"):
        return "cancelled", f"job {job.job} was cancelled"
    if state.state in ("TIMEOUT", "DEADLINE"):
        return "timeout", f"job {job.job} reached its time limit; raise resources.time_min"
    if state.state == "PREEMPTED":
        return "preempted", f"job {job.job} was preempted{where}"
    if state.state == "NODE_FAIL":
        return "lost", f"the node of job {job.job} failed{where}"
    if state.state == "GONE":
        return "lost", f"SLURM no longer knows job {job.job}, and it left no result"
    return "lost", f"job {job.job} ended as {state.state}{where} and left no result; see {job.log}"


def _killed_for_memory(log: Path) -> bool:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            tail = file.read().decode(errors="replace")
    except OSError:
        return False
    return any(sign in tail for sign in MEMORY_SIGNS)
