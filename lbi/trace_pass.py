"""A run once more, not measured, for the traces that would have disturbed it.

    python -m lbi.trace_pass ATTEMPT_FOLDER/trace

A process of its own, started by the worker after the run, with what torch must find in its environment. It loads,
quantizes, compiles and generates as the run did; where that fails, what was recorded until then is kept, for this is
what it is for.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from lbi import compile_trace, memory_snapshot, tracing
from lbi.config import LbiConfig
from lbi.files import read_json
from lbi.process import Phases, die_with_parent, prepare
from lbi.record import Record
from lbi.store import SCHEMA
from lbi.typed import build


def main(folder: Path) -> None:
    """Take the traces that `request.json` in `folder` names, of the attempt that the folder is in."""
    die_with_parent()
    attempt = folder.parent
    asked = read_json(folder / "request.json", SCHEMA) or {}
    request = read_json(attempt / "config.json", SCHEMA) or {}
    config, phases = build(LbiConfig, request["config"]), Phases(attempt, "trace: ")
    with phases("import"):
        prepare(config)
    found: dict[str, dict[str, Any]] = {}
    memory = memory_snapshot.Recorder(folder)
    failed = ""
    try:
        _generate(config, request, asked["traces"], memory, found, phases)
    except Exception as error:
        traceback.print_exc()
        failed = f"{type(error).__name__}: {error}".splitlines()[0]
    if "memory" in asked["traces"] and memory.found:
        found["memory"] = memory.found
    if "compile" in asked["traces"]:
        found["compile"] = compile_trace.read(attempt / tracing.COMPILE)
    for trace in asked["traces"]:
        about = found.setdefault(trace, {"missing": f"the pass that takes it failed: {failed}"})
        if failed and "missing" not in about:
            about["failed"] = failed
    tracing.add(attempt, found)


def _generate(
    config: LbiConfig,
    request: dict[str, Any],
    traces: list[str],
    memory: memory_snapshot.Recorder,
    found: dict[str, dict[str, Any]],
    phases: Phases,
) -> None:
    """What the run did, up to a whole generation, with the recorders on."""
    from lbi import steps
    from lbi.run import make_ready

    scratch = Record(memory.folder, phases)
    if "memory" in traces:
        memory.start()
    ready = make_ready(config, request, scratch, phases, checked=False)
    steps.warm_up(config, ready.engine, ready.prompt, scratch, phases)
    if "memory" in traces:
        with phases("memory"):
            ready.engine.generate(ready.prompt, config.workload.new_tokens, seed=config.decoding.seed or 0)
            memory.take(memory_snapshot.AT_THE_END)
            memory.stop()
    if "kernels" in traces:
        with phases("kernels"):
            found["kernels"] = {
                **steps.traced_steps(config, ready.engine, ready.prompt, memory.folder),
                "blocking": True,
            }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
