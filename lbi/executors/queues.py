"""Which queue a submission went to, so that any later process asks the right one.

A sweep may have been sent to SLURM first and to a cloud later; its jobs are then asked about
where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from lbi.executors.scheduler import Job, Scheduler
from lbi.executors.sky import PREFIX, Sky


class Queue(Protocol):
    """Something that runs jobs, and may not answer: then it is None or False."""

    name: str

    def jobs(self, ids: Iterable[str]) -> dict[str, Job] | None:
        """State of each job."""

    def named(self, names: Sequence[str]) -> dict[str, str] | None:
        """Job ids by the name of their array."""

    def cancel(self, ids: Sequence[str]) -> bool:
        """Whether the cancellation was taken."""


def queue_of(cluster: Mapping[str, Any]) -> Queue:
    """The queue that a submission's `cluster` names."""
    if cluster.get("kind") == "sky":
        return Sky(cluster["command"])
    return Scheduler()


class Queues:
    """Every queue that the given jobs are in, asked as one."""

    name = "a scheduler"

    def __init__(self, clusters: Iterable[Mapping[str, Any]]) -> None:
        self._queues = {_kind(cluster): queue_of(cluster) for cluster in clusters}
        if len(self._queues) == 1:
            self.name = next(iter(self._queues.values())).name

    def jobs(self, ids: Iterable[str]) -> dict[str, Job] | None:
        """State of each job; None if one of the queues does not answer."""
        found: dict[str, Job] = {}
        for kind, mine in _sorted(ids).items():
            told = self._queues[kind].jobs(mine)
            if told is None:
                return None
            found |= told
        return found

    def named(self, names: Sequence[str]) -> dict[str, str] | None:
        """Job ids by the name of their array; None if one of the queues does not answer."""
        found: dict[str, str] = {}
        for queue in self._queues.values():
            told = queue.named(names)
            if told is None:
                return None
            found |= told
        return found

    def cancel(self, ids: Sequence[str]) -> bool:
        """Whether every cancellation was taken."""
        taken = [self._queues[kind].cancel(mine) for kind, mine in _sorted(ids).items()]
        return all(taken)


def _kind(cluster: Mapping[str, Any]) -> str:
    return str(cluster.get("kind", "slurm"))


def _sorted(ids: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for job in ids:
        found.setdefault("sky" if job.startswith(PREFIX) else "slurm", []).append(job)
    return found
