"""How a recipe loads its model, and turns the prompt into tokens."""

from __future__ import annotations

from typing import Any

from lbi.config import EngineConfig, ModelConfig
from lbi.model_files import ModelFacts
from lbi.quantizers.loaders import stored_format
from lbi.recipe.part import Part, literal

MODELS = "from transformers import AutoModelForCausalLM, AutoTokenizer"

ENCODE = """
def encode(tokenizer, text):
    return tokenizer(text)["input_ids"]


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens)
"""

STAND_IN = '''
def encode(tokenizer, text):
    """Random weights have no tokenizer: an id a word."""
    words = re.findall(r"\\s?\\w+|[^\\w\\s]", text)
    return [0, *(1 + zlib.crc32(word.encode()) % (ARCH["vocab_size"] - 1) for word in words)]


def decode(tokenizer, tokens):
    return " ".join(map(str, tokens))
'''


def part(model: ModelConfig, engine: EngineConfig, facts: ModelFacts) -> Part:
    """`load()`, which returns model and tokenizer, `encode` and `decode`."""
    if model.source == "random":
        return _random(model, engine)
    return _gguf(model, engine) if model.source == "gguf" else _hf(model, engine, facts)


def _hf(model: ModelConfig, engine: EngineConfig, facts: ModelFacts) -> Part:
    # Quantized weights are packed for the device that they are loaded onto.
    placed = stored_format(facts.arch) is not None and engine.device == "cuda"
    revision = f', revision="{model.revision}"' if model.revision else ""
    code = f"""
MODEL = {facts.location!r}


def load():
    model = AutoModelForCausalLM.from_pretrained(
        MODEL{revision}, dtype=DTYPE, attn_implementation="{engine.attention}"{", device_map=DEVICE" if placed else ""}
    )
    return model{"" if placed else ".to(DEVICE)"}.eval(), AutoTokenizer.from_pretrained(MODEL{revision})
"""
    return Part((MODELS,), code + "\n" + ENCODE)


def _gguf(model: ModelConfig, engine: EngineConfig) -> Part:
    where, imports = _file(str(model.path))
    code = f"""
FILE = {where}


def load():
    model = AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=DTYPE, attn_implementation="{engine.attention}"
    )
    if getattr(model, "hf_quantizer", None) is not None:
        # The weights are dense now, whatever the file held.
        model.hf_quantizer.remove_quantization_config(model)
    return model.to(DEVICE).eval(), AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
"""
    return Part((MODELS, *imports), code + "\n" + ENCODE)


def _file(path: str) -> tuple[str, tuple[str, ...]]:
    """The expression that finds a GGUF file, and its imports; `package:` is inside an installed package."""
    if not path.startswith("package:"):
        return f"Path({path!r}).expanduser()", ("from pathlib import Path",)
    package, _, file = path.removeprefix("package:").partition("/")
    found = f'Path(importlib.util.find_spec("{package}").submodule_search_locations[0]) / "{file}"'
    return found, ("import importlib.util", "from pathlib import Path")


def _random(model: ModelConfig, engine: EngineConfig) -> Part:
    fields: dict[str, Any] = dict(model.arch or {})
    kind = fields.pop("model_type")
    code = f"""
ARCH = {literal(fields)}


def load():
    torch.manual_seed({model.seed})
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        config = AutoConfig.for_model("{kind}", **ARCH)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="{engine.attention}")
    torch.set_default_dtype(torch.float32)
    return model.eval(), None
"""
    imports = ("import re", "import zlib", "from transformers import AutoConfig, AutoModelForCausalLM")
    return Part(imports, code + "\n" + STAND_IN)
