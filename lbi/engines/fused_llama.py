"""The model of engine=fused: a Llama of our own, whole in this file, made for one token at a time.

It takes the weights of a loaded and quantized Hugging Face model and puts together what is read
together: q, k and v are one matrix, gate and up another, their rows in turn. A decode step is five
kernels a layer (lbi/kernels/decode.py; the same in torch on a CPU), and nothing in it waits for the
host: the token is chosen, embedded and counted on the device. Attention reads as far as the text
has come, not to the end of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from lbi.config import CacheConfig
from lbi.engines.fused_weights import give_back, matrix_of, refusal
from lbi.errors import Unsupported
from lbi.kernels import cache_ops
from lbi.kernels.cache_formats import CacheFormat, Rows, halves_problem
from lbi.kernels.decode_torch import Shape, TorchSteps, rotate, times
from lbi.kernels.formats import Packed, interleaved, stacked
from lbi.kernels.several_torch import TorchSeveral

WAY_OUT = "engine=loop runs any model of transformers with any quantizer"


Choose = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From logits (1, vocabulary), float32, and noise of the same shape to the next token, (1,)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: four matrices, the gains of its two norms, its part of the cache.

    Keys and values are (kv heads, slots, width) each, or the rows of a low-bit cache.
    """

    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed
    attention_gain: torch.Tensor
    mlp_gain: torch.Tensor
    keys: torch.Tensor | Rows
    values: torch.Tensor | Rows


Attend = Callable[[torch.Tensor, Layer], torch.Tensor]
"""From the product of queries, keys and values (T, rows) to what a layer's attention makes of it (T, heads * width)."""


class Llama:
    """Llama 2 to 3.2, SmolLM2, TinyLlama, Mistral: what transformers calls `llama`, or `mistral` without a window.

    `beside`: another one, whose cache it reads and writes, layer by layer, in place of its own.
    """

    def __init__(
        self, model: Any, slots: int, cache: CacheConfig | None = None, *, beside: Llama | None = None
    ) -> None:
        config = model.config
        self.shape = Shape(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            slots=slots,
            eps=config.rms_norm_eps,
        )
        why = refusal(model, self.shape, slots)
        if why is not None:
            raise Unsupported(f"engine=fused: {why}; {WAY_OUT}")
        self.dtype, self.device = model.model.norm.weight.dtype, model.model.norm.weight.device
        self.cache = self._cache_format(cache)
        self._blocks = list(model.model.layers)
        self.layers = [self._layer_at(index, beside) for index in range(len(self._blocks))]
        self.gain = model.model.norm.weight.detach()
        self.table: Any = model.model.embed_tokens
        self.head = matrix_of(model.lm_head)
        self._rotary: Any = model.model.rotary_emb
        self.cos, self.sin = self._angles(slots + 1)
        self.steps, self.several = self._operations()

    def step(self, choose: Choose | None = None, noise: torch.Tensor | None = None, turn: int = 0) -> torch.Tensor:
        """The token at the position goes through the model, and the next one is put behind it.

        `choose` takes it from the logits, with `noise`; None takes the likeliest. Returns the logits,
        (1, vocabulary) float32, in memory that belongs to the `turn`.
        """
        logits = self.feed(turn)
        if choose is None:
            self.steps.next_token()
        else:
            self.steps.put(choose(logits, noise))
        return logits

    def feed(self, turn: int = 0) -> torch.Tensor:
        """The token at the position goes through the model; its logits, as `step` returns them."""
        steps, layers = self.steps, self.layers
        steps.embed(self.table.weight.detach(), getattr(self.table, "scale", None), layers[0].attention_gain)
        for index, layer in enumerate(layers):
            qkv = steps.norm_product(layer.qkv)
            mixed = steps.attention(qkv, self.cos, self.sin, layer.keys, layer.values)
            steps.product_add(layer.out, mixed, layer.mlp_gain)
            act = steps.norm_product_swiglu(layer.gate_up)
            following = layers[index + 1].attention_gain if index + 1 < len(layers) else self.gain
            steps.product_add(layer.down, act, following)
        logits: torch.Tensor = steps.head(self.head, turn)[None]
        return logits

    def prefill(self, tokens: torch.Tensor, *, keep: bool = True) -> torch.Tensor:
        """The stream behind the last block for (T,) tokens, (T, hidden) float32. `keep`: fill the cache from slot 0."""
        stream, delta = self.table(tokens).float(), None
        cos, sin = self._angles(tokens.shape[0])

        def attend(qkv: torch.Tensor, layer: Layer) -> torch.Tensor:
            q, k, v = self._heads(qkv, cos, sin)
            if keep:
                self._fill(layer, k, v)
            return self._attended(q[None], k[None], v[None])[0].transpose(0, 1).reshape(len(qkv), -1)

        for layer in self.layers:
            delta = self._block(stream, delta, layer, attend)
        return stream if delta is None else stream.add_(delta)

    def extend(self, tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocabulary) float32 of (T,) tokens that stand at `where` (T,), behind what the cache has.

        Nothing about the shapes depends on how far the text is.
        """
        stream, delta = self.table(tokens).float(), None
        self.several.begin(where, self.cos, self.sin)

        def attend(qkv: torch.Tensor, layer: Layer) -> torch.Tensor:
            return self.several.attention(qkv, layer.keys, layer.values)

        for layer in self.layers:
            delta = self._block(stream, delta, layer, attend)
        return self.logits(stream, delta)

    def _block(self, stream: torch.Tensor, delta: torch.Tensor | None, layer: Layer, attend: Attend) -> torch.Tensor:
        """What a block's MLP adds to the stream, (T, hidden) both; `delta` is that of the block before.

        That, and what its attention adds, is in `stream` afterwards.
        """
        several = self.several
        qkv = product(several.norm(stream, delta, layer.attention_gain), layer.qkv)
        delta = product(attend(qkv, layer), layer.out)
        act = several.swiglu(product(several.norm(stream, delta, layer.mlp_gain), layer.gate_up))
        return product(act, layer.down)

    def _heads(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (heads, T, width), turned to their positions, of a product (T, rows)."""
        shape, count = self.shape, qkv.shape[0]
        sizes = [shape.heads * shape.width, shape.kv_heads * shape.width, shape.kv_heads * shape.width]
        q, k, v = (part.view(count, -1, shape.width).transpose(0, 1) for part in qkv.split(sizes, dim=1))
        return rotate(q, cos, sin).to(self.dtype), rotate(k, cos, sin).to(self.dtype), v

    def _fill(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values (kv heads, tokens, width) into the first slots."""
        for held, new in ((layer.keys, k), (layer.values, v)):
            if isinstance(held, Rows):
                cache_ops.put_in_torch(*held.tensors, new, torch.zeros_like(self.steps.position), *self._format_name())
            else:
                held[:, : new.shape[1]] = new

    def _format_name(self) -> tuple[str, int]:
        return ("", 0) if self.cache is None else (self.cache.name, self.cache.group)

    def _attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention of (1, heads, tokens, width), through a low-bit cache if there is one."""
        if self.cache is not None:
            return cache_ops.causal(q, k, v, self.cache, self.cache, self.shape.width**-0.5)
        several = self.shape.heads != self.shape.kv_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=several)

    def logits(self, stream: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """(T, vocabulary) float32 of a stream (T, hidden), to which `delta` is added first."""
        return product(self.several.norm(stream, delta, self.gain), self.head).float()

    def _angles(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the first `count` positions, (count, width / 2) float32."""
        angles = torch.arange(count, device=self.device)[:, None] * self._rotary.inv_freq.float()
        return angles.cos() * self._rotary.attention_scaling, angles.sin() * self._rotary.attention_scaling

    def _layer_at(self, index: int, beside: Llama | None) -> Layer:
        """The layer of a block: with slots of its own, or with those of the layer `beside` it, or that layer itself."""
        block = self._blocks[index]
        if beside is None:
            return self._layer(block, self._slots(), self._slots())
        other = beside.layers[index]
        return other if beside._blocks[index] is block else self._layer(block, other.keys, other.values)

    def _layer(self, block: Any, keys: torch.Tensor | Rows, values: torch.Tensor | Rows) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        qkv = stacked([matrix_of(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        gate_up = interleaved(matrix_of(mlp.gate_proj), matrix_of(mlp.up_proj))
        # The model's own layers become views, so that no weight is in memory twice.
        begin = 0
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            rows = slice(begin, begin := begin + part.out_features)
            give_back(part, qkv, rows)
        for part, rows in ((mlp.gate_proj, slice(0, None, 2)), (mlp.up_proj, slice(1, None, 2))):
            give_back(part, gate_up, rows)
        return Layer(
            qkv,
            matrix_of(attention.o_proj),
            gate_up,
            matrix_of(mlp.down_proj),
            block.input_layernorm.weight.detach(),
            block.post_attention_layernorm.weight.detach(),
            keys,
            values,
        )

    def _slots(self) -> torch.Tensor | Rows:
        shape = self.shape
        if self.cache is not None:
            return self.cache.allocate(shape.kv_heads, shape.slots, self.device)
        return torch.zeros(shape.kv_heads, shape.slots, shape.width, device=self.device, dtype=self.dtype)

    def _cache_format(self, cache: CacheConfig | None) -> CacheFormat | None:
        """How the slots are stored; None is the model's own type. Raises `Unsupported`."""
        if cache is None or cache.format is None:
            return None
        try:
            made = CacheFormat(cache.format, self.shape.width, cache.group_size or self.shape.width)
        except ValueError as error:
            raise Unsupported(f"cache.group_size={cache.group_size}: {error}") from error
        why = halves_problem(made) if self.device.type == "cuda" else None
        if why is not None:
            raise Unsupported(f"cache.group_size={cache.group_size}: {why}")
        return made

    def _operations(self) -> tuple[Any, TorchSeveral]:
        """What lies between the products of a step, and of a pass of several tokens."""
        if self.device.type != "cuda":
            several = TorchSeveral(self.shape, self.dtype, self.cache)
            return TorchSteps(self.shape, self.device, self.dtype, self.cache), several
        from lbi.kernels.decode import TritonSteps
        from lbi.kernels.several import TritonSeveral

        given = self.shape, self.device, self.dtype, self.cache
        return TritonSteps(*given), TritonSeveral(*given)


def product(x: torch.Tensor, matrix: Packed) -> torch.Tensor:
    """(T, rows): the matrix times `x`, (T, inputs), by the kernel for that many tokens."""
    if not x.is_cuda:
        return times(matrix, x)
    from lbi.kernels.gemv import MOST_ROWS, dequantized, matmul_small

    return matmul_small(x, matrix) if x.shape[0] <= MOST_ROWS else F.linear(x, dequantized(matrix, x.dtype))
