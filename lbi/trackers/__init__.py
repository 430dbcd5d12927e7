"""Trackers: where results are shown besides the store. Written from the store, never by a run."""

from __future__ import annotations

from lbi.config import TrackerConfig
from lbi.store import Store


def track(store: Store, sweep: str, config: TrackerConfig) -> str:
    """Hand the sweep's results to the tracker; one line about what became of them."""
    if config.kind == "none":
        return "Tracker: none"
    from lbi.trackers.wandb import track_in_process

    return track_in_process(store, sweep, config)
