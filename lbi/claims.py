"""One at a time for what several drivers would otherwise make at once, on this host or on others, through the store.

    <thing>.claim/      claim.json, heartbeat

Making the folder is the lock. A claim is live while its process lives (same host) or its heart beats (another
host), as that of an attempt is, so a maker that was killed holds nobody up. In the worst case, two that give up
a dead one's claim in the same moment, a thing is made twice: things appear by one rename, so no harm is done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lbi.files import BadFile, read_json, write_json
from lbi.store import live_owner, own_claim

POLL_S = 1.0


@contextlib.contextmanager
def claimed(
    things: Sequence[Path], give_up: Callable[[], bool], while_waiting: Callable[[str], object]
) -> Iterator[list[Path] | None]:
    """Have the making of all `things` to oneself while open; the heartbeats to touch meanwhile.

    None once `give_up` says so, which is asked about every second and when all are had. `while_waiting` is
    told about as often who has one of them.
    """
    with contextlib.ExitStack() as held:
        heartbeats: list[Path] = []
        # In one order for everybody, so that no two wait for each other.
        for thing in sorted(things):
            folder = thing.with_name(f"{thing.name}.claim")
            while not give_up() and (owner := _take(folder, held)):
                while_waiting(owner)
                for heartbeat in heartbeats:
                    with contextlib.suppress(OSError):
                        heartbeat.touch()
                time.sleep(POLL_S)
            heartbeats.append(folder / "heartbeat")
        yield None if give_up() else heartbeats


def _take(folder: Path, held: contextlib.ExitStack) -> str | None:
    """Claim a folder until `held` closes; who has it, if somebody does."""
    claim = own_claim()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            owner = live_owner(folder)
            if owner is not None:
                return owner
            with contextlib.suppress(FileNotFoundError):
                _clear(folder)
        try:
            folder.mkdir()
        except FileExistsError:
            return "a process that has just begun"
        held.callback(_release, folder, claim)
        write_json(folder / "claim.json", claim)
    except OSError as error:
        # Of a full disk whoever makes the thing will have more to say; nobody is kept from trying.
        print(f"{folder.name}: nobody can be told that this is being made: {error}", flush=True)
    return None


def _clear(folder: Path) -> None:
    """Take away the claim of a process that is gone. A rename, which one of several succeeds with.

    Raises `OSError` for the others.
    """
    away = folder.with_name(f".{folder.name}-{os.getpid()}-{time.monotonic_ns()}")
    folder.rename(away)
    if live_owner(away) is not None:
        # Somebody had cleared it before, and has claimed it since, and may have made the folder anew by writing to it.
        with contextlib.suppress(OSError):
            away.rename(folder)
    shutil.rmtree(away, ignore_errors=True)


def _release(folder: Path, claim: dict[str, Any]) -> None:
    with contextlib.suppress(BadFile):
        if read_json(folder / "claim.json") in (claim, None):
            shutil.rmtree(folder, ignore_errors=True)
