"""Exponential moving average of what trains: steadier weights than those of any one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .trained_parameters import save_values, set_parameters, trained_parameters

AVERAGED_WEIGHTS = "averaged.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps average = decay x average + (1 - decay) x weights, updated after every step, of the trained parameters.

    In the first steps the decay is at most (1 + steps) / (10 + steps), so that the weights before training, which may
    be random, soon count for nothing.

    Args:
        model: its trained parameters are followed, from what they are now; frozen ones are not copied.
        decay: in (0, 1); the average covers about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = trained_parameters(model)
        self.values = {name: value.detach().clone() for name, value in self.parameters.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
            set_parameters(self.parameters, weights)

    def apply(self) -> None:
        """Give the model the averaged weights."""
        set_parameters(self.parameters, self.values)

    def save(self, folder: Path) -> None:
        save_values(self.values, folder / AVERAGED_WEIGHTS)

    def load(self, folder: Path) -> None:
        """What `save` wrote. The state's trained weights, read before, have been compared with the model's."""
        set_parameters(self.values, load_file(folder / AVERAGED_WEIGHTS))
