"""The products of ternary_cpu.cpp as torch operators, and the layouts that they read.

Operators, so that torch.compile with fullgraph takes them and a profiler's trace names them.
They are defined without `torch.library.custom_op`, whose wrapper costs 44 µs a call where
this way costs 14 (docs/log.md): a small model makes 210 calls a token.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from lbi.kernels.cpu_build import NoKernel, load

SOURCE = Path(__file__).parent / "ternary_cpu.cpp"

WORD_COLUMNS = 128
BYTE_COLUMNS = 32

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@cache
def library() -> ctypes.CDLL:
    """The compiled file with its signatures. Raises `NoKernel`.

    Loaded after torch, whose libgomp it then shares: two of them would spin against each other.
    """
    loaded = load(SOURCE)
    linear, rsr = loaded.lbi_ternary_linear, loaded.lbi_rsr_linear
    linear.argtypes, linear.restype = [_POINTER] * 4 + [_SIZE] * 3 + [_INT] * 2, None
    rsr.argtypes, rsr.restype = [_POINTER] * 5 + [_SIZE] * 3 + [_INT] * 4, None
    return loaded


def problem() -> str | None:
    """Why there are no compiled products here; None where there are."""
    try:
        library()
    except NoKernel as error:
        return str(error)
    return None


def pack(codes: torch.Tensor) -> torch.Tensor:
    """(rows, columns) int8 of -1, 0 and 1 to (rows, padded columns / 4) uint8, rows padded to 32 columns.

    32 columns are 8 bytes: byte `lane` has columns lane, lane + 8, lane + 16 and lane + 24, the first in
    its lowest two bits. Of each full 128 columns, the 4 bytes of a lane lie side by side: one 32-bit word.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % BYTE_COLUMNS))
    fields = (padded.view(torch.uint8) & 3).view(rows, -1, 4, 8)
    packed = fields[:, :, 0] | fields[:, :, 1] << 2 | fields[:, :, 2] << 4 | fields[:, :, 3] << 6
    words = padded.shape[1] // WORD_COLUMNS * 4
    side_by_side = packed[:, :words].view(rows, -1, 4, 8).transpose(2, 3)
    return torch.cat([side_by_side.reshape(rows, -1), packed[:, words:].reshape(rows, -1)], dim=1)


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """What `pack` packed: (rows, columns) int8."""
    rows, row_bytes = packed.shape
    words = row_bytes * 4 // WORD_COLUMNS * 32
    lanes = packed[:, :words].reshape(rows, -1, 8, 4).transpose(2, 3)
    fields = torch.cat([lanes.reshape(rows, -1, 1, 8), packed[:, words:].reshape(rows, -1, 1, 8)], dim=1)
    # Made where it is needed: a CUDA graph cannot take a copy from the host.
    shifts = torch.arange(6, -1, -2, dtype=torch.uint8, device=packed.device).view(4, 1)
    # Two bits at the top of an int8, shifted down with their sign.
    codes = (fields << shifts).view(torch.int8) >> 6
    return codes.reshape(rows, -1)[:, :columns]


def _ternary_linear(inputs: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(m, columns) times the `pack`ed (outputs, columns), times a float32 scale: (m, outputs)."""
    inputs = _readable(inputs)
    (m, columns), outputs = inputs.shape, packed.shape[0]
    result = inputs.new_empty(m, outputs)
    pointers = (inputs.data_ptr(), result.data_ptr(), packed.data_ptr(), scale.data_ptr())
    library().lbi_ternary_linear(
        *pointers, m, columns, outputs, inputs.dtype == torch.bfloat16, torch.get_num_threads()
    )
    return result


def _rsr_linear(
    inputs: torch.Tensor,
    index: torch.Tensor,
    starts: torch.Tensor,
    scale: torch.Tensor,
    outputs: int,
    k: int,
    fold: bool,
) -> torch.Tensor:
    """(m, columns) times the matrix of an `rsr_index.build`, times a float32 scale: (m, outputs).

    `fold` is RSR++'s block product; without it, RSR's.
    """
    inputs = _readable(inputs)
    m, columns = inputs.shape
    result = inputs.new_empty(m, outputs)
    pointers = (inputs.data_ptr(), result.data_ptr(), index.data_ptr(), starts.data_ptr(), scale.data_ptr())
    library().lbi_rsr_linear(
        *pointers, m, columns, outputs, k, fold, inputs.dtype == torch.bfloat16, torch.get_num_threads()
    )
    return result


def _readable(inputs: torch.Tensor) -> torch.Tensor:
    """`inputs` as the C functions read them. Raises `TypeError` for a type that they do not know."""
    if inputs.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"ternary products take bfloat16 and float32, not {inputs.dtype}")
    return inputs.contiguous()


def _define() -> None:
    torch.library.define("lbi::ternary_linear", "(Tensor inputs, Tensor packed, Tensor scale) -> Tensor")
    torch.library.impl("lbi::ternary_linear", "CPU", _ternary_linear)
    torch.library.register_fake(
        "lbi::ternary_linear", lambda inputs, packed, scale: inputs.new_empty(inputs.shape[0], packed.shape[0])
    )
    torch.library.define(
        "lbi::rsr_linear",
        "(Tensor inputs, Tensor index, Tensor starts, Tensor scale, int outputs, int k, bool fold) -> Tensor",
    )
    torch.library.impl("lbi::rsr_linear", "CPU", _rsr_linear)
    torch.library.register_fake(
        "lbi::rsr_linear",
        lambda inputs, index, starts, scale, outputs, k, fold: inputs.new_empty(inputs.shape[0], outputs),
    )


_define()
