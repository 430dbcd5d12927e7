"""Text that carries units and results through variables and logs."""

from __future__ import annotations

import base64
import io
import os
import random
import tarfile
import zlib
from pathlib import Path

import pytest

from lbi import parcel
from lbi.parcel import Damaged


def make_files(folder: Path, size: int = 20_000) -> dict[str, Path]:
    folder.mkdir()
    (folder / "metrics.json").write_text('{"schema": 1}')
    (folder / "noise.bin").write_bytes(os.urandom(size))
    return {"metrics.json": folder / "metrics.json", "trace/noise.bin": folder / "noise.bin"}


def test_files_come_out_of_a_log_as_they_went_in(tmp_path: Path) -> None:
    files = make_files(tmp_path / "in")
    text = parcel.pack_files(files)
    sent = list(parcel.lines("result", "abc-def", text))
    assert len(sent) > 5
    assert all(len(line) < 3000 for line in sent)
    # Others print in between, and SkyPilot puts words before each line.
    log = "\n".join(f"(name, pid=1) {line}\nsomething else" for line in sent)
    received = parcel.read_log(log)
    assert received.of("result") == {"abc-def": text}
    assert received.broken == set()
    parcel.unpack_files(text, tmp_path / "out")
    for name, path in files.items():
        assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()


def test_lines_may_come_twice_and_in_any_order_but_not_be_missing_or_changed(tmp_path: Path) -> None:
    text = parcel.pack_files(make_files(tmp_path / "in"))
    sent = list(parcel.lines("result", "a-b", text))
    mixed = [*sent, *sent]
    random.shuffle(mixed)
    assert parcel.read_log("\n".join(mixed)).of("result") == {"a-b": text}
    for lost in (0, len(sent) // 2, len(sent) - 1):
        received = parcel.read_log("\n".join(sent[:lost] + sent[lost + 1 :]))
        assert received.parcels == {}
        assert received.broken == {("result", "a-b")}
    changed = sent[3][:-5] + ("AAAAA" if not sent[3].endswith("AAAAA") else "BBBBB")
    received = parcel.read_log("\n".join([*sent[:3], changed, *sent[4:]]))
    assert received.parcels == {}
    assert received.broken == {("result", "a-b")}


def test_the_last_whole_version_counts(tmp_path: Path) -> None:
    first, second = parcel.pack({"n": 1}), parcel.pack({"n": 2})
    log = "\n".join([*parcel.lines("result", "a-b", first), *parcel.lines("result", "a-b", second)])
    assert parcel.unpack(parcel.read_log(log).of("result")["a-b"]) == {"n": 2}


def test_notes_are_counted() -> None:
    log = "\n".join(["x " + parcel.note("begun", "aaa"), parcel.note("begun", "bbb"), parcel.note("begun", "aaa")])
    assert parcel.read_log(log).noted("begun") == {"aaa": 2, "bbb": 1}


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_no_file_is_written_outside_its_folder(tmp_path: Path, name: str) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("good"), io.BytesIO())
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(Damaged, match="no file inside"):
        parcel.unpack_files(base64.b64encode(zlib.compress(made.getvalue())).decode(), tmp_path / "in" / "deep")
    assert not list(tmp_path.rglob("outside"))
    assert not list(tmp_path.rglob("good"))


def test_links_are_refused(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(Damaged, match="no file inside"):
        parcel.unpack_files(base64.b64encode(zlib.compress(made.getvalue())).decode(), tmp_path)


@pytest.mark.parametrize("text", ["", "no base64!", "aGVsbG8=", parcel.pack({"a": 1})[:-8], "W10="])
def test_what_is_no_parcel_says_so(text: str) -> None:
    with pytest.raises(Damaged):
        parcel.unpack(text)


def test_a_parcel_that_unpacks_to_more_than_it_may_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = parcel.pack({"text": "x" * 100_000})
    monkeypatch.setattr(parcel, "MOST_UNPACKED", 50_000)
    with pytest.raises(Damaged, match="larger than"):
        parcel.unpack(text)
