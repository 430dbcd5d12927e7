"""Asks SLURM what its jobs are doing, with or without accounting.

squeue knows the living jobs and, for MinJobAge, the dead ones; sacct knows all of them
where there is accounting. A scheduler that does not answer is no answer about a job: the
callers get None then, and nothing is declared dead. Text output is parsed, because the
JSON of squeue changes between releases.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT GONE "
    "FAILED_SETUP FAILED_PRECHECKS FAILED_NO_RESOURCE".split()
)
"""States in which a job's processes are gone; GONE is ours: nobody knows the job any more. The last are SkyPilot's."""

RUNNING = frozenset(("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"))

ANSWER_S = 30.0
"""SLURM's commands wait for a controller that is down longer than anyone wants to."""

ACCOUNTING_LAG_S = 60.0
"""sacct may call a job running this long after the controller has forgotten it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job or array task: its id (12 or 12_3), state, node list, and why it waits."""

    id: str
    state: str
    node: str = ""
    reason: str = ""
    name: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Scheduler:
    """SLURM through its commands, as the current user."""

    name = "SLURM's controller"

    def __init__(self) -> None:
        self._unknown_since: dict[str, float] = {}

    def jobs(self, ids: Iterable[str]) -> dict[str, Job] | None:
        """State of each job by id; None if the controller does not answer."""
        wanted = set(ids)
        if not wanted:
            return {}
        listed = _ask("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T|%N|%r|%j")
        if listed is None:
            return None
        known = {job.id: job for job in _parse(listed)}
        missing = sorted(wanted - set(known))
        accounted = self._accounted(missing) if missing else {}
        now = time.monotonic()
        for job in missing:
            since = self._unknown_since.setdefault(job, now)
            found = accounted.get(job)
            if found is None or (not found.ended and now - since > ACCOUNTING_LAG_S):
                found = Job(job, "GONE")
            known[job] = found
        for job in wanted - set(missing):
            self._unknown_since.pop(job, None)
        return {job: known[job] for job in wanted}

    def named(self, names: Sequence[str]) -> dict[str, str] | None:
        """Job ids (of a whole array) by job name; None if the controller does not answer."""
        user = getpass.getuser()
        listed = _ask("squeue", "-h", "-t", "all", "-u", user, "-n", ",".join(names), "-o", "%F|%j")
        if listed is None:
            return None
        booked = _ask("sacct", "-X", "-n", "-P", "-u", user, "--name", ",".join(names), "-o", "JobID,JobName") or ""
        found = {}
        for line in [*booked.splitlines(), *listed.splitlines()]:
            job, _, name = line.partition("|")
            if name in names:
                found[name] = job.split("_")[0]
        return found

    def cancel(self, ids: Sequence[str]) -> bool:
        """Cancel jobs; whether SLURM took it."""
        taken = True
        for start in range(0, len(ids), 500):
            taken = _ask("scancel", *ids[start : start + 500]) is not None and taken
        return taken

    def max_array_size(self) -> int:
        """How many tasks an array may have: MaxArraySize bounds the highest index, which is one less."""
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "")
        return max(1, int(found[1])) if found else 1000

    def _accounted(self, ids: Sequence[str]) -> dict[str, Job]:
        """What sacct says; nothing where there is no accounting."""
        parents = sorted({job.split("_")[0] for job in ids})
        found: dict[str, Job] = {}
        for start in range(0, len(parents), 500):
            some = ",".join(parents[start : start + 500])
            text = _ask("sacct", "-X", "-n", "-P", "-j", some, "-o", "JobID,State,NodeList,Reason,JobName")
            found |= {job.id: job for job in _parse(text or "")}
        return found


def was_preempted(job: str) -> bool | None:
    """Whether SLURM has preempted this job; None if it does not answer in time.

    The state says only COMPLETING while a job's processes end. `job` is an array task's own
    name ("12_3"): the bare number may name the whole array.
    """
    found = re.search(r"PreemptTime=(\S+)", _ask("scontrol", "-o", "show", "job", job, answer_s=3.0) or "")
    return found[1] != "None" if found else None


def seconds_left(job: str) -> float | None:
    """Time to a job's limit, in seconds; None if it has none or nobody answers."""
    text = (_ask("squeue", "-h", "-j", job, "-o", "%L", answer_s=5.0) or "").strip()
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def requeue(job: str) -> bool:
    """Have SLURM start this job again; whether it agreed."""
    return _ask("scontrol", "requeue", job) is not None


def _parse(text: str) -> list[Job]:
    jobs = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) >= 4 and fields[0]:
            # sacct: "CANCELLED by 1000"
            reason = "" if fields[3] == "None" else fields[3]
            jobs.append(Job(fields[0], fields[1].split()[0], fields[2], reason, "|".join(fields[4:])))
    return jobs


def _ask(*command: str, answer_s: float = ANSWER_S) -> str | None:
    """Output of a command, or None if it is missing, fails, or takes too long."""
    try:
        # A session of its own: a signal to the worker's group must not end a requeue half way.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=answer_s, check=True, start_new_session=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
