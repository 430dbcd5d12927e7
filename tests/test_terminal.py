"""What the terminal shows while several slots run."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lbi.report import terminal
from lbi.store import Store


def event(kind: str, cell: int, slot: int, text: str = "") -> Any:
    result = SimpleNamespace(ok=False, status="crash", reason="for show", seconds=1.0) if kind == "end" else None
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
