"""Imported by every Python process of a cluster test: jobs then start stand-in children and import no torch.

LBI_TEST_SCRIPTS says what the child of a cell does, by the cell's workload.new_tokens: "8=ok,9=exit".
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent.parent / "child.py"


def install() -> None:
    from lbi import children

    scripts = dict(item.split("=") for item in os.environ["LBI_TEST_SCRIPTS"].split(",") if item)

    def start(self: Any, module: str, folder: Path, log: Path, config: Any, caches: Path) -> children.Started:
        script = "nothing" if module == "lbi.reference" else scripts.get(str(config.workload.new_tokens), "ok")
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", str(CHILD), str(folder), script],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return children.Started(process, "a stand-in")

    children.Starter.start = start  # type: ignore[method-assign]


if "LBI_TEST_SCRIPTS" in os.environ:
    # Some other program's Python does not see lbi.
    with contextlib.suppress(ImportError):
        install()
