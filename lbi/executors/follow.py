"""Follows the jobs of a sweep until every cell has a result or a reason.

Results are taken from the store. SLURM is asked only about cells without one: a job that is
over and left cells behind is settled, and what was not the cells' own fault is submitted
again, elsewhere if a node is to blame. Ctrl-C stops the following, not the jobs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lbi.children import Stop
from lbi.executors.local import stopping_on_signals
from lbi.executors.reconcile import Ending, publish
from lbi.executors.scheduler import RUNNING, Job
from lbi.schedule import Unit, make_packs
from lbi.store import UNFINISHED, Result, Store
from lbi.submissions import Submissions, UnitJob
from lbi.sweep_folder import environments, find_result
from lbi.worker import Event, Report, Task

if TYPE_CHECKING:
    from lbi.executors.queue_executor import QueueExecutor

LOOK_S = 1.0
"""How often the store is looked at."""

SETTLE_S = 5.0
"""A job must have been over for this long before its cells are judged: results cross a network file system."""

BAD_NODE = 3
"""A node with as many failed runs of one sweep is left out of what is submitted after."""

DETACH_S = 3.0
"""Time for the second Ctrl-C, which cancels."""


class Follower:
    """Follows the given tasks, by run_id, of one sweep."""

    def __init__(
        self, executor: QueueExecutor, store: Store, tasks: dict[str, Task], since: float, report: Report
    ) -> None:
        self.executor, self.store, self.since, self.report = executor, store, since, report
        self.submissions = Submissions(store, executor.sweep)
        self.tasks, self.open = tasks, dict(tasks)
        self.tries: Counter[str] = Counter()
        self.failures: dict[str, set[str]] = {}
        self.over_since: dict[str, float] = {}
        self.queued_since: dict[str, float] = {}
        self.retried: dict[str, float] = {}
        self.crashed: set[str] = set()
        self.given_up: set[str] = set()
        self.suspects: set[str] = set()
        self.unlaunched: set[str] = set()
        self.superseded: set[str] = set()
        self.said = ""

    def run(self, stop: Stop) -> None:
        """Follow until every task has ended; sets `stop.detached` if asked to stop before."""
        often, began, asked = self.executor.ask_s, time.monotonic(), -float("inf")
        with stopping_on_signals(stop):
            while self.open and not stop.wanted:
                looked = time.monotonic()
                self._look()
                now = time.monotonic()
                if now - asked >= often[now - began >= 600]:
                    asked = now
                    self._ask()
                if self.open and not stop.wanted:
                    # Thousands of open cells on a network file system: look no more than a tenth of the time.
                    time.sleep(max(LOOK_S, 10 * (now - looked)))
            if self.open:
                self._leave(stop)
            if not stop.detached or stop.now:
                self.executor.over(self.store)

    def _look(self) -> None:
        """Take in results that have appeared."""
        found = environments(self.store, self.executor.sweep)
        for run_id, task in list(self.open.items()):
            result = find_result(self.store, found, run_id, task.env_id)
            if result is None or result.finished <= self.retried.get(run_id, self.since):
                continue
            self._blame(result)
            if result.status == "crash" and self.tries[run_id] == 0:
                # It may have been the node's fault: tried once more when its job is over.
                self.crashed.add(run_id)
                continue
            if result.status in UNFINISHED - {"cancelled"} and run_id not in self.given_up:
                continue
            self._end(task, result)

    def _end(self, task: Task, result: Result) -> None:
        del self.open[task.run_id]
        self.report(Event("end", task, "", result))

    def _blame(self, result: Result) -> None:
        if result.status in ("crash", "lost") and result.host:
            self.failures.setdefault(result.host, set()).add(f"{result.run_id}-{result.attempt}")

    def _ask(self) -> None:
        """Ask SLURM about the jobs of open cells, and settle those that are over."""
        jobs = self._newest()
        states = self.executor.scheduler.jobs(job.job for job in jobs)
        if states is None:
            self._say(f"{self.executor.scheduler.name} does not answer; going on with what the store says")
            return
        self.executor.bring_home(self.store, jobs, states)
        self._look()
        jobs = self._newest()
        again: list[Task] = []
        for job in jobs:
            state = self._launched(states[job.job])
            if state.ended:
                again += self._settle(job, state)
            elif job.job not in self.superseded and self.executor.superseded(job, state, self._done(job)):
                # Its cells are judged, and submitted again, when it is over.
                self.executor.scheduler.cancel([job.job])
                self.superseded.add(job.job)
            else:
                self.over_since.pop(job.job, None)
                self._give_up_waiting(job, state)
        have = {cell.run_id for job in jobs for cell in job.cells}
        again += [task for run_id, task in self.open.items() if run_id not in have and self._may_retry(run_id)]
        self._count(list(states.values()))
        if again:
            self._submit(again)

    def _newest(self) -> list[UnitJob]:
        """The last job of each open cell, each job with its open cells only."""
        last: dict[str, UnitJob] = {}
        for job in self.submissions.jobs():
            for cell in job.cells:
                last[cell.run_id] = job
        by_job: dict[str, UnitJob] = {}
        for run_id in self.open:
            if run_id in last:
                by_job[last[run_id].job] = last[run_id]
        return [
            replace(
                job,
                cells=tuple(
                    cell for cell in job.cells if cell.run_id in self.open and last[cell.run_id].job == job.job
                ),
            )
            for job in by_job.values()
        ]

    def _done(self, job: UnitJob) -> int:
        """How many of a job's cells have ended."""
        listed = next((known for known in self.submissions.jobs() if known.job == job.job), job)
        return sum(cell.run_id not in self.open for cell in listed.cells)

    def _settle(self, job: UnitJob, state: Job) -> list[Task]:
        """End what the job cannot finish any more; the tasks to submit again."""
        now = time.monotonic()
        if now - self.over_since.setdefault(job.job, now) < SETTLE_S:
            return []
        self._look()
        left = [cell for cell in job.cells if cell.run_id in self.open]
        found = self.executor.endings(self.store, job, state, left)
        if found is None:
            return []
        hopeless = {cell.run_id: reason for cell in left if (reason := self.executor.hopeless(job, state, cell.run_id))}
        self.given_up |= set(hopeless)
        found = [replace(ending, reason=hopeless.get(ending.cell.run_id, ending.reason)) for ending in found]
        # What a job had not begun is not to blame for its end, unless the job never began anything.
        blameless = any(ending.begun for ending in found)
        return [self.open[ending.cell.run_id] for ending in found if self._again(ending, state, blameless)]

    def _again(self, ending: Ending, state: Job, blameless: bool) -> bool:
        """Whether a cell of an ended job is to be submitted again; else, or if it had begun, publish how it ended."""
        run_id = ending.cell.run_id
        if ending.status in ("oom", "timeout", "cancelled"):
            publish(self.store, ending, ending.status, ending.reason)
            return False
        if run_id in self.given_up:
            publish(self.store, ending, "lost", ending.reason)
            return False
        crashed = run_id in self.crashed
        if blameless and not ending.begun and not crashed:
            return True
        # The second attempt at a crash is not one of the retries of lost jobs.
        retry = self._may_retry(run_id) or (crashed and not ending.begun)
        if ending.begun:
            self.suspects.add(run_id)
            publish(self.store, ending, ending.status, ending.reason)
            if state.node:
                self.failures.setdefault(state.node, set()).add(f"{run_id}-{self.tries[run_id]}")
        elif not retry:
            publish(self.store, ending, "lost", ending.reason)
        if not retry:
            self.given_up.add(run_id)
        return retry

    def _may_retry(self, run_id: str) -> bool:
        self.tries[run_id] += 1
        return self.tries[run_id] <= self.tasks[run_id].config.resources.requeues

    def _submit(self, tasks: Sequence[Task]) -> None:
        bad = [node for node, runs in self.failures.items() if len(runs) >= BAD_NODE]
        crashed = {result.host for result in self._results(tasks) if result.status in ("crash", "lost")}
        exclude = sorted({*bad, *crashed})
        # A run that took its job down with it gets a job of its own.
        packs = [[task] for task in tasks if task.run_id in self.suspects]
        packs += make_packs([task for task in tasks if task.run_id not in self.suspects])
        units = [Unit(f"unit-{number}", tuple(pack)) for number, pack in enumerate(packs)]
        self._say(f"submitting {len(tasks)} runs again" + (f", leaving out {', '.join(exclude)}" if exclude else ""))
        # What these runs have by now is what is to be bettered.
        since = max([time.time(), *(result.finished for result in self._results(tasks))])
        self.retried |= {task.run_id: since for task in tasks}
        self.executor.submit(units, self.store, since, exclude)

    def _results(self, tasks: Sequence[Task]) -> list[Result]:
        found = environments(self.store, self.executor.sweep)
        results = [find_result(self.store, found, task.run_id, task.env_id) for task in tasks]
        return [result for result in results if result is not None and result.finished > self.since]

    def _launched(self, state: Job) -> Job:
        """The job's state; one that SLURM holds because a node could not launch it counts as failed there."""
        if state.state == "PENDING" and "launch failed" in state.reason:
            self.executor.scheduler.cancel([state.id])
            self.unlaunched.add(state.id)
        if state.id in self.unlaunched:
            return replace(state, state="BOOT_FAIL")
        if state.id in self.superseded and state.ended:
            return replace(state, state="PREEMPTED")
        return state

    def _give_up_waiting(self, job: UnitJob, state: Job) -> None:
        """Cancel a job that has waited longer than it may."""
        if state.state in RUNNING:
            # Should it be requeued, it waits anew.
            self.queued_since.pop(job.job, None)
            return
        limits = [self.tasks[cell.run_id].config.resources.queue_timeout_s for cell in job.cells]
        limit = min((limit for limit in limits if limit is not None), default=None)
        waited = time.monotonic() - self.queued_since.setdefault(job.job, time.monotonic())
        if limit is not None and waited > limit:
            if self.executor.waited(job, waited, limit):
                self.queued_since[job.job] = time.monotonic()
                return
            reason = f"job {job.job} had not begun after {limit:g} s ({state.state}, {state.reason})"
            self.executor.scheduler.cancel([job.job])
            for cell in job.cells:
                self.given_up.add(cell.run_id)
                publish(self.store, Ending(cell, "lost", reason, None), "lost", reason)

    def _count(self, states: Sequence[Job]) -> None:
        running = [job for job in states if job.state in RUNNING]
        waiting = Counter(
            job.reason or job.state.lower() for job in states if not job.ended and job.state not in RUNNING
        )
        nodes = sorted({job.node for job in running if job.node})
        parts = [f"{len(running)} jobs running" + (f" on {', '.join(nodes)}" if nodes else "")]
        parts += [f"{count} waiting ({reason})" for reason, count in waiting.most_common(2)]
        self._say(", ".join(parts))

    def _say(self, text: str) -> None:
        if text != self.said:
            self.said = text
            self.report(Event("note", next(iter(self.tasks.values())), text))

    def _leave(self, stop: Stop) -> None:
        """Detach; or cancel, if asked a second time."""
        print(f"\nThe jobs go on. Ctrl-C again within {DETACH_S:.0f} s cancels them.", flush=True)
        until = time.monotonic() + DETACH_S
        while time.monotonic() < until and not stop.now:
            time.sleep(0.1)
        if stop.now:
            taken = self.executor.scheduler.cancel(sorted({job.job for job in self._newest()}))
            stop.detached = "Cancelled the jobs." if taken else "The cancellation was not taken; try lbi cancel."
            return
        name, root = self.executor.sweep, self.store.root
        stop.detached = (
            f"Detached; the jobs go on. Follow: the same command, or python -m lbi status {name} --watch --store {root}"
            f"\nCancel: python -m lbi cancel {name} --store {root}"
        )
