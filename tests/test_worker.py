"""Whatever a child does, its run ends with the right status and the runs after it go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbi import children, worker
from lbi.children import Started, Stop
from lbi.config import LbiConfig
from lbi.plan import Plan
from lbi.schedule import make_units
from lbi.store import Store
from lbi.worker import Event, Task, run_unit

CHILD = Path(__file__).parent / "fakes" / "child.py"


@pytest.fixture
def tasks(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Task]]:
    """Tasks whose children follow the given scripts, in order."""

    def made(*scripts: str, reference: str = "nothing", **resources: Any) -> list[Task]:
        lengths = ",".join(str(8 + number) for number in range(len(scripts)))
        cells = plan(f"workload.new_tokens={lengths}", "quality=off").cells
        found = [task for unit in make_units(cells) for task in unit.tasks]
        found = [replace(task, config=with_resources(task.config, **resources)) for task in found]
        by_run = dict(zip([task.config.workload.new_tokens for task in found], scripts, strict=True))

        def start(
            self: Any, module: str, folder: Path, log: Path, config: LbiConfig, caches: Path, own: Any = ()
        ) -> Started:
            script = reference if module == "lbi.reference" else by_run[config.workload.new_tokens]
            with log.open("a") as output:
                process = subprocess.Popen(
                    [sys.executable, str(CHILD), str(folder), script],
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            return Started(process, "a stand-in")

        monkeypatch.setattr(children.Starter, "start", start)
        return found

    return made


def with_resources(config: LbiConfig, **changes: Any) -> LbiConfig:
    return replace(config, resources=replace(config.resources, **changes))


def statuses(store: Store, tasks: list[Task]) -> list[str | None]:
    found = [store.result(task.run_id, task.env_id) for task in tasks]
    return [result.status if result else None for result in found]


def run(
    tasks: list[Task], store: Store, stop: Stop | None = None, look: Callable[[Event], object] = lambda event: None
) -> list[Event]:
    """Measure the tasks; `look` sees each event as it comes."""
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        look(event)

    run_unit(tasks, store, report, stop or Stop(), time.time())
    return events


def test_each_death_has_its_status_and_the_next_run_goes_on(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "oom", "exit", "segfault", "kill", "half", "ok")
    events = run(unit, store)
    assert statuses(store, unit) == ["ok", "oom", "crash", "crash", "crash", "crash", "ok"]
    reasons = [store.result(task.run_id, task.env_id).reason for task in unit]  # type: ignore[union-attr]
    assert reasons[1] == "no memory left"
    assert "exit code 9 in phase measure" in reasons[2]
    assert "SIGSEGV" in reasons[3]
    assert "SIGKILL" in reasons[4]
    assert [event.kind for event in events].count("end") == 7


def test_a_childs_phases_are_reported(tasks: Any, store: Store) -> None:
    events = run(tasks("slow"), store)
    assert [event.text for event in events if event.kind == "phase"] == ["measure"]


def test_a_kill_by_the_kernel_for_memory_is_oom(tasks: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(100))
    monkeypatch.setattr(children, "_oom_kills", lambda: next(counts))
    unit = tasks("kill", "segfault")
    run(unit, store)
    assert statuses(store, unit) == ["oom", "crash"]


def test_kills_for_memory_are_counted_where_they_are_ours(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert children._oom_kills(tmp_path) == 0
    write("proc/vmstat", "pgfault 5\noom_kill 7\n")
    assert children._oom_kills(tmp_path) == 7
    write("proc/self/cgroup", "4:cpu,memory:/old\n1:name=systemd:/x\n0::/job/step\n")
    assert children._oom_kills(tmp_path) == 7
    # Each is nearer to us than those before it.
    for count, file in enumerate(
        ("memory/memory.oom_control", "memory.events", "memory/old/memory.oom_control", "job/step/memory.events")
    ):
        write(f"sys/fs/cgroup/{file}", f"under_oom 9\noom_kill {count}\noom_group_kill 8\n")
        assert children._oom_kills(tmp_path) == count


def test_a_run_that_takes_too_long_is_a_timeout_even_if_it_resists(tasks: Any, store: Store) -> None:
    unit = tasks("hang", "stubborn", "ok", run_timeout_s=0.7, stop_grace_s=0.3)
    unit[2] = replace(unit[2], config=with_resources(unit[2].config, run_timeout_s=60))
    began = time.monotonic()
    run(unit, store)
    assert statuses(store, unit) == ["timeout", "timeout", "ok"]
    assert time.monotonic() - began < 100


def test_stopping_ends_the_current_run_and_keeps_what_is_finished(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "hang", "ok")
    stop = Stop()
    run(unit, store, stop, lambda event: stop.request() if (event.kind, event.task) == ("phase", unit[1]) else None)
    assert statuses(store, unit) == ["ok", "cancelled", None]
    # The next call runs what is missing.
    unit = tasks("ok", "ok", "ok")
    run(unit[1:], store)
    assert statuses(store, unit) == ["ok", "ok", "ok"]
    assert store.result(unit[1].run_id, unit[1].env_id).attempt == 2  # type: ignore[union-attr]


def test_a_second_request_to_stop_does_not_wait_for_grace(tasks: Any, store: Store) -> None:
    unit = tasks("stubborn", stop_grace_s=600)
    stop = Stop()

    def twice(event: Event) -> None:
        if event.kind == "phase":
            stop.request()
            threading.Timer(0.5, stop.request).start()

    began = time.monotonic()
    run(unit, store, stop, twice)
    assert time.monotonic() - began < 100
    assert statuses(store, unit) == ["cancelled"]


def test_nothing_that_a_child_started_outlives_it(tasks: Any, store: Store) -> None:
    unit = tasks("family")
    run(unit, store)
    folder = store.result(unit[0].run_id, unit[0].env_id).folder  # type: ignore[union-attr]
    grandchild = int((folder / "grandchild").read_text())
    deadline = time.monotonic() + 5
    while is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(grandchild)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_another_process_measures_is_awaited_and_not_measured_again(tasks: Any, store: Store) -> None:
    unit = tasks("slow", "ok")
    other = Store.open(store.root, write=True)
    seen: list[list[Event]] = [[], []]
    since = time.time()

    def drive(number: int, own: Store) -> None:
        run_unit(unit, own, seen[number].append, Stop(), since)

    threads = [threading.Thread(target=drive, args=(number, own)) for number, own in enumerate((store, other))]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    assert statuses(store, unit) == ["ok", "ok"]
    assert [len(store.attempts(task.run_id, task.env_id)) for task in unit] == [1, 1]
    assert any(event.kind == "wait" for events in seen for event in events)


def test_a_reference_that_fails_is_said_and_not_tried_again(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "ok")
    same = [replace(task, config=replace(task.config, workload=unit[0].config.workload)) for task in unit]
    events = run(same, store)
    assert [event.kind for event in events].count("reference") == 1


def test_two_drivers_that_begin_together_run_the_unquantized_model_once(
    tasks: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two units of one model, on two nodes: what one makes, the other waits for."""
    gate = tmp_path / "gate"
    monkeypatch.setenv("LBI_TEST_GATE", str(gate))
    unit = tasks("ok", "ok", reference="reference")
    same = [replace(task, config=replace(task.config, workload=unit[0].config.workload)) for task in unit]
    seen: list[list[Event]] = [[], []]
    stores = store, Store.open(store.root, write=True)

    def drive(number: int) -> None:
        def report(event: Event) -> None:
            seen[number].append(event)
            if event.kind == "wait":
                gate.touch()

        run_unit([same[number]], stores[number], report, Stop(), time.time())

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses(store, same) == ["ok", "ok"]
    kinds = [event.kind for events in seen for event in events]
    assert kinds.count("reference") == 1
    waited = [event.text for events in seen for event in events if event.kind == "wait"]
    # It may be seen between the folder of its claim and what is written there.
    assert waited
    assert set(waited) <= {
        f"{owner} is running the unquantized model"
        for owner in (f"process {os.getpid()} on {socket.gethostname()}", "a process that has just begun")
    }
    folders = [entry.name for entry in (store.root / "references").iterdir()]
    assert [name[:7] for name in folders] == ["greedy-"]


def test_the_workers_own_entry_point_runs_a_unit_file(
    plan: Callable[..., Plan], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert worker.main([str(tmp_path / "none.json")]) == 2
    (tmp_path / "bad.json").write_text("{")
    assert worker.main([str(tmp_path / "bad.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """The driver is killed outright: the kernel ends its child."""
    child = (
        "import time; from lbi.process import die_with_parent; "
        "die_with_parent(); print('up', flush=True); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], env={{**os.environ, 'LBI_PARENT': str(os.getpid())}},"
        " start_new_session=True, stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\nprint(p.pid, flush=True)\ntime.sleep(600)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    assert is_alive(pid)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
