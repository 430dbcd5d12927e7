"""A real SLURM cluster for the tests, and ways to break it: dead nodes, a lost controller, no accounting.

Stand-ins for sbatch and squeue would only repeat what we believe of them. The cluster is that
of scripts/slurm; its processes are known by its SLURM_CONF in their environment. Every call
ends within its timeout: a SLURM client waits for ever for what can still happen.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts" / "slurm"
COLUMNS = {"id": "%i", "state": "%T", "node": "%N", "reason": "%r", "name": "%j"}
DAEMONS = ("slurmctld", "slurmscriptd", "slurmd", "slurmstepd", "slurmdbd", "mariadbd", "munged")


class ClusterError(Exception):
    """The cluster did not do what was asked of it, or not in time."""


class NotInstalled(ClusterError):
    """SLURM's packages are missing; the message says which."""


@dataclass(frozen=True)
class Process:
    """A process of the cluster or of one of its jobs."""

    pid: int
    name: str
    variables: frozenset[str]

    @property
    def node(self) -> str | None:
        """The virtual node it belongs to: a job's process has its name, a daemon of the node its log."""
        for variable in self.variables:
            if variable.startswith("SLURMD_NODENAME="):
                return variable.partition("=")[2]
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{self.pid}/fd").iterdir():
                found = re.search(r"/log/slurmd-(\w+)\.log$", os.readlink(link))
                if found and self.name in ("slurmd", "slurmstepd"):
                    return found[1]
        return None

    @property
    def is_of_job(self) -> bool:
        return self.name not in DAEMONS and any(item.startswith("SLURMD_NODENAME=") for item in self.variables)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Cluster:
    """Virtual nodes n1 and n2 with four h100s each, n3 and n4 with four a100s. Settings: see scripts/slurm/start."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.settings = {name: str(value) for name, value in settings.items()}
        self.environment = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def start(self) -> None:
        settings = {"OWNER": str(os.getpid()), **self.settings}
        done = self.run(str(SCRIPTS / "start"), str(self.folder), timeout=120, check=False, **settings)
        if done.returncode:
            self.stop()
            raise (NotInstalled if done.returncode == 3 else ClusterError)(done.stderr.strip())

    def stop(self) -> None:
        self.run(str(SCRIPTS / "stop"), "--purge", str(self.folder), timeout=60)

    def run(
        self, *command: str, timeout: float = 30, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, SLURM's or another, in the cluster's environment."""
        environment = {**os.environ, **self.environment, **variables}
        environment["PATH"] += ":/usr/sbin:/sbin"
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, cwd="/", check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{' '.join(command)}: no end within {timeout:.0f} s") from error
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done

    # Jobs.

    def sbatch(self, *arguments: str) -> str:
        """Submit a job, its output discarded unless asked for; returns its id."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *arguments).stdout.strip()

    def squeue(self, *arguments: str) -> list[dict[str, str]]:
        """Jobs that are not over, array tasks one by one: id, state, node, reason, name."""
        lines = self.run("squeue", "-h", "-r", "-o", "|".join(COLUMNS.values()), *arguments).stdout.splitlines()
        return [dict(zip(COLUMNS, line.split("|", len(COLUMNS) - 1), strict=True)) for line in lines]

    def jobs(self) -> list[dict[str, str]]:
        """As squeue, with the jobs that are over and that the controller still remembers."""
        return self.squeue("-t", "all")

    def scontrol(self, *arguments: str) -> str:
        return self.run("scontrol", *arguments).stdout

    def scancel(self, *arguments: str) -> None:
        self.run("scancel", *arguments)

    def wait_idle(self, timeout: float = 30) -> None:
        """Wait until no job is waiting, running or ending."""
        self.wait(lambda: not self.squeue(), timeout, "the jobs to end")

    def wait_job(self, job: str, *states: str, timeout: float = 30) -> dict[str, str]:
        """Wait until a job is in one of some states; returns its row."""
        rows: list[dict[str, str]] = []

        def arrived() -> bool:
            rows[:] = [row for row in self.jobs() if row["id"] == job and row["state"] in states]
            return bool(rows)

        self.wait(arrived, timeout, f"job {job} to be {' or '.join(states)}")
        return rows[0]

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                tables = [self.run(command, check=False).stdout for command in ("sinfo", "squeue")]
                raise ClusterError("\n".join([f"waited {timeout:.0f} s for {what}", *tables]))
            time.sleep(0.1)

    # Nodes.

    def nodes(self) -> dict[str, str]:
        """State of every node, in sinfo's words: idle, mixed, down*, ..."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N|%T").stdout.splitlines()
        return dict(line.split("|") for line in lines)

    def processes(self) -> Iterator[Process]:
        mine = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = frozenset((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
                if mine in variables:
                    yield Process(int(folder.name), (folder / "comm").read_text().strip(), variables)

    def kill_node(self, name: str, noticed: bool = False) -> None:
        """End everything on a node at once, as a crash of the machine does; daemons first, so that none reports it.

        The controller needs 20 s to see it; `noticed` tells it. It takes 6 s more to run a job again.
        """
        end = time.monotonic() + 10
        while found := [process for process in self.processes() if process.node == name]:
            for process in sorted(found, key=lambda process: (process.is_of_job, process.name)):
                process.kill()
            if time.monotonic() > end:
                raise ClusterError(f"processes of {name} do not end: {[process.name for process in found]}")
        if noticed:
            self.scontrol("update", f"nodename={name}", "state=down", "reason=crashed")

    def kill_slurmd(self, name: str) -> None:
        """End a node's daemon only: the controller takes the node for dead, and its jobs live on."""
        for process in self.processes():
            if process.name == "slurmd" and process.node == name:
                process.kill()

    def restart_node(self, name: str, timeout: float = 20) -> None:
        """Start a node's daemon if it is down, and have the controller use the node again."""
        if not any(process.name == "slurmd" and process.node == name for process in self.processes()):
            self.run("slurmd", "-N", name)

        def up() -> bool:
            state = self.nodes()[name]
            if state.startswith(("down", "drain", "fail")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
            return state in ("idle", "mixed", "allocated", "completing")

        self.wait(up, timeout, f"{name} to come up")

    # Controller.

    def stop_controller(self, crash: bool = False) -> None:
        """End the controller: in order, or with SIGKILL, which may lose what it had not yet saved."""
        for process in self.processes():
            if process.name == "slurmctld":
                os.kill(process.pid, signal.SIGKILL if crash else signal.SIGTERM)
        end = time.monotonic() + 20
        while any(process.name == "slurmctld" for process in self.processes()):
            if time.monotonic() > end:
                raise ClusterError("the controller does not end")
            time.sleep(0.05)

    def start_controller(self, timeout: float = 20) -> None:
        if not any(process.name == "slurmctld" for process in self.processes()):
            self.run("slurmctld")
        end = time.monotonic() + timeout
        while " is UP" not in self.run("scontrol", "ping", check=False).stdout:
            if time.monotonic() > end:
                raise ClusterError("the controller does not answer")
            time.sleep(0.05)

    # Between tests.

    def heal(self) -> None:
        """No jobs, every node idle. What takes longer than making the cluster anew, which is 3 s, is not waited for."""
        try:
            self.start_controller(3)
            self._end_jobs()
            for name, state in self.nodes().items():
                if state != "idle":
                    self.restart_node(name, 3)
            self.wait(lambda: set(self.nodes().values()) == {"idle"}, 3, "all nodes to be idle")
        except ClusterError:
            self.stop()
            self.start()

    def _end_jobs(self) -> None:
        """Cancel all jobs, without the time that SLURM gives them to end. A dead node's jobs end when it is back."""
        dead = {f"n{number}" for number in range(1, len(self.nodes()) + 1)}
        dead -= {process.node or "" for process in self.processes() if process.name == "slurmd"}
        for name in dead:
            self.run("slurmd", "-N", name)
        if self.squeue():
            self.scancel(f"--user={getpass.getuser()}")
        end = time.monotonic() + 3
        # A process may start another while the list is read.
        while left := [process for process in self.processes() if process.is_of_job]:
            for process in left:
                process.kill()
            if time.monotonic() > end:
                raise ClusterError(f"processes of jobs do not end: {[process.name for process in left]}")
        self.wait_idle(3)


class Clusters:
    """The clusters of a test session: one for each combination of settings that is asked for, started when it is."""

    def __init__(self) -> None:
        self.running: dict[tuple[tuple[str, object], ...], Cluster] = {}

    def __call__(self, **settings: object) -> Cluster:
        key = tuple(sorted(settings.items()))
        if key not in self.running:
            # A short path: a socket's may have no more than 107 characters.
            made = Cluster(Path(tempfile.mkdtemp(prefix="lbi-slurm-")), **settings)
            made.start()
            self.running[key] = made
        return self.running[key]

    def heal(self) -> None:
        for cluster in self.running.values():
            cluster.heal()

    def stop(self) -> None:
        for cluster in self.running.values():
            cluster.stop()
