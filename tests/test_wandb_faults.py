"""What a W&B server can do to a sweep: refuse, fail, limit, hang, die at any moment.

Each time: the driver is not held up beyond its bound, no process is left, and what was missing is
written by the next call, once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.wandb_server import FakeWandb
from wandb_cases import config, offline_folders, processes_of, put_result, put_sweep

from lbi.store import Store
from lbi.trackers import meanwhile, track
from lbi.trackers.wandb_runs import of_sweep
from lbi.trackers.wandb_sweep_run import sweep_run_id

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def assert_whole(server: FakeWandb, store: Store, results: int, sweep: str = "survey") -> None:
    """Every result is one finished run with one point, and has its files."""
    runs = of_sweep(store, sweep)
    assert set(server.runs) == {run.id for run in runs} | {sweep_run_id(sweep)}
    assert len(runs) == results
    assert all(run.complete for run in server.runs.values())
    assert all(len(server.runs[run.id].history) == 1 for run in runs)
    assert set(server.artifacts("result")) == {f"result-{run.id}" for run in runs}
    assert (server.uncommitted, server.unknown, offline_folders(store)) == ([], [], [])


@pytest.mark.parametrize(
    ("operation", "status"),
    [
        pytest.param("CommitArtifact", 500, marks=pytest.mark.by_hand),
        pytest.param("PUT /artifacts", 500, marks=pytest.mark.by_hand),
        pytest.param("UpsertBucket", 500, marks=pytest.mark.by_hand),
        pytest.param("UpsertBucket", 429, marks=pytest.mark.by_hand),
        pytest.param("CreateArtifact", 429, marks=pytest.mark.by_hand),
        pytest.param("POST /files /file_stream", 500, marks=pytest.mark.by_hand),
        pytest.param("POST /files /file_stream", 429, marks=pytest.mark.by_hand),
    ],
)
def test_errors_that_pass_are_waited_out(
    server: FakeWandb, store: Store, home: Path, operation: str, status: int
) -> None:
    put_sweep(store, results=1)
    server.fail(operation, status, times=2)
    assert "1 run online" in track(store, "survey", config())
    assert_whole(server, store, 1)
    assert processes_of(home) == {}


@pytest.mark.by_hand
@pytest.mark.parametrize("operation", ["CommitArtifact", "CreateRunFiles"])
def test_errors_that_stay_are_bounded(server: FakeWandb, store: Store, home: Path, operation: str) -> None:
    put_sweep(store, results=2)
    server.fail(operation, 500, times=1000)
    started = time.monotonic()
    line = track(store, "survey", config(timeout_s=8.0))
    assert time.monotonic() - started < 12
    assert "not written" in line or "offline" in line
    assert processes_of(home) == {}
    server.forgive()
    assert "2 runs online" in track(store, "survey", config())
    assert_whole(server, store, 2)


@pytest.mark.slow
def test_a_server_that_dies_on_the_way(server: FakeWandb, store: Store, home: Path) -> None:
    put_sweep(store, results=4)
    lines: list[str] = []
    caller = threading.Thread(target=lambda: lines.append(track(store, "survey", config(timeout_s=10.0))))
    started = time.monotonic()
    caller.start()
    wait_for(lambda: len(server.runs) >= 2 and any(run.complete for run in list(server.runs.values())))
    with server.down():
        caller.join()
        took = time.monotonic() - started
        again = track(store, "survey", config())
    assert took < 20
    assert "online" in lines[0]
    assert "not written" in lines[0] or "offline" in lines[0]
    assert "offline" in again, "a server that is known to be away is not waited for"
    assert processes_of(home) == {}
    assert "4 runs online" in track(store, "survey", config())
    assert_whole(server, store, 4)


@pytest.mark.slow
def test_results_go_online_while_others_are_measured(server: FakeWandb, store: Store, home: Path) -> None:
    put_sweep(store, results=3)
    first, _, last = of_sweep(store, "survey")
    assert last.folder is not None
    (last.folder.parent / "status.json").unlink()
    with meanwhile(store, "survey", config(inline_s=0.2), measures_on_cpu=False):
        wait_for(lambda: first.id in server.runs and server.runs[first.id].complete)
        wait_for(lambda: len(server.artifacts("result")) == 2 and not processes_of(home))
        assert sweep_run_id("survey") not in server.runs, "it comes when the sweep is over"
        put_result(store, last.row["run_id"], "ok")
        wait_for(lambda: last.id in server.runs)
        started = time.monotonic()
    assert time.monotonic() - started < 3, "a sweep that ends does not wait for the writer"
    assert processes_of(home) == {}
    assert "3 runs online" in track(store, "survey", config())
    assert_whole(server, store, 3)


def test_a_sweep_goes_on_beside_a_server_that_hangs(server: FakeWandb, store: Store, home: Path) -> None:
    put_sweep(store, results=1)
    with server.hanging():
        with meanwhile(store, "survey", config(inline_s=0.1), measures_on_cpu=False):
            wait_for(lambda: any("wandb-core" in command for command in processes_of(home).values()))
            started = time.monotonic()
        assert time.monotonic() - started < 3
        assert processes_of(home) == {}
    assert offline_folders(store) == []


def test_nothing_is_written_beside_a_measurement_on_this_cpu(server: FakeWandb, store: Store) -> None:
    put_sweep(store, results=1)
    for changes, on_cpu in (({}, True), ({"inline_s": None}, False), ({"kind": "none"}, False)):
        with meanwhile(store, "survey", config(**{"inline_s": 0.01, **changes}), measures_on_cpu=on_cpu):
            time.sleep(0.1)
    with meanwhile(store, "survey", config(inline_s=0.01, mode="offline"), measures_on_cpu=False):
        time.sleep(0.1)
    assert server.connections == 0
    assert offline_folders(store) == []


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_process(server: FakeWandb, store: Store, home: Path) -> None:
    put_sweep(store, results=2)
    with server.hanging(about=of_sweep(store, "survey")[1].id):
        driver = subprocess.Popen([sys.executable, "-m", "lbi", "sync", "survey", "--store", str(store.root)])
        wait_for(lambda: len(server.artifacts("result")) == 1)
        assert any("wandb-core" in command for command in processes_of(home).values())
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        wait_for(lambda: processes_of(home) == {})
    assert "2 runs online" in track(store, "survey", config())
    assert_whole(server, store, 2)


@pytest.mark.by_hand
def test_two_hundred_results_twice(server: FakeWandb, store: Store, home: Path) -> None:
    put_sweep(store, results=200)
    settings = config(runs_per_minute=1e6, timeout_s=60.0)
    line = track(store, "survey", settings)
    for _ in range(20):
        if "200 runs online" in line:
            break
        line = track(store, "survey", settings)
    assert "200 runs online" in line
    assert_whole(server, store, 200)
    connections, versions = server.connections, server.versions
    assert track(store, "survey", settings) == line
    assert server.connections == connections
    assert max(number for name, number in versions.items() if name.startswith("result-")) == 1
    assert processes_of(home) == {}
