"""The W&B tracker, with the real wandb client against a loopback server.

What matters: W&B says what the store says, a second call costs nothing, and nothing that a
server or a network does holds up the driver or leaves a process behind.
"""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes.wandb_server import KEY, FakeWandb
from wandb_cases import (
    ENV_ID,
    cell,
    config,
    files,
    offline_folders,
    processes_of,
    put_plan,
    put_result,
    put_sweep,
    said,
)

from lbi.files import write_bytes, write_json_lines, write_text
from lbi.store import Store
from lbi.trackers import track, wandb_process
from lbi.trackers.wandb_access import Access, key_sources, may_be_online_now, unreachable
from lbi.trackers.wandb_files import VIEWED
from lbi.trackers.wandb_runs import MAX_TAG, Ledger, of_sweep
from lbi.trackers.wandb_sweep_run import sweep_run_id
from lbi.trackers.wandb_writer import Pace


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def assert_no_key(store: Store) -> None:
    found = [file for file in store.root.rglob("*") if file.is_file()]
    assert len(found) > 10
    assert [file for file in found if KEY.encode() in file.read_bytes()] == []


def put_every_kind(store: Store) -> None:
    put_result(store, "a" * 12, "ok", speed=123.5)
    put_result(store, "b" * 12, "oom", "needs 20 GiB of 16")
    put_plan(
        store,
        "survey",
        cell(0, "a" * 12),
        cell(1, "b" * 12, quantizer="none"),
        cell(2, "c" * 12, "PRUNED", "hqq4", "hqq4 needs a group size"),
        cell(3, "", "PRUNED", reason="there is no such knob"),
        cell(4, "a" * 12, "DUPLICATE", reason="the same setting as cell 0"),
        cell(5, "d" * 12),
    )


@pytest.mark.slow
def test_online_says_what_the_store_says(server: FakeWandb, store: Store, home: Path, tmp_path: Path) -> None:
    put_every_kind(store)
    line = track(store, "survey", config())

    assert f"4 runs online at {server.url}/team/lbi" in line
    assert server.unknown == []
    measured, failed = server.runs[f"{'a' * 12}-{ENV_ID}"], server.runs[f"{'b' * 12}-{ENV_ID}"]
    pruned = {run.summary["reason"]: run for name, run in server.runs.items() if name.startswith("pruned-")}
    assert set(pruned) == {"hqq4 needs a group size", "there is no such knob"}
    whole = server.runs.pop(sweep_run_id("survey"))
    assert len(server.runs) == 4, "duplicates and cells without a result are no runs"
    for run in server.runs.values():
        assert (run.fields["groupName"], run.fields["jobType"], run.complete) == ("survey", "bench", True)
        assert "sweep:survey" in run.fields["tags"]
    assert (whole.fields["groupName"], whole.fields["jobType"], whole.complete) == ("survey", "report", True)

    expected = {"decode_tok_s": 123.5, "mean_kld": 0.015625, "repetitions": 5, "status": "ok", "attempt": 1}
    said = {key: value for key, value in measured.summary.items() if not key.startswith("_")}
    samples, generated = server.table(measured.id, "samples"), server.table(measured.id, "generated")
    assert {said.pop(name)["_type"] for name in ("samples", "generated")} == {"table-file"}
    assert said == {**expected, "host": "node7", "mean_kld_plotted": 0.015625}, "no metric that is None"
    assert samples["columns"] == ["repetition", "void", "token", "seconds"]
    assert samples["data"] == [[0, "", 0, 0.0], [0, "", 1, 0.125], [0, "", 2, 0.25]]
    assert generated["data"] == [[4, 3, "once upon a time"]]
    assert [point["decode_tok_s"] for point in measured.history] == [123.5]
    assert measured.fields["displayName"] == "int4_wo eager 0"
    assert set(measured.fields["tags"]) == {"tiny", "int4_wo", "hf", "greedy", "static", "ok"} | {
        "sweep:survey",
        "Some CPU",
    }
    wanted = {"sweep": "survey", "quantizer": "int4_wo", "quantizer_bits": 4, "quantizer_skip": "lm_head embed"}
    wanted |= {"model": "tiny", "model_arch_hidden_size": 64, "device": "Some CPU", "run_id": "a" * 12}
    assert wanted.items() <= measured.config.items()
    assert not {"model_path", "model_note", "store_path"} & set(measured.config)

    assert (failed.summary["status"], failed.summary["reason"]) == ("oom", "needs 20 GiB of 16")
    assert "decode_tok_s" not in failed.summary
    assert (failed.exit_code, measured.exit_code) == (1, 0)
    cut = pruned["hqq4 needs a group size"]
    assert (cut.summary["status"], cut.config["rule"], cut.config["quantizer"]) == ("pruned", "some_rule", "hqq4")
    assert cut.exit_code == 0

    sent = b"".join(server.bodies)
    assert files(home) == {}, "nothing is left in the home folder"
    for secret in (KEY, str(tmp_path), str(Path.cwd()), os.path.expanduser("~")):
        assert secret.encode() not in sent
        assert not any(secret.encode() in file.read_bytes() for file in store.root.rglob("wandb.json"))


@pytest.mark.slow
def test_nothing_new_costs_nothing(server: FakeWandb, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_every_kind(store)
    first = track(store, "survey", config())
    before, connections = files(store.root), server.connections
    with monkeypatch.context() as patch:
        forbid_processes(patch)
        assert track(store, "survey", config()) == first
    assert (files(store.root), server.connections) == (before, connections)
    versions = server.versions

    put_result(store, "d" * 12, "ok")
    server.bodies.clear()
    assert "5 runs online" in track(store, "survey", config())
    begun = [body for body in server.bodies if b"mutation UpsertBucket" in body]
    assert any(b"d" * 12 in body for body in begun)
    assert not any(b"a" * 12 in body for body in begun), "what was written is not written again"
    again = {name for name, number in server.versions.items() if number > versions.get(name, 0)}
    assert {name.split("-")[0] for name in again if "d" * 12 not in name} <= {"report", "run"}


@pytest.mark.slow
def test_offline_without_a_key(server: FakeWandb, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    put_every_kind(store)
    line = track(store, "survey", config())

    assert line.startswith(f"W&B: 4 runs offline under {store.root / 'wandb'} (no API key")
    assert "wandb sync" in line
    assert len(offline_folders(store)) == 4
    assert all(list(folder.glob("run-*.wandb")) for folder in offline_folders(store))
    assert server.connections == 0
    before = files(store.root)
    with monkeypatch.context() as patch:
        forbid_processes(patch)
        assert track(store, "survey", config()) == line
    assert files(store.root) == before

    # A key appears: the same runs go online, and their offline folders, uploaded beside them, would say it twice.
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert "4 runs online" in track(store, "survey", config())
    assert set(server.runs) == {run.id for run in of_sweep(store, "survey")} | {sweep_run_id("survey")}
    assert offline_folders(store) == []
    assert len(server.artifacts("result")) == 2, "nothing was lost offline"
    assert_no_key(store)


@pytest.mark.by_hand
def test_what_was_uploaded_by_hand_gets_its_files(
    server: FakeWandb, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sweep(store)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "2 runs offline" in track(store, "survey", config(mode="online"))
    assert server.connections == 0
    monkeypatch.delenv("WANDB_MODE")
    folders = [str(folder) for folder in offline_folders(store)]
    subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], check=True, capture_output=True, timeout=60)
    assert len(server.runs) == 2
    assert server.artifacts("result") == {}
    assert "2 runs online" in track(store, "survey", config())
    assert len(server.artifacts("result")) == 2
    for run in of_sweep(store, "survey"):
        assert [point["decode_tok_s"] for point in server.runs[run.id].history] == [100], "its point is not said twice"
    assert offline_folders(store) == []


def test_no_server_means_offline(home: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    put_sweep(store)
    line = track(store, "survey", config())
    assert "2 runs offline" in line
    assert "Connection refused" in line
    with monkeypatch.context() as patch:
        forbid_processes(patch)
        assert track(store, "survey", config()) == line


def test_online_only_does_not_fall_back(server: FakeWandb, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_sweep(store)
    monkeypatch.delenv("WANDB_API_KEY")
    line = track(store, "survey", config(mode="online"))
    assert line.startswith("W&B: 2 runs not written (no API key")
    assert not (store.root / "wandb").exists()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.fail("UpsertBucket", 401, times=1000)
    line = track(store, "survey", config(mode="online"))
    assert "2 runs not written (CommError" in line
    assert not (store.root / "wandb").exists()


@pytest.mark.by_hand
def test_a_server_that_refuses_means_offline_for_now(server: FakeWandb, store: Store) -> None:
    put_sweep(store)
    server.fail("UpsertBucket", 401, times=1)
    line = track(store, "survey", config())
    assert "2 runs offline" in line
    assert "CommError" in line
    assert "2 runs online" in track(store, "survey", config())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.slow
def test_a_hanging_server_is_bounded_and_leaves_no_process(server: FakeWandb, store: Store, home: Path) -> None:
    put_sweep(store, results=2)
    assert "2 runs online" in track(store, "survey", config())
    put_sweep(store, results=3)
    last = of_sweep(store, "survey")[-1].id
    lines: list[str] = []
    seen: dict[int, str] = {}
    with server.hanging(about=last):
        started = time.monotonic()
        caller = threading.Thread(target=lambda: lines.append(track(store, "survey", config(timeout_s=15.0))))
        caller.start()
        while caller.is_alive():
            seen |= processes_of(home)
            time.sleep(0.1)
        took = time.monotonic() - started
    assert took < 25
    assert any("wandb-core" in command for command in seen.values()), "the helper was there to be left behind"
    assert processes_of(home) == {}
    assert "2 runs online" in lines[0]
    assert "1 run not written (took longer than tracker.timeout_s=15)" in lines[0]

    server.bodies.clear()
    assert "3 runs online" in track(store, "survey", config())
    assert server.runs[last].complete
    begun = [body for body in server.bodies if b"mutation UpsertBucket" in body]
    others = [run.id for run in of_sweep(store, "survey") if run.id != last]
    assert any(last.encode() in body for body in begun)
    assert not any(run.encode() in body for body in begun for run in others), "only the one that was missing"
    assert processes_of(home) == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_helper_in_its_own_session_is_ended(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = tmp_path / "writer"
    writer.write_text(f"#!/bin/sh\nsetsid sleep 300 &\necho $! > {tmp_path}/helper\nsleep 300\n")
    writer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(writer))
    assert wandb_process.run_bounded("writer", [], tmp_path, seconds=5.0) is None
    assert (tmp_path / "helper").read_text().strip().isdigit()
    assert processes_of(home) == {}


@pytest.mark.slow
def test_a_run_lives_on_in_other_sweeps_and_attempts(server: FakeWandb, store: Store) -> None:
    put_sweep(store, "first", results=1)
    track(store, "first", config())
    run = server.runs[f"{'0' * 12}-{ENV_ID}"]

    put_plan(store, "second", cell(7, "0" * 12))
    (again,) = of_sweep(store, "second")
    assert Ledger(store, "first", config()).state(again) == "online"
    assert Ledger(store, "second", config()).state(again) == "", "W&B does not know that it is part of this sweep too"
    put_result(store, "0" * 12, "crash", "exit code 1", attempt=2)
    assert "1 run online" in track(store, "second", config())
    assert (run.fields["groupName"], run.fields["displayName"]) == ("first", "int4_wo eager 0")
    assert {"sweep:first", "sweep:second", "crash"} <= set(run.fields["tags"])
    assert (run.summary["status"], run.summary["attempt"]) == ("crash", 2)
    assert "decode_tok_s" not in run.summary, "a number of the attempt before"

    put_result(store, "0" * 12, "ok", attempt=3, speed=77.0)
    track(store, "first", config())
    assert (run.summary["status"], run.summary["decode_tok_s"], "reason" in run.summary) == ("ok", 77, False)
    assert [point["decode_tok_s"] for point in run.history] == [100, 77], "an attempt with numbers is a point"
    assert [found for found in server.runs.values() if found.fields["jobType"] == "bench"] == [run]
    assert server.versions[f"result-{run.id}"] == 3


def test_disabled_by_the_environment(server: FakeWandb, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_sweep(store)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    forbid_processes(monkeypatch)
    assert track(store, "survey", config()) == "W&B: off (WANDB_MODE=disabled)"


def test_a_sweep_without_results(home: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_plan(store, "survey", cell(0, "d" * 12))
    forbid_processes(monkeypatch)
    assert track(store, "survey", config()) == "W&B: no results to write yet"


def test_a_writer_that_fails_is_a_line(server: FakeWandb, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_sweep(store)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    line = track(store, "survey", config())
    assert "2 runs not written (exit code 1" in line
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "not everything was written" in track(store, "survey", config())


def test_long_names_fit_a_tag(store: Store) -> None:
    put_sweep(store, results=1)
    (run,) = of_sweep(store, "survey")
    tags = run.tags(["s" * 200, "s" * 200])
    assert max(map(len, tags)) == MAX_TAG
    assert len(tags) == len(set(tags))


def test_whether_to_ask_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def last(kind: str) -> Access:
        return Access("offline", kind, "", "http://127.0.0.1:1", key_sources())

    assert may_be_online_now(None)
    assert may_be_online_now(last("refused"))
    assert not may_be_online_now(last("no_network"))
    keyless = last("no_key")
    assert not may_be_online_now(keyless)
    (home / ".netrc").write_text("machine example.org login user password secret\n")
    assert may_be_online_now(keyless)


def test_a_name_that_is_not_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(*args: Any, **kwargs: Any) -> socket.socket:
        time.sleep(30.0)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", stuck)
    started = time.perf_counter()
    assert "does not answer within 0.1 s" in str(unreachable("https://wandb.example", seconds=0.1))
    assert time.perf_counter() - started < 10


def test_a_proxy_is_the_first_hop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    for url in ("https://wandb.example", "https://inside.example", "http://wandb.example:81", "https://127.0.0.1:9"):
        assert unreachable(url) is None
    assert asked == [("proxy.example", 3128), ("inside.example", 443), ("wandb.example", 81), ("127.0.0.1", 9)]


@pytest.mark.slow
def test_artifacts_hold_the_files_of_the_store(server: FakeWandb, store: Store, tmp_path: Path) -> None:
    put_sweep(store)
    (first, second) = of_sweep(store, "survey")
    assert first.folder is not None
    trace = b'{"traceEvents": []}'
    write_bytes(first.folder / "trace" / "trace.json.gz", gzip.compress(trace))
    write_bytes(first.folder / "trace" / "memory.pickle", b"x" * 2_000)
    write_bytes(first.folder / "trace" / "huge.bin", b"x" * 60_000)
    write_text(store.sweep_folder("survey") / "report.html", "<p>the report</p>")
    assert "2 runs online" in track(store, "survey", config(max_file_mb=0.05))
    assert server.unknown == []
    assert server.uncommitted == []

    results = server.artifacts("result")
    assert set(results) == {f"result-{first.id}", f"result-{second.id}"}
    kept = results[f"result-{first.id}"].files
    assert set(kept) == {"config.json", "outcome.json", "metrics.json", "samples.parquet", "text.json", "log.txt"}
    assert all(content == (first.folder / name).read_bytes() for name, content in kept.items())

    (traced,) = server.artifacts("profile").values()
    assert set(traced.files) == {"trace/trace.json.gz", "trace/memory.pickle", f"trace/trace{VIEWED}"}
    assert traced.files[f"trace/trace{VIEWED}"] == trace
    link = f"{server.url}/team/lbi/artifacts/profile/trace-{first.id}/v0/files/trace/trace{VIEWED}"
    said = server.runs[first.id].summary
    assert (said["trace"], said["not_attached"]) == (link, "larger than 0.05 MB: trace/huge.bin")

    whole = server.runs[sweep_run_id("survey")]
    assert whole.summary["report"]["_type"] == "html-file"
    assert b"<p>the report</p>" in whole.files[whole.summary["report"]["path"]]
    assert (whole.summary["cells"], whole.summary["cells_ok"]) == (2, 2)
    assert "Fastest" in whole.summary["answers"]
    results_table = server.table(whole.id, "results")
    rows = [dict(zip(results_table["columns"], row, strict=True)) for row in results_table["data"]]
    assert [row["run"] for row in rows] == [f"{server.url}/team/lbi/runs/{run.id}" for run in (first, second)]
    assert [row["trace"] for row in rows] == [link, ""]
    assert [row["decode_tok_s"] for row in rows] == [100.0, 100.0]
    assert rows[0]["is_baseline"] is True
    (sweep,) = server.artifacts("sweep").values()
    assert set(sweep.files) == {"plan.jsonl", "report.html", "results.csv", "results.parquet", "results.json"}


@pytest.mark.by_hand
def test_fewer_files_on_request(server: FakeWandb, store: Store) -> None:
    put_sweep(store, results=1)
    (run,) = of_sweep(store, "survey")
    assert run.folder is not None
    write_bytes(run.folder / "trace" / "trace.json.gz", gzip.compress(b"{}"))
    header = {"schema": 1, "sweep": "survey", "command": "python -m lbi model.path=/home/me/model"}
    write_json_lines(store.sweep_folder("survey") / "plan.jsonl", [header, cell(0, run.row["run_id"])])
    write_text(store.sweep_folder("survey") / "report.html", "/home/me/model")
    track(store, "survey", config(files="none"))
    assert (server.artifacts("result"), server.artifacts("sweep")) == ({}, {})
    assert b"/home/me" not in b"".join(server.bodies)
    track(store, "survey", config(files="results"))
    assert len(server.artifacts("result")) == 1
    assert server.artifacts("profile") == {}
    track(store, "survey", config())
    assert len(server.artifacts("profile")) == 1
    connections = server.connections
    track(store, "survey", config(files="none"))
    assert server.connections == connections, "what is attached stays attached"


@pytest.mark.slow
def test_offline_then_moved_then_synced_loses_nothing(
    server: FakeWandb, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sweep(store)
    (run, _) = of_sweep(store, "survey")
    assert run.folder is not None
    write_bytes(run.folder / "trace" / "trace.json.gz", gzip.compress(b"{}"))
    track(store, "survey", config(mode="offline"))
    assert len(offline_folders(store)) == 2
    assert_no_key(store)
    elsewhere = tmp_path / "elsewhere" / "store"
    elsewhere.parent.mkdir()
    store.root.rename(elsewhere)
    moved = Store.open(elsewhere, write=True)
    assert "2 runs online" in track(moved, "survey", config())
    assert (len(server.artifacts("result")), len(server.artifacts("profile"))) == (2, 1)
    assert (server.uncommitted, server.unknown, offline_folders(moved)) == ([], [], [])


@pytest.mark.slow
def test_two_machines_say_it_once(server: FakeWandb, store: Store, tmp_path: Path) -> None:
    put_sweep(store)
    copy = tmp_path / "copy"
    shutil.copytree(store.root, copy)
    track(store, "survey", config())
    first = {name: (run.config, said(run), run.history) for name, run in server.runs.items()}
    versions = server.versions
    track(Store.open(copy, write=True), "survey", config())
    assert {name: (run.config, said(run), run.history) for name, run in server.runs.items()} == first
    assert server.versions == versions


def test_the_pace() -> None:
    pace = Pace(per_minute=3.0)
    assert [pace.wait_s(10.0) for _ in range(3)] == [0, 0, 0]
    assert pace.wait_s(10.0) == pytest.approx(20)
    assert pace.wait_s(30.0) == pytest.approx(20), "the one before was written at 30"
    assert pace.wait_s(1000.0) == 0
