"""What torch.compile made, from the log that torch writes under TORCH_TRACE: in short here, as pages by tlparse.

The log has each graph before and after inductor's passes, the code it became, guards, and why a frame was compiled
again. tlparse is a program of its own (pip install tlparse); without it the log is kept, to be read anywhere later.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGES = "pages"
TLPARSE_S = 120.0
WITHOUT = "there are no pages: tlparse is not installed (pip install tlparse; tlparse LOG)"

OF_A_GRAPH = {
    "graphs": "dynamo_output_graph",
    "made_by_inductor": "inductor_output_code",
    "recompiled": "recompile_reasons",
}
"""What is counted, by the name that torch's log gives each."""


def read(folder: Path) -> dict[str, Any]:
    """What there is of the log in `folder`, or why there is none."""
    logs = sorted(folder.glob("*.log"))
    if not logs:
        return {"missing": "torch wrote no log under TORCH_TRACE"}
    seen: Counter[str] = Counter()
    for log in logs:
        with log.open(errors="replace") as lines:
            seen.update(entries(lines))
    home = folder.parent.parent
    found: dict[str, Any] = {"file": logs[0].relative_to(home).as_posix(), "logs": len(logs)}
    found |= {name: seen[entry] for name, entry in OF_A_GRAPH.items()}
    why = _pages(logs[0], folder / PAGES)
    return found | (
        {"pages": f"{folder.relative_to(home).as_posix()}/{PAGES}/index.html"} if not why else {"note": why}
    )


def entries(lines: Iterable[str]) -> Iterable[str]:
    """The names of a log's entries; what belongs to one is indented, and graphs have the name of their artifact."""
    for line in lines:
        _, bracket, text = line.partition("] {")
        if not bracket or line.startswith("\t"):
            continue
        try:
            entry = json.loads("{" + text)
        except ValueError:
            continue
        for name, about in entry.items():
            yield str(about.get("name", name)) if name == "artifact" and isinstance(about, dict) else str(name)


def _pages(log: Path, target: Path) -> str:
    """Have tlparse make pages; why there are none, if so."""
    beside = Path(sys.executable).with_name("tlparse")
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which("tlparse")
    if program is None:
        return WITHOUT
    command = [program, str(log), "-o", str(target), "--overwrite", "--no-browser"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TLPARSE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"tlparse made no pages: {error}"
    return "" if (target / "index.html").exists() else f"tlparse made no pages: {_last(done.stderr)}"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
