"""Energy of the device over a stretch of time.

GPU: NVML's counter of the whole board in millijoule (Volta and later). CPU: the
package counter of RAPL, which most systems let only root read.
"""

from __future__ import annotations

from pathlib import Path

from lbi.gpu_processes import current_gpu, nvml_handle

RAPL = Path("/sys/class/powercap/intel-rapl:0")


class EnergyMeter:
    """Joules used while it was open; None where nothing can be read."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.joules: float | None = None

    def __enter__(self) -> EnergyMeter:
        self._start = _read(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        end = _read(self.device)
        if self._start is None or end is None:
            return
        used = end - self._start
        if used < 0:
            # RAPL's counter wraps.
            used += int((RAPL / "max_energy_range_uj").read_text()) / 1e6
        self.joules = used

    @staticmethod
    def why_not(device: str) -> str:
        """Why there is no energy figure on this device."""
        if device == "cuda":
            return "NVML's energy counter could not be read (pip install nvidia-ml-py)"
        return f"{RAPL}/energy_uj could not be read"


def _read(device: str) -> float | None:
    """The counter in joules since some fixed moment."""
    if device == "cpu":
        try:
            return int((RAPL / "energy_uj").read_text()) / 1e6
        except (OSError, ValueError):
            return None
    uuid = current_gpu()
    handle = nvml_handle(uuid) if uuid else None
    if handle is None:
        return None
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except pynvml.NVMLError:
        return None
