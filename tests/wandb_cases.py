"""What the tests of W&B share: results as lbi lays them out, and a look at what the writer leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fakes.wandb_server import FakeRun

from lbi.config import TrackerConfig
from lbi.files import write_json, write_json_lines, write_text
from lbi.store import Store
from lbi.trackers.wandb_process import MARK

ENV_ID = "e" * 12


def config(**changes: Any) -> TrackerConfig:
    return TrackerConfig(**{"name": "wandb", "kind": "wandb", "timeout_s": 60.0, **changes})


def put_result(
    store: Store, run_id: str, status: str, reason: str = "", attempt: int = 1, speed: float = 100.0
) -> None:
    """A result as lbi.store and lbi.run lay it out."""
    folder = store.run_folder(run_id, ENV_ID) / f"attempt-{attempt}"
    sections = {
        "model": {"name": "tiny", "source": "random", "path": None, "note": "for tests", "arch": {"hidden_size": 64}},
        "quantizer": {"name": "int4_wo", "bits": 4, "skip": ["lm_head", "embed"]},
        "store": {"path": str(store.root)},
    }
    write_json(folder / "config.json", {"schema": 1, "config": sections, "device_name": "Some CPU"})
    outcome = {"run_id": run_id, "env_id": ENV_ID, "status": status, "reason": reason, "attempt": attempt}
    outcome |= {"schema": 1, "host": "node7", "finished": 1.8e9, "seconds": 2.5}
    write_json(folder / "outcome.json", outcome)
    write_text(folder / "log.txt", "[12:00:00] load\n")
    write_text(folder / "heartbeat", "")
    if status == "ok":
        samples = [{"repetition": 0, "void": "", "idle_cpu": None, "token": i, "seconds": 0.125 * i} for i in range(3)]
        pq.write_table(pa.Table.from_pylist(samples), folder / "samples.parquet")
        text = {"prompt_tokens": 4, "tokens": [5, 6, 7], "text": "once upon a time"}
        write_json(folder / "text.json", {"schema": 1, **text})
        metrics = {"decode_tok_s": speed, "mean_kld": 0.015625, "compile_s": None, "repetitions": 5.0}
        write_json(folder / "metrics.json", {"schema": 1, "metrics": metrics, "missing": {"compile_s": "not compiled"}})
    write_json(folder.parent / "status.json", outcome)


def cell(index: int, run_id: str, verdict: str = "RUN", quantizer: str = "int4_wo", reason: str = "") -> dict[str, Any]:
    choices = {"model": "tiny", "engine": "hf", "quantizer": quantizer, "compiler": "eager", "decoding": "greedy"}
    return {
        "index": index,
        "name": f"{quantizer} eager {index}",
        "overrides": [f"quantizer={quantizer}"],
        "choices": choices | {"cache": "static", "workload": "chat"},
        "run_id": run_id,
        "env_id": ENV_ID if run_id else "",
        "verdict": verdict,
        "reason": reason,
        "rule": "some_rule" if verdict == "PRUNED" else "",
    }


def put_plan(store: Store, sweep: str, *cells: dict[str, Any]) -> None:
    write_json_lines(store.sweep_folder(sweep) / "plan.jsonl", [{"schema": 1, "sweep": sweep}, *cells])


def put_sweep(store: Store, sweep: str = "survey", results: int = 2) -> None:
    """A sweep of so many measured cells."""
    ids = [f"{i:012x}" for i in range(results)]
    for run_id in ids:
        put_result(store, run_id, "ok")
    put_plan(store, sweep, *(cell(i, run_id) for i, run_id in enumerate(ids)))


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if not path.is_symlink()}


def processes_of(home: Path) -> dict[int, str]:
    """Command lines of the writer and its helpers: they alone have this test's home folder and the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if f"HOME={home}".encode() in variables and any(item.startswith(MARK.encode()) for item in variables):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
    return found


def offline_folders(store: Store) -> list[Path]:
    return sorted((store.root / "wandb").glob("offline-run-*"))


def said(run: FakeRun) -> dict[str, Any]:
    """A run's summary without what the client adds, and without the names that it invents for table files."""
    plain = {key: value for key, value in run.summary.items() if not key.startswith("_")}
    return {key: value["sha256"] if isinstance(value, dict) else value for key, value in plain.items()}
