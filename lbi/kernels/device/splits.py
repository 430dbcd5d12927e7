"""How the programs that share a context put their parts of an attention together (split-KV).

Each leaves its weighted sum, its largest score and its total; the last to arrive adds up what all
have left, in their order, so the result has the same bits whoever is last. It loads many parts at
once: one after the other, sixteen parts take longer than the attention itself.
"""

import triton
import triton.language as tl


@triton.jit
def merge_if_last(
    partial, arrived, out, kv, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Called by each program when its part is stored: the last of a key-value head writes (GROUP, D) to `out`.

    `partial` is (KV, SPLITS, GROUP, BD + 2) float32: a part's sum, largest score and total.
    `arrived` (KV,) is zero between launches.
    """
    tl.debug_barrier()
    if tl.atomic_add(arrived + kv, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived + kv, 0)
        _merge(partial + kv * SPLITS * GROUP * (BD + 2), out, GROUP, D, BD, SPLITS, AT_ONCE)


@triton.jit
def _merge(
    partial, out, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """Attention of a key-value head's `GROUP` queries from (SPLITS, GROUP, BD + 2): sums, largest score, total."""
    GP: tl.constexpr = triton.next_power_of_2(GROUP)
    s, g, d = tl.arange(0, AT_ONCE), tl.arange(0, GP), tl.arange(0, BD)
    most = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, BD), tl.float32)
    for part in tl.static_range(0, SPLITS, AT_ONCE):
        is_one = (part + s < SPLITS)[:, None] & (g < GROUP)[None, :]
        its = partial + ((part + s)[:, None] * GROUP + g[None, :]) * (BD + 2)
        its_most = tl.load(its + BD, mask=is_one, other=float("-inf"), cache_modifier=".cg")
        its_total = tl.load(its + BD + 1, mask=is_one, other=0.0, cache_modifier=".cg")
        theirs = tl.load(its[:, :, None] + d[None, None, :], mask=is_one[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(most, tl.max(its_most, axis=0))
        # A split without tokens has -inf, and so may all before it: exp(-inf - -inf) is no number.
        shrink = tl.where(most == float("-inf"), 0.0, tl.exp(most - higher))
        weight = tl.where(its_most == float("-inf"), 0.0, tl.exp(its_most - higher[None, :]))
        total = total * shrink + tl.sum(its_total * weight, axis=0)
        acc = acc * shrink[:, None] + tl.sum(theirs * weight[:, :, None], axis=0)
        most = higher
    made = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + g[:, None] * D + d[None, :], made, mask=(g[:, None] < GROUP) & (d[None, :] < D))
