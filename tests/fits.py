"""Whether kernels that tests/compiled*.py have compiled fit the shared memory of the GPU that they are for."""

from __future__ import annotations

from lbi.kernels.compile_only import compiled

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a program may have, by compute capability."""


def say_whether_they_fit() -> None:
    """Print how many were compiled for sm_90. Raises `SystemExit` if one has more than there is."""
    most = max(kernel.metadata.shared for kernel in compiled)
    if most > SHARED[90]:
        raise SystemExit(f"{most} bytes of shared memory")
    print(f"sm_90: {len(compiled)} kernels, {most} bytes of shared memory at most")
