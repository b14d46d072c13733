"""Exponential moving average of what trains: steadier weights than those of any one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGED_WEIGHTS = "averaged.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps average = decay x average + (1 - decay) x weights, updated after every step, of the trained parameters.

    In the first steps the decay is at most (1 + steps) / (10 + steps), so that the weights before training, which may
    be random, soon count for nothing.

    Args:
        model: its trained parameters are followed; frozen ones are not copied.
        decay: in (0, 1); the average covers about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.values: dict[str, Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run has loaded its average by now."""
        if self.values is None:
            self.values = {name: value.detach().clone() for name, value in self.parameters.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.values is not None  # since `on_train_begin`
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        get_ema_multi_avg_fn(decay)(list(self.values.values()), list(self.parameters.values()), state.global_step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside of it."""
        weights = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.apply()
        try:
            yield
        finally:
            self._set(weights)

    def apply(self) -> None:
        """Give the model the averaged weights."""
        if self.values is not None:
            self._set(self.values)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, folder: Path) -> None:
        assert self.values is not None  # states are written after steps
        save_file({name: value.contiguous().cpu() for name, value in self.values.items()}, folder / AVERAGED_WEIGHTS)

    def load(self, folder: Path) -> None:
        """What `save` wrote. The state's trained weights, read before, have been compared with the model's."""
        stored = load_file(folder / AVERAGED_WEIGHTS)
        self.values = {name: stored[name].to(value.device) for name, value in self.parameters.items()}
