"""Starts measuring processes and watches them until they end.

A child lives in a session of its own, so that Ctrl-C reaches the worker alone and so that
whatever the child started can be ended with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lbi.config import LbiConfig, ResourcesConfig
from lbi.files import BadFile, read_json
from lbi.forkserver import Forked, ForkServer
from lbi.process import child_environment
from lbi.slots import Slot
from lbi.store import HEARTBEAT_S

POLL_S = 0.1

NOTHING: Mapping[str, str] = MappingProxyType({})

TOLD = (-signal.SIGTERM, -signal.SIGUSR2)
"""Return codes of a child that was asked to end."""


class Stop:
    """Asks a worker to stop: politely once, at once the second time.

    `detached` says, where work goes on elsewhere, how to follow it.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.detached = ""

    def request(self) -> None:
        self.requests += 1

    def of(self, run_id: str) -> Stop:
        """The stop that one run is to heed."""
        return self

    def why(self) -> tuple[str, str]:
        """Status and reason of a run that was stopped so."""
        return "cancelled", "stopped on request"

    @property
    def wanted(self) -> bool:
        return self.requests > 0

    @property
    def now(self) -> bool:
        return self.requests > 1


class Starter:
    """Starts measuring processes of a slot: forked from a server that has imported torch where that is sound.

    To be used in one thread: Linux ends a child that dies with its parent when the thread that
    started it ends.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.server: ForkServer | None = None

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.close()

    def start(
        self,
        module: str,
        folder: Path,
        log: Path,
        config: LbiConfig,
        caches: Path,
        own: Mapping[str, str] = NOTHING,
        stdin: Path | str = os.devnull,
    ) -> Started:
        """A process that runs `module` on `folder`, in a session of its own, with its input from `stdin`.

        `own` is what its environment has beside the others'; torch reads some of it when it is imported.
        """
        variables = {**child_environment(config, caches, self.slot.variables()), **own}
        why_not = f"with {', '.join(own)}" if own else "resources.fork=false"
        if config.resources.fork and not own:
            before, server = self.server, self._server(variables)
            if server.refusal is None:
                forked, new = server.start(module, str(folder), log, stdin), server is not before
                return Started(forked, "forked from a server with torch imported", server.import_s, new)
            why_not = server.refusal
        with log.open("a") as output, open(stdin) as given:
            # Its own session: Ctrl-C reaches the worker alone, which then decides.
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                stdin=given,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        return Started(process, f"started anew ({why_not})")

    def _server(self, variables: dict[str, str]) -> ForkServer:
        """The server for this environment. Another environment, or a server that died, needs another one."""
        if self.server is None or not self.server.serves(variables):
            if self.server is not None:
                self.server.close()
            self.server = ForkServer(variables)
        return self.server


@dataclass(frozen=True, slots=True)
class Started:
    """A process and how it was started, for the record.

    Of a forked one `import_s` is what its server's imports took, and `new_server` whether it was the server's first.
    """

    process: subprocess.Popen[bytes] | Forked
    how: str
    import_s: float | None = None
    new_server: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. `returncode` is negative for a signal, as in subprocess."""

    returncode: int
    timed_out: bool
    stopped: bool
    oom_killed: bool

    def describe(self) -> str:
        if self.timed_out:
            return "took too long"
        if self.returncode < 0:
            return f"killed by {_signal_name(-self.returncode)}"
        return f"exit code {self.returncode}"


LIVES_ON = Ended(0, timed_out=False, stopped=False, oom_killed=False)
"""How a child counts that has done its run and waits for another."""


class Child:
    """One child process in a session of its own, its output in the attempt's log.

    While it lives `heartbeats` are touched, beside the attempt's own.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes] | Forked,
        attempt: Path,
        resources: ResourcesConfig,
        stop: Stop,
        heartbeats: Sequence[Path] = (),
    ) -> None:
        self.process, self.attempt, self.resources, self.stop = process, attempt, resources, stop
        self.heartbeats = (attempt / "heartbeat", *heartbeats)
        self.ooms = _oom_kills()

    def wait(self, on_phase: Callable[[str], None], done: Callable[[], bool] = lambda: False) -> Ended | None:
        """Watch until it ends, is stopped, or runs out of time; None once `done` says so of a child that lives on."""
        deadline = time.monotonic() + self.resources.run_timeout_s
        kill_at, beat_at, phase = float("inf"), 0.0, ""
        timed_out = stopped = lives_on = False
        try:
            while self.process.poll() is None:
                now = time.monotonic()
                if now >= beat_at:
                    for heartbeat in self.heartbeats:
                        # The folder of a claim is not there where it could not be made, or was cleared away.
                        with suppress(FileNotFoundError):
                            heartbeat.touch()
                    beat_at = now + HEARTBEAT_S
                if kill_at == float("inf") and (self.stop.wanted or now >= deadline):
                    stopped, timed_out = self.stop.wanted, not self.stop.wanted
                    self._signal(signal.SIGTERM)
                    kill_at = now + self.resources.stop_grace_s
                if now >= kill_at or self.stop.now:
                    self._signal(signal.SIGKILL)
                current = phase_of(self.attempt)
                if current != phase:
                    phase = current
                    on_phase(phase)
                if done():
                    lives_on = True
                    return None
                time.sleep(POLL_S)
        finally:
            if not lives_on:
                end_session(self.process)
        if self.process.returncode in TOLD and not timed_out:
            # SLURM signals every process of a job: the child may have heard it a moment before the worker.
            time.sleep(2 * POLL_S)
            stopped = stopped or self.stop.wanted
        return Ended(self.process.returncode or 0, timed_out, stopped, _oom_kills() > self.ooms)

    def _signal(self, number: int) -> None:
        _signal_session(self.process, number)


def end_session(process: subprocess.Popen[bytes] | Forked) -> None:
    """Kill a child and whatever it has started."""
    _signal_session(process, signal.SIGKILL)
    process.wait()


def _signal_session(process: subprocess.Popen[bytes] | Forked, number: int) -> None:
    """To the whole session: a compiler's helpers must not outlive the run."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return


def phase_of(folder: Path) -> str:
    """What the process of an attempt is doing, by its own word; empty if it has not said."""
    try:
        return str((read_json(folder / "progress.json") or {}).get("phase", ""))
    except BadFile:
        return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom_kills(root: Path = Path("/")) -> int:
    """Processes the kernel has killed for memory so far: of our control group if one counts them, else of the machine.

    On a shared machine most of those are other people's.
    """
    for file in (*_counters_of_the_group(root), root / "proc/vmstat"):
        with suppress(OSError):
            found = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("oom_kill ")]
            if found:
                return int(found[0])
    return 0


def _counters_of_the_group(root: Path) -> list[Path]:
    """Where control groups of version 2, then 1, may count kills: under our path, or, in a container, at the top."""
    mount, own = root / "sys/fs/cgroup", {"": "", "memory": ""}
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= {name: path.strip("/") for name in controllers.split(",") if name in own}
    paths = ((own[""], own["memory"]), ("", ""))
    return [
        file
        for two, one in paths
        for file in (mount / two / "memory.events", mount / "memory" / one / "memory.oom_control")
    ]
