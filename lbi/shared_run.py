"""Runs in turn in one process, which keeps the loaded and quantized model (resources.isolation=shared_load).

    python -m lbi.shared_run ATTEMPT_FOLDER        (later folders on stdin, one a line)

Started by the worker, which claims each attempt before it names it here, and takes the verdict that appears in its
folder for the end of the run. Each run has its own log, record and verdict. One that ends otherwise than well ends
the process; so does the end of stdin.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lbi import run
from lbi.process import die_with_parent

if TYPE_CHECKING:
    from lbi.shared_model import Shared


def main(folder: Path) -> int:
    """Run the attempt in `folder` and those that follow; 0 if all ended with a number."""
    die_with_parent()
    _shared.cache_clear()
    if run.attempt(folder, _shared):
        return 1
    # Not sys.stdin: a forked process has that of its parent.
    with os.fdopen(0) as later:
        for line in later:
            folder = Path(line.rstrip("\n"))
            _log_into(folder / "log.txt")
            if run.attempt(folder, _shared):
                return 1
    return 0


@cache
def _shared() -> Shared:
    """The model of this process, made once torch has been imported."""
    from lbi.shared_model import Shared

    return Shared()


def _log_into(file: Path) -> None:
    """Have everything that is said from now on in this file, by libraries of C too."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
