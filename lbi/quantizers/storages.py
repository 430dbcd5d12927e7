"""Tensors as a safetensors file of the storages behind them.

safetensors itself keeps contiguous tensors of some types. Here a tensor is a view (type, shape, strides,
offset) of a storage that is kept as bytes, so any layout and any type comes back as it was, and tensors
that share a storage share it again: a head and a table in int8 are one tensor in memory.

A file is read into memory of the process, not mapped. What is measured afterwards reads those weights at
every token, so they must lie where freshly quantized ones would, in pages of the process that may be large
ones; and a file that another process removes meanwhile cannot take the process down.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lbi.files import UMASK, BadFile

LONGEST_HEADER = 1 << 28


class Storages:
    """The storages of tensors, each once, and the views that the tensors are."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[int, int], str] = {}

    def view_of(self, tensor: torch.Tensor) -> dict[str, Any]:
        """A plain tensor as a JSON view of one of the storages, which is added if it is new."""
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in self._names:
            name = self._names[key] = f"{len(self._names):06d}"
            self.by_name[name] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
                storage, 0, (storage.nbytes(),), (1,)
            )
        return {
            "storage": self._names[key],
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "size": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
        }

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in self.by_name.values())


def tensor_of(view: Mapping[str, Any], storages: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that `view` describes. Raises `KeyError`, `ValueError` or another for what is no view of these."""
    storage = storages[view["storage"]]
    empty = torch.empty(0, dtype=getattr(torch, view["dtype"]), device=storage.device)
    reach = sum((size - 1) * stride for size, stride in zip(view["size"], view["stride"], strict=True))
    if 0 not in view["size"] and (view["offset"] + reach + 1) * empty.element_size() > storage.nbytes:
        raise ValueError(f"a view of {view['size']} reaches beyond its storage")
    return empty.set_(storage.untyped_storage(), view["offset"], tuple(view["size"]), tuple(view["stride"]))


def write(path: Path, storages: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """A safetensors file of the storages with `about` in its header, on the disk when this returns.

    Raises `OSError` where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(storages), path, metadata={"about": json.dumps(about, allow_nan=False)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors makes files that nobody else may read.
    path.chmod(0o666 & ~UMASK)
    # What is still to be written would be written while something is timed.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read(path: Path, device: str | torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """The storages of a file on `device`, what is written about them, and the sha256 of all of it.

    Raises `BadFile` for a file that is not whole.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, device)
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BadFile(path, f"is no safetensors file of storages ({error})") from error


def _read(path: Path, file: Any, device: str | torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    digest = hashlib.sha256()
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0]
    if length > min(LONGEST_HEADER, path.stat().st_size):
        raise BadFile(path, "is cut off in its header")
    text = file.read(length)
    digest.update(prefix + text)
    header = json.loads(text)
    about = json.loads(header.pop("__metadata__")["about"])
    storages: dict[str, torch.Tensor] = {}
    reached = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if start != reached or entry["dtype"] != "U8" or end < start or end > path.stat().st_size:
            raise BadFile(path, f"has no whole storage {name}")
        # Anonymous memory of its own, as a quantizer would have asked for.
        storage = torch.empty(end - start, dtype=torch.uint8)
        content = memoryview(storage.numpy())
        if file.readinto(content) != end - start:
            raise BadFile(path, f"is cut off in storage {name}")
        digest.update(content)
        storages[name] = storage.to(device)
        reached = end
    if file.read(1):
        raise BadFile(path, "goes on behind its last storage")
    return storages, about, digest.hexdigest()
