"""Trackers: where results are shown besides the store. Written from the store, never by a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lbi.config import TrackerConfig
from lbi.store import Store


def track(store: Store, sweep: str, config: TrackerConfig) -> str:
    """Hand the sweep's results to the tracker; one line about what became of them."""
    if config.kind == "none":
        return "Tracker: none"
    from lbi.trackers.wandb import track_in_process

    return track_in_process(store, sweep, config)


def meanwhile(store: Store, sweep: str, config: TrackerConfig, measures_on_cpu: bool) -> AbstractContextManager[Any]:
    """While open, results are handed to the tracker as they come.

    Not beside a measurement on this machine's CPU: the tracker would take a share of what is measured.
    """
    if config.kind == "none" or config.inline_s is None or measures_on_cpu:
        return nullcontext()
    from lbi.trackers.wandb_inline import Inline

    return Inline(store, sweep, config)
