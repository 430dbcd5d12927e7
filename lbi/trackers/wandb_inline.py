"""Results to W&B while the sweep is still running, so that it can be watched from elsewhere.

The same writer as at the end, called now and then, with the lowest priority and only online. What
goes wrong is left to the end; when the sweep ends, a writer that is at work is ended at once.
"""

from __future__ import annotations

import threading
from types import TracebackType

from lbi.config import TrackerConfig
from lbi.store import Store
from lbi.trackers.wandb import write_meanwhile

LONGEST_PAUSE_S = 3600.0
"""After a failure the pause doubles, up to this."""


class Inline:
    """While open, writes new results every `tracker.inline_s` seconds in a thread of its own."""

    def __init__(self, store: Store, sweep: str, config: TrackerConfig) -> None:
        self.store, self.sweep, self.config = store, sweep, config
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go, name="wandb", daemon=True)

    def __enter__(self) -> Inline:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _go(self) -> None:
        usual = pause = self.config.inline_s or LONGEST_PAUSE_S
        while not self._stop.wait(pause):
            # A store of its own: what this thread could not read is no news to the driver's.
            went_well = write_meanwhile(Store(self.store.root), self.sweep, self.config, self._stop)
            pause = usual if went_well else min(2 * pause, max(usual, LONGEST_PAUSE_S))
