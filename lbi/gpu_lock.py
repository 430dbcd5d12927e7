"""One run at a time on a GPU, whoever starts it: a file lock per GPU that all users of the machine share.

Two sweeps on one GPU would each measure the other. The kernel gives the lock back when
the process that holds it ends, however it ends, so a killed driver blocks nothing; the file
stays, since removing it would let two processes lock two files of one name.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from lbi.errors import InputError


class GpuLock:
    """The lock of the GPU with this uuid. Every instance is a holder of its own, also within one process."""

    def __init__(self, uuid: str) -> None:
        self.path = Path(tempfile.gettempdir()) / f"lbi-gpu-{uuid.replace('/', '_')}.lock"
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Take the lock if nobody has it; whether it is held now.

        Raises `InputError` where the file is another user's and closed to this one.
        """
        if self._handle is None:
            self._handle = self._locked()
            if self._handle is not None:
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, f"process {os.getpid()} of user {os.getuid()}".encode(), 0)
        return self._handle is not None

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def is_free(self) -> bool:
        """Whether nobody has the lock at this moment."""
        handle = self._locked()
        if handle is not None:
            os.close(handle)
        return handle is not None

    def owner(self) -> str:
        """Who held the lock last, by their own word."""
        try:
            return self.path.read_text(errors="replace").strip() or "another process"
        except OSError:
            return "another process"

    def _locked(self) -> int | None:
        handle = self._open()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def _open(self) -> int:
        while True:
            try:
                # Without O_CREAT, which Linux refuses for another user's file in a folder like /tmp.
                return os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                self._create()
            except OSError as error:
                raise InputError(
                    "resources.gpus", self.path, f"this lock cannot be opened ({error.strerror})", "Set TMPDIR"
                ) from error

    def _create(self) -> None:
        """Under its name only once every user may open it."""
        handle, scratch = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            os.fchmod(handle, 0o666)
            os.link(scratch, self.path)
        except FileExistsError:
            return
        finally:
            os.close(handle)
            os.unlink(scratch)
