"""What a metric costs in memory."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Bytes that a metric needed at its peak, above what the process held before it was built.

    On CUDA the allocator's count. On the CPU the resident memory of the process, which only Linux lets be reset; None
    elsewhere. Create it before the metric is built.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif device.type == "cpu" and sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present
            except OSError:  # a hardened container: not measured
                return
            self._before = _status("VmRSS")

    def bytes(self) -> int | None:
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return max(0, peak - self._before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
