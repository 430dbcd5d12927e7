"""Where lbi keeps what can be made again: converted models and compile caches.

Node-local and outside the store, which may be a network folder that many nodes share.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LBI_CACHE, or lbi's folder in the user's cache folder."""
    given = os.environ.get("LBI_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lbi"


def compile_cache(env_id: str) -> Path:
    """Inductor's cache for one environment; never shared between library versions or devices."""
    return cache_folder() / "inductor" / env_id


def conf_folder() -> Path:
    """The folder of the config groups: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"
