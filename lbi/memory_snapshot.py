"""The CUDA allocator's history as a snapshot: who holds how much, and what happened until then.

The file is torch's own format, the only one that its viewer (pytorch.org/memory_viz, which reads it in the browser)
opens: a pickle, which nothing in lbi ever reads. What it says in short goes into effective.json.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "memory_snapshot.pickle"

MOST_EVENTS = 100_000
"""Allocations and frees that are kept, the latest; some hundred bytes each with their Python stack."""

LISTED = 10

AT_THE_END = "after a generation"
AT_OOM = "at the allocation that failed"


class Recorder:
    """Records from `start` on; `found` is what the last snapshot says, empty while there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, Any] = {}

    def start(self) -> None:
        """Begin, and have a snapshot taken at the moment an allocation fails: soon after, what was held is freed."""
        import torch

        torch.cuda.init()
        torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")
        torch._C._cuda_attach_out_of_memory_observer(lambda *_: self.take(AT_OOM))

    def take(self, when: str) -> None:
        """Write a snapshot, in place of an earlier one."""
        import torch

        self.folder.mkdir(exist_ok=True)
        scratch = self.folder / f".{FILE}-{os.getpid()}"
        torch.cuda.memory._dump_snapshot(str(scratch))
        os.replace(scratch, self.folder / FILE)
        self.found = {
            "file": f"{self.folder.name}/{FILE}",
            "taken": when,
            "peak_bytes": int(torch.cuda.max_memory_allocated()),
            **summarize(torch.cuda.memory._snapshot()),
        }

    def stop(self) -> None:
        """Record no more: what comes next is another trace's."""
        import torch

        torch.cuda.memory._record_memory_history(enabled=None)


def summarize(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes in use and reserved, and the lines of Python that hold most of them."""
    held: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for segment in snapshot["segments"]:
        for block in segment["blocks"]:
            if block["state"].startswith("active"):
                where = _where(block.get("frames") or ())
                held[where] += block["size"]
                blocks[where] += 1
    return {
        "allocated_bytes": sum(held.values()),
        "reserved_bytes": sum(segment["total_size"] for segment in snapshot["segments"]),
        "largest": [
            {"where": where, "bytes": size, "blocks": blocks[where]} for where, size in held.most_common(LISTED)
        ],
    }


def _where(frames: Any) -> str:
    """The innermost line that is not torch's own: which of torch's was called says little about whose memory it is."""
    named = [frame for frame in frames if frame.get("filename", "").endswith(".py")]
    own = next((frame for frame in named if "/torch/" not in frame["filename"]), named[0] if named else None)
    if own is None:
        return "no Python line is known"
    return f"{'/'.join(Path(own['filename']).parts[-2:])}:{own['line']} {own['name']}"
