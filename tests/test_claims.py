"""What several drivers would make at once is made by one, and a dead one holds nobody up."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lbi import claims
from lbi.claims import claimed
from lbi.store import own_claim


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 0.01)


def never() -> bool:
    return False


def claim_of_another(thing: Path, **other: Any) -> Path:
    """A claim that another process has left on `thing`."""
    folder = thing.with_name(f"{thing.name}.claim")
    folder.mkdir(parents=True)
    (folder / "claim.json").write_text(json.dumps({**own_claim(), **other}))
    (folder / "heartbeat").touch()
    return folder


def test_of_many_that_want_a_thing_one_makes_it(tmp_path: Path) -> None:
    things = [tmp_path / "b", tmp_path / "a"]
    makers: list[int] = []

    def want(number: int) -> None:
        asked = things if number % 2 else things[::-1]
        with claimed(asked, lambda: all(thing.exists() for thing in things), lambda owner: None) as heartbeats:
            if heartbeats is not None:
                assert [heartbeat.parent.name for heartbeat in heartbeats] == ["a.claim", "b.claim"]
                makers.append(number)
                time.sleep(0.1)
                for thing in things:
                    thing.mkdir()

    threads = [threading.Thread(target=want, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_one_that_failed_leaves_it_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed([tmp_path / "a"], never, print):
        raise RuntimeError
    with claimed([tmp_path / "a"], never, print) as heartbeats:
        assert heartbeats == [tmp_path / "a.claim" / "heartbeat"]


@pytest.mark.parametrize("other", [{"start_ticks": 1}, {"host": "elsewhere"}], ids=["here", "elsewhere"])
def test_the_claim_of_a_process_that_is_gone_is_taken_over(other: dict[str, Any], tmp_path: Path) -> None:
    folder = claim_of_another(tmp_path / "a", **other)
    for name in ("claim.json", "heartbeat"):
        os.utime(folder / name, (time.time() - 500,) * 2)
    with claimed([tmp_path / "a"], never, print) as heartbeats:
        assert heartbeats
        assert json.loads((folder / "claim.json").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_on_another_host_lives_while_its_heart_beats(tmp_path: Path) -> None:
    folder = claim_of_another(tmp_path / "a", host="elsewhere", pid=7)
    os.utime(folder / "claim.json", (time.time() - 500,) * 2)
    told: list[str] = []
    with claimed([tmp_path / "a"], lambda: len(told) == 3, told.append) as heartbeats:
        assert heartbeats is None
    assert told == ["process 7 on elsewhere"] * 3
    assert folder.exists()


def test_a_claim_that_was_taken_over_meanwhile_is_not_given_back(tmp_path: Path) -> None:
    with claimed([tmp_path / "a"], never, print):
        (tmp_path / "a.claim" / "claim.json").write_text(json.dumps({**own_claim(), "pid": 1}))
    assert (tmp_path / "a.claim").exists()


def test_a_claim_made_since_it_was_found_dead_is_put_back(tmp_path: Path) -> None:
    folder = claim_of_another(tmp_path / "a")
    claims._clear(folder)
    assert (folder / "claim.json").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_claim_that_was_made_anew_meanwhile_stays_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = claim_of_another(tmp_path / "a")

    def owner(away: Path) -> str:
        """Its owner writes to the claim just as it is moved away."""
        (folder / "claim.json").parent.mkdir()
        (folder / "claim.json").write_text("{}")
        return "process 7"

    monkeypatch.setattr(claims, "live_owner", owner)
    claims._clear(folder)
    assert (folder / "claim.json").read_text() == "{}"
    assert list(tmp_path.iterdir()) == [folder]


def test_where_no_claim_can_be_made_the_thing_is_made_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with claimed([tmp_path / "file" / "a"], never, print) as heartbeats:
        assert heartbeats is not None
    assert "nobody can be told" in capsys.readouterr().out
