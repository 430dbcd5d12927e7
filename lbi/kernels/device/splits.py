"""How the programs that share a context put their parts of an attention together (split-KV).

Each leaves its weighted sum, its largest score and its total; the last to arrive adds up what all
have left, in their order, so the result has the same bits whoever is last. Nothing in that waits for
another thread, and all loads can be under way at once: one part after the other would take longer than
the attention itself.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-1e30)
"""A maximum of no scores: finite, so that what has none gets weights of zero and not of nan."""


@triton.jit
def one_by_one(index, known):
    """`index`, of which the compiler must not see that it is in a row; `known` is any number that is not negative.

    It would load two or four neighbours at once, and that in another layout than single numbers, and then have every
    weight changed from one layout into the other: two barriers for each part.
    """
    return index * tl.where(known >= 0, 1, 2)


@triton.jit
def merge_if_last(
    partial, arrived, out, kv, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Called by each program when its part is stored: the last of a key-value head writes (GROUP, D) to `out`.

    `partial` is (KV, SPLITS, GROUP, BD + 2) float32: a part's sum, largest score and total.
    `arrived` (KV,) is zero between launches.
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrived + kv, 1, sem="acq_rel")
    if before == SPLITS - 1:
        tl.store(arrived + kv, 0)
        _merge(partial + kv * SPLITS * GROUP * (BD + 2), out, before, GROUP, D, BD, SPLITS)


@triton.jit
def _merge(
    partial, out, known, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Attention of a key-value head's `GROUP` queries from (SPLITS, GROUP, BD + 2): sums, largest score, total."""
    g, d = tl.arange(0, triton.next_power_of_2(GROUP))[:, None], one_by_one(tl.arange(0, BD), known)[None, :]
    inside = (g < GROUP) & (d < D)
    # A part's maximum and total for every value of it: alike, and where they are needed, by no way through memory.
    highest = tl.full((g.shape[0], BD), LEAST, tl.float32)
    for part in tl.static_range(SPLITS):
        its = partial + (part * GROUP + g) * (BD + 2) + 0 * d
        highest = tl.maximum(highest, tl.load(its + BD, mask=inside, other=LEAST, cache_modifier=".cg"))
    total = tl.zeros((g.shape[0], BD), tl.float32)
    acc = tl.zeros((g.shape[0], BD), tl.float32)
    for part in tl.static_range(SPLITS):
        its = partial + (part * GROUP + g) * (BD + 2) + 0 * d
        # A split without tokens has a maximum that no score comes near, and so a weight of 0.
        weight = tl.exp(tl.load(its + BD, mask=inside, other=LEAST, cache_modifier=".cg") - highest)
        total += weight * tl.load(its + BD + 1, mask=inside, other=0.0, cache_modifier=".cg")
        acc += weight * tl.load(its + d, mask=inside, other=0.0, cache_modifier=".cg")
    made = tl.where(inside, acc / tl.where(inside, total, 1.0), 0.0)
    tl.store(out + g * D + d, made.to(out.dtype.element_ty), mask=inside)
