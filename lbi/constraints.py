"""docs/constraints.md: every rule of rules.py with an example, the reason it gives, its evidence and its proof.

    python -m lbi.constraints          prints the page, which a test compares with docs/constraints.md

An example is a command line that the rule refuses. Those that a CPU can try are run for real, rules
switched off, by tests/test_constraints.py: when a library mends what a rule rests on, that test fails and
the rule can go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lbi import rules
from lbi.config import LbiConfig
from lbi.model_files import inspect
from lbi.places import conf_folder
from lbi.typed import build

TRIED = "tried"
"""Run by tests/test_constraints.py, where it must not end with a number that is right."""

MEANING = "by definition"
"""Nothing can show it: what the rule refuses has no meaning, or would be the same as something else."""

GPU = "needs a GPU"
"""What would happen can only be seen on one."""

PLACE = "depends on the place"
"""About what is installed or what the processor is: a test has a machine pretend."""


@dataclass(frozen=True, slots=True)
class Example:
    """Overrides that a rule refuses, on a machine with a `device`, a compiler and these packages."""

    overrides: tuple[str, ...]
    proof: str
    device: str = "cpu"
    packages: tuple[str, ...] = ("torch", "transformers", "torchao", "hqq")
    has_compiler: bool = True
    capability: float | None = None

    def machine(self) -> rules.Machine:
        """The machine that the example is refused on."""
        known = dict.fromkeys(self.packages, "0") | {"transformers": "5.23.0"}
        has_gpu = self.capability is not None
        return rules.Machine(self.device, known, self.has_compiler, self.capability, has_gpu)


SHORT, LONG = (f"[{','.join([factor] * 16)}]" for factor in ("1.0", "8.0"))
"""Factors of longrope for 32 values of a head, up to the first context and beyond."""

EXAMPLES: dict[str, Example] = {
    "unused_quantizer_knob": Example(("quantizer=int8_wo", "++quantizer.group_size=32"), MEANING),
    "unused_knob": Example(("cache=static", "++cache.group_size=32"), MEANING),
    "speculation_is_complete": Example(
        ("engine=loop", "cache=static", "decoding=speculative_lookup", "decoding.ngram=null"), MEANING
    ),
    "speculation_needs_own_loop": Example(("engine=loop", "cache=sliding", "decoding=speculative_lookup"), TRIED),
    "grammar_can_be_followed": Example(
        ("engine=loop", "cache=static", "decoding=structured", "decoding.grammar_kind=regex", "decoding.grammar='[a-'"),
        TRIED,
    ),
    "sampling_is_complete": Example(("decoding=sampling", "decoding.seed=null"), MEANING),
    "hardware_fits": Example(("quantizer=gemlite_a16w4",), TRIED),
    "package_is_installed": Example(("quantizer=gemlite_a16w4",), GPU, device="cuda", capability=9.0),
    "mix_is_given": Example(("quantizer=mix",), MEANING),
    "autoquant_is_complete": Example(("quantizer=autoquant", "quantizer.candidates=[]"), MEANING),
    "dtype_and_group_exist": Example(("quantizer=int4_wo", "quantizer.group_size=48"), TRIED),
    "bits_exist": Example(("quantizer=hqq4", "quantizer.bits=5"), TRIED),
    "gpu_is_there": Example(("engine.device=cuda",), PLACE, device="cuda"),
    "group_divides_rows": Example(("quantizer=int4_wo", "quantizer.group_size=128", "model=smollm2_135m"), TRIED),
    "group_divides_matrix": Example(("quantizer=hqq4", "quantizer.group_size=100"), TRIED),
    "int4_forms": Example(("quantizer=int4_wo", "quantizer.qparams=magic"), TRIED),
    "native_forms": Example(("quantizer=native_w4", "quantizer.group_size=4"), TRIED),
    "failed_products_want_eager": Example(
        ("quantizer=int8_da", "compiler=cudagraph", "cache=static"), GPU, device="cuda", capability=9.0
    ),
    "hqq_backend": Example(("quantizer=hqq4", "quantizer.backend=torchao_int4"), TRIED),
    "static_shapes_need_static_cache": Example(("compiler=inductor", "cache=dynamic"), TRIED),
    "loop_needs_static_cache": Example(("engine=loop", "cache=dynamic"), TRIED),
    "low_bit_needs_own_engine": Example(("engine=hf", "cache=static_int8"), TRIED),
    "sliding_needs_loop": Example(("engine=hf", "cache=sliding"), TRIED),
    "cache_groups_fit": Example(("engine=loop", "cache=static_int4", "cache.group_size=48"), TRIED),
    "hf_quantized_cache_can_be_had": Example(("cache=hf_quantized_hqq", "cache.group_size=100"), TRIED),
    "offloading_needs_gpu": Example(("cache=offloaded",), TRIED),
    "fused_reads_it": Example(("engine=fused", "cache=static", "quantizer=int8_wo"), TRIED),
    "loop_needs_fixed_rope": Example(
        (
            "engine=loop",
            "cache=static",
            "model.arch.model_type=phi3",
            "++model.arch.original_max_position_embeddings=40",
            f"++model.arch.rope_scaling={{type:longrope,short_factor:{SHORT},long_factor:{LONG}}}",
            "++model.arch.pad_token_id=0",
            "++model.arch.initializer_range=0.3",
            "model.dtype=float32",
        ),
        TRIED,
    ),
    "cuda_graphs_need_cuda": Example(("compiler=cudagraph", "cache=static"), TRIED),
    "coordinate_descent_needs_gpu": Example(("compiler=inductor_tuned", "cache=static"), MEANING),
    "inductor_on_cpu_needs_compiler": Example(("compiler=inductor", "cache=static"), PLACE, has_compiler=False),
    "rsr_can_be_built": Example(("quantizer=rsr",), PLACE, has_compiler=False),
    "batch_has_room": Example(("engine=hf", "workload.batch=2"), TRIED),
    "fits_context": Example(("workload.new_tokens=5000",), MEANING),
    "custom_function_is_there": Example(("quantizer=custom", "quantizer.target=nowhere:quantize"), TRIED),
    "stored_weights_fit": Example(("quantizer=checkpoint",), TRIED),
    "wrapped_layers_have_graph_breaks": Example(
        ("compiler=inductor", "cache=static", "++model.arch.quantization_config={quant_method:compressed-tensors}"),
        PLACE,
    ),
}

HEAD = """# What cannot be combined

Made by `python -m lbi.constraints > docs/constraints.md` from lbi/*_rules.py and lbi/constraints.py; a test compares.
A plan refuses these cells with the rule's name and the reason; `sweep.prune=false` runs them all the same.

Proof: **tried**: tests/test_constraints.py runs the example on a CPU without the rule, and it must fail, or give other
tokens than generate() by more than rounding explains. **by definition**: it has no meaning, or would be another cell
under a second name. **depends on the place**: what is installed, or the processor; tests have a machine pretend.
**needs a GPU**: not tried in a test yet.
"""


def config_of(overrides: tuple[str, ...], device: str) -> LbiConfig:
    """The cell of an example, on the tiny model unless it names another."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    fixed = ["hydra/sweeper=basic", "hydra/launcher=basic", f"engine.device={device}", "store.path=store"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed: Any = compose("config", ["model=tiny_random", *fixed, *overrides])
        sections: Any = OmegaConf.to_container(composed, resolve=True)
    return build(LbiConfig, {key: value for key, value in sections.items() if key != "hydra"})


def reason(name: str) -> str | None:
    """What the rule says of its example."""
    example = EXAMPLES[name]
    config = config_of(example.overrides, example.device)
    rule = next(rule for rule in rules.RULES if rule.name == name)
    return rule.check(config, inspect(config.model), example.machine())


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    for rule in rules.RULES:
        example = EXAMPLES[rule.name]
        where = "" if example.device == "cpu" else " (on a GPU)"
        parts.append(
            f"## {rule.name}\n\n`{' '.join(example.overrides)}`{where}\n\n{reason(rule.name)}.\n\n"
            f"Evidence: {rule.evidence}.\n\nProof: {example.proof}.\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    print(text(), end="")
