"""A loaded and quantized model that several runs use in turn in one process, and the process put back between them.

What a run adds to the model (a compiled forward pass, an attention function, buffers) is taken away again, by what
the model's modules held when it was new. A compiled graph alone stays, if the next run would compile the very same.
What cannot be taken away, a weight that was written to or a layer of another class, is found, and the model is then
not used again.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lbi.compilers import HELD, CompilerState
from lbi.cost import PHASES
from lbi.graph_key import held_key
from lbi.process import Phases
from lbi.record import Record

if TYPE_CHECKING:
    from lbi.config import LbiConfig
    from lbi.models import LoadedModel
    from lbi.quantizers.audit import Layer

MAPPINGS = ("_parameters", "_buffers", "_modules")
"""Mappings of a module whose content is its own; a copy of its attributes alone would share them."""


class Findings:
    """What loading and quantizing added to a record while it was open, for the records of later runs."""

    def __init__(self, record: Record) -> None:
        self._parts = self._of(record)
        self._before = [dict(part) for part in self._parts]
        self.added: list[dict[str, Any]] = []

    @staticmethod
    def _of(record: Record) -> tuple[dict[str, Any], ...]:
        return record.metrics, record.missing, record.effective

    def close(self) -> Findings:
        """Keep what is new or another value than before."""
        for part, before in zip(self._parts, self._before, strict=True):
            new = {name: value for name, value in part.items() if name not in before or before[name] is not value}
            self.added.append(copy.deepcopy(new))
        return self

    def give(self, record: Record) -> None:
        """Put the same into another record."""
        for part, added in zip(self._of(record), self.added, strict=True):
            part.update(copy.deepcopy(added))


class Shared:
    """The model that the runs of this process have in common; `kept` is None until the first has quantized it.

    `held` is the graph that the last run has left compiled, for one that is like it (graph_key.py).
    """

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.held: Held | None = None

    def keep(self, loaded: LoadedModel, layers: list[Layer], findings: Findings, run_id: str, phases: Phases) -> None:
        """Take what the run `run_id` has loaded and quantized, before an engine has touched it."""
        spent = phases.seconds
        both = sum(spent.get(step, 0.0) for step in (*PHASES["load"], *PHASES["quantize"]))
        as_new, settings = Snapshot.of(loaded.model), Settings.take()
        self.kept = Kept(loaded, layers, findings, run_id, spent.get("load", 0.0), both, held_bytes(), as_new, settings)

    def hold(self, config: LbiConfig, run_id: str, record: Record) -> None:
        """Note that the run has compiled a graph that another may use as it is, if it has."""
        if record.cost.get("compile") == HELD:
            return
        key, graphs = held_key(config), record.effective.get("compiler", {}).get("graphs", 0)
        # At its limit dynamo gives up without a word, and a run after this one would be eager.
        holds = key is not None and 0 < graphs < torch._dynamo.config.recompile_limit
        self.held = Held(str(key), run_id) if holds else None

    def tell(self, config: LbiConfig, record: Record) -> None:
        """Say in the record of a later run what it has of earlier ones; what it cannot use of them is forgotten."""
        if self.kept is None:
            return
        if self.held is not None and self.held.key != held_key(config):
            self.held = None
            forget_compiled()
            give_memory_back()
        if self.held is not None:
            record.effective["isolation"] |= {"graph_of": self.held.run_id}
        self.kept.tell(record)

    def put_back(self) -> str:
        """Make model and process what they were when the model was new, but for a graph that is held.

        What cannot be made so, or empty.
        """
        if self.kept is None:
            return ""
        self.kept.as_new.restore()
        if self.held is None:
            forget_compiled()
        forget_counts()
        self.kept.settings.restore()
        give_memory_back()
        return self.kept.as_new.difference()


@dataclass(frozen=True, slots=True)
class Held:
    """A compiled graph in the memory of this process: the `held_key` of runs that may use it, and whose it was."""

    key: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A model as the run `run_id` has loaded and quantized it, with what it found of it.

    `load_s` is what its phase `load` took and `spent_s` all that it spent on loading and quantizing, in seconds;
    `held_bytes` is what the process held of the device's memory when the model was new.
    """

    loaded: LoadedModel
    layers: list[Layer]
    findings: Findings
    run_id: str
    load_s: float
    spent_s: float
    held_bytes: int | None
    as_new: Snapshot
    settings: Settings

    def tell(self, record: Record) -> None:
        """Say in the record of a later run what its model is, what it did not pay for, and what is left of others.

        `left_bytes` is what the process holds beyond what it held at this point of its first run.
        """
        self.findings.give(record)
        record.metrics["load_s"] = self.load_s
        record.effective["quantized"] = f"shared with {self.run_id} ({record.effective['quantized']})"
        now = held_bytes()
        left = None if now is None or self.held_bytes is None else max(0, now - self.held_bytes)
        record.effective["isolation"] |= {"left_bytes": left}
        record.cost |= {"shared_from": self.run_id, "shared_load_s": self.spent_s}


@dataclass(frozen=True, slots=True)
class Module:
    """A module, its class, its attributes, and what its parameters, buffers and children were."""

    module: torch.nn.Module
    kind: type
    attributes: dict[str, Any]
    held: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a model's modules and configs held, and the version of each of its tensors."""

    modules: dict[str, Module]
    configs: list[tuple[Any, dict[str, Any]]]
    versions: dict[str, tuple[torch.Tensor, int | None]]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Snapshot:
        """Of a model that no engine has touched yet."""
        modules = {
            name: Module(
                module,
                type(module),
                dict(module.__dict__),
                {key: dict(module.__dict__[key]) for key in MAPPINGS},
            )
            for name, module in model.named_modules()
        }
        found = {id(own): own for module in model.modules() if (own := getattr(module, "config", None)) is not None}
        configs = [(own, copy.deepcopy(own.__dict__)) for own in found.values()]
        versions = {name: (tensor, version(tensor)) for name, tensor in tensors(model)}
        return cls(modules, configs, versions)

    def restore(self) -> None:
        """Give every module the attributes, parameters and children that it had, and every config its values."""
        for known in self.modules.values():
            own = known.module.__dict__
            for key, held in known.held.items():
                # The mapping itself stays: torch and torchao hold on to it.
                known.attributes[key].clear()
                known.attributes[key].update(held)
            own.clear()
            own.update(known.attributes)
        for config, values in self.configs:
            for name in set(config.__dict__) - set(values):
                del config.__dict__[name]
            for name, value in values.items():
                if config.__dict__.get(name) != value:
                    config.__dict__[name] = copy.deepcopy(value)

    def difference(self) -> str:
        """What is not as it was after `restore`; empty where everything is."""
        for name, known in self.modules.items():
            if type(known.module) is not known.kind:
                return f"{name or 'the model'} has become a {type(known.module).__name__}"
        for name, (tensor, before) in self.versions.items():
            if version(tensor) != before:
                return f"{name} was written to"
        return ""


def tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, and the plain tensors that those of a subclass are made of."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield from _parts(name, tensor)


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, tensor
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(tensor, part))


def version(tensor: torch.Tensor) -> int | None:
    """How often torch has written to a tensor; None for one of which it does not count that."""
    return None if tensor.is_inference() else int(tensor._version)


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the whole process that compiling may change."""

    compiler: CompilerState
    dynamo: dict[str, Any]

    @classmethod
    def take(cls) -> Settings:
        return cls(CompilerState.take(), torch._dynamo.config.get_config_copy())

    def restore(self) -> None:
        self.compiler.restore()
        now = torch._dynamo.config.get_config_copy()
        for name, value in self.dynamo.items():
            if now.get(name) != value:
                setattr(torch._dynamo.config, name, value)


def forget_compiled() -> None:
    """Have torch.compile start as in a new process: its graphs, and what inductor holds in memory."""
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()


def forget_counts() -> None:
    """Have dynamo's and inductor's counts start at zero."""
    from torch._dynamo.utils import counters

    counters.clear()


def give_memory_back() -> None:
    """Free what earlier runs left, to the device and to the system, and count peaks anew."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # Freed memory that the C library keeps for itself would count as resident; other C libraries have no such call.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def held_bytes() -> int | None:
    """What this process holds of the memory whose peak a run reports: the GPU's allocator, else what is resident."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)
