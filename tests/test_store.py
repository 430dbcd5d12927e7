"""The store loses nothing that was finished, mixes nothing up, and goes on past what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbi.errors import InputError
from lbi.files import BadFile, read_json, read_json_lines, write_json
from lbi.store import AlreadyRunning, Store, live_owner

ROOT = Path(__file__).parent.parent


def publish_ok(store: Store, run: str = "a" * 12, env: str = "e" * 12) -> Path:
    attempt = store.claim(run, env, {})
    write_json(attempt.folder / "metrics.json", {"schema": 1, "metrics": {}})
    store.publish(attempt, "ok", "", 1.0)
    return attempt.folder


def test_a_published_result_comes_back(store: Store) -> None:
    folder = publish_ok(store)
    result = store.result("a" * 12, "e" * 12)
    assert result is not None
    assert (result.ok, result.attempt, result.folder) == (True, 1, folder)
    assert store.result("a" * 12, "f" * 12) is None
    assert store.known_runs() == {"a" * 12}
    assert not store.problems


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "run_id": "other"}']
)
def test_a_damaged_status_is_reported_and_counts_as_absent(store: Store, content: str) -> None:
    folder = publish_ok(store)
    (folder.parent / "status.json").write_text(content)
    assert store.result("a" * 12, "e" * 12) is None
    assert [problem.path.name for problem in store.problems] == ["status.json"]


def test_a_good_status_without_metrics_counts_as_absent(store: Store) -> None:
    folder = publish_ok(store)
    (folder / "metrics.json").write_text('{"schema": 1, "metr')
    assert store.result("a" * 12, "e" * 12) is None
    (folder / "metrics.json").unlink()
    assert store.result("a" * 12, "e" * 12) is None
    assert len(store.problems) == 2


def test_binary_rubbish_and_foreign_files_do_not_stop_it(store: Store) -> None:
    publish_ok(store)
    (store.root / "runs" / "notes.txt").write_text("mine")
    (store.root / "runs" / ("a" * 12) / "stray").write_bytes(b"\xff\xfe")
    (store.root / "runs" / ("b" * 12) / "weird").mkdir(parents=True)
    (store.root / "runs" / ("b" * 12) / "weird" / "status.json").write_bytes(b"\xff\x00")
    assert [result.run_id for result in store.results("a" * 12)] == ["a" * 12]
    assert list(store.results("b" * 12)) == []
    assert len(store.problems) == 1


def test_a_later_attempt_is_not_overwritten_by_an_earlier_one(store: Store) -> None:
    """An attempt that was given up as lost and comes back must not replace what was measured since."""
    first = store.claim("a" * 12, "e" * 12, {})
    (first.folder / "outcome.json").write_text("{}")
    second = store.claim("a" * 12, "e" * 12, {})
    write_json(second.folder / "metrics.json", {"schema": 1, "metrics": {"x": 2}})
    store.publish(second, "ok", "", 1.0)
    store.publish(first, "crash", "late", 1.0)
    result = store.result("a" * 12, "e" * 12)
    assert result is not None
    assert (result.attempt, result.status) == (2, "ok")


def test_a_run_is_claimed_by_one_live_process_only(store: Store) -> None:
    attempt = store.claim("a" * 12, "e" * 12, {})
    with pytest.raises(AlreadyRunning, match=str(os.getpid())):
        store.claim("a" * 12, "e" * 12, {})
    assert store.running("a" * 12, "e" * 12) == attempt.folder
    store.publish(attempt, "cancelled", "", 0.0)
    assert store.claim("a" * 12, "e" * 12, {}).number == 2


def test_a_claim_whose_process_was_killed_is_free_again(store: Store) -> None:
    code = (
        "import os, sys; from lbi.store import Store; "
        "Store.open(sys.argv[1], write=True).claim('a' * 12, 'e' * 12, {}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.root)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert store.claim("a" * 12, "e" * 12, {}).number == 2


def test_a_claim_from_another_host_is_live_while_its_heart_beats(store: Store) -> None:
    attempt = store.claim("a" * 12, "e" * 12, {})
    claim = read_json(attempt.folder / "claim.json") or {}
    write_json(attempt.folder / "claim.json", {**claim, "host": "elsewhere"})
    assert live_owner(attempt.folder)
    long_ago = time.time() - 1000
    os.utime(attempt.folder / "claim.json", (long_ago, long_ago))
    assert live_owner(attempt.folder) is None
    (attempt.folder / "heartbeat").touch()
    assert live_owner(attempt.folder)


def test_what_an_attempt_came_to_is_published_by_the_next_if_its_process_did_not_get_to_it(store: Store) -> None:
    run, env = "a" * 12, "e" * 12
    for status in ("lost", "oom"):
        store.publish(store.claim(run, env, {}), status, "why", 1.0)
    (store.run_folder(run, env) / "status.json").unlink()
    assert store.result(run, env) is None
    assert store.claim(run, env, {}).number == 3
    found = store.result(run, env)
    assert found is not None
    assert (found.status, found.attempt) == ("oom", 2)


@pytest.mark.slow
def test_of_two_processes_that_claim_at_once_one_gets_it(store: Store) -> None:
    code = (
        "import sys, time\nfrom lbi.store import Store, AlreadyRunning\n"
        "store = Store.open(sys.argv[1], write=True)\n"
        "for i in range(40):\n"
        "    try:\n"
        "        print(i, store.claim(f'{i:012d}', 'e' * 12, {}).number, flush=True)\n"
        "    except AlreadyRunning:\n"
        "        pass\n"
        "print('tried all', flush=True)\n"
        "sys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen([sys.executable, "-c", code, str(store.root)], **pipes) for _ in range(2)]  # type: ignore[call-overload]
    # A claim is live as long as its process is, so neither ends before both have tried.
    lines = []
    for process in both:
        for line in process.stdout:
            if "tried all" in line:
                break
            lines.append(line.strip())
    for process in both:
        process.communicate("\n")
    assert sorted(lines) == sorted(f"{i} 1" for i in range(40))


def test_a_store_in_an_impossible_place_is_a_wrong_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/lbi-store")):
        with pytest.raises(InputError) as caught:
            Store.open(path, write=True)
        assert caught.value.field == "store.path"
        assert "LBI_STORE" in caught.value.way_out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_is_a_wrong_request(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="cannot be written"):
        Store.open(tmp_path / "store", write=True)


def test_a_store_of_another_schema_is_refused_and_a_damaged_marker_reported(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"schema": 2}')
    with pytest.raises(InputError, match="schema 2"):
        Store.open(tmp_path, write=False)
    (tmp_path / "store.json").write_text("?")
    assert len(Store.open(tmp_path, write=True).problems) == 1
    assert read_json(tmp_path / "store.json") == {"schema": 1, "kind": "lbi store"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"x": float("nan")})
    with pytest.raises(TypeError):
        write_json(file, {"x": object()})
    assert json.loads(file.read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_lines_that_are_not_objects_are_bad(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(BadFile, match="not a JSON object"):
        read_json_lines(file)
    with pytest.raises(BadFile, match="cannot be read"):
        read_json_lines(tmp_path / "none")


def test_writing_a_file_does_not_touch_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: slots that write at once could leave it at 0."""
    mask = os.umask(0)
    os.umask(mask)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    write_json(tmp_path / "file.json", {})
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o666 & ~mask
