"""What a command costs the machine: wall time, CPU time of everything that it sets to work, files it leaves.

A command that hands work to daemons has little CPU time of its own, and the daemons are no
children of its. So the benchmark moves itself into a cgroup before it starts anything, and
all that it starts is counted there. Where no cgroup can be made, the busy time of the whole
machine is counted instead, which other programs add to, and the table says so.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Of one command. `others_cpu_s`: CPU time that the rest of the machine used meanwhile."""

    wall_s: float
    cpu_s: float
    others_cpu_s: float
    files: int


class Meter:
    """CPU seconds used so far, by the processes of a cgroup or else by the whole machine."""

    def __init__(self, group: Path | None) -> None:
        self.group = group
        self.counts = (
            "the benchmark, the cluster and its jobs, by their cgroup"
            if group
            else "everything on this machine, as no cgroup could be made"
        )

    def seconds(self) -> float:
        if self.group is None:
            return machine_seconds()
        fields = dict(line.split() for line in (self.group / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6


def machine_seconds() -> float:
    """Busy time of all cores since the start of the machine: user, nice, system, interrupts."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def metering() -> Iterator[Meter]:
    """Count this process and all that it starts from now on."""
    home = _own_group()
    group = home / f"lbi-benchmark-{os.getpid()}" if home else None
    try:
        if group:
            group.mkdir()
            (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        group = None
    try:
        yield Meter(group)
    finally:
        if home and group:
            (home / "cgroup.procs").write_text(str(os.getpid()))
            # Something that is still running keeps it.
            with contextlib.suppress(OSError):
                group.rmdir()


def _own_group() -> Path | None:
    """The cgroup of this process in the second version's hierarchy, which counts CPU time without a controller."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [mount[1] for mount in mounts if mount[2] == "cgroup2"]
    groups = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    return Path(roots[0] + groups[0].removeprefix("0::")) if roots and groups else None


def count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def measure(
    command: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    meter: Meter,
    settle: Callable[[], None] = lambda: None,
) -> Cost:
    """Run a command in a folder. CPU time counts until `settle` returns, which waits for what the command left running.

    Raises `RuntimeError`, with the end of its output, if the command fails.
    """
    files, busy, used, began = count_files(folder), machine_seconds(), meter.seconds(), time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - began
    settle()
    used, busy = meter.seconds() - used, machine_seconds() - busy
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-3000:]}")
    return Cost(wall, used, max(0.0, busy - used), count_files(folder) - files)
