"""Which stored result may stand for a cell on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lbi import environment
from lbi.config import LbiConfig
from lbi.sites import Site
from lbi.store import UNFINISHED, Result, Store


class Reuse:
    """Looks results up; asks the file system once which runs exist at all."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.known = store.known_runs()

    def find(self, run_id: str, site: Site, config: LbiConfig) -> Result | None:
        """The result to reuse under the config's `sweep.reuse` for a cell that would run at `site`, or None.

        Results that merely ended (`UNFINISHED`) do not count.
        """
        if run_id not in self.known:
            return None
        level = config.sweep.reuse
        if level in ("exact", "same_versions"):
            found = [self.store.result(run_id, env_id) for env_id in site.env_ids]
            candidates = [result for result in found if result]
        else:
            candidates = list(self.store.results(run_id))
        accept = self._acceptable(config, site)
        usable = [result for result in candidates if result.status not in UNFINISHED and accept(result)]
        # This machine's own result comes first, then a good one, then the newest.
        return max(usable, key=lambda result: (result.env_id in site.env_ids, result.ok, result.finished), default=None)

    def deserves_another(self, result: Result) -> bool:
        """A crash may have been the machine's fault, so it is tried twice; nothing else is."""
        if result.status != "crash":
            return False
        outcomes = self.store.attempts(result.run_id, result.env_id)
        return len([outcome for outcome in outcomes if outcome["status"] == "crash"]) < 2

    def _acceptable(self, config: LbiConfig, site: Site) -> Callable[[Result], bool]:
        if config.sweep.reuse == "exact":
            state = environment.git_state()
            return lambda result: bool(self._recorded(result).get("git") == state)
        if config.sweep.reuse == "same_gpu":
            device = config.engine.device
            return lambda result: environment.hardware(self._recorded(result), device) in site.hardware
        return lambda result: True

    def _recorded(self, result: Result) -> dict[str, Any]:
        return self.store.read(result, "env.json") or {}
