"""Files that are either whole or absent.

Everything lbi writes is read by another process, perhaps after a crash: a write
goes to a temporary name and is renamed. Reading never raises for bad content;
it says what is wrong, so that one damaged file does not stop a sweep.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def _umask() -> int:
    # The only portable way to read it is to set it; the value is put back at once.
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _umask()
"""Read once, at import: it belongs to the process, and two threads reading it could leave it at 0 between them."""


class BadFile(Exception):
    """A file that exists and cannot be used; `reason` is for a person."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically and durably."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value` as JSON. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by one JSON object a line."""
    write_text(path, "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows))


def read_json(path: Path, schema: int | None = None) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no file.

    Raises `BadFile` for what is not a JSON object, or has another `schema`.
    """
    try:
        # A report of a thousand cells reads nine thousand files, and a buffer is a third of what reading one takes.
        with open(path, "rb", buffering=0) as file:
            value = json.loads(file.read().decode())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"cannot be read ({error})") from error
    except ValueError as error:
        raise BadFile(path, f"is not whole JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadFile(path, "is not a JSON object")
    if schema is not None and value.get("schema") != schema:
        raise BadFile(path, f"has schema {value.get('schema')!r}, this lbi reads {schema}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of `path`, a line each. Raises `BadFile` as `read_json` does, and where there is no file."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"cannot be read ({error})") from error
    except ValueError as error:
        raise BadFile(path, f"is not whole JSON ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise BadFile(path, "holds a line that is not a JSON object")
    return rows
