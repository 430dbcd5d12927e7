"""lbi's own kernels and engine=fused on a GPU: against float64, and against Hugging Face's own Llama."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packed_cases import FORMS, Form, error, exact, random_matrix
from test_fused import CONFIG, expected, llama, off

from lbi.engines.fused import FusedEngine
from lbi.engines.fused_llama import Llama
from lbi.kernels.formats import Packed
from lbi.quantizers import assign
from lbi.quantizers.options import option

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

ON_GPU = SimpleNamespace(**{**vars(CONFIG), "engine": SimpleNamespace(device="cuda", tokens_per_graph=1)})

BEYOND = {torch.bfloat16: 5e-4, torch.float16: 5e-4, torch.float32: 1e-5}
"""Relative to float64, with the weights as stored, beyond what it takes to round that result to the type: with few
rows that alone is more than 2e-3 of bf16 now and then."""


def on_gpu(matrix: Packed) -> Packed:
    moved = {name: getattr(matrix, name) for name in ("data", "scales", "zeros")}
    return replace(matrix, **{name: tensor.cuda() for name, tensor in moved.items() if tensor is not None})


@pytest.mark.parametrize("dtype", BEYOND, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_products_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    """Every way through the kernels: one token, few, and more than the tensor cores take at once."""
    from lbi.kernels.gemv import MOST_ROWS
    from lbi.kernels.packed_ops import packed_linear

    form: Form = FORMS[name]
    unit = max(form.unit, form.group or 1)
    # In 8,192 inputs all steps of the loads are under way, which is what takes shared memory.
    for rows, inputs in ((64, 32 * unit), (int(torch.randint(1, 400, ()).item()), unit * 9), (64, 8192)):
        matrix = random_matrix(form, rows, inputs, dtype)
        bias = torch.randn(rows).to(dtype)
        there = on_gpu(matrix)
        for tokens in (1, 2, 8, 9, 16, 17):
            x = torch.randn(tokens, inputs).to(dtype)
            y = packed_linear(x.cuda(), there.data, there.scales, there.zeros, bias.cuda(), there.format)
            # Beyond 16 tokens the weights are written out, and rounded, too.
            roundings = 2 if tokens > MOST_ROWS else 1
            unavoidable = error(exact(matrix, x, bias).to(dtype), matrix, x, bias)
            assert error(y.cpu(), matrix, x, bias) < roundings * unavoidable + BEYOND[dtype], (rows, inputs, tokens)


@pytest.mark.parametrize("name", ["w4 g32", "w4 row", "w2 g64", "w158", "w8"])
def test_inputs_far_from_zero_do_not_drown_the_weights(name: str) -> None:
    """What the mantissa adds to each code is 128 times the inputs' sum: it must come off again."""
    from lbi.kernels.packed_ops import packed_linear

    matrix = random_matrix(FORMS[name], 256, 4096, torch.bfloat16)
    there = on_gpu(matrix)
    x = (5 + torch.randn(1, 4096)).to(torch.bfloat16)
    y = packed_linear(x.cuda(), there.data, there.scales, there.zeros, None, there.format)
    assert error(y.cpu(), matrix, x) < 5e-3


@pytest.mark.parametrize(
    ("heads", "kv", "width"), [(4, 4, 64), (6, 2, 64), (8, 2, 80), (8, 1, 96), (4, 2, 128), (16, 2, 64)]
)
@pytest.mark.parametrize("graphed", [False, True])
def test_fused_says_what_hugging_face_says(heads: int, kv: int, width: int, graphed: bool) -> None:
    model = llama(heads=heads, kv=kv, width=width)
    prompt = torch.randint(0, 517, (int(torch.randint(1, 60, ()).item()),)).tolist()
    tokens, logits = expected(model, prompt, 70)
    engine = FusedEngine(model.cuda(), ON_GPU, slots=len(prompt) + 70)
    if graphed:
        engine.compile()
    for _ in range(2):
        found = engine.generate(prompt, 70, seed=0, inspect=True)
        assert off(found.logits, logits) < 1e-3
        assert found.tokens == tokens


@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 4, 64), (9, 3, 64), (8, 2, 80), (32, 8, 128), (16, 1, 96)])
def test_several_tokens_behind_a_cache_are_what_they_are_on_a_cpu(heads: int, kv: int, width: int) -> None:
    """16 tokens of 16 heads are more rows than a tile has; 17 tokens more than the products take at once."""
    on_cpu = llama(heads=heads, kv=kv, width=width, hidden_size=32 * heads)
    on_card = deepcopy(on_cpu).cuda()
    ours, theirs = (Llama(model, 300) for model in (on_card, on_cpu))
    with torch.no_grad():
        for count in (2, 9, 16, 17):
            begun = int(torch.randint(1, 300 - count, ()).item())
            text = torch.randint(0, 517, (begun + count,))
            where = begun + torch.arange(count)
            expected_logits = extended(theirs, text, where)
            assert off(extended(ours, text.cuda(), where.cuda()).cpu(), expected_logits) < 1e-4, (begun, count)


def extended(model: Llama, text: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    model.prefill(text[: where[0]])
    return model.extend(text[where[0] :], where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["native_w8", "native_fp8", "native_w4 group_size=64", "native_w2", "native_w158"])
def test_fused_reads_lbis_formats_as_torch_does_on_a_cpu(text: str, dtype: torch.dtype) -> None:
    model = llama(heads=8, kv=2, hidden_size=256, intermediate_size=512).to(dtype)
    assign.apply(model, assign.by_name(model, replace(option(text), lm_head="same")))
    prompt = torch.randint(0, 517, (23,)).tolist()
    wanted = FusedEngine(model, CONFIG, slots=64).generate(prompt, 30, seed=0, inspect=True)
    assert wanted.logits is not None
    engine = FusedEngine(model.cuda(), ON_GPU, slots=64)
    engine.compile()
    found = engine.generate(prompt, 30, seed=0, inspect=True)
    assert found.logits is not None
    pairs = zip(found.tokens, wanted.tokens, strict=True)
    same = next((number for number, (ours, theirs) in enumerate(pairs) if ours != theirs), 29)
    # Up to where the texts part, if they do: rounding may turn a near tie.
    assert off(found.logits[: same + 1], wanted.logits[: same + 1]) < (1e-3 if dtype == torch.float32 else 3e-2)
    assert same == 29 or dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("heads", "kv", "width", "group"), [(32, 8, 128, 0), (9, 3, 64, 32), (8, 1, 80, 20), (4, 4, 96, 0)]
)
@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_attention_over_a_low_bit_cache_is_that_of_float64(
    name: str, heads: int, kv: int, width: int, group: int
) -> None:
    """What the cache holds is the reference, so that only the kernel's own rounding is left."""
    from lbi.kernels import cache_gpu
    from lbi.kernels.cache_formats import CacheFormat

    kind, slots, scale = CacheFormat(name, width, group or width), 3000, width**-0.5
    cut = cache_gpu.cut_for(kind, slots)
    splits = cache_gpu.splits_for(torch.device("cuda"), kv, slots, cut)
    # A few keys that stand out, and values far from zero, as real models have them.
    keys, values = torch.randn(kv, slots, width, device="cuda") * 2, torch.randn(kv, slots, width, device="cuda") + 3
    stored = kind.store(keys), kind.store(values)
    exact_keys, exact_values = (kind.read(rows).double().repeat_interleave(heads // kv, 0) for rows in stored)
    scratch = cache_gpu.scratch(torch.device("cuda"), heads, kv, width, splits, cut)
    for live in (1, 63, 64, 65, 1000, slots):
        queries = torch.randn(heads, width, device="cuda").bfloat16()
        out = torch.empty_like(queries)
        position = torch.tensor([live - 1], device="cuda", dtype=torch.int32)
        cache_gpu.attend(queries, *stored, position, 1, kind, scale, out, scratch, splits)
        scores = torch.einsum("hd,htd->ht", queries.double(), exact_keys[:, :live]) * scale
        wanted = torch.einsum("ht,htd->hd", scores.softmax(-1), exact_values[:, :live])
        assert off(out.double(), wanted) < 4e-3, live
