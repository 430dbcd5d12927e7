"""What the terminal shows: while several slots run, and at the end."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lbi.collect import NO_FUSION, metric_columns
from lbi.ranking import tables
from lbi.report import terminal
from lbi.store import Store


def event(kind: str, cell: int, slot: int, text: str = "") -> Any:
    ended = SimpleNamespace(ok=False, status="crash", reason="for show", seconds=1.0, folder=Path("nowhere"))
    result = ended if kind == "end" else None
    task = SimpleNamespace(cell=cell, name=f"name{cell}")
    return SimpleNamespace(kind=kind, task=task, text=text, result=result, slot=slot)


@pytest.fixture
def live(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A display of 40 runs; what it prints is in `.out.file`."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    monkeypatch.setattr(terminal, "console", lambda: console)
    with terminal.Live(40, store, "sweep") as made:
        yield made


def test_the_moving_line_shows_every_slot(live: Any) -> None:
    def line(*events: Any) -> str:
        for one in events:
            live.report(one)
        return str(live.progress.tasks[0].description)

    assert line(event("start", 1, 0), event("phase", 1, 0, "measure")) == "name1: measure"
    assert line(event("start", 2, 1), event("phase", 2, 1, "load")) == "2 running: name1 (measure), name2 (load)"
    assert line(event("wait", 3, 2, "GPU x is used")).startswith("3 running: ")
    assert line(event("end", 3, 0)) == "name2: load"
    assert line(event("end", 2, 1)) == ""


def test_events_of_several_threads_do_not_mix(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    update = live.progress.update

    def slow(*arguments: Any, **changes: Any) -> None:
        update(*arguments, **changes)
        time.sleep(0.001)

    monkeypatch.setattr(live.progress, "update", slow)

    def work(slot: int) -> None:
        for cell in range(slot * 10, slot * 10 + 10):
            for kind in ("start", "phase", "end"):
                live.report(event(kind, cell, slot, "measure"))

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = [line for line in live.out.file.getvalue().splitlines() if "crash" in line]
    assert [line.split()[0] for line in ended] == [f"[{number}/40]" for number in range(1, 41)]
    assert sorted(line.split()[1] for line in ended) == sorted(f"name{cell}:" for cell in range(40))


def test_a_row_that_unpacks_whole_weights_is_tagged_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"decode_tok_s": 4.7, "bytes_per_token": 163e6, "unpacked_bytes_per_token": 212.3e6}
    shared = {**dict.fromkeys(metric_columns()), "status": "ok", "model": "m", "workload": "w"}
    shared |= dict.fromkeys(("engine", "quantizer", "compiler", "decoding", "cache", "overrides"), "")
    rows = [shared | {"cell": 0, "name": "none", "run_id": "a", "flags": [], "decode_tok_s": 9.0}]
    rows.append(shared | {"cell": 1, "name": "fp8_wo", "run_id": "b", "flags": [NO_FUSION]} | numbers)
    out = Console(file=io.StringIO(), width=250, highlight=False)
    (table,) = tables(rows, "none", 0.05)
    terminal._show_table(out, table, {"notes": {}})
    text = out.file.getvalue()
    assert "fp8_wo (weight-only without fusion)" in text
    assert "none (baseline)" in text
    assert (
        "Weight-only without fusion: the decode step of fp8_wo writes 212.3 MB of unpacked weights per token beside "
        "the 163.0 MB it would have to read." in text
    )


def test_a_long_table_shows_the_fastest_and_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "SHOWN_CELLS", 5)
    shared = {**dict.fromkeys(metric_columns()), "status": "ok", "model": "m", "workload": "w", "flags": []}
    shared |= dict.fromkeys(("engine", "quantizer", "compiler", "decoding", "cache", "overrides"), "")
    rows = [
        shared | {"cell": cell, "name": f"cell{cell}", "run_id": "a", "decode_tok_s": 9.0 - cell} for cell in range(8)
    ]
    rows += [
        shared | {"cell": 10 + cell, "name": f"lost{cell}", "status": "oom", "reason": "none left"} for cell in range(7)
    ]
    out = Console(file=io.StringIO(), width=250, highlight=False)
    (table,) = tables(rows, "cell7", 0.05)
    terminal._show_table(out, table, {"notes": {}})
    text = out.file.getvalue()
    assert [cell for cell in range(8) if f"  cell{cell} " in text] == [0, 1, 2, 3, 7]
    assert "... and 3 slower ones; the report has them all" in text
    assert "7 cells, of which the first 5:" in text
    assert [cell for cell in range(7) if f"lost{cell}" in text] == [0, 1, 2, 3, 4]
