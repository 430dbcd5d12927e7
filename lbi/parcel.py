"""Text that carries what a machine without a shared folder needs, or has made: through a variable or a log.

A parcel is JSON or files, compressed, in letters that any shell, YAML or log leaves alone. In a
log it is cut into lines, each of which says which part it is: log streams cut long lines, put
words before them, and lose some.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

LINE = 2400
"""Letters of a parcel in one line of a log: container runtimes cut lines at 16 KB, terminals and shippers at 4."""

MOST_UNPACKED = 64 * 2**20
"""A parcel that claims to be larger than this is damaged or hostile."""

MARK = "lbi-parcel"
PART = re.compile(rf"{MARK} (\w+) (\S+) (\d+)/(\d+) ([0-9a-f]{{16}}) ([A-Za-z0-9+/=]*)")
"""Anywhere in a line: kind, name, number, how many, sum of the whole, letters."""

NOTE = re.compile(r"lbi-note (\w+) (\S+)")


class Damaged(ValueError):
    """Text that is no whole parcel."""


def pack(value: Mapping[str, Any]) -> str:
    """A JSON object as text."""
    return _text(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def unpack(text: str) -> dict[str, Any]:
    """The object that `pack` made text of. Raises `Damaged`."""
    try:
        value = json.loads(_bytes(text))
    except ValueError as error:
        raise Damaged(f"is no parcel ({error})") from error
    if not isinstance(value, dict):
        raise Damaged("holds no JSON object")
    return value


def pack_files(files: Mapping[str, Path]) -> str:
    """Files by the names that they are to have, as text."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, path in files.items():
            content = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return _text(made.getvalue())


def unpack_files(text: str, folder: Path) -> None:
    """Write the files of a parcel below `folder`. Raises `Damaged`, also for a name that leads elsewhere."""
    try:
        with tarfile.open(fileobj=io.BytesIO(_bytes(text)), mode="r") as tar:
            members = tar.getmembers()
            for member in members:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.is_absolute() or ".." in path.parts:
                    raise Damaged(f"holds {member.name!r}, which is no file inside its folder")
            for member in members:
                content = tar.extractfile(member)
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read() if content else b"")
    except (tarfile.TarError, EOFError) as error:
        raise Damaged(f"is no parcel ({error})") from error


def lines(kind: str, name: str, text: str) -> Iterator[str]:
    """A parcel as lines of a log. `name` has no space."""
    total = sum_of(text)
    parts = [text[start : start + LINE] for start in range(0, len(text), LINE)] or [""]
    for number, part in enumerate(parts, 1):
        yield f"{MARK} {kind} {name} {number}/{len(parts)} {total} {part}"


def note(kind: str, name: str) -> str:
    """A line of a log that says one thing about `name`."""
    return f"lbi-note {kind} {name}"


def sum_of(text: str) -> str:
    """What a parcel is known by."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(slots=True)
class Received:
    """What a log has in it so far: whole parcels and notes, by kind and name, the last of each."""

    parcels: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: dict[tuple[str, str], int] = field(default_factory=dict)
    broken: set[tuple[str, str]] = field(default_factory=set)
    """Parcels that are there in part, or whose sum is wrong."""

    def of(self, kind: str) -> dict[str, str]:
        """The parcels of a kind, by name."""
        return {name: text for (found, name), text in self.parcels.items() if found == kind}

    def noted(self, kind: str) -> dict[str, int]:
        """How often each name was noted so."""
        return {name: count for (found, name), count in self.notes.items() if found == kind}


def read_log(log: str) -> Received:
    """Everything that a log has in it. A parcel that was sent twice is one; of two versions the last whole one."""
    received = Received()
    parts: dict[tuple[str, str, str], dict[int, str]] = {}
    for line in log.splitlines():
        found = PART.search(line)
        if found:
            kind, name, number, count, total, letters = found.groups()
            have = parts.setdefault((kind, name, total), {})
            have[int(number)] = letters
            if len(have) == int(count):
                text = "".join(have[key] for key in sorted(have))
                if sum_of(text) == total:
                    received.parcels[kind, name] = text
            continue
        noted = NOTE.search(line)
        if noted:
            key = (noted[1], noted[2])
            received.notes[key] = received.notes.get(key, 0) + 1
    received.broken = {(kind, name) for kind, name, _ in parts} - set(received.parcels)
    return received


def _text(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _bytes(text: str) -> bytes:
    try:
        engine = zlib.decompressobj()
        content = engine.decompress(base64.b64decode(text, validate=True), MOST_UNPACKED)
        if not engine.eof:
            raise Damaged("ends too early, or is larger than a parcel may be")
    except (binascii.Error, zlib.error) as error:
        raise Damaged(f"is no parcel ({error})") from error
    return content
