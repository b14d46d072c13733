"""One process per device: what the leaderboard needs of a group of processes, alone or started by accelerate."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Protocol, TypeVar

import torch

from ..errors import QScorerError
from ..scorer import resolve_device

Value = TypeVar("Value")

LONGEST_WAIT = timedelta(days=7)  # for a process whose images take longer than the others'


class Processes(Protocol):
    """This process among its like.

    Attributes:
        index: 0 .. count - 1; process 0 writes what is common.
        count: Number of processes.
        device: Where this one scores.
    """

    index: int
    count: int
    device: torch.device

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by index, in every process; waits for all of them."""
        ...

    def finish(self) -> None:
        """Leave the group; call it last, in every process."""
        ...


class OneProcess:
    """No other process."""

    index, count = 0, 1

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = resolve_device(device)

    def gather(self, value: Value) -> list[Value]:
        return [value]

    def finish(self) -> None:
        """Nothing to leave."""


class AcceleratedProcesses:
    """Processes that `accelerate launch` started, one per GPU, or torchrun, also on the CPU."""

    def __init__(self, cpu: bool) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device: torch.device = self._state.device

    def gather(self, value: Value) -> list[Value]:
        from accelerate.utils import gather_object

        found: list[Value] = gather_object([value])
        return found

    def finish(self) -> None:
        self._state.wait_for_everyone()
        self._state.destroy_process_group()  # else its threads end the interpreter with an error


def processes(device: str | None = None) -> Processes:
    """The group that this process was started in.

    Args:
        device: of one process any; of several `cpu`, `cuda` (each takes its own GPU), or None: CUDA where there is
            one, unless accelerate was told to use the CPU.

    Raises:
        QScorerError: `device` names one GPU for several processes, or does not exist.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess(device)
    if device not in (None, "cpu", "cuda"):
        raise QScorerError(f"device {device!r} cannot be shared by several processes: leave it out, each takes its own")
    if device is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        device = "cpu"
    return AcceleratedProcesses(cpu=resolve_device(device).type == "cpu")
