"""engine=fused against Hugging Face's own Llama: same tokens, same logits, no second copy of a weight."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lbi.engines.fused import FusedEngine
from lbi.errors import InputError, Unsupported
from lbi.quantizers import audit

CONFIG: Any = SimpleNamespace(
    engine=SimpleNamespace(device="cpu", tokens_per_graph=1),
    cache=SimpleNamespace(kind="static", name="static", format=None, group_size=None),
    decoding=SimpleNamespace(kind="greedy"),
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(*, heads: int = 4, kv: int = 2, width: int = 64, dtype: torch.dtype = torch.float32, **others: Any) -> Any:
    """A random model whose logits are far enough apart for its tokens to vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 96 * 2, "intermediate_size": 200, "num_hidden_layers": 2, "vocab_size": 517}
    config = LlamaConfig(
        **settings | {"max_position_embeddings": 256} | others,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=width,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.requires_grad_(False)
            weight.mul_(3.0) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    return model.to(dtype)


def expected(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    ids = torch.tensor([prompt])
    # Without a mask generate() takes a 0 in the prompt for padding, and does not see it.
    asked = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=count, do_sample=False, **asked)
        return whole[0, len(prompt) :].tolist(), model(whole[:, :-1]).logits[0, len(prompt) - 1 :]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("heads", "kv", "width", "others"),
    [
        (4, 4, 64, {"tie_word_embeddings": True}),
        (6, 2, 64, {"tie_word_embeddings": False}),
        (8, 2, 80, {"rope_parameters": LLAMA3}),
        (8, 1, 96, {"tie_word_embeddings": True}),
        (4, 2, 128, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
        (3, 1, 64, {"num_hidden_layers": 1, "rms_norm_eps": 1e-3}),
    ],
)
@pytest.mark.parametrize(("length", "count"), [(1, 7), (13, 40)])
def test_tokens_and_logits_are_hugging_faces(
    heads: int, kv: int, width: int, others: dict[str, Any], length: int, count: int
) -> None:
    torch.manual_seed(heads * 100 + width)
    model = llama(heads=heads, kv=kv, width=width, **others)
    prompt = torch.randint(0, 517, (length,)).tolist()
    tokens, logits = expected(model, prompt, count)
    # The cache is full at the end: the last token is written into its last slot but one.
    engine = FusedEngine(model, CONFIG, slots=length + count)
    for _ in range(2):
        found = engine.generate(prompt, count, seed=0, inspect=True)
        assert found.tokens == tokens
        assert off(found.logits, logits) < 1e-5
    assert len(set(tokens)) > 1
    assert off(engine.forward(prompt + tokens[:-1])[length - 1 :], logits) < 1e-5


def test_the_model_itself_still_works_and_shares_every_weight() -> None:
    model = llama()
    before = audit.weight_bytes(model)
    prompt = list(range(1, 12))
    tokens, logits = expected(model, prompt, 5)
    engine = FusedEngine(model, CONFIG, slots=32)
    after_tokens, after = expected(model, prompt, 5)
    assert after_tokens == tokens
    assert off(after, logits) == 0.0
    held = [layer.qkv.data for layer in engine.llama.layers] + [layer.gate_up.data for layer in engine.llama.layers]
    assert audit.weight_bytes(model) == before
    storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert {matrix.untyped_storage().data_ptr() for matrix in held} <= storages


def test_quality_is_scored_on_texts_longer_than_the_cache() -> None:
    model, text = llama(), torch.randint(0, 517, (100,)).tolist()
    logits = model(torch.tensor([text])).logits[0]
    assert off(FusedEngine(model, CONFIG, slots=16).forward(text), logits) < 1e-5


def test_bfloat16_parts_from_hugging_face_by_no_more_than_rounding() -> None:
    torch.manual_seed(5)
    model = llama(dtype=torch.bfloat16)
    prompt = list(range(2, 40))
    wide = model.float()
    logits = wide(torch.tensor([prompt])).logits[0]
    narrow = model.to(torch.bfloat16)
    theirs = off(narrow(torch.tensor([prompt])).logits[0], logits)
    ours = off(FusedEngine(narrow, CONFIG, slots=64).forward(prompt), logits)
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda model: setattr(model.config, "model_type", "phi"), "a model of type phi is not one of llama, mistral"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "hidden_act=gelu is not silu"),
        (lambda model: setattr(model.config, "sliding_window", 16), "window of 16 tokens is shorter than the 32 slots"),
        (lambda model: model.config.rope_parameters.update(rope_type="dynamic"), "rope_type=dynamic changes"),
        (
            lambda model: setattr(model.model.layers[1].mlp.up_proj, "bias", torch.nn.Parameter(torch.ones(200))),
            "model.layers.1.mlp.up_proj has a bias",
        ),
    ],
)
def test_what_it_cannot_load_is_refused_with_the_reason(spoil: Callable[[Any], None], why: str) -> None:
    model = llama()
    spoil(model)
    with pytest.raises(Unsupported, match=why) as caught:
        FusedEngine(model, CONFIG, slots=32)
    assert "engine=loop" in str(caught.value)


def test_foreign_layers_are_refused_by_name() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama(dtype=torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(Unsupported, match=r"cannot read model\.layers\.0\.self_attn\.q_proj, a Linear of Int8Tensor"):
        FusedEngine(model, CONFIG, slots=32)


def test_prompts_that_cannot_be_are_refused_before_any_work() -> None:
    engine = FusedEngine(llama(), CONFIG, slots=16)
    with pytest.raises(InputError, match="has no tokens"):
        engine.generate([], 4, seed=0)
    with pytest.raises(InputError, match=r"cache\.max_len=16: is too short for a prompt of 14 and 4 new tokens"):
        engine.generate(list(range(14)), 4, seed=0)


def test_short_prompts_are_captured_by_the_length_that_they_are_filled_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for a CUDA graph, which warms up, captures and restores as one does."""

    class Graph:
        def __init__(self, call: Callable[[], Any], restore: Callable[[], None]) -> None:
            self.call, self.replays = call, 0
            for _ in range(4):
                call()
                restore()

        def __call__(self) -> Any:
            self.replays += 1
            return self.call()

    monkeypatch.setattr("lbi.engines.fused.GraphedCall", Graph)
    model = llama()
    plain, graphed = (FusedEngine(model, CONFIG, slots=60) for _ in range(2))
    graphed.compile()
    # Of the two longest one fills its length and one has none that the cache has room for.
    for length, captured in ((3, 1), (16, 1), (5, 1), (17, 2), (32, 2), (40, 2)):
        prompt = torch.randint(0, 517, (length,)).tolist()
        wanted = plain.generate(prompt, 9, seed=0, inspect=True)
        found = graphed.generate(prompt, 9, seed=0, inspect=True)
        assert found.tokens == wanted.tokens
        assert off(found.logits, wanted.logits) < 1e-5
        assert graphed.graphs().prefills == captured
    assert sorted(graphed._buckets) == [16, 32]
    assert [bucket.logits.replays for _, bucket in sorted(graphed._buckets.items())] == [3, 2]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("interpreted_decode", "5 shapes"),
        ("compiled_decode", "sm_90: 48 k"),
        ("interpreted_several", "5 shapes"),
        ("compiled_several", "sm_90: 24 k"),
    ],
)
@pytest.mark.slow
def test_the_kernels_do_what_their_torch_reference_does_and_compile(script: str, said: str) -> None:
    """In Triton's interpreter, or for a GPU that is not here: each takes over its whole process."""
    file = Path(__file__).parent / f"{script}.py"
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
