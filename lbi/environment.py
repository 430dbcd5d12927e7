"""What this machine is, read without importing torch.

The plan needs an env_id in milliseconds, on a login node as on a laptop, so
package versions come from their metadata and the GPU from nvidia-smi.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import lbi
from lbi.errors import InputError
from lbi.identity import digest

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "torchao",
    "hqq",
    "gemlite",
    "mslk-cuda",
    "compressed-tensors",
    "gptqmodel",
    "autoawq",
    "bitsandbytes",
    "optimum",
    "optimum-quanto",
    "auto-round",
    "aqlm",
    "vptq",
    "spqr_quant",
    "sinq",
    "amd-quark",
    "fouroversix",
    "fp_quant",
    "flute-kernel",
    "fast_hadamard_transform",
    "fbgemm-gpu-genai",
    "kernels",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "gguf",
)
"""Packages whose version can change a number: they are part of the env_id."""


def describe(slots: int = 1) -> dict[str, Any]:
    """Everything recorded beside a result: hardware, software, code. Of a CPU, what one of `slots` runs has."""
    return {
        "host": platform.node(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu": cpu_model(),
        **_shared(slots),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
        "packages": packages(),
        "lbi": lbi.__version__,
        "git": git_state(),
    }


def key(device: str, slots: int = 1) -> dict[str, Any]:
    """The part of the environment that can change a number on `device` (cpu or cuda).

    A CPU that `slots` runs share is another machine to each of them: fewer cores, and others
    on its memory. Raises `InputError` where it has fewer cores than that.
    """
    if device == "cuda":
        cards = gpus()
        hardware: dict[str, Any] = {
            "gpu": cards[0]["name"] if cards else None,
            "driver": cards[0]["driver"] if cards else None,
        }
    else:
        hardware = {"cpu": cpu_model(), **_shared(slots)}
    return {"device": device, **hardware, "packages": packages(), "lbi": lbi.__version__}


def key_of(description: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The key of the machine that `describe` described, for a result that came from elsewhere.

    Raises `KeyError` or `IndexError` where the description lacks something.
    """
    if device == "cuda":
        card = description["gpus"][0]
        hardware: dict[str, Any] = {"gpu": card["name"], "driver": card["driver"]}
    else:
        hardware = {"cpu": description["cpu"], "cores": description["cores"]}
        if description.get("slots", 1) > 1:
            hardware["slots"] = description["slots"]
    return {"device": device, **hardware, "packages": description["packages"], "lbi": description["lbi"]}


def identify(device: str, slots: int = 1) -> str:
    """The env_id of this machine for runs on `device`, of which `slots` share a CPU."""
    return digest("env", key(device, slots))


def hardware(description: Mapping[str, Any], device: str) -> tuple[Any, ...]:
    """What `sweep.reuse=same_gpu` compares: the GPU's name, or the CPU and what of it a run had."""
    cards = [card["name"] for card in description.get("gpus") or []]
    if device == "cuda" and cards:
        return (cards[0],)
    return (description.get("cpu"), description.get("cores"), description.get("slots", 1))


def packages() -> dict[str, str]:
    """Installed versions of `PACKAGES`; a package that is not there is left out.

    A CUDA build of torch names its CUDA in the version ("2.11.0+cu130").
    """
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def required_packages() -> list[str]:
    """Names of the packages that lbi needs, with those that it needs on a GPU."""
    lines = metadata.requires("lbi") or []
    wanted = [line for line in lines if "extra ==" not in line or "gpu" in line.partition("extra ==")[2]]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted]


@cache
def cpu_model() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use, which a container or a scheduler may have cut."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_per_slot(slots: int) -> int:
    """Cores that each of `slots` runs at the same time gets. Raises `InputError` where that is none."""
    share = cores() // slots
    if share == 0:
        raise InputError(
            "resources.slots", slots, f"is more than the {cores()} cores there are", "Each run needs a core of its own"
        )
    return share


def _shared(slots: int) -> dict[str, int]:
    """A machine that a run has to itself is described without `slots`: its env_id is as old as its results."""
    return {"cores": cores_per_slot(slots), **({"slots": slots} if slots > 1 else {})}


def memory_bytes() -> int:
    """Memory of the machine, or of the control group where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return total


@cache
def gpus() -> list[dict[str, Any]]:
    """Name, uuid, driver and memory of each NVIDIA GPU this process may use; an empty list where there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [] if named == "" else visible(_all_gpus(), named)


def capability() -> float | None:
    """Compute capability of the first GPU (9.0 for an H100); None where there is none or it is not told."""
    for card in gpus():
        try:
            return float(card["compute_capability"])
        except (KeyError, ValueError):
            return None
    return None


def visible(cards: list[dict[str, Any]], named: str | None) -> list[dict[str, Any]]:
    """The cards that CUDA_VISIBLE_DEVICES=`named` leaves, in its order; all of them for None.

    It names them by index or by (the beginning of) the uuid, and what follows a name that
    fits no card is hidden, as CUDA has it. An index counts as nvidia-smi does, which is
    CUDA's count where all cards are alike.
    """
    if named is None:
        return cards
    found: list[dict[str, Any]] = []
    for name in (part.strip() for part in named.split(",")):
        if name.startswith("MIG-") and cards:
            # nvidia-smi's list has whole cards only. A slice is known by its name alone.
            card: dict[str, Any] | None = {**cards[0], "uuid": name}
        elif name.isdigit():
            card = cards[int(name)] if int(name) < len(cards) else None
        else:
            card = next((card for card in cards if name and card["uuid"].startswith(name)), None)
        if card is None:
            break
        if card not in found:
            found.append(card)
    return found


def _all_gpus() -> list[dict[str, Any]]:
    query = "name,uuid,driver_version,memory.total,compute_cap"
    try:
        listed = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    cards = []
    for line in listed.splitlines():
        name, uuid, driver, memory, capability = (part.strip() for part in line.split(","))
        cards.append(
            {
                "name": name,
                "uuid": uuid,
                "driver": driver,
                "memory_bytes": int(float(memory)) * 2**20 if memory.replace(".", "").isdigit() else None,
                "compute_capability": capability,
            }
        )
    return cards


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of lbi's own checkout and a hash of its uncommitted changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    # An installed copy may lie inside some other repository; that one says nothing about lbi.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "diff", "HEAD", "--", str(folder)) or ""
    return {
        "commit": commit.strip(),
        "dirty": hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
