"""What a measuring process does before anything else, and how it watches itself.

A measuring process is a child of the worker and dies with it: a run whose driver was
killed must not go on and disturb the next one's timings.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lbi.config import LbiConfig
from lbi.files import write_json

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere nothing happens)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get("LBI_PARENT")
    # The parent may have died between starting this process and the line above.
    if expected is not None and os.getppid() != int(expected):
        os.kill(os.getpid(), signal.SIGKILL)


def child_environment(config: LbiConfig, compile_cache: Path, slot: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a measuring process, over those of its slot, over those of its parent."""
    variables = {
        **slot,
        "LBI_PARENT": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(compile_cache / "inductor"),
        "TRITON_CACHE_DIR": str(compile_cache / "triton"),
    }
    if config.engine.threads:
        variables["OMP_NUM_THREADS"] = str(config.engine.threads)
    if config.engine.device == "cpu":
        # torchao's wheel carries CUDA libraries only; trying to load them prints pages.
        variables |= {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **variables}


def prepare(config: LbiConfig) -> None:
    """Import torch and set threads. Everything torch-wide that a run depends on is set here."""
    import torch

    from lbi.models import be_quiet

    be_quiet()
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    torch.set_grad_enabled(False)


class Phases:
    """Names what the process is doing, for whoever watches, and times it; `before` goes before each name."""

    def __init__(self, folder: Path, before: str = "") -> None:
        self.folder, self.before = folder, before
        self.seconds: dict[str, float] = {}
        self.last = ""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        write_json(self.folder / "progress.json", {"schema": 1, "phase": f"{self.before}{name}", "since": time.time()})
        print(f"[{time.strftime('%H:%M:%S')}] {self.before}{name}", flush=True)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.last = name

    def report(self) -> dict[str, Any]:
        """Seconds by phase, and the phase the process was in last."""
        return {"phases_s": self.seconds, "last_phase": self.last}


def cpu_seconds() -> float:
    """CPU time of this process so far, and of its children that have ended."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


class CpuWatch:
    """Share of the machine's CPU time that other processes took while it was open, and that nobody did."""

    def __enter__(self) -> CpuWatch:
        self._start = self._read()
        self.foreign_share: float | None = None
        self.idle_share: float | None = None
        return self

    def __exit__(self, *_: object) -> None:
        end = self._read()
        if self._start and end:
            available = (end[2] - self._start[2]) * (os.cpu_count() or 1)
            busy = end[0] - self._start[0]
            if available > 0:
                self.foreign_share = max(0.0, (busy - (end[1] - self._start[1])) / available)
                self.idle_share = min(1.0, max(0.0, 1 - busy / available))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Busy seconds of all CPUs, of this process and its ended children, and the wall clock."""
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        # user nice system idle iowait irq softirq steal
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return busy, cpu_seconds(), time.perf_counter()


class PeakMemory:
    """Peak memory while it was open: of the CUDA allocator, or this process's resident set.

    `reset` is whether the peak could be forgotten that was reached before.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes: int | None = None
        self.reset = False

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.reset = True
        else:
            with contextlib.suppress(OSError):
                # 5 resets the high water mark (man 5 proc).
                Path("/proc/self/clear_refs").write_text("5")
                self.reset = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            import torch

            self.bytes = int(torch.cuda.max_memory_allocated())
            return
        with contextlib.suppress(OSError, IndexError, ValueError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.bytes = int(line.split()[1]) * 1024
