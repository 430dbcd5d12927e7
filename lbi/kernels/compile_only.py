"""Has Triton compile kernels as their launches would, and launch nothing.

For a GPU that is not here, since the interpreter takes what the compiler refuses; and in several
processes at once, which fill the cache on disk that one process with the GPU then reads.
Written against Triton 3.6: what it puts in the driver's place is no interface of Triton's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True, slots=True)
class _Absent:
    """As much of a GPU as compiling for it takes."""

    capability: int

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps the target that it found for a device.
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


_launch = JITFunction.run

compiled: list[Any] = []
"""The kernels compiled so far instead of being launched."""


def _compile(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    compiled.append(_launch(self, *args, grid=grid, warmup=True, **named))


def compile_only(capability: int) -> None:
    """From here on, for the whole process: launches stop at the kernel, compiled for this GPU (90 for sm_90)."""
    driver.set_active(_Absent(capability))
    JITFunction.run = _compile
