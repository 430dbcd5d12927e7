"""torch.compile, set from the compiler group alone, and what it really did.

Quantizers change inductor's settings for the whole process (torchao by default,
hqq through its backends). `CompilerState` takes them before anything is quantized
and puts them back afterwards, so that a quantized cell is compiled like the baseline.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lbi.config import CompilerConfig
from lbi.errors import Unsupported


@dataclass(frozen=True, slots=True)
class CompilerState:
    """Settings that belong to the compiler group and that others are known to change."""

    inductor: dict[str, Any]
    matmul_precision: str

    @classmethod
    def take(cls) -> CompilerState:
        import torch._inductor.config as inductor

        return cls(inductor.get_config_copy(), torch.get_float32_matmul_precision())

    def restore(self) -> list[str]:
        """Put the settings back; the names of those that had been changed."""
        import torch._inductor.config as inductor

        now = inductor.get_config_copy()
        changed = {name: value for name, value in self.inductor.items() if now.get(name) != value}
        for name, value in changed.items():
            setattr(inductor, name, value)
        names = [f"inductor.{name}" for name in sorted(changed)]
        if torch.get_float32_matmul_precision() != self.matmul_precision:
            torch.set_float32_matmul_precision(self.matmul_precision)
            names.append("float32_matmul_precision")
        return names


def inductor_options(config: CompilerConfig) -> dict[str, Any]:
    """The mode's options and the config's own, as one mapping for torch.compile.

    torch.compile takes a mode or options, not both. Raises `Unsupported` for an option
    inductor does not have.
    """
    from torch._inductor import list_mode_options, list_options

    known, own = list_options(), _flat(config.options)
    for name in own:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; close to: {', '.join(close)}" if close else ""
            raise Unsupported(f"compiler.options.{name}: inductor {torch.__version__} has no such option{hint}")
    options: dict[str, Any] = {}
    if config.mode != "default":
        options |= list_mode_options(config.mode, config.dynamic)
    if config.coordinate_descent:
        options["coordinate_descent_tuning"] = True
    return options | own


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by inductor's dotted names: {cpp: {threads: 1}} as cpp.threads."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def compile_function(function: Callable[..., Any], config: CompilerConfig) -> Callable[..., Any]:
    """`function` compiled by inductor as the config says.

    With `dynamic`, the numbers that a model holds (an epsilon, a scale) would be symbols, too: dynamo then traces the
    model and hands it on a first time for nothing, and starts again with them as constants.
    """
    if config.dynamic:
        torch._dynamo.config.specialize_float = True
    compiled: Callable[..., Any] = torch.compile(
        function,
        backend="inductor",
        fullgraph=config.fullgraph,
        dynamic=config.dynamic,
        options=inductor_options(config),
    )
    return compiled


def compile_linears(model: Any, config: CompilerConfig) -> None:
    """Have each linear layer of `model` compiled at its first call with one token; other calls stay as they are.

    A kernel serves all layers of its shape, so a model of 224 layers compiles four or five.
    """
    # The default of 8 graphs for one function is fewer than a model has shapes and kinds of layer.
    torch._dynamo.config.recompile_limit = 256
    for layer in model.modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            layer.forward = _for_one_token(layer.forward, compile_function(layer.forward, config))


def _for_one_token(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(inputs: torch.Tensor) -> Any:
        return (compiled if inputs.numel() == inputs.shape[-1] else plain)(inputs)

    return forward


def counters() -> dict[str, int]:
    """What dynamo and inductor have done so far in this process.

    `graphs` grows with every compile and recompile, from a cache or not.
    """
    from torch._dynamo.utils import counters as raw

    return {
        "graphs": int(raw["stats"]["unique_graphs"]),
        "graph_breaks": sum(raw["graph_break"].values()),
        "cache_hits": int(raw["inductor"]["fxgraph_cache_hit"]),
        "cache_misses": int(raw["inductor"]["fxgraph_cache_miss"]),
    }


HELD = "held"
"""What `start_of` says of a graph that an earlier run of the process has compiled."""


def start_of(seen: dict[str, int], holds: bool = False) -> str:
    """Whether inductor compiled (cold), found everything in its cache (warm), some of it (mixed), or had nothing to do.

    Mixed is also a first compile of layers one by one, of which those of one shape find each other's. `holds`: the
    process has a graph of an earlier run in its memory, so that nothing at all may be left to compile (held).
    """
    if holds and not seen["graphs"]:
        return HELD
    if seen["cache_hits"] and not seen["cache_misses"]:
        return "warm"
    return "mixed" if seen["cache_hits"] else "cold"
