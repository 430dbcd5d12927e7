"""engine=loop: the tokens of generate(), from a loop that never goes back to the host."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lbi import engine_rules, identity, rules, steps
from lbi.compilers import counters
from lbi.config import DecodingConfig, LbiConfig
from lbi.cuda_graphs import require_device_counters
from lbi.decode_trace import MARK, Kernel, Step, read_steps, take
from lbi.engines import Engine, Graphs, make, plain_engine
from lbi.engines.cache import in_pieces
from lbi.engines.sampling import chooser, probabilities
from lbi.errors import InputError, Unsupported
from lbi.kernels_seen import summary
from lbi.look_inside import look_inside
from lbi.model_files import ModelFacts
from lbi.models import load
from lbi.plan import Plan
from lbi.process import Phases
from lbi.prompts import fit_tokens, read_text
from lbi.record import Record
from lbi.verdicts import PRUNED, RUN

MakePlan = Callable[..., Plan]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""With so short an original context, a test's few positions reach all of its branches."""


def shape(
    heads: int, kv_heads: int, head_dim: int, *, tied: bool = False, hidden: int = 96, **fields: Any
) -> dict[str, Any]:
    """A model of two layers. Its weights are large enough that greedy text does not repeat one token."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 301,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        **fields,
    }


SHAPES = {
    "gqa1-64-tied": shape(4, 4, 64, tied=True),
    "gqa3-80": shape(6, 2, 80),
    "gqa4-96-llama3": shape(8, 2, 96, rope_parameters=LLAMA3),
    "gqa8-128-tied-llama3": shape(8, 1, 128, tied=True, rope_parameters=LLAMA3),
    "window": shape(4, 2, 32, model_type="mistral", sliding_window=16),
    "no-rope": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 301}
    | {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def config(plan: MakePlan) -> Callable[..., LbiConfig]:
    """A cell of engine=loop in float32 with these overrides, whatever the rules say of it."""

    def made(*overrides: str, arch: dict[str, Any] | None = None) -> LbiConfig:
        common = ["model.dtype=float32", "engine=loop", "cache=static", "sweep.prune=false"]
        found = plan(*common, *overrides).cells[0].config
        assert found is not None
        return replace(found, model=replace(found.model, arch=arch)) if arch else found

    return made


def by_generate(config: LbiConfig, model: Any, slots: int = 0) -> Engine:
    """engine=hf for the same cell, with a dynamic cache unless there are slots."""
    cache = config.cache if slots else steps.PLAIN_CACHE
    return make(replace(config, engine=plain_engine(config.engine), cache=cache), model, slots)


def largest_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.slow
def test_greedy_tokens_and_logits_are_those_of_generate(config: Callable[..., LbiConfig], name: str) -> None:
    cell = config(arch=SHAPES[name])
    model = load(cell.model, cell.engine).model
    plain = by_generate(cell, model)
    # The longest fills the cache to its last slot; the short ones after it must not see what it left there.
    loop = make(cell, model, slots=23 + 17 - 1)
    for length, new in ((23, 17), (1, 17), (7, 2), (16, 1)):
        prompt = [(7 * index + length) % 300 for index in range(length)]
        wanted = plain.generate(prompt, new, seed=0, inspect=True)
        found = loop.generate(prompt, new, seed=0, inspect=True)
        assert found.tokens == wanted.tokens
        assert found.logits.shape == wanted.logits.shape == (new, 301)
        assert largest_error(found.logits, wanted.logits) < 1e-3
        assert loop.generate(prompt, new, seed=0).tokens == wanted.tokens
        assert (len(found.timing.tokens), found.timing.prompt_tokens) == (new, length)
        assert (found.cache["class"], found.cache["slots"]) == ("StaticCache", 16 if name == "window" else 39)
    assert len(set(plain.generate([5, 9], 17, seed=0).tokens)) > 3
    assert torch.equal(loop.forward(prompt), plain.forward(prompt))


@pytest.mark.parametrize(
    "quantizer", ["int8_wo", "int8_da", "int4_wo", "hqq4", "intx_sim", "int8_pack", "fp8_wo", "bitnet", "rsr"]
)
@pytest.mark.slow
def test_quantized_weights_give_generates_tokens_too(
    config: Callable[..., LbiConfig], tmp_path: Path, quantizer: str
) -> None:
    cell = config(
        f"quantizer={quantizer}", "model.dtype=bfloat16", arch=shape(4, 2, 64, hidden=128, intermediate_size=256)
    )
    model = load(cell.model, cell.engine).model
    phases = Phases(tmp_path)
    steps.quantize(cell, model, [1, 2, 3], tmp_path / "tuning.json", Record(tmp_path, phases), phases)
    wanted = by_generate(cell, model, slots=24).generate([3, 1, 4, 1, 5], 12, seed=0)
    assert make(cell, model, slots=24).generate([3, 1, 4, 1, 5], 12, seed=0).tokens == wanted.tokens


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["decoding.top_k=null", "decoding.top_p=0.8"],
        ["decoding.top_k=5", "decoding.temperature=2.0"],
        ["decoding.top_k=null", "decoding.min_p=0.2"],
        ["decoding.top_p=0.9", "decoding.min_p=0.01", "decoding.repetition_penalty=1.8"],
        ["decoding.repetition_penalty=0.6"],
    ],
)
@pytest.mark.parametrize("engine", ["loop", "fused"])
@pytest.mark.slow
def test_a_seed_draws_the_tokens_that_generate_draws_for_it(
    config: Callable[..., LbiConfig], engine: str, settings: list[str]
) -> None:
    cell = config("decoding=sampling", f"engine={engine}", *settings, arch=shape(4, 2, 32, initializer_range=0.1))
    model = load(cell.model, cell.engine).model
    plain = by_generate(cell, model)
    loop = make(cell, model, slots=64)
    drawn = {seed: loop.generate([1, 2, 3], 20, seed=seed).tokens for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    for seed, tokens in drawn.items():
        assert tokens == loop.generate([1, 2, 3], 20, seed=seed).tokens
        assert tokens == plain.generate([1, 2, 3], 20, seed=seed).tokens


def test_the_likeliest_of_one_is_greedy(config: Callable[..., LbiConfig]) -> None:
    greedy, single = config(arch=SHAPES["gqa3-80"]), config("decoding=sampling", "decoding.top_k=1")
    model = load(greedy.model, greedy.engine).model
    wanted = make(greedy, model, slots=40).generate([4, 5, 6], 20, seed=0).tokens
    assert make(single, model, slots=40).generate([4, 5, 6], 20, seed=9).tokens == wanted


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.75}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.15}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings: dict[str, Any], allowed: list[int]) -> None:
    decoding = DecodingConfig(name="sampling", kind="sampling", temperature=0.5, seed=0, **settings)
    shares = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]])
    # Half the temperature squares them, so the logits are half of what gives these shares.
    logits = shares.log() / 2
    wanted = torch.zeros(5)
    wanted[allowed] = shares[0, allowed] / shares[0, allowed].sum()
    assert torch.allclose(probabilities(logits, decoding)[0], wanted, atol=1e-6)
    torch.manual_seed(0)
    choose = chooser(decoding)
    drawn = torch.cat([choose(logits, torch.empty(1, 5).exponential_()) for _ in range(4000)])
    # Four standard errors of a share of a half.
    assert torch.allclose(drawn.bincount(minlength=5) / 4000, wanted, atol=0.032)
    assert set(drawn.tolist()) <= set(allowed)


@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
def test_tokens_do_not_depend_on_how_many_are_launched_at_once(config: Callable[..., LbiConfig], decoding: str) -> None:
    cells = [config(f"decoding={decoding}", f"engine.tokens_per_graph={count}") for count in (1, 3, 50)]
    model = load(cells[0].model, cells[0].engine).model
    wanted, *others = [make(cell, model, slots=40).generate([9, 8, 7], 12, seed=4, inspect=True) for cell in cells]
    for found in others:
        assert found.tokens == wanted.tokens
        assert torch.equal(found.logits, wanted.logits)


def test_tokens_of_one_launch_share_its_end_and_the_mean_stays_right(config: Callable[..., LbiConfig]) -> None:
    cell = config("engine.tokens_per_graph=3")
    engine = make(cell, load(cell.model, cell.engine).model, slots=40)
    timing = engine.generate([9, 8, 7], 9, seed=0).timing
    first, *others = timing.tokens
    assert [others[index] for index in (0, 3, 6)] == sorted(set(others))
    assert [others.count(at) for at in sorted(set(others))] == [3, 3, 2]
    assert 0 < first < others[0]
    assert timing.tokens[-1] <= timing.end
    assert timing.tpot_s() == pytest.approx((others[-1] - first) / 8)


def test_attention_is_not_the_slow_kind(config: Callable[..., LbiConfig]) -> None:
    """With torch's plain form of attention forbidden a call that needs it fails: that form alone does here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cell = config(arch=SHAPES["gqa4-96-llama3"])
    engine = make(cell, load(cell.model, cell.engine).model, slots=33)
    wanted = engine.generate(list(range(21)), 8, seed=0).tokens
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert engine.generate(list(range(21)), 8, seed=0).tokens == wanted
        q = torch.randn(1, 2, 8, 16)
        with pytest.raises(RuntimeError, match="No available kernel"):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)


@pytest.mark.parametrize("knobs", [["decoding=greedy"], ["decoding=sampling", "decoding.repetition_penalty=1.3"]])
@pytest.mark.slow
def test_the_whole_step_is_one_compiled_graph(config: Callable[..., LbiConfig], knobs: list[str]) -> None:
    cell = config("compiler=inductor", *knobs)
    model = load(cell.model, cell.engine).model
    eager, compiled = make(cell, model, slots=40), make(cell, model, slots=40)
    before = counters()
    compiled.compile()
    for prompt in ([1, 2, 3], [9, 8, 7, 6, 5, 4]):
        wanted = eager.generate(prompt, 15, seed=2).tokens
        assert compiled.generate(prompt, 15, seed=2).tokens == wanted
    after = counters()
    assert (after["graphs"] - before["graphs"], after["graph_breaks"] - before["graph_breaks"]) == (1, 0)
    assert compiled.graphs() is None


class Operators(TorchDispatchMode):
    """Notes the operators that run while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gqa3-80", "gqa4-96-llama3", "no-rope"])
def test_no_number_of_the_device_is_asked_for(config: Callable[..., LbiConfig], name: str) -> None:
    """On a CPU nothing waits, but what would is an operator there as well."""
    knobs = ["decoding.top_p=0.9", "decoding.min_p=0.01", "decoding.repetition_penalty=1.1"]
    cell = config("decoding=sampling", *knobs, arch=SHAPES[name])
    model = load(cell.model, cell.engine).model
    asking = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "multinomial"}
    with Operators() as generate:
        by_generate(cell, model, slots=32).generate([1, 2, 3], 4, seed=0)
    assert generate.seen & asking
    engine = make(cell, model, slots=32)
    engine.generate([1, 2, 3], 4, seed=0)
    with Operators() as loop:
        engine.generate([1, 2, 3], 4, seed=0)
    assert "exponential_" in loop.seen
    assert not loop.seen & asking


def test_graphs_are_captured_before_the_prompt_and_by_number_of_steps(
    config: Callable[..., LbiConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for a CUDA graph, which warms up, captures and restores as one does."""
    captured: list[int] = []

    class Graph:
        def __init__(self, call: Callable[[], Any], restore: Callable[[], None]) -> None:
            self.call, self.replays = call, 0
            for _ in range(4):
                captured.append(len(call()))
                restore()

        def __call__(self) -> Any:
            self.replays += 1
            return self.call()

    monkeypatch.setattr("lbi.engines.loop.GraphedCall", Graph)
    cells = [config(f"compiler={name}", "engine.tokens_per_graph=3") for name in ("eager", "cudagraph")]
    model = load(cells[0].model, cells[0].engine).model
    plain, graphed = (make(cell, model, slots=14) for cell in cells)
    graphed.compile()
    for prompt, new in (([1, 2, 3], 12), ([4, 5], 8), ([1, 2, 3], 12)):
        wanted = plain.generate(prompt, new, seed=0)
        assert graphed.generate(prompt, new, seed=0).tokens == wanted.tokens
    # 11 steps are three launches of three and one of two, 7 are two of three and one of one.
    assert captured == [2] * 4 + [3] * 4 + [1] * 4
    assert graphed.graphs() == Graphs(captured=3, replays=4 + 3 + 4)
    record = Record(Path(), Phases(Path()))
    steps._note_compiled(cells[1], graphed, record)
    assert record.effective["compiler"] == {"cuda_graphs": 3, "replays": 11, "tokens_per_graph": 3}


def test_wrong_calls_are_refused_before_any_work(config: Callable[..., LbiConfig]) -> None:
    cell = config()
    engine = make(cell, load(cell.model, cell.engine).model, slots=10)
    for prompt, new, field, part in (
        ([], 4, "workload.prompt", "at least one token"),
        ([1, 2], 0, "workload.new_tokens", "at least 1"),
        ([1, 2, 3], 9, "cache.max_len", "Set it to 11 or more"),
    ):
        with pytest.raises(InputError, match=part) as caught:
            engine.generate(prompt, new, seed=0)
        assert caught.value.field == field
    assert len(engine.generate([1, 2, 3], 8, seed=0).tokens) == 8
    with pytest.raises(InputError, match="cache=static"):
        make(replace(cell, cache=steps.PLAIN_CACHE), None, slots=10)
    with pytest.raises(InputError, match="has no tokens"):
        fit_tokens([], 8)


def test_a_cache_that_counts_on_the_host_is_not_replayed(config: Callable[..., LbiConfig]) -> None:
    from transformers import StaticCache

    caches = {
        name: StaticCache(config=load(cell.model, cell.engine).model.config, max_cache_len=8)
        for name in ("window", "gqa3-80")
        for cell in [config(arch=SHAPES[name])]
    }
    require_device_counters(caches["gqa3-80"])
    with pytest.raises(Unsupported, match="StaticSlidingWindowLayer"):
        require_device_counters(caches["window"])


@pytest.mark.parametrize(
    ("overrides", "rule", "part"),
    [
        (["engine=loop"], "loop_needs_static_cache", "use cache=static"),
        (["engine=loop", "cache=static", "engine.tokens_per_graph=4"], "unused_knob", "compiler=cudagraph"),
        (["engine=hf", "+engine.tokens_per_graph=4"], "unused_knob", "engine=loop"),
        (["engine=hf,loop", "cache=static", "engine.tokens_per_graph=1"], "no_such_knob", "tokens_per_graph"),
    ],
)
def test_what_the_loop_cannot_do_is_pruned(plan: MakePlan, overrides: list[str], rule: str, part: str) -> None:
    cell = plan(*overrides).cells[0]
    assert (cell.verdict, cell.rule) == (PRUNED, rule)
    assert part in cell.reason
    assert plan("engine=loop", "cache=static").cells[0].verdict == RUN


@pytest.mark.parametrize(
    ("rope", "refused"),
    [
        ({"rope_type": "llama3"}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"type": "longrope", "original_max_position_embeddings": 32}, True),
        ({"type": "longrope", "original_max_position_embeddings": 4096}, False),
    ],
)
def test_a_rope_that_changes_with_the_length_is_left_to_generate(
    config: Callable[..., LbiConfig], rope: dict[str, Any], refused: bool
) -> None:
    facts = ModelFacts(None, {"rope_scaling": rope}, None)
    reason = engine_rules.loop_needs_fixed_rope(config(), facts, rules.Machine("cpu", {}, True))
    assert (reason is not None) == refused


def test_runs_of_generate_keep_their_ids(plan: MakePlan) -> None:
    """A knob that only engine=loop reads must not make every older result stale."""
    (cell,) = plan("engine.device=cpu").cells
    assert cell.config is not None
    known = '{"attention":"sdpa","device":"cpu","kind":"hf","threads":null}'
    assert identity.canonical_engine(cell.config.engine) == known
    with_knob = plan("engine.device=cpu", "+engine.tokens_per_graph=1").cells[0]
    assert with_knob.run_id == cell.run_id == identity.run_id_of(cell.config, ModelFacts(None, None, None))
    loops = plan("engine=loop", "cache=static", "compiler=cudagraph", "engine.tokens_per_graph=1,2").cells
    assert len({loop.run_id for loop in (cell, *loops)}) == 3


def test_knobs_of_decoding_that_came_later_leave_older_runs_their_ids(plan: MakePlan) -> None:
    def text(*overrides: str) -> str:
        found = plan(*overrides).cells[0].config
        assert found is not None
        return identity.canonical_decoding(found.decoding)

    greedy = '{"kind":"greedy","seed":null,"temperature":null,"top_k":null,"top_p":null}'
    sampling = '{"kind":"sampling","seed":0,"temperature":0.8,"top_k":200,"top_p":null}'
    assert text() == greedy
    assert text("decoding=sampling") == sampling
    assert text("decoding=sampling", "decoding.min_p=0.1") == sampling.replace('"seed"', '"min_p":0.1,"seed"')


def test_the_check_of_a_library_that_tunes_by_rows_has_no_others(
    config: Callable[..., LbiConfig], tmp_path: Path
) -> None:
    """The prompt's number of rows and single ones, which are tuned anyway; the logits are those of the whole text."""
    cell = config()
    model = load(cell.model, cell.engine).model
    text, seen = [5, 6, 7, 8, 9, 10, 11, 12], []
    handle = model.register_forward_pre_hook(
        lambda _, args, named: seen.append((named.get("input_ids", args[0] if args else None)).shape[1]),
        with_kwargs=True,
    )
    found = in_pieces(model, text, 3)
    handle.remove()
    assert seen == [3, 3, 1, 1]
    whole = model(torch.tensor([text])).logits[0]
    assert float((found - whole).norm() / whole.norm()) < 1e-5
    by_gemlite = replace(cell, quantizer=replace(cell.quantizer, family="gemlite"))
    wanted = make(cell, model, slots=40).generate([1, 2, 3], cell.workload.new_tokens, seed=0).tokens
    check = steps.plain_path(by_gemlite, model, [1, 2, 3], Phases(tmp_path))
    assert check is not None
    assert check(wanted)["verdict"] == "equal"


def test_the_loop_is_never_the_plain_path_itself(config: Callable[..., LbiConfig], tmp_path: Path) -> None:
    cell = config()
    model = load(cell.model, cell.engine).model
    check = steps.plain_path(cell, model, [1, 2, 3], Phases(tmp_path))
    assert check is not None
    tokens = make(cell, model, slots=40).generate([1, 2, 3], cell.workload.new_tokens, seed=0).tokens
    assert check(tokens)["verdict"] == "equal"
    hf = replace(cell, engine=plain_engine(cell.engine), cache=steps.PLAIN_CACHE)
    assert steps.plain_path(hf, model, [1, 2, 3], Phases(tmp_path)) is None


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("quantizer", ["none", "int8_wo"])
@pytest.mark.slow
def test_decode_steps_are_looked_into_by_token(
    config: Callable[..., LbiConfig], tmp_path: Path, at_once: int, quantizer: str
) -> None:
    wide = shape(8, 4, 32, hidden=256, intermediate_size=768)
    cell = config(f"quantizer={quantizer}", f"engine.tokens_per_graph={at_once}", "model.dtype=bfloat16", arch=wide)
    phases = Phases(tmp_path)
    record = Record(tmp_path, phases)
    model = load(cell.model, cell.engine).model
    layers = steps.quantize(cell, model, [1, 2, 3], tmp_path / "tuning.json", record, phases)
    look_inside(cell, make(cell, model, slots=40), model, [1, 2, 3], layers, record, phases)
    seen = record.effective["kernels"]
    assert seen["steps"] == 3 * at_once
    products = [item["calls"] for item in seen["top"] if item["name"] == "aten::mm"]
    assert products == [15.0]
    if quantizer == "int8_wo":
        weights = sum(layer.params for layer in layers if layer.seen.quantized)
        assert record.metrics["unpacked_bytes_per_token"] == 2 * weights


def test_a_short_workload_is_looked_into_no_further_than_its_cache_reaches(config: Callable[..., LbiConfig]) -> None:
    cell = config("engine.tokens_per_graph=4", "workload.new_tokens=7")
    engine = make(cell, load(cell.model, cell.engine).model, slots=10)
    found = take(engine, [1, 2, 3], "cpu", cell.workload.new_tokens)
    assert [step.tokens for step in found] == [4, 2]


def test_the_kernels_of_one_replay_are_shared_out_to_its_tokens() -> None:
    def event(kind: str, name: str, ts: float, **about: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "tid": 1, "ts": ts, "dur": 2.0, "args": about}

    replay = event("user_annotation", f"{MARK}s 4", 10.0) | {"dur": 5.0}
    launch = event("cuda_runtime", "cudaGraphLaunch", 11.0, correlation=1)
    kernels = [event("kernel", "gemv(int)", 20.0 + index, correlation=1) for index in range(8)]
    (step,) = read_steps([replay, launch, *kernels])
    assert step == Step(4, kernels=[Kernel("gemv(int)", 2e-6)] * 8)
    seen = summary([step], "cuda")
    assert (seen["steps"], seen["top"][0]["calls"]) == (4, 2.0)
    assert seen["ms_per_step"] == pytest.approx(4e-3)


@pytest.mark.slow
def test_a_run_ends_with_the_tokens_of_generate(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    ran = run_lbi(
        *["-m", "model=tiny_random", "model.dtype=float32", "engine=hf,loop", "cache=static", "tracker=none"],
        *["measure=quick", "workload.new_tokens=2,8", "trace=kernels", "sweep.name=loops"],
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with (tmp_path / "store" / "sweeps" / "loops" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok"] * 4
    for row in rows:
        effective = json.loads((Path(row["folder"]) / "effective.json").read_text())
        assert effective["lossless"]["verdict"] == "equal"
        assert effective["cache"]["class"] == "StaticCache"
        assert float(row["decode_tok_s"]) > 0
        assert float(row["mean_kld"]) == 0
        assert effective["kernels"]["steps"] == min(3, int(row["first_divergence"].split(".")[0]) - 1)
    assert {row["engine"] for row in rows} == {"hf", "loop"}


def prompts(count: int, tokens: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Different stretches of the quality text."""
    text = encode(read_text("text:quality"))
    return [text[90 * index : 90 * index + tokens + index % 7] for index in range(count)]


@pytest.mark.model
@pytest.mark.parametrize(
    ("count", "new"), [(3, 40), pytest.param(20, 200, marks=pytest.mark.by_hand, id="20 prompts, 200 tokens")]
)
@pytest.mark.slow
def test_a_real_model_says_what_it_says_to_generate(plan: MakePlan, count: int, new: int) -> None:
    cells = plan("model.dtype=float32", "engine=loop,fused", "cache=static", model="smollm2_135m").cells
    configs = [cell.config for cell in cells if cell.config is not None]
    loaded = load(configs[0].model, configs[0].engine)
    plain = by_generate(configs[0], loaded.model)
    ours = [make(cell, loaded.model, slots=32 + new) for cell in configs]
    assert len(ours) == 2
    for prompt in prompts(count, 24, loaded.encode):
        wanted = plain.generate(prompt, new, seed=0, inspect=True)
        for engine in ours:
            found = engine.generate(prompt, new, seed=0, inspect=True)
            assert found.tokens == wanted.tokens, type(engine).__name__
            assert largest_error(found.logits, wanted.logits) < 1e-3


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("compiler", ["cudagraph", "cudagraph_linears", "inductor_reduce_overhead"])
def test_replayed_steps_give_the_same_tokens(
    config: Callable[..., LbiConfig], compiler: str, at_once: int, decoding: str
) -> None:
    if at_once > 1 and compiler == "inductor_reduce_overhead":
        pytest.skip("one token at a time")
    cell = config(
        f"compiler={compiler}", f"decoding={decoding}", f"engine.tokens_per_graph={at_once}", "engine.device=cuda"
    )
    model = load(cell.model, cell.engine).model
    eager, replayed = make(cell, model, slots=64), make(cell, model, slots=64)
    given = [[1, 2, 3], [9, 8, 7, 6, 5], [1, 2, 3]]
    wanted = [eager.generate(prompt, 20, seed=index) for index, prompt in enumerate(given)]
    replayed.compile()
    for index, prompt in enumerate(given):
        found = replayed.generate(prompt, 20, seed=index)
        assert found.tokens == wanted[index].tokens
        assert found.timing.tokens[0] < found.timing.tokens[1] <= found.timing.tokens[-1] <= found.timing.end
    looked = replayed.generate(given[0], 20, seed=0, inspect=True)
    assert looked.tokens == wanted[0].tokens
    assert looked.logits.shape[0] == 20
    graphs = replayed.graphs()
    if compiler.startswith("cudagraph"):
        # 19 steps: of four at once there are four, and one of three.
        assert graphs is not None
        assert (graphs.captured, graphs.replays) == ((1, 4 * 19) if at_once == 1 else (2, 4 * 5))
        seen = take(replayed, given[0], "cuda", 20)
        assert [step.tokens for step in seen] == [at_once] * 3
        assert all(step.kernels for step in seen)
    else:
        assert graphs is None


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("compiler", ["eager", "cudagraph"])
@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
def test_the_host_waits_for_nothing_between_the_first_token_and_the_last(
    config: Callable[..., LbiConfig], monkeypatch: pytest.MonkeyPatch, compiler: str, decoding: str
) -> None:
    """torch raises at whatever waits, from the first mark of the clock to the last."""
    from lbi.engines import clock

    class Watched(clock.Clock):
        def mark(self) -> None:
            super().mark()
            torch.cuda.set_sync_debug_mode("error" if len(self.marks) < 20 + 2 else "default")

    cell = config(f"compiler={compiler}", f"decoding={decoding}", "engine.device=cuda")
    engine = make(cell, load(cell.model, cell.engine).model, slots=64)
    if compiler != "eager":
        engine.compile()
    wanted = engine.generate([1, 2, 3], 20, seed=0).tokens
    monkeypatch.setattr("lbi.engines.loop.Clock", Watched)
    try:
        assert engine.generate([1, 2, 3], 20, seed=0).tokens == wanted
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
def test_on_a_gpu_the_tokens_are_those_of_generate(config: Callable[..., LbiConfig]) -> None:
    cell = config("engine.device=cuda", "compiler=cudagraph", "engine.tokens_per_graph=4", arch=SHAPES["gqa3-80"])
    model = load(cell.model, cell.engine).model
    loop = make(cell, model, slots=64)
    loop.compile()
    wanted = by_generate(cell, model).generate(list(range(23)), 30, seed=0, inspect=True)
    found = loop.generate(list(range(23)), 30, seed=0, inspect=True)
    assert found.tokens == wanted.tokens
    assert largest_error(found.logits, wanted.logits) < 1e-3
