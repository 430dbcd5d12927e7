"""Whether the GPU slowed itself down while a sample was timed, and how fast, hot and hungry it was.

A GPU that is too hot, or told to brake by its board, lowers its clocks: such a timing is the cooling's, not the
setting's. At its power limit it lowers them too; that is what the setting costs on this card, so it is recorded and
holds nothing against the sample.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from lbi.gpu_processes import current_gpu, nvml_handle

SLOWED = {0x08: "hardware slowdown", 0x20: "too hot", 0x40: "much too hot", 0x80: "power brake"}
"""Bits of NVML's clock event reasons that void a sample (nvml.h, nvmlClocksEventReasons)."""

POWER_LIMIT = 0x04

NO_NVML = "NVML could not read the GPU's clocks (pip install nvidia-ml-py)"


class ClockWatch:
    """Looks at the GPU's clocks when it is opened and when it is closed, once a sample; `report` is about all looks.

    `slowed` says why the clocks were lowered the last time it was open, "" if they were not. What came and went
    between the two looks is missed: looking while a sample is timed would disturb it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.slowed = ""
        self._looks: list[dict[str, int]] = []
        self._at_ends: list[int] = []

    def __enter__(self) -> ClockWatch:
        self.slowed = ""
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        seen = self._look()
        if seen is not None:
            self._at_ends.append(seen["power_mw"])

    def _look(self) -> dict[str, int] | None:
        seen = read() if self.device == "cuda" else None
        if seen is None:
            return None
        self._looks.append(seen)
        self.slowed = self.slowed or ", ".join(words for bit, words in SLOWED.items() if seen["reasons"] & bit)
        return seen

    def report(self) -> dict[str, Any]:
        """For effective.json: the range of clocks, the highest temperature and power, and why clocks were lowered.

        `power_at_end_w` is the median over the samples' ends, of what NVML averages over about a second.
        """
        if self.device != "cuda":
            return {}
        if not self._looks:
            return {"clocks": {"missing": NO_NVML}}
        reasons = 0
        for look in self._looks:
            reasons |= look["reasons"]
        named = [words for bit, words in {**SLOWED, POWER_LIMIT: "power limit"}.items() if reasons & bit]

        def ends(name: str) -> list[int]:
            values = [look[name] for look in self._looks]
            return [min(values), max(values)]

        return {
            "clocks": {
                "sm_mhz": ends("sm_mhz"),
                "memory_mhz": ends("memory_mhz"),
                "temperature_c": ends("temperature_c")[1],
                "power_w": ends("power_mw")[1] / 1e3,
                "power_at_end_w": median(self._at_ends) / 1e3 if self._at_ends else None,
                "lowered": named,
            }
        }


def read() -> dict[str, int] | None:
    """Clocks in MHz, temperature in °C, power in mW and the clock event reasons now; None where NVML cannot say."""
    uuid = current_gpu()
    handle = nvml_handle(uuid) if uuid else None
    if handle is None:
        return None
    import pynvml

    try:
        return {
            "sm_mhz": int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "memory_mhz": int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            "temperature_c": int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            "power_mw": int(pynvml.nvmlDeviceGetPowerUsage(handle)),
            "reasons": int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
    except pynvml.NVMLError:
        return None
