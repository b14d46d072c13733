"""What a metric costs in memory, and on which machine it was measured."""

from __future__ import annotations

import gc
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch


class PeakMemory:
    """Bytes that a metric needed at its peak since `restart`, above what the process held before it was built.

    On CUDA the allocator's count. On the CPU the resident memory of the process, which only Linux lets be reset; None
    elsewhere. Create it before the metric is built, and restart it before each dataset.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None
        if self.restart():
            self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")

    def restart(self) -> bool:
        """Forget the peak so far; whether that can be done here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        if self.device.type != "cpu" or sys.platform != "linux":
            return False
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present
        except OSError:  # a hardened container: not measured
            return False
        return True

    def bytes(self) -> int | None:
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return max(0, peak - self._before)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a time depends on: the device, the processor, its cores, and torch's threads."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _resident(field: str) -> int:
    """A size in bytes from what Linux says of this process."""
    [kilobytes] = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)
