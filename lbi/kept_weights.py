"""Quantized weights kept in the store, so that a setting's weights are quantized once and not by every cell.

    quantized/<id>/         meta.json    what they are of, how long quantizing took, the file's sha256
                            tensors.safetensors
                            used         touched at each use

The id is a digest of everything that the weights depend on (`address`). So an entry is never replaced by
another's content, whoever comes first publishes by one rename, and what another version made has another
name. What is read back is checked against its sha256; what is not whole counts as absent and is made anew.

Before an entry appears it is read back and held against the layers that it was made of: bit for bit, and
by the output of one layer of each kind. A class of layer that would not come back as it was is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import lbi
from lbi import environment, identity
from lbi.config import LbiConfig, ModelConfig, StoreConfig
from lbi.files import UMASK, BadFile, read_json, write_json
from lbi.model_files import inspect
from lbi.quantizers import storages
from lbi.quantizers.assign import Assignment
from lbi.quantizers.layer_forms import Form, NotKept, put_together, take_apart
from lbi.quantizers.options import PLAIN, content
from lbi.store import SCHEMA, live_owner, own_claim

TENSORS, META = "tensors.safetensors", "meta.json"

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ImportError, AssertionError)
"""What a form may raise that is not one of this lbi's, although its file is whole."""

READ_BYTES_PER_S = 1e9
"""What reading and checking kept weights is taken for before they are written; 0.85e9 on an H200's host, where writing
and reading back 3.93 GB took 12 s, and quantizing them 4.5."""

WORTH = 2.0
"""How many times longer than reading back quantizing must take: writing, too, is to be repaid within a few runs."""


@dataclass(frozen=True, slots=True)
class Address:
    """What weights depend on, and the digest of it."""

    key: dict[str, Any]
    id: str


def address(config: LbiConfig, of: ModelConfig, model: Any, assignment: Assignment, embeddings: str) -> Address:
    """Where the weights of `model`, loaded as `of` says and quantized as `assignment` says, are kept.

    Raises `NotKept` for weights that are not known well enough to be told from others.
    """
    families = {part.family for part in assignment.values()}
    if "custom" in families:
        raise NotKept("what a quantizer of the user's own imports is not known, so neither is when it changes")
    if "checkpoint" in families:
        raise NotKept("the weights come quantized")
    key = {
        **depends_on(config, of, model),
        "layers": {name: identity.canonical(content(part)) for name, part in sorted(assignment.items())},
        "embeddings": embeddings,
    }
    return Address(key, identity.digest("quantized", key))


def depends_on(config: LbiConfig, of: ModelConfig, model: Any) -> dict[str, Any]:
    """What quantized weights depend on beside the quantizer: the weights, the device, versions, lbi's own code.

    Raises `NotKept` for weights of which it is not known which they are.
    """
    facts = inspect(of)
    weights: dict[str, Any] = {"model": identity.canonical_model(of, facts)}
    if of.source == "hf" and not facts.fingerprint:
        weights["commit"] = getattr(model.config, "_commit_hash", None)
        if not weights["commit"]:
            raise NotKept("the hub did not say which revision the weights are")
    on_cpu = config.engine.device == "cpu"
    return {
        "weights": weights,
        # Sums are taken in another order by another device, or by another number of threads.
        "device": environment.cpu_model() if on_cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads() if on_cpu else None,
        "packages": environment.packages(),
        "lbi": lbi.__version__,
        "sources": sources(),
    }


@cache
def sources() -> str:
    """Digest of the part of lbi that decides what quantized weights are and how they are kept."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    others = [folder / name for name in ("kept_weights.py", "models.py")]
    for file in sorted([*folder.glob("quantizers/*.py"), *folder.glob("kernels/**/*.*"), *others]):
        if file.suffix in (".py", ".cpp"):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(slots=True)
class Kept:
    """The entry of one address under `root`; `notes` say what became of it, for the result."""

    root: Path
    address: Address
    settings: StoreConfig
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.root / self.address.id

    def exists(self) -> bool:
        return self.folder.is_dir()

    def load(self, model: Any) -> float | None:
        """Put the kept layers into `model`; the seconds that quantizing them took, or None if there are none.

        A damaged entry is removed and noted, and `model` is as it was.
        """
        try:
            with _in_use(self.folder):
                meta, forms = self._read(model)
                made = {name: put_together(form, model.get_submodule(name)) for name, form in forms.items()}
                quantize_s = float(meta["quantize_s"])
        except (BadFile, *DAMAGED) as error:
            if not isinstance(error, BadFile):
                error = BadFile(self.folder, f"cannot be put together ({type(error).__name__}: {error})")
            self._note(f"damaged, quantized anew: {error.path.name} {error.reason}")
            _remove(self.folder)
            return None
        for name, layer in made.items():
            model.set_submodule(name, layer)
        return quantize_s

    def _read(self, model: Any) -> tuple[dict[str, Any], dict[str, Form]]:
        meta = read_json(self.folder / META, SCHEMA)
        if meta is None:
            raise BadFile(self.folder / META, "is missing")
        if meta["key"] != self.address.key:
            raise BadFile(self.folder / META, "is of other weights")
        found, about, digest = storages.read(self.folder / TENSORS, next(model.parameters()).device)
        if digest != meta["sha256"]:
            raise BadFile(self.folder / TENSORS, "has another sha256 than was written")
        return meta, _forms(about, found)

    def keep(self, model: Any, names: list[str], quantize_s: float) -> None:
        """Keep the layers `names` of `model`, if that is worth it and can be done; notes which."""
        least = self.settings.quantized_s
        try:
            if quantize_s < least:
                raise NotKept(f"quantizing took {quantize_s:.2g} s, and store.quantized_s is {least:g}")
            size, load_s = self._publish(model, names, quantize_s)
            self._note(f"kept: {size / 1e9:.3g} GB, read back in {load_s:.2g} s")
        except NotKept as reason:
            self._note(f"not kept: {reason}")
        except (OSError, BadFile) as error:
            # A full disk, or a file that another process took away: the run has its weights and goes on.
            self._note(f"not kept: {getattr(error, 'strerror', None) or error}")

    def _publish(self, model: Any, names: list[str], quantize_s: float) -> tuple[int, float]:
        forms = {name: take_apart(model.get_submodule(name)) for name in names}
        kept = storages.Storages()
        about = {name: _as_json(form, kept) for name, form in forms.items()}
        limit = int(self.settings.quantized_gb * 1e9)
        if kept.nbytes > limit:
            raise NotKept(f"{kept.nbytes / 1e9:.3g} GB are more than store.quantized_gb={self.settings.quantized_gb:g}")
        reading_s = kept.nbytes / READ_BYTES_PER_S
        if self.settings.quantized_s and quantize_s < WORTH * reading_s:
            about_s = f"reading {kept.nbytes / 1e9:.3g} GB takes about {reading_s:.2g} s"
            raise NotKept(f"{about_s}, which spares too little of {quantize_s:.2g} s of quantizing")
        self.root.mkdir(parents=True, exist_ok=True)
        make_room(self.root, limit - kept.nbytes)
        scratch = Path(tempfile.mkdtemp(dir=self.root, prefix=".writing-"))
        try:
            write_json(scratch / "claim.json", own_claim())
            storages.write(scratch / TENSORS, kept.by_name, about)
            digest, load_s = _compare(scratch, model, forms)
            if self.settings.quantized_s and load_s >= quantize_s:
                raise NotKept(f"reading them takes {load_s:.2g} s, as long as quantizing ({quantize_s:.2g} s)")
            meta = {"schema": SCHEMA, "key": self.address.key, "sha256": digest, "bytes": kept.nbytes}
            meta |= {"quantize_s": quantize_s, "load_s": load_s, "made": time.time()}
            (scratch / "claim.json").unlink()
            (scratch / "used").touch()
            write_json(scratch / META, meta)
            self._appear(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return kept.nbytes, load_s

    def _appear(self, scratch: Path) -> None:
        os.chmod(scratch, 0o777 & ~UMASK)
        try:
            scratch.rename(self.folder)
        except OSError:
            # Another process was first; what it made is of the same address, and was held against its layers.
            if not (self.folder / META).exists():
                raise

    def _note(self, text: str) -> None:
        print(f"quantized weights {self.address.id}: {text}", flush=True)
        self.notes.append(text)


def make_room(root: Path, most: int) -> None:
    """Remove the entries that were not used for longest until no more than `most` bytes are kept.

    An entry that a live process is reading stays. What processes left behind that died while writing goes.
    """
    entries = []
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name.startswith("."):
            if live_owner(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            entries.append((_last_used(folder), _size(folder), folder))
    total = sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= most:
            return
        if not _readers(folder):
            _remove(folder)
            total -= size


def _readers(folder: Path) -> list[str]:
    """Live processes that read an entry."""
    with contextlib.suppress(OSError):
        return [owner for entry in (folder / "readers").iterdir() if (owner := live_owner(entry))]
    return []


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Mark an entry as being read. A store that cannot be written is read all the same."""
    mark = folder / "readers" / f"{socket.gethostname()}-{os.getpid()}"
    with contextlib.suppress(OSError):
        mark.parent.mkdir(exist_ok=True)
        mark.mkdir(exist_ok=True)
        write_json(mark / "claim.json", own_claim())
        (folder / "used").touch()
    try:
        yield
    finally:
        shutil.rmtree(mark, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Take an entry away at once: a half-removed one must not be found."""
    away = folder.with_name(f".removed-{folder.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _last_used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / "used").stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return (folder / TENSORS).stat().st_size
    return 0


def _as_json(form: Form, kept: storages.Storages) -> dict[str, Any]:
    views = {name: kept.view_of(tensor) for name, tensor in form.tensors.items()}
    return {"kind": form.kind, "values": form.values, "tensors": views}


def _forms(about: dict[str, Any], found: dict[str, torch.Tensor]) -> dict[str, Form]:
    return {
        name: Form(
            row["kind"],
            row["values"],
            {part: storages.tensor_of(view, found) for part, view in row["tensors"].items()},
        )
        for name, row in about.items()
    }


def _compare(scratch: Path, model: Any, forms: dict[str, Form]) -> tuple[str, float]:
    """sha256 of the written file and the seconds it takes to read it. Raises `NotKept` for layers that differ."""
    started = time.perf_counter()
    found, about, digest = storages.read(scratch / TENSORS, next(model.parameters()).device)
    made = {name: put_together(form, model.get_submodule(name)) for name, form in _forms(about, found).items()}
    load_s = time.perf_counter() - started
    tried = set()
    for name, form in forms.items():
        if not same(form, take_apart(made[name])):
            raise NotKept(f"a {form.kind} would not come back as it was ({name})")
        layer = model.get_submodule(name)
        shape = (form.kind, getattr(layer, "in_features", 0), getattr(layer, "out_features", 0))
        if shape not in tried and not _equal_outputs(layer, made[name], model):
            raise NotKept(f"a {form.kind} would not compute what it did ({name})")
        tried.add(shape)
    return digest, load_s


def same(form: Form, other: Form) -> bool:
    """Whether two layers are made of the same values and the very same bits."""
    if (form.kind, form.values, form.tensors.keys()) != (other.kind, other.values, other.tensors.keys()):
        return False
    return all(_same_bits(tensor, other.tensors[name]) for name, tensor in form.tensors.items())


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    left, right = storages.Storages(), storages.Storages()
    views = left.view_of(one), right.view_of(other)
    if any({**view, "storage": ""} != {**views[0], "storage": ""} for view in views):
        return False
    return all(map(torch.equal, left.by_name.values(), right.by_name.values()))


def _equal_outputs(layer: Any, made: Any, model: Any) -> bool:
    device, width = next(model.parameters()).device, getattr(layer, "in_features", None)
    with torch.no_grad():
        if width is None:
            given: torch.Tensor = torch.arange(4, device=device)
        else:
            given = torch.linspace(-1, 1, width, device=device)[None].to(model.dtype)
        return _same_bits(layer(given), made(given))


def names_of(model: Any, assignment: Assignment, embeddings: str) -> list[str]:
    """Modules of `model` that are not as they were loaded once it is quantized."""
    changed = [name for name, part in assignment.items() if part != PLAIN]
    if embeddings != "keep":
        table = model.get_input_embeddings()
        changed += [name for name, module in model.named_modules() if module is table]
    return changed
