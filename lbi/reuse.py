"""Which stored result may stand for a cell on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lbi import environment
from lbi.config import LbiConfig
from lbi.store import Result, Store

UNFINISHED = frozenset({"preempted", "lost", "cancelled"})
"""Statuses that say nothing about the setting: the run is simply missing."""


class Reuse:
    """Looks results up; asks the file system once which runs exist at all."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.known = store.known_runs()

    def find(self, run_id: str, env_id: str, config: LbiConfig) -> Result | None:
        """The result to reuse under the config's `sweep.reuse`, or None.

        Results that merely ended (`UNFINISHED`) do not count.
        """
        if run_id not in self.known:
            return None
        level = config.sweep.reuse
        if level in ("exact", "same_versions"):
            result = self.store.result(run_id, env_id)
            candidates = [result] if result else []
        else:
            candidates = list(self.store.results(run_id))
        accept = self._acceptable(config)
        usable = [result for result in candidates if result.status not in UNFINISHED and accept(result)]
        # This machine's own result comes first, then a good one, then the newest.
        return max(usable, key=lambda result: (result.env_id == env_id, result.ok, result.finished), default=None)

    def deserves_another(self, result: Result) -> bool:
        """A crash may have been the machine's fault, so it is tried twice; nothing else is."""
        if result.status != "crash":
            return False
        outcomes = self.store.attempts(result.run_id, result.env_id)
        return len([outcome for outcome in outcomes if outcome["status"] == "crash"]) < 2

    def _acceptable(self, config: LbiConfig) -> Callable[[Result], bool]:
        if config.sweep.reuse == "exact":
            state = environment.git_state()
            return lambda result: bool(self._recorded(result).get("git") == state)
        if config.sweep.reuse == "same_gpu":
            device = config.engine.device
            here = _hardware(environment.describe(config.resources.slots), device)
            return lambda result: _hardware(self._recorded(result), device) == here
        return lambda result: True

    def _recorded(self, result: Result) -> dict[str, Any]:
        return self.store.read(result, "env.json") or {}


def _hardware(description: dict[str, Any], device: str) -> tuple[Any, ...]:
    cards = [card["name"] for card in description.get("gpus") or []]
    if device == "cuda" and cards:
        return (cards[0],)
    return (description.get("cpu"), description.get("cores"), description.get("slots", 1))
