"""When did each token come to be? Taken without making the host wait for the device."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Moments of the device: on CUDA events on the stream, read after the call; on a CPU the host's clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note the present moment of the device."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each mark after the first one. On CUDA this waits for the device."""
        if not self.cuda:
            return [mark - self.marks[0] for mark in self.marks]
        torch.cuda.synchronize()
        return [self.marks[0].elapsed_time(mark) / 1e3 for mark in self.marks]
