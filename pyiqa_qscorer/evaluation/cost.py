"""What a metric costs in memory, and on which machine it was measured."""

from __future__ import annotations

import gc
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from .results import MACHINE_FACTS


class PeakMemory:
    """Bytes that a metric needed at its peak since `restart`, above what the process held before it was built.

    On CUDA the allocator's count. On the CPU the resident memory of the process, which only Linux lets be reset; None
    elsewhere. Create it before the metric is built, and restart it before each dataset.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None
        if not self.restart():
            return
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")

    def restart(self) -> bool:
        """Forget the peak so far; whether that can be done here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu" and sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present
            except OSError:  # a hardened container: not measured
                return False
        else:
            return False
        return True

    def bytes(self) -> int | None:
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return max(0, peak - self._before)


def machine_facts() -> dict[str, Any]:
    """What a time depends on besides the device: processor, its cores, and torch's threads (`MACHINE_FACTS`)."""
    values = (platform.processor() or platform.machine(), os.cpu_count(), torch.get_num_threads())
    return dict(zip(MACHINE_FACTS, values, strict=True))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
