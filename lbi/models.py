"""Loads a model onto the device: a folder or hub id, a GGUF file, or seeded random weights."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from lbi.config import EngineConfig, ModelConfig
from lbi.errors import Unsupported
from lbi.model_files import ModelFacts, inspect
from lbi.places import cache_folder
from lbi.prompts import stand_in_tokens
from lbi.quantizers.loaders import stored_format


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its way from text to tokens and back."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    tokenizer: Any = None


def load(config: ModelConfig, engine: EngineConfig) -> LoadedModel:
    """Load what `config` names. Raises `Unsupported` where the weights cannot be had."""
    facts = known_facts(config)
    if config.source == "random":
        return _random(config, engine)
    if config.source == "gguf":
        return _from_folder(config, engine, str(_converted(config, facts)), None)
    return _from_folder(config, engine, str(facts.location), stored_format(facts.arch))


def known_facts(config: ModelConfig) -> ModelFacts:
    """The model's facts, with config.json of a hub id fetched. Raises `Unsupported` where it cannot be had."""
    facts = inspect(config)
    if config.source != "hf" or facts.fingerprint:
        return facts
    try:
        arch, _ = PretrainedConfig.get_config_dict(str(facts.location), revision=config.revision or "main")
    except (OSError, ValueError) as error:
        raise Unsupported(f"{config.path} could not be loaded: {_first_line(error)}") from error
    return replace(facts, arch=arch)


def _dtype(config: ModelConfig) -> torch.dtype:
    return getattr(torch, config.dtype)  # type: ignore[no-any-return]


def _from_folder(config: ModelConfig, engine: EngineConfig, location: str, held: str | None) -> LoadedModel:
    """The model of a folder or hub id, whose weights are in the quantized format `held`, or plain for None."""
    # Quantized weights are packed for the device that they are loaded onto.
    placed = {"device_map": engine.device} if held and engine.device == "cuda" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision or "main")
        model, report = AutoModelForCausalLM.from_pretrained(
            location,
            revision=config.revision or "main",
            dtype=_dtype(config),
            attn_implementation=engine.attention,
            output_loading_info=True,
            **placed,
        )
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        raise Unsupported(f"{config.path} could not be loaded: {_first_line(error)}") from error
    lost = sorted(report["missing_keys"])
    if held and lost:
        # transformers would go on with random numbers in their place.
        raise Unsupported(
            f"{config.path}: the {held} loader found no weights for {len(lost)} tensors, such as {lost[0]}"
        )
    model = (model if placed else model.to(engine.device)).eval()
    return LoadedModel(
        model,
        lambda text: tokenizer(text)["input_ids"],
        lambda tokens: tokenizer.decode(tokens),
        tokenizer,
    )


def _converted(config: ModelConfig, facts: ModelFacts) -> Path:
    """The folder that a GGUF file was converted to, made the first time.

    transformers dequantizes a Llama GGUF tensor by tensor on every load (20 s for 135M on two
    cores); from the converted folder it takes 2 s.
    """
    target = cache_folder() / "models" / f"{facts.fingerprint}-{config.dtype}"
    if (target / "config.json").exists():
        return target
    file = Path(str(facts.location))
    print(f"converting {file.name} once, into {target}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=_dtype(config))
        # The loader leaves a quantization_config behind although the weights are dense now.
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            # Another process was first; its folder is as good.
            if not (target / "config.json").exists():
                raise
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise Unsupported(f"{file} could not be converted: {_first_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _random(config: ModelConfig, engine: EngineConfig) -> LoadedModel:
    """A model of the given shapes, its weights made on the device from the seed."""
    fields = dict(config.arch or {})
    hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    generator_state = torch.get_rng_state()
    torch.manual_seed(config.seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(config))
    try:
        with torch.device(engine.device):
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=engine.attention)
    finally:
        torch.set_default_dtype(default)
        torch.set_rng_state(generator_state)
    vocabulary = hf_config.vocab_size
    return LoadedModel(
        model.eval(),
        lambda text: stand_in_tokens(text, vocabulary),
        lambda tokens: " ".join(map(str, tokens)),
    )


def main(path: str, dtype: str = "bfloat16") -> None:
    """Convert a GGUF file now, so that the first run does not: `python -m lbi.models FILE [DTYPE]`."""
    be_quiet()
    model = ModelConfig(name="gguf", source="gguf", path=path, dtype=dtype)  # type: ignore[arg-type]
    print(_converted(model, inspect(model)))


def be_quiet() -> None:
    """Keep progress bars and advice of transformers out of the run's log."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
