"""A stand-in for a process that runs share: takes attempts as lbi.shared_run does, and does each by its script.

    python shared_child.py FIRST_FOLDER SCRIPTS        SCRIPTS: JSON, from workload.new_tokens to a script of child.py

`spoilt` ends well and says that the model cannot be used again; `leave` ends well, and the process with it; after
`late` the process ends as it is given the next run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import child


def attempt(folder: Path, scripts: dict[str, str]) -> bool:
    """Do one attempt; whether the process is to go on."""
    config = json.loads((folder / "config.json").read_text())
    script = scripts[str(config["config"]["workload"]["new_tokens"])]
    if script == "oom_if_shared":
        script = "oom" if config["isolation"].get("after") else "ok"
    # A verdict is written once, with all it says: the worker may read it at once.
    child.main(folder, "ok" if script in ("leave", "late") else script)
    if script == "late":
        sys.stdin.readline()
    if script in ("leave", "late"):
        os.kill(os.getpid(), signal.SIGTERM)
    return script != "spoilt"


def main(folder: Path, scripts: dict[str, str]) -> None:
    going = attempt(folder, scripts)
    while going:
        line = sys.stdin.readline()
        going = bool(line) and attempt(Path(line.rstrip("\n")), scripts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
