"""Where lbi keeps what can be made again: converted models and compile caches.

Node-local and outside the store, which may be a network folder that many nodes share.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$LBI_CACHE, or lbi's folder in the user's cache folder."""
    given = os.environ.get("LBI_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lbi"


def compile_cache(env_id: str) -> Path:
    """The compile cache for one environment (kept_graphs.py); never shared between library versions or devices.

    In a SLURM job it lies on the node, unless $LBI_CACHE says where: a home folder there is
    usually a network folder, and concurrent writers corrupt each other's entries.
    """
    if os.environ.get("SLURM_JOB_ID") and not os.environ.get("LBI_CACHE"):
        return Path(tempfile.gettempdir()) / f"lbi-{os.getuid()}" / "inductor" / env_id
    return cache_folder() / "inductor" / env_id


def conf_folder() -> Path:
    """The folder of the config groups: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"
