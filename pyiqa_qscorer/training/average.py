"""Trained parameters of a model by name, and their exponential moving average: steadier than any one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGED_WEIGHTS = "averaged.safetensors"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are not frozen."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def set_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy each parameter's value, of any dtype and device, into it."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def mix_in(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], share: float) -> None:
    """Each parameter that `start` names becomes share x start + (1 - share) x itself.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.
    """
    for name, value in start.items():
        parameters[name].lerp_(value.to(parameters[name]), share)


def save_values(values: Mapping[str, Tensor], file: Path) -> None:
    """Write values as safetensors, from wherever they are."""
    save_file({name: value.contiguous().cpu() for name, value in values.items()}, file)


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
        """Inside, the model has the averaged weights."""
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
