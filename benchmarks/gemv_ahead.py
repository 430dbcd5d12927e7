"""Compiles kernels in processes of their own, before benchmarks/gemv.py launches them.

Triton takes a second for a kernel and one core. These processes fill its cache on disk for the
GPU's capability; whoever has the GPU then finds the kernel there. A kernel that fails here is
none of theirs: the launch will say so.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from gemv_cases import Case

from lbi.kernels.tiles import Tile


def set_up(capability: int) -> None:
    """In each process, before Triton is imported: no GPU, no interpreter, one core."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    from lbi.kernels.compile_only import compile_only

    compile_only(capability)


def compile_gemv(case: Case, tile: Tile) -> str | None:
    """What went wrong, or None."""
    from lbi.kernels.gemv import gemv

    try:
        x = torch.empty(case.inputs, dtype=torch.bfloat16)
        gemv(x, case.matrix("cpu", torch.bfloat16, filled=False), None, tile)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[-200:]
    return None


class Ahead:
    """Compiles what it is given, in the order given, each kernel once."""

    def __init__(self, capability: int, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._begun: dict[object, Future[str | None]] = {}
        if workers > 0:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), set_up, (capability,))

    def begin(self, case: Case, tile: Tile) -> None:
        """Have the kernel compiled, some time."""
        kernel = _kernel(case, tile)
        if self._pool is None or kernel in self._begun:
            return
        try:
            self._begun[kernel] = self._pool.submit(compile_gemv, case, tile)
        except (BrokenProcessPool, RuntimeError):
            self._pool = None

    def wait(self, case: Case, tile: Tile, seconds: float) -> str | None:
        """Until the kernel is compiled, at most so long; what is known to be wrong with it."""
        begun = self._begun.get(_kernel(case, tile))
        if begun is None:
            return None
        try:
            return begun.result(max(0.0, seconds))
        except TimeoutError:
            return "was not compiled in time"
        except Exception:
            # The processes are gone: the launch compiles for itself.
            self._pool = None
            self._begun.clear()
            return None

    def forget(self) -> None:
        """What has not begun is not wanted any more."""
        self._begun = {kernel: future for kernel, future in self._begun.items() if not future.cancel()}

    def close(self) -> None:
        """End the processes in the midst of what they do: nobody waits for it."""
        self.forget()
        if self._pool is not None:
            running = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()


def _kernel(case: Case, tile: Tile) -> object:
    """What decides which kernel a launch needs: the number of rows only by whether tiles leave a rest."""
    return case.form, case.inputs, tile, case.rows % tile.rows == 0, case.rows % 16 == 0
