"""A stand-in for a measuring process: does what its folder's name of a script says, without torch.

    python child.py FOLDER SCRIPT

The worker sees what it would see of a real one: progress, a verdict, metrics, or a death.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def write(folder: Path, name: str, **content: object) -> None:
    """Write a file as a run does: whole or not at all, for whoever reads it meanwhile."""
    temporary = folder / f".{name}.{os.getpid()}"
    temporary.write_text(json.dumps({"schema": 1, **content}))
    temporary.replace(folder / name)


def fill_the_disk(folder: Path) -> None:
    with (folder.parents[3] / "filler").open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def good(folder: Path, **said: str) -> None:
    write(folder, "metrics.json", metrics={"decode_tok_s": 10.0, "tpot_s": 0.1, "mean_kld": 0.0}, missing={})
    write(folder, "verdict.json", status="ok", reason="", **said)


def wait_for_gate() -> None:
    """Until the test opens it; a test that fails may never do."""
    end = time.monotonic() + 600
    while not Path(os.environ["LBI_TEST_GATE"]).exists() and time.monotonic() < end:
        time.sleep(0.1)


def meet(hall: Path, wanted: int) -> None:
    """Wait until so many children are there at once, or long enough to know that they will not be."""
    hall.mkdir(exist_ok=True)
    (hall / str(os.getpid())).touch()
    deadline = time.monotonic() + 20
    while len(list(hall.iterdir())) < wanted and time.monotonic() < deadline:
        time.sleep(0.02)


def main(folder: Path, script: str) -> None:
    if script == "stubborn":
        # Before it is known to be there.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write(folder, "progress.json", phase="measure", since=time.time())
    if script.endswith("_once"):
        # Only the first attempt at a run misbehaves.
        script = script.removesuffix("_once") if folder.name == "attempt-1" else "ok"
    if script == "ok":
        good(folder)
    elif script == "spoilt":
        good(folder, spoilt="a weight was written to")
    elif script == "slow":
        time.sleep(1.0)
        good(folder)
    elif script == "place" or script.startswith("meet"):
        began = time.monotonic()
        meet(folder.parents[3] / "met", int(script.removeprefix("meet"))) if script != "place" else time.sleep(0.3)
        place = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        write(folder, "place.json", **place, cores=cores, began=began, ended=time.monotonic())
        good(folder)
    elif script == "reference":
        if "LBI_TEST_GATE" in os.environ:
            wait_for_gate()
        else:
            time.sleep(0.3)
        request = json.loads((folder / "request.json").read_text())
        Path(request["greedy"]).mkdir(parents=True)
    elif script == "hang":
        time.sleep(600)
    elif script == "gate":
        wait_for_gate()
        good(folder)
    elif script == "stubborn":
        time.sleep(600)
    elif script == "oom":
        write(folder, "verdict.json", status="oom", reason="no memory left")
        sys.exit(1)
    elif script == "exit":
        os._exit(9)
    elif script == "raise":
        raise RuntimeError("the child does not like this")
    elif script == "memory":
        held = bytearray(1200 * 2**20)
        for position in range(0, len(held), 4096):
            held[position] = 1
        time.sleep(60)
    elif script == "murder":
        # The worker is the parent: its job ends, and nothing is published.
        os.kill(os.getppid(), signal.SIGKILL)
    elif script == "fill":
        fill_the_disk(folder)
    elif script.startswith("sleep"):
        time.sleep(float(script.removeprefix("sleep")))
        good(folder)
    elif script == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif script == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif script == "half":
        (folder / "verdict.json").write_text('{"schema": 1, "stat')
        sys.exit(1)
    elif script == "family":
        # Leaves a grandchild behind that would go on for ever.
        if os.fork() == 0:
            (folder / "grandchild.new").write_text(str(os.getpid()))
            (folder / "grandchild.new").replace(folder / "grandchild")
            time.sleep(600)
        while not (folder / "grandchild").exists():
            time.sleep(0.01)
        good(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
