"""What the unquantized model answers: computed once, shared by every cell that needs it.

    python -m lbi.reference FOLDER      (FOLDER/request.json says for which cell)

Runs in a process of its own like any run, so that no cell inherits anything from it.
Logits depend on the model and the text; greedy tokens on the model and the workload; the
quality of a cell on its weights besides. Each is a folder under references/; the first two
appear by one rename when they are whole.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbi import identity
from lbi.config import CacheConfig, CompilerConfig, DecodingConfig, LbiConfig, ModelConfig, QuantizerConfig
from lbi.engines import make, plain_engine
from lbi.files import read_json, write_json
from lbi.identity import digest
from lbi.model_files import inspect
from lbi.store import SCHEMA
from lbi.typed import build, plain

NO_BASE = "quantizer.base is not given: it names the unquantized model to compare with"
"""Why a checkpoint has no quality."""


def folders(store: Path, config: LbiConfig, env_id: str) -> dict[str, Path]:
    """Where a cell's reference logits, reference tokens and quality are kept, if they are there yet."""
    base = base_model(config)
    common = {
        "model": identity.canonical_model(base, inspect(base)) if base else None,
        "device": config.engine.device,
        "attention": config.engine.attention,
        "env": env_id,
    }
    text = common | {"quality": identity.canonical(plain(config.quality))}
    # What the teacher-forced pass of a cell depends on beside the reference: its weights, a cache that is
    # not lossless, the engine only where it is another model, the compiler only where that has the prefill too.
    own = {"quantizer": identity.canonical_quantizer(config.quantizer)}
    if config.quantizer.family == "checkpoint":
        own["weights"] = identity.canonical_model(config.model, inspect(config.model))
    if config.engine.kind == "fused" or not config.cache.lossless:
        own["engine"] = config.engine.kind
    if not config.cache.lossless:
        own["cache"] = identity.canonical_cache(config.cache)
    if config.compiler.prefill:
        own["compiler"] = identity.canonical(plain(config.compiler))
    keys = {
        "logits": text,
        "greedy": common | {"workload": identity.canonical_workload(replace(config.workload, batch=1))},
        "quality": text | own,
    }
    return {kind: store / "references" / f"{kind}-{digest(kind, key)}" for kind, key in keys.items()}


def base_model(config: LbiConfig) -> ModelConfig | None:
    """The unquantized model of a cell: for a checkpoint what `quantizer.base` names, None if it names nothing."""
    base = config.quantizer.base
    if config.quantizer.family != "checkpoint":
        return config.model
    return replace(config.model, path=base, revision=None, arch=None) if base else None


def unquantized(config: LbiConfig) -> LbiConfig:
    """The cell with nothing applied: plain weights, engine=hf, eager, dynamic cache, greedy."""
    return replace(
        config,
        model=base_model(config) or config.model,
        engine=plain_engine(config.engine),
        quantizer=QuantizerConfig(name="none", family="none", method="none"),
        compiler=CompilerConfig(name="eager", backend="eager"),
        decoding=DecodingConfig(name="greedy", kind="greedy"),
        cache=CacheConfig(name="dynamic", kind="dynamic"),
    )


def main(folder: Path) -> None:
    """Compute what is missing of one reference. Errors are the caller's to read from the log."""
    from lbi.process import die_with_parent, prepare

    die_with_parent()
    request = read_json(folder / "request.json", SCHEMA)
    if request is None:
        raise SystemExit(f"{folder}: there is no request.json")
    config = unquantized(build(LbiConfig, request["config"]))
    prepare(config)
    from lbi.models import load
    from lbi.prompts import fit_tokens, read_text

    loaded = load(config.model, config.engine)
    engine = make(config, loaded.model, slots=0)
    if config.quality.enabled and not Path(request["logits"]).exists():
        _save_logits(Path(request["logits"]), engine, loaded.encode(read_text(config.quality.text)), config)
    if not Path(request["greedy"]).exists():
        workload = config.workload
        prompt = fit_tokens(loaded.encode(read_text(workload.prompt)), workload.prompt_tokens)
        generation = engine.generate(prompt, workload.new_tokens, seed=0)
        with _whole_folder(Path(request["greedy"])) as scratch:
            write_json(scratch / "greedy.json", {"schema": SCHEMA, "prompt": prompt, "tokens": generation.tokens})


def _save_logits(target: Path, engine: Any, tokens: list[int], config: LbiConfig) -> None:
    import numpy as np

    from lbi.quality import reference_logits, windows

    pieces = windows(tokens, config.quality.tokens, config.quality.window)
    with _whole_folder(target) as scratch:
        np.save(scratch / "logits.npy", reference_logits(engine.forward, pieces))
        (scratch / "pieces.json").write_text(json.dumps(pieces))


class _whole_folder:
    """A scratch folder that becomes `target` by one rename, unless another process was first."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(dir=self.target.parent, prefix=".making-"))
        return self.scratch

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                os.rename(self.scratch, self.target)
            except OSError:
                if not self.target.exists():
                    raise
        shutil.rmtree(self.scratch, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
