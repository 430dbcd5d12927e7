"""Processes of others on the GPU, which would make a timing theirs as much as ours.

NVML lists the processes that have a context on a GPU. In a container the numbers may be
those of another pid namespace: there this process does not find itself in the list, and
what is foreign cannot be known. Then that is said, and nothing is held against anybody.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any


@cache
def current_gpu() -> str | None:
    """The uuid of the GPU that torch uses; None where there is none."""
    try:
        import torch

        return f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    except (ImportError, RuntimeError, AssertionError):
        return None


@cache
def nvml_handle(uuid: str) -> Any:
    """NVML's handle of a GPU, found by uuid: NVML and CUDA count GPUs differently. None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None


def listed(uuid: str) -> set[int] | None:
    """Numbers of the processes that compute on the GPU, as NVML gives them; None where it cannot say."""
    handle = nvml_handle(uuid)
    if handle is None:
        return None
    import pynvml

    try:
        return {int(process.pid) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except pynvml.NVMLError:
        return None


def named(pids: set[int]) -> str:
    """Processes in words."""
    return ("process " if len(pids) == 1 else "processes ") + ", ".join(map(str, sorted(pids)))


class ForeignWatch:
    """Looks for foreign processes on this process's GPU when it is opened and when it is closed.

    `during` holds those of the last time it was open. One that came and went between the two
    looks is missed: looking while a sample is timed would disturb it. Opened once per sample;
    `report` is about all of them.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.gpu = current_gpu() if device == "cuda" else None
        self.during: set[int] = set()
        self.seen: set[int] = set()
        self.unknown = ""

    def __enter__(self) -> ForeignWatch:
        self.during = self._foreign()
        return self

    def __exit__(self, *_: object) -> None:
        self.during |= self._foreign()
        self.seen |= self.during

    def report(self) -> dict[str, str | None]:
        """For effective.json: the GPU, whether others were there (none, seen, unknown), and who or why not known."""
        if self.device != "cuda":
            return {}
        if self.seen:
            return {"gpu": self.gpu, "foreign_gpu": "seen", "foreign_gpu_detail": named(self.seen)}
        if self.unknown:
            return {"gpu": self.gpu, "foreign_gpu": "unknown", "foreign_gpu_detail": self.unknown}
        return {"gpu": self.gpu, "foreign_gpu": "none"}

    def _foreign(self) -> set[int]:
        if self.device != "cuda":
            return set()
        pids = listed(self.gpu) if self.gpu else None
        if pids is None:
            self.unknown = "NVML could not list the GPU's processes (pip install nvidia-ml-py)"
            return set()
        if os.getpid() not in pids:
            self.unknown = "NVML does not list this process itself: its numbers are of another pid namespace"
            return set()
        return {pid for pid in pids if not _is_ours(pid)}


def _is_ours(pid: int) -> bool:
    """Every run has a session of its own, so a compiler's helpers are known by theirs."""
    try:
        return os.getsid(pid) == os.getsid(0)
    except OSError:
        return False
