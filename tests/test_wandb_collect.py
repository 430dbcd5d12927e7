"""Results from W&B on a machine that has none, with the real client against a loopback server."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from fakes.wandb_server import FakeWandb
from wandb_cases import ENV_ID, cell, config, processes_of, put_plan, put_result, put_sweep

from lbi import verbs
from lbi.collect import rows
from lbi.errors import InputError
from lbi.files import write_bytes, write_text
from lbi.store import Store
from lbi.trackers import track
from lbi.trackers.wandb_runs import of_sweep


def contents(folder: Path) -> dict[str, bytes]:
    own = ("wandb.json", "heartbeat")
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in own]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_results_come_back_as_they_were(
    server: FakeWandb, store: Store, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_result(store, "a" * 12, "ok", attempt=3)
    put_result(store, "b" * 12, "oom", "needs 20 GiB of 16")
    put_plan(
        store, "survey", cell(0, "a" * 12), cell(1, "b" * 12), cell(2, "", "PRUNED", reason="no"), cell(3, "c" * 12)
    )
    write_bytes(store.run_folder("a" * 12, ENV_ID) / "attempt-3" / "trace" / "trace.json.gz", gzip.compress(b"{}"))
    assert "3 runs online" in track(store, "survey", config())

    other = tmp_path / "other" / "store"
    assert verbs.run("collect", ["survey", "--from-wandb", "--store", str(other)]) == 0
    assert "2 results fetched, 0 in the store already" in capsys.readouterr().out
    assert server.unknown == []
    there = Store.open(other, write=False)
    assert contents(other / "runs") == contents(store.root / "runs")
    wanted = [row | {"folder": ""} for row in rows(store, "survey")]
    assert [row | {"folder": ""} for row in rows(there, "survey")] == wanted
    assert there.problems == []
    assert (other / "sweeps" / "survey" / "results.csv").is_file()

    assert verbs.run("collect", ["survey", "--from-wandb", "--store", str(other)]) == 0
    assert "0 results fetched, 2 in the store already" in capsys.readouterr().out
    assert processes_of(home) == {}


@pytest.mark.by_hand
def test_what_is_here_is_kept_and_what_was_begun_is_left_alone(server: FakeWandb, store: Store, tmp_path: Path) -> None:
    put_sweep(store, results=2)
    assert "2 runs online" in track(store, "survey", config())
    first, second = of_sweep(store, "survey")
    other = Store.open(tmp_path / "other", write=True)
    put_result(other, first.row["run_id"], "ok", speed=7.0)
    begun = other.run_folder(second.row["run_id"], ENV_ID) / "attempt-1"
    write_text(begun / "log.txt", "begun here")
    assert verbs.run("collect", ["survey", "--from-wandb", "--store", str(other.root)]) == 0
    table = rows(other, "survey")
    assert [(row["decode_tok_s"], row["attempt"]) for row in table] == [(7.0, 1), (100.0, 2)]
    assert contents(begun) == {"log.txt": b"begun here"}


@pytest.mark.slow
def test_what_cannot_be_had_is_said(
    server: FakeWandb, store: Store, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ["--from-wandb", "--store", str(tmp_path / "other")]
    with pytest.raises(InputError, match="Add --from-wandb"):
        verbs.run("collect", ["survey", "--project", "mine"])
    with pytest.raises(InputError, match="--timeout-s=inf: is not a number above 0"):
        verbs.run("collect", ["survey", "--timeout-s", "inf", *other])
    with pytest.raises(InputError, match="whole name"):
        verbs.run("collect", other)
    with pytest.raises(InputError, match=r"no_such.*rtifact"):
        verbs.run("collect", ["no_such", *other])
    with server.hanging():
        with pytest.raises(InputError, match="took longer than 4 s"):
            verbs.run("collect", ["survey", "--timeout-s", "4", *other])
        assert processes_of(home) == {}
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(InputError, match="no API key"):
        verbs.run("collect", ["survey", *other])
    assert os.listdir(tmp_path / "other") == ["store.json"]
