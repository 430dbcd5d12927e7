"""The step of a run that looks inside its decode steps: kernels, unpacked weights, compiled extensions.

It comes after everything that is timed or scored, because a profiler slows down what it looks at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lbi import decode_trace, dequantized, kernels_seen, timeline
from lbi.config import LbiConfig, QuantizerConfig
from lbi.engines import Engine
from lbi.extensions import torchao_extensions
from lbi.process import Phases
from lbi.quantizers import method
from lbi.quantizers.audit import Layer
from lbi.quantizers.options import layer_config
from lbi.record import Record


def look_inside(
    config: LbiConfig,
    engine: Engine,
    model: Any,
    prompt: list[int],
    layers: Sequence[Layer],
    record: Record,
    phases: Phases,
) -> None:
    """Add to the record which kernels a decode step runs, and whether it unpacks whole weights first.

    Raises `NotApplied` where the kernels are not those that a quantizer is for.
    """
    device, backend = config.engine.device, config.compiler.backend
    options = {layer.name: layer_config(layer.name, config.quantizer) for layer in layers if layer.seen.quantized}
    if any(option.family == "torchao" for option in options.values()):
        record.effective["torchao_extensions"] = torchao_extensions()
    with phases("look inside"):
        events = decode_trace.take_events(engine, prompt, device, config.workload.new_tokens)
        steps = decode_trace.read_steps(events)
    record.effective["kernels"] = kernels_seen.summary(steps, device)
    record.effective["timeline"] = timeline.breakdown(events, steps, device)
    kernels_seen.check(steps, options.values(), device, backend)
    sizes = weight_only(layers, options)
    if not sizes:
        record.missing["unpacked_bytes_per_token"] = "no layer is quantized in its weights alone"
    elif not steps:
        record.missing["unpacked_bytes_per_token"] = "the profiler saw no decode step"
    else:
        found = dequantized.find(steps, sizes, model.dtype.itemsize, device, compiled=backend != "eager")
        record.effective["dequantized"] = asdict(found)
        record.metrics["unpacked_bytes_per_token"] = float(found.per_token_bytes)


def weight_only(layers: Sequence[Layer], options: Mapping[str, QuantizerConfig]) -> Counter[int]:
    """Number of layers whose option leaves activations alone, by their number of weights."""
    named = [layer for layer in layers if layer.name in options]
    return Counter(layer.params for layer in named if method(options[layer.name]).activations == 16)
