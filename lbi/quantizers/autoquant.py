"""AutoQuant: the fastest option for each layer, on this device, among those that are accurate enough.

torchao had one and removed it. This one times whole candidates of any family at the number
of tokens that decoding has, in the way the cell runs (eager, compiled, as a CUDA graph); it
takes the error of each layer from the inputs that the layer really gets; and every choice is
kept with the times and errors that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import log10
from typing import TYPE_CHECKING, Any

from lbi.config import LbiConfig, QuantizerConfig
from lbi.errors import NotApplied, RunFailure
from lbi.quantizers import COMMON, Method, Observed
from lbi.quantizers.options import PLAIN, option

if TYPE_CHECKING:
    import torch

    from lbi.quantizers.assign import Assignment

SAMPLE_ROWS = 64
"""Inputs of a layer that its error is taken from."""

SAME_TIME = 1.02
"""Candidates within this ratio of the fastest count as equally fast; the more accurate one is taken."""


def autoquant(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Never asked to: `choose` gives each layer an option of its own. Raises `NotApplied`."""
    raise NotApplied("autoquant was not given the chance to choose")


def observe(layer: torch.nn.Module) -> Observed | None:
    """AutoQuant has no layers of its own."""
    return None


@dataclass(slots=True)
class _Shape:
    """Layers of one shape, and what was found about each candidate for them."""

    names: list[str]
    timed: dict[str, tuple[float, float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


def choose(model: Any, config: LbiConfig, assignment: Assignment, sample: list[int]) -> tuple[Assignment, Any]:
    """An option for every layer that `assignment` leaves to autoquant, and the evidence as JSON.

    `sample` is the text whose pass through the model gives each layer's inputs.
    """
    import torch

    quantizer = config.quantizer
    targets = [name for name, part in assignment.items() if part.family == "autoquant"]
    candidates, refused = usable_candidates(config)
    chosen, shapes = dict(assignment), {}
    with torch.no_grad(), _many_compiles():
        inputs = _inputs(model, targets, sample)
        for key, names in _by_shape(model, targets).items():
            shapes[key] = _Shape(names, refused=dict(refused))
            _judge(model, shapes[key], candidates, inputs, config)
            _decide(shapes[key], float(quantizer.max_error or 0.0))
            chosen |= {name: candidates[text] for name, text in shapes[key].chosen.items()}
    return chosen, _evidence(shapes, list(candidates), quantizer)


def usable_candidates(config: LbiConfig) -> tuple[dict[str, QuantizerConfig], dict[str, str]]:
    """The options worth trying on this machine, always with the plain weights, and why not the others."""
    from lbi import rules
    from lbi.model_files import inspect
    from lbi.quantizers import method

    machine, facts = rules.Machine.here(config.engine.device), inspect(config.model)
    usable, refused = {"none": PLAIN}, {}
    for text in config.quantizer.candidates:
        part = option(text)
        found = rules.refuse(replace(config, quantizer=part), facts, machine)
        if found is not None:
            refused[text] = found[1]
        elif machine.device in method(part).unpacked_on:
            # Slower than plain weights by its making; rounding and timing it would cost seconds.
            refused[text] = f"{part.name} has no kernel on {'a CPU' if machine.device == 'cpu' else 'a GPU'}"
        elif part.family != "none":
            usable[text] = part
    return usable, refused


def _inputs(model: Any, targets: list[str], sample: list[int]) -> dict[str, torch.Tensor]:
    """Up to `SAMPLE_ROWS` rows of what each target is given, (rows, in)."""
    import torch

    kept: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(layer: Any, given: Any) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])
            kept[name] = rows[:: max(1, rows.shape[0] // SAMPLE_ROWS)][:SAMPLE_ROWS].clone()

        return keep

    hooks = [model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in targets]
    device = next(model.parameters()).device
    model(torch.tensor([sample[:512]], device=device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def _by_shape(model: Any, targets: list[str]) -> dict[tuple[int, int], list[str]]:
    shapes: dict[tuple[int, int], list[str]] = {}
    for name in targets:
        layer = model.get_submodule(name)
        shapes.setdefault((layer.in_features, layer.out_features), []).append(name)
    return shapes


def _judge(
    model: Any, shape: _Shape, candidates: dict[str, QuantizerConfig], inputs: dict[str, Any], config: LbiConfig
) -> None:
    """Time each candidate for the shape, and take the errors of those that are faster than plain weights."""
    from lbi.quantizers.layer_timing import LayerPass, in_turn, layers_in_a_pass

    plain = [model.get_submodule(name) for name in shape.names]
    rows = config.quantizer.tokens or 1
    timed = layers_in_a_pass(len(plain), plain[0].weight.numel() * plain[0].weight.element_size())
    given = inputs[shape.names[0]][:1].expand(rows, -1).contiguous()[None]
    passes, made = {}, {}
    for text, part in candidates.items():
        try:
            made[text] = [_made(layer, part) for layer in plain[:timed]]
            passes[text] = LayerPass(made[text], given, config.compiler)
        except (RunFailure, RuntimeError, NotImplementedError, AssertionError) as error:
            shape.refused[text] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            made.pop(text, None)
    shape.timed = in_turn(passes)
    limit = shape.timed["none"][0]
    for text, layers in made.items():
        if text != "none" and shape.timed[text][0] < limit:
            shape.errors[text] = {
                name: _error(
                    plain[index],
                    layers[index] if index < timed else _made(plain[index], candidates[text]),
                    inputs[name],
                    rows,
                )
                for index, name in enumerate(shape.names)
            }


def _made(layer: Any, part: QuantizerConfig) -> Any:
    """A copy of a linear layer, stored as `part` says; the layer itself for plain weights."""
    import torch

    from lbi.quantizers import method

    if part.family == "none":
        return layer
    # Not deepcopy: a tied head would take its embedding along, and quantizers give up the weight they are given.
    twin = torch.nn.Linear(1, 1, bias=False, device="meta")
    twin.in_features, twin.out_features = layer.in_features, layer.out_features
    twin.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    twin.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    holder = torch.nn.ModuleDict({"layer": twin})
    method(part).apply(holder, part, frozenset({"layer"}))
    return holder["layer"]


def _error(plain: Any, made: Any, inputs: torch.Tensor, rows: int) -> float:
    """||y - y'|| / ||y|| over the layer's own inputs, y' from `rows` at a time: the kernel that was timed."""
    import torch

    wanted = plain(inputs).float()
    found = torch.cat([made(part).float() for part in inputs.split(rows)])
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def _decide(shape: _Shape, max_error: float) -> None:
    """For each layer the fastest candidate whose error is within the bound; of equally fast ones the most accurate."""
    for name in shape.names:
        errors = {text: found[name] for text, found in shape.errors.items() if found[name] <= max_error}
        errors["none"] = 0.0
        fastest = min(shape.timed[text][0] for text in errors)
        as_fast = [text for text in errors if shape.timed[text][0] <= fastest * SAME_TIME]
        shape.chosen[name] = min(as_fast, key=lambda text: errors[text])


@contextmanager
def _many_compiles() -> Iterator[None]:
    """Room for one graph per candidate and shape, and no trace of them in the cell's own counters."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1024):
        yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _evidence(shapes: dict[tuple[int, int], _Shape], candidates: list[str], quantizer: QuantizerConfig) -> Any:
    rows = []
    for key, shape in shapes.items():
        used = list(shape.chosen.values())
        worst = {text: max(found.values()) for text, found in shape.errors.items()}
        rows.append(
            {
                "shape": list(key),
                "layers": len(shape.names),
                "chosen": {text: used.count(text) for text in dict.fromkeys(used)},
                "timed_us": {text: round(seconds * 1e6, 3) for text, (seconds, _) in shape.timed.items()},
                "spread_us": {text: round(spread * 1e6, 3) for text, (_, spread) in shape.timed.items()},
                "error": {text: round(value, 6) for text, value in worst.items()},
                "sqnr_db": {text: round(-20 * log10(value), 2) for text, value in worst.items() if value > 0},
                "refused": shape.refused,
                "by_layer": shape.chosen,
            }
        )
    known = {"candidates": candidates, "tokens": quantizer.tokens, "max_error": quantizer.max_error}
    return {**known, "by_shape": rows}


METHODS = {"autoquant": Method(apply=autoquant, knobs=COMMON | {"candidates", "max_error", "tokens"})}
