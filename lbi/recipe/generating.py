"""How a recipe generates: by transformers' generate(), or by an engine of lbi's own where that is what was measured."""

from __future__ import annotations

from typing import Any

from lbi.config import CompilerConfig, LbiConfig
from lbi.recipe.part import Part, arguments, literal
from lbi.recipe.quantizing import knobs

GENERATE = """
def generate(model, tokenizer, ids):
    torch.manual_seed({seed})
    # EOS is not looked at: what was measured has {new_tokens} tokens, whatever they are.
    model.generation_config = GenerationConfig(pad_token_id=0)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, pad_token_id=0, use_cache=True, disable_compile=True,
        {settings},
    )
    inputs = torch.tensor([ids], device=DEVICE)
    mask = torch.ones_like(inputs)
    output = model.generate(inputs, attention_mask=mask, generation_config=settings{cache})
    return output[0, len(ids) :].tolist()
"""

COMPILE = '''
def compile_decode_step(model):
    """Inductor for passes of one token{prefill}."""
    plain = model.forward
    compiled = torch.compile(plain, backend="inductor", fullgraph={fullgraph}, dynamic={dynamic}{mode})

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        return ({choice})(*args, **kwargs)

    model.forward = forward
'''

OWN_ENGINE = """
SETTING = standalone.setting(
{groups})


def generate(model, tokenizer, ids, draft=None):
    engine = standalone.engine(model, SETTING, len(ids), NEW_TOKENS, draft, tokenizer)
    return engine.generate(ids, NEW_TOKENS, seed={seed}).tokens
"""


def own_engine(config: LbiConfig) -> bool:
    """Whether the cell runs by code of lbi's own: its engines, its CUDA graphs, its caches."""
    return config.engine.kind != "hf" or config.compiler.backend == "cudagraph"


def part(config: LbiConfig) -> Part:
    """`generate(model, tokenizer, ids)`, and what it needs."""
    return _own(config) if own_engine(config) else _generate(config)


def _own(config: LbiConfig) -> Part:
    wanted = ["engine", "compiler", "decoding", "cache"]
    groups = {name: knobs(getattr(config, name)) for name in wanted}
    if config.workload.batch > 1:
        groups["workload"] = knobs(config.workload)
    if config.decoding.draft is not None:
        # A draft is loaded in the model's own type.
        groups = {"model": {name: value for name, value in knobs(config.model).items() if name != "note"}, **groups}
    text = "".join(f"    {name}={literal(known, 8)},\n" for name, known in groups.items())
    code = OWN_ENGINE.format(groups=text, seed=config.decoding.seed or 0)
    return Part(("from lbi import standalone",), code)


def _generate(config: LbiConfig) -> Part:
    given, imports = "", ["from transformers import GenerationConfig"]
    if config.cache.kind == "hf_quantized":
        imports.append("from transformers import QuantizedCache")
        given = f", past_key_values=QuantizedCache({config.cache.backend!r}, model.config{_cache_knobs(config)})"
    settings = ",\n        ".join(part for part in (_sampling(config), _cache(config)) if part)
    code = GENERATE.format(
        seed=config.decoding.seed or 0, new_tokens=config.workload.new_tokens, settings=settings, cache=given
    )
    if config.compiler.backend == "eager":
        return Part(tuple(imports), code)
    return Part((*imports, "import functools"), _compile(config.compiler) + "\n" + code)


def _sampling(config: LbiConfig) -> str:
    decoding = config.decoding
    if decoding.kind == "greedy":
        return "do_sample=False"
    known = {
        "do_sample": True,
        "temperature": decoding.temperature,
        # 0 and 1.0 switch these off; left out, generate() would take its own.
        "top_k": decoding.top_k or 0,
        "top_p": decoding.top_p or 1.0,
        "min_p": decoding.min_p,
        "repetition_penalty": decoding.repetition_penalty or 1.0,
    }
    return arguments(known)


def _cache(config: LbiConfig) -> str:
    kind = config.cache.kind
    if kind in ("static", "offloaded_static"):
        slots = str(config.cache.max_len or "len(ids) + NEW_TOKENS")
        return f'cache_implementation="{kind}", max_cache_len={slots}'
    return f'cache_implementation="{kind}"' if kind == "offloaded" else ""


def _cache_knobs(config: LbiConfig) -> str:
    cache = config.cache
    if cache.backend == "fp8":
        return ""
    axis = cache.axis or 0
    known = {"nbits": cache.bits, "axis_key": axis, "axis_value": axis}
    return ", " + arguments(known | {"q_group_size": cache.group_size, "residual_length": cache.residual})


def _compile(compiler: CompilerConfig) -> str:
    own: dict[str, Any] = dict(compiler.options)
    if compiler.coordinate_descent:
        own["coordinate_descent_tuning"] = True
    mode = ""
    if own and compiler.mode != "default":
        # torch.compile takes a mode or options, not both.
        listed = f"torch._inductor.list_mode_options({compiler.mode!r}, {compiler.dynamic})"
        mode = f", options={listed} | {own!r}"
    elif own:
        mode = f", options={own!r}"
    elif compiler.mode != "default":
        mode = f', mode="{compiler.mode}"'
    choice = "compiled" if compiler.prefill else "compiled if ids is not None and ids.shape[1] == 1 else plain"
    return COMPILE.format(
        prefill=", and for the prompt" if compiler.prefill else "; the prompt's stays as it is",
        fullgraph=compiler.fullgraph,
        dynamic=compiler.dynamic,
        mode=mode,
        choice=choice,
    )
