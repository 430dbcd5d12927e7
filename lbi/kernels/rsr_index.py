"""The index of RSR: for each block of rows, which columns may be added before they are multiplied.

Dehghankar, Erfanian, Asudeh: "An Efficient Matrix Multiplication Algorithm for Accelerating
Inference in Binary and Ternary Neural Networks" (arXiv 2411.06360). A ternary matrix is the
difference of two binary ones; each is cut into blocks of k rows (columns in the paper, which
multiplies from the left); a column's k bits in a block are its key, and columns are sorted by
key. Three things differ from the paper and none changes the result: segments lie in order of
their length rather than of their key, empty ones and that of key 0 are left out, and a block's
two signs are subtracted before the block product, so that there is one product instead of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

COLUMNS = 65_535
"""A column's number has 16 bits, and so has a segment's length."""

LARGEST_K = 14


def block_size(columns: int, fold: bool = True) -> int:
    """The k of least work: argmin of (n/k)(n + 2^k) for RSR++, of (n/k)(n + k 2^k) for RSR, as in the paper."""
    sizes = range(1, LARGEST_K + 1)
    return min(sizes, key=lambda k: (columns + (1 if fold else k) * 2**k) / k)


def build(codes: npt.NDArray[np.int8], k: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    """(rows, columns) of -1, 0 and 1 to the blocks' streams, one after another, and where each begins.

    A block's stream is, for the positive and then for the negative weights: length, count, `count` times a
    key and the `length` columns that have it, for every length that occurs; then 0. Bit j of a key is row j
    of the block. Raises `ValueError` for more than 65,535 columns, and a k outside 1 to 14.
    """
    import numpy as np

    rows, columns = codes.shape
    if columns > COLUMNS:
        raise ValueError(f"RSR's index numbers columns in 16 bits: {columns} are more than {COLUMNS}")
    if not 1 <= k <= LARGEST_K:
        raise ValueError(f"a block of {k} rows: RSR's have 1 to {LARGEST_K}")
    pieces: list[npt.NDArray[np.int64]] = []
    starts = [0]
    for first in range(0, rows, k):
        block = codes[first : first + k]
        stream = [piece for sign in (1, -1) for piece in _sign_stream(block == sign)]
        pieces += stream
        starts.append(starts[-1] + sum(map(len, stream)))
    return np.concatenate(pieces).astype(np.uint16), np.array(starts, dtype=np.int64)


def _sign_stream(bits: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """One sign's stream in a block, from its (rows, columns) of bits."""
    import numpy as np

    height = len(bits)
    keys = (1 << np.arange(height)) @ bits
    lengths = np.bincount(keys, minlength=2**height)
    lengths[0] = 0
    segments = np.argsort(lengths, kind="stable")
    segments = segments[lengths[segments] > 0]
    columns = np.lexsort((keys, lengths[keys]))
    columns = columns[lengths[keys[columns]] > 0]
    stream = []
    for length, count in zip(*np.unique(lengths[segments], return_counts=True), strict=True):
        table = np.column_stack([segments[:count], columns[: count * length].reshape(count, length)])
        stream += [np.array([length, count]), table.ravel()]
        segments, columns = segments[count:], columns[count * length :]
    return [*stream, np.zeros(1, dtype=np.int64)]
