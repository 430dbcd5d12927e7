"""What a run found, collected while it goes and written at its end into its attempt folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lbi.files import write_json
from lbi.process import Phases
from lbi.store import SCHEMA


class Record:
    """metrics, reasons for missing ones, what was really applied, raw samples, generated text."""

    def __init__(self, folder: Path, phases: Phases) -> None:
        self.folder, self.phases = folder, phases
        self.metrics: dict[str, float | None] = {}
        self.missing: dict[str, str] = {}
        self.effective: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.text: dict[str, Any] = {}
        self.first_call_s = 0.0
        self.last_warm_up_s = 0.0
        self.cost: dict[str, Any] = {}

    def write(self) -> None:
        """metrics.json is last: a folder that has it has everything."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name, phase in (("load_s", "load"), ("quantize_s", "quantize")):
            self.metrics.setdefault(name, self.phases.seconds.get(phase, 0.0))
        pq.write_table(pa.Table.from_pylist(self.samples), self.folder / "samples.parquet")
        write_json(self.folder / "effective.json", {"schema": SCHEMA, **self.effective})
        write_json(self.folder / "text.json", {"schema": SCHEMA, **self.text})
        write_json(
            self.folder / "metrics.json",
            {
                "schema": SCHEMA,
                "metrics": self.metrics,
                "missing": self.missing,
                "phases_s": self.phases.seconds,
            },
        )
