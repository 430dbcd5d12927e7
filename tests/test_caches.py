"""Low-bit caches: what is stored, what attention reads of it, and that quality is scored through it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lbi import environment, identity, reference, scoring, steps
from lbi.config import CacheConfig, LbiConfig
from lbi.engines import make, sliding
from lbi.engines.cache import CHUNK, quantized_cache
from lbi.engines.low_bit import LowBitCache
from lbi.errors import NotApplied, Unsupported
from lbi.kernels import cache_ops
from lbi.kernels.cache_formats import FORMATS, CacheFormat
from lbi.models import load
from lbi.plan import Plan
from lbi.process import Phases
from lbi.record import Record
from lbi.store import Store
from lbi.typed import plain
from lbi.verdicts import PRUNED, RUN

MakePlan = Callable[..., Plan]

CASES = [
    CacheFormat(name, width, group)
    for width, groups in ((64, (64, 32)), (80, (80, 16)), (12, (12, 4)))
    for group in groups
    for name in FORMATS
]

ERROR = {"int8": 0.5 / 127, "fp8": 1 / 16, "int4": 0.5 / 15}
"""Bounds on a value's error: of the group's largest size, of the value itself, of the group's range."""

ARCH = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 301,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def config(plan: MakePlan) -> Callable[..., LbiConfig]:
    """A cell of engine=loop in float32 with these overrides, whatever the rules say of it."""

    def made(*overrides: str, arch: dict[str, Any] | None = None) -> LbiConfig:
        found = plan("model.dtype=float32", "engine=loop", "sweep.prune=false", *overrides).cells[0].config
        assert found is not None
        return replace(found, model=replace(found.model, arch=ARCH | (arch or {})))

    return made


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def filled(kind: CacheFormat, values: torch.Tensor) -> Any:
    rows = kind.allocate(values.shape[0], values.shape[1], "cpu")
    cache_ops.put(rows, values, torch.tensor(0), kind)
    return rows


@pytest.mark.parametrize("kind", CASES, ids=str)
def test_a_value_is_stored_as_well_as_its_bits_allow(kind: CacheFormat) -> None:
    values = torch.randn(3, 50, kind.width) * torch.logspace(-6, 4, 50)[None, :, None]
    values[1, 7] = 0.0
    found = kind.rounded(values)
    groups, errors = values.unflatten(-1, (-1, kind.group)), (found - values).abs().unflatten(-1, (-1, kind.group))
    size = groups.abs() if kind.name == "fp8" else groups.abs().amax(-1, keepdim=True)
    if kind.name == "int4":
        size = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    # A scale is rounded to 8 bits, which clips the largest; fp8 has its least step at the lower end.
    slack = groups.abs().amax(-1, keepdim=True) * (2**-7 if kind.name == "int4" else 2**-8)
    assert bool((errors <= ERROR[kind.name] * size + slack).all())
    assert bool((found[1, 7] == 0).all())
    assert off(found, values) > 1e-4, "nothing was rounded"
    assert torch.equal(kind.rounded(found), found) or off(kind.rounded(found), found) < 0.02


@pytest.mark.parametrize("kind", CASES, ids=str)
def test_the_compiled_form_stores_the_same_bits(kind: CacheFormat) -> None:
    if cache_ops.problem() is not None:
        pytest.skip(str(cache_ops.problem()))
    values = torch.randn(2, 40, kind.width) * 3
    values[0, 3], values[1, 5, 0] = 0.0, 1e-30
    whole, single = filled(kind, values), kind.allocate(2, 40, "cpu")
    for slot in range(40):
        cache_ops.put(single, values[:, slot : slot + 1], torch.tensor([slot], dtype=torch.int32), kind)
    assert torch.equal(single.codes, whole.codes)
    assert torch.equal(single.numbers, whole.numbers)
    with pytest.raises(IndexError, match="slot 40 of 40"):
        cache_ops.put(single, values[:, :1], torch.tensor(40), kind)


@pytest.mark.parametrize("kind", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_reads_what_is_stored(kind: CacheFormat, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keys, values = torch.randn(2, 1300, kind.width), torch.randn(2, 1300, kind.width)
    held = filled(kind, keys), filled(kind, values)
    try:
        for live, count in ((1, 1), (33, 1), (1300, 1), (64, 5), (1100, 7), (40, 40)):
            queries = torch.randn(6, count, kind.width)
            past = torch.arange(live)[None] <= torch.arange(live - count, live)[:, None]
            seen = [kind.read(rows)[None, :, :live] for rows in held]
            wanted = F.scaled_dot_product_attention(queries[None], *seen, attn_mask=past, scale=0.2, enable_gqa=True)
            found = cache_ops.attend(queries, *held, torch.tensor(live - 3), kind, 0.2, offset=3)
            assert off(found, wanted[0]) < 1e-5, (live, count)
            assert off(cache_ops.attend(queries.bfloat16(), *held, torch.tensor(live), kind, 0.2), wanted[0]) < 0.02
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_the_torch_form_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = CASES[2]
    rows = filled(kind, torch.randn(2, 50, kind.width))
    queries = torch.randn(4, 1, kind.width)
    wanted = cache_ops.attend(queries, rows, rows, torch.tensor(50), kind, 0.1)
    monkeypatch.setattr(cache_ops, "problem", lambda: "there is none")
    monkeypatch.setattr(cache_ops, "library", lambda: pytest.fail("the compiled form was called"))
    assert off(cache_ops.attend(queries, rows, rows, torch.tensor(50), kind, 0.1), wanted) < 1e-5


def test_impossible_formats_are_refused() -> None:
    for arguments, part in ((("int3", 64, 64), "no cache format int3"), (("int8", 64, 48), "groups of 48")):
        with pytest.raises(ValueError, match=part):
            CacheFormat(*arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_one_pass_is_what_token_after_token_gives(config: Callable[..., LbiConfig], name: str) -> None:
    """So the quality that is scored by passes is that of decoding through the cache."""
    cell = config(f"cache=static_{name}")
    plain_model = load(cell.model, cell.engine).model
    text = torch.randint(0, 300, (60,)).tolist()
    exact = plain_model(torch.tensor([text])).logits[0]
    engine = make(cell, load(cell.model, cell.engine).model, slots=60)
    passed = engine.forward(text)
    cache = engine._allocate().cache  # type: ignore[attr-defined]
    cache.reset()
    stepwise = torch.cat(
        [engine.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0] for token in text]  # type: ignore[attr-defined]
    )
    # Sums in another order may turn a code at the edge; beside what the cache does to the logits that is little.
    damage = off(stepwise, exact)
    assert damage > 1e-3
    assert off(passed, stepwise) < 0.2 * damage


@pytest.mark.parametrize("name", FORMATS)
def test_the_loop_generates_through_the_cache(config: Callable[..., LbiConfig], name: str) -> None:
    cell = config(f"cache=static_{name}")
    engine = make(cell, load(cell.model, cell.engine).model, slots=64)
    for prompt, count in (([5, 6, 7, 8, 9], 40), ([11], 12)):
        found = engine.generate(prompt, count, seed=0, inspect=True)
        again = engine.forward(prompt + found.tokens[:-1])[len(prompt) - 1 :]
        assert off(found.logits, again) < 0.02
        assert found.tokens == found.logits.argmax(-1).tolist()
        assert engine.generate(prompt, count, seed=0).tokens == found.tokens
    assert len(set(found.tokens)) > 3


@pytest.mark.parametrize(
    ("window", "sinks", "length"), [(8, 2, 30), (8, 0, 30), (300, 4, 700), (9, 8, 20), (64, 4, 30)]
)
def test_a_window_sees_the_first_and_the_latest_tokens(window: int, sinks: int, length: int) -> None:
    query, key, value = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
    now, past = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = (past <= now) & ((past > now - (window - sinks)) | (past < sinks))
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert off(sliding.banded(query, key, value, None, window, sinks), wanted) < 1e-5


@pytest.mark.parametrize(("window", "sinks", "first"), [(12, 4, 1), (12, 4, 9), (12, 0, 30), (12, 4, 40), (100, 4, 20)])
def test_a_ring_goes_on_where_the_prompt_ended(
    config: Callable[..., LbiConfig], window: int, sinks: int, first: int
) -> None:
    cell = config("cache=sliding", f"cache.window={window}", f"cache.sinks={sinks}")
    exact = load(cell.model, cell.engine).model
    engine = make(cell, load(cell.model, cell.engine).model, slots=first + 31)
    prompt = torch.randint(0, 300, (first,)).tolist()
    found = engine.generate(prompt, 30, seed=0, inspect=True)
    again = engine.forward(prompt + found.tokens[:-1])[first - 1 :]
    assert off(found.logits, again) < 1e-4
    assert engine.generate(prompt, 30, seed=0).tokens == found.tokens
    assert found.cache["slots"] == min(window, first + 31)
    assert found.cache["bytes"] == 3 * 2 * 2 * 64 * 4 * found.cache["slots"]
    steps._check_cache(cell, found.cache)
    theirs = exact(torch.tensor([prompt + found.tokens[:-1]])).logits[0, first - 1 :]
    # Until the window is full nothing is lost.
    full = max(0, window - first + 1)
    if full:
        assert off(again[:full], theirs[:full]) < 1e-4
    if full < 30:
        assert off(again, theirs) > 1e-3


def test_a_ring_takes_one_token_at_a_time(config: Callable[..., LbiConfig]) -> None:
    cell = config("cache=sliding")
    engine = make(cell, load(cell.model, cell.engine).model, slots=20)
    cache = engine._allocate().cache  # type: ignore[attr-defined]
    with pytest.raises(Unsupported, match="one token at a time"):
        engine.model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache)  # type: ignore[attr-defined]


class Widest(TorchDispatchMode):
    """Notes the largest floating-point tensor that an operator makes while it is open."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.skipif(cache_ops.problem() is not None, reason="the torch form widens blocks of slots")
def test_no_step_writes_out_the_cache(config: Callable[..., LbiConfig]) -> None:
    cell = config("cache=static_int4", arch={"vocab_size": 31})
    engine = make(cell, load(cell.model, cell.engine).model, slots=700)
    ready = engine._ready({1})  # type: ignore[attr-defined]
    engine._prefill(torch.randint(0, 30, (600,)))  # type: ignore[attr-defined]
    with Widest() as widest:
        ready[1]()
    # The largest are views of the weights, 384 x 96; one layer's live keys alone would be more.
    assert 0 < widest.numel < 2 * 601 * 64


@pytest.mark.parametrize(("name", "bits"), [("int8", 8.25), ("fp8", 8.25), ("int4", 5.0)])
def test_bytes_are_those_of_the_tensors(config: Callable[..., LbiConfig], name: str, bits: float) -> None:
    cell = config(f"cache=static_{name}")
    engine = make(cell, load(cell.model, cell.engine).model, slots=50)
    found = engine.generate([1, 2, 3], 4, seed=0, inspect=True).cache
    layers = engine._own.cache.layers  # type: ignore[attr-defined]
    held = [tensor for layer in layers for tensor in layer.tensors()]
    assert found["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in held)
    values = 2 * 3 * 2 * 64
    assert found["bytes_per_slot"] * 8 / values == bits
    assert (found["dtype"], found["slots"], found["layer_class"]) == (name, 50, "LowBitLayer")
    assert found["reads"] == "live"
    assert found["bytes"] == 50 * found["bytes_per_slot"]


@pytest.mark.parametrize("cache", ["static_int8", "sliding"])
@pytest.mark.slow
def test_the_whole_step_is_one_compiled_graph(config: Callable[..., LbiConfig], cache: str) -> None:
    from lbi.compilers import counters

    cell = config(f"cache={cache}", "compiler=inductor", *(["cache.window=9"] if cache == "sliding" else []))
    model = load(cell.model, cell.engine).model
    eager, compiled = make(cell, model, slots=40), make(cell, model, slots=40)
    wanted = eager.generate([1, 2, 3], 15, seed=0).tokens
    before = counters()
    compiled.compile()
    assert compiled.generate([1, 2, 3], 15, seed=0).tokens == wanted
    after = counters()
    assert (after["graphs"] - before["graphs"], after["graph_breaks"] - before["graph_breaks"]) == (1, 0)


def test_a_cache_that_is_stored_otherwise_is_not_applied(config: Callable[..., LbiConfig]) -> None:
    cell = config("cache=static_int8")
    steps._check_cache(cell, {"class": "StaticCache", "dtype": "int8"})
    with pytest.raises(NotApplied, match="stored as bfloat16"):
        steps._check_cache(cell, {"class": "StaticCache", "dtype": "bfloat16"})


def test_models_that_want_more_than_full_attention_are_refused(config: Callable[..., LbiConfig]) -> None:
    window = config("cache=static_int8", arch={"model_type": "mistral", "sliding_window": 16})
    model = load(window.model, window.engine).model
    with pytest.raises(Unsupported, match="full attention alone"):
        LowBitCache(model.config, 32, "int8", None)
    odd = config("cache=static_int4", "cache.group_size=48")
    engine = make(odd, load(odd.model, odd.engine).model, slots=32)
    with pytest.raises(Unsupported, match="groups of 48 do not divide heads of 64"):
        engine.generate([1, 2], 3, seed=0)


@pytest.mark.parametrize("name", FORMATS)
def test_engine_fused_decodes_through_the_cache(config: Callable[..., LbiConfig], name: str) -> None:
    cell = config("engine=fused", f"cache=static_{name}")
    exact = load(cell.model, cell.engine).model
    engine = make(cell, load(cell.model, cell.engine).model, slots=64)
    loop = make(config("engine=loop", f"cache=static_{name}"), load(cell.model, cell.engine).model, slots=64)
    found = engine.generate([5, 6, 7, 8, 9], 40, seed=0, inspect=True)
    text = [5, 6, 7, 8, 9, *found.tokens[:-1]]
    theirs = exact(torch.tensor([text])).logits[0, 4:]
    damage = off(found.logits, theirs)
    assert damage > 1e-3
    assert off(engine.forward(text)[4:], found.logits) < 0.2 * damage
    assert off(loop.forward(text)[4:], found.logits) < 0.2 * damage
    assert found.cache["bytes_per_slot"] * 8 / (2 * 3 * 2 * 64) == (5.0 if name == "int4" else 8.25)
    assert (found.cache["dtype"], found.cache["bytes"]) == (name, 64 * found.cache["bytes_per_slot"])
    steps._check_cache(cell, found.cache)


@pytest.mark.parametrize(
    ("script", "said"), [("interpreted_cache", "9 formats"), ("compiled_cache", "sm_90: 9 kernels")]
)
@pytest.mark.slow
def test_the_gpu_kernels_do_what_torch_does_and_compile(script: str, said: str) -> None:
    """In Triton's interpreter, or for a GPU that is not here: each takes over its whole process."""
    file = Path(__file__).parent / f"{script}.py"
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout


def test_a_lossy_cache_is_scored_and_not_held_to_the_plain_path(
    config: Callable[..., LbiConfig], store: Store, tmp_path: Any
) -> None:
    lossy, exact = config("cache=static_int8"), config("cache=static")
    assert steps.plain_path(lossy, None, [1], Phases(tmp_path)) is None
    keys = {
        cell.cache.name: reference.folders(store.root, cell, "env")
        for cell in (lossy, exact, config("cache=static_int8", "cache.group_size=32"))
    }
    assert len({str(found["logits"]) for found in keys.values()}) == 1
    qualities = {
        str(reference.folders(store.root, cell, "env")["quality"])
        for cell in (lossy, exact, config("cache=static_int8", "cache.group_size=32"), config("cache=static_int4"))
    }
    assert len(qualities) == 4
    asked: list[list[int]] = []

    class Engine:
        def forward(self, tokens: list[int]) -> torch.Tensor:
            asked.append(tokens)
            raise NotApplied("asked")

    folders = {"greedy": str(tmp_path / "greedy"), "logits": str(tmp_path), "quality": str(tmp_path / "quality")}
    (tmp_path / "pieces.json").write_text("[[1, 2, 3]]")
    import numpy as np

    np.save(tmp_path / "logits.npy", np.zeros((2, 5), dtype=np.float16))
    request = {"references": folders, "reference_problem": None}
    record = Record(tmp_path, Phases(tmp_path))
    with pytest.raises(NotApplied, match="asked"):
        scoring.score_quality(lossy, request, Engine(), record, Phases(tmp_path))  # type: ignore[arg-type]
    scoring.score_quality(exact, request, Engine(), record, Phases(tmp_path))  # type: ignore[arg-type]
    assert asked == [[1, 2, 3]]


def test_run_ids_of_the_first_caches_are_what_they_were() -> None:
    for kind, max_len, wanted in (
        ("dynamic", None, '{"kind":"dynamic","max_len":null}'),
        ("static", 64, '{"kind":"static","max_len":64}'),
    ):
        cache = CacheConfig(name="x", kind=kind, max_len=max_len)  # type: ignore[arg-type]
        assert identity.canonical_cache(cache) == wanted
    low = CacheConfig(name="x", kind="static", format="int8")
    assert identity.canonical_cache(low) == '{"format":"int8","kind":"static","max_len":null}'
    assert set(plain(low)) >= {"format", "group_size"}


@pytest.mark.parametrize(
    ("overrides", "rule", "part"),
    [
        (["engine=hf", "cache=static_int8"], "low_bit_needs_own_engine", "engine=loop or engine=fused"),
        (["engine=loop", "cache=static_int4", "cache.group_size=48"], "cache_groups_fit", "groups of 48"),
        (["++cache.format=int8"], "unused_knob", "does not read cache.format"),
        (["cache=static", "++cache.group_size=32"], "unused_knob", "does not read cache.group_size"),
        (["cache=hf_quantized_fp8", "++cache.bits=4"], "unused_knob", "does not read cache.bits"),
        (["cache=hf_quantized_quanto", "++cache.axis=1"], "unused_knob", "does not read cache.axis"),
        (["engine=loop", "cache=hf_quantized_hqq"], "loop_needs_static_cache", "or engine=hf"),
        (["engine=fused", "cache=offloaded"], "loop_needs_static_cache", "or engine=hf"),
        (["cache=hf_quantized_hqq", "compiler=inductor"], "static_shapes_need_static_cache", "moved by the host"),
        (["cache=hf_quantized_hqq", "cache.group_size=128"], "hf_quantized_cache_can_be_had", "3 x 64 keys"),
        (["cache=sliding"], "sliding_needs_loop", "use engine=loop"),
        (["engine=loop", "cache=sliding", "cache.sinks=256"], "sliding_needs_loop", "fill the window"),
        (["engine=fused", "cache=sliding"], "loop_needs_static_cache", "use engine=loop"),
        (["cache=offloaded"], "offloading_needs_gpu", "they are there"),
        (["cache=offloaded_static"], "offloading_needs_gpu", "they are there"),
    ],
)
def test_what_cannot_be_is_pruned(plan: MakePlan, overrides: list[str], rule: str, part: str) -> None:
    cell = plan(*overrides, model="smollm2_135m").cells[0]
    assert (cell.verdict, cell.rule) == (PRUNED, rule)
    assert part in cell.reason


def test_a_package_that_is_missing_prunes_its_cache(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    for versions, part in (
        ({"transformers": "5.23.0"}, "pip install optimum-quanto"),
        ({"optimum-quanto": "0.2.7"}, ""),
    ):
        monkeypatch.setattr(environment, "packages", lambda versions=versions: {"torch": "2", **versions})
        cell = plan("cache=hf_quantized_quanto", model="smollm2_135m").cells[0]
        assert (cell.verdict, part in cell.reason) == (PRUNED if part else RUN, True)
        eight = plan("cache=hf_quantized_quanto", "cache.bits=8", model="smollm2_135m").cells[0]
        assert (eight.verdict, eight.rule) == (PRUNED, "hf_quantized_cache_can_be_had")
    cell = plan("cache=hf_quantized_fp8", model="smollm2_135m").cells[0]
    assert (cell.verdict, "transformers 5.23" in cell.reason) == (PRUNED, True)


@pytest.mark.parametrize(
    ("name", "dtype", "bits"), [("hqq", "hqq4", (4, 6)), ("fp8", "fp8", (8, 8.5)), ("quanto", "quanto4", (4, 6))]
)
def test_transformers_own_low_bit_caches_are_used_and_measured(
    config: Callable[..., LbiConfig], name: str, dtype: str, bits: tuple[float, float]
) -> None:
    if name == "quanto":
        pytest.importorskip("optimum.quanto")
    cell = config(f"cache=hf_quantized_{name}", "engine=hf", *([] if name == "fp8" else ["cache.residual=8"]))
    model = load(cell.model, cell.engine).model
    engine = make(cell, model, slots=0)
    # 31 + 9 tokens are fed: the prompt at once, 8 that fill the residual, one that is in it.
    found = engine.generate(list(range(31)), 10, seed=0, inspect=True)
    steps._check_cache(cell, found.cache)
    assert (found.cache["class"], found.cache["dtype"], found.cache["slots"]) == ("QuantizedCache", dtype, 40)
    values = 2 * 3 * 2 * 64
    rest = 0 if name == "fp8" else values * 4
    assert bits[0] * 39 < (found.cache["bytes"] - rest) * 8 / values < bits[1] * 40


@pytest.mark.parametrize("name", ["hqq", "fp8"])
def test_a_quality_pass_sees_what_generation_through_the_cache_sees(
    config: Callable[..., LbiConfig], name: str
) -> None:
    residual = 8
    extra = [] if name == "fp8" else [f"cache.residual={residual}"]
    cell = config(f"cache=hf_quantized_{name}", "engine=hf", *extra)
    model = load(cell.model, cell.engine).model
    engine = make(cell, model, slots=0)
    text = torch.randint(0, 300, ((CHUNK if name == "fp8" else residual) + 7,)).tolist()
    prompt = text[:-7]
    cache = quantized_cache(cell.cache, model.config)
    stepwise = [model(torch.tensor([prompt]), past_key_values=cache).logits[0]]
    stepwise += [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in text[len(prompt) :]]
    exact = model(torch.tensor([text])).logits[0]
    passed = engine.forward(text)
    damage = off(torch.cat(stepwise)[-7:], exact[-7:])
    assert damage > 1e-3
    assert off(passed[-7:], torch.cat(stepwise)[-7:]) < 0.2 * damage


def test_what_can_be_runs(plan: MakePlan) -> None:
    made = plan("engine=loop,fused", "cache=static,static_int8,static_fp8,static_int4", model="smollm2_135m")
    assert [cell.verdict for cell in made.cells] == [RUN] * 8
    assert plan("engine=loop", "cache=sliding", model="smollm2_135m").cells[0].verdict == RUN
