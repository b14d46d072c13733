"""What goes on beside the steps of a training: progress, order of an epoch, resumable states, stopping on a signal."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .batches import MixedSampler


class ShowParts(ProgressCallback):
    """Progress bar with the loss, its parts and the training SRCC behind it, instead of a printed line per log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Evaluations are printed as lines of their own, so that they stay readable."""
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if "eval_srcc" in logs:
            found = "  ".join(f"{name.upper()} {logs[f'eval_{name}']:.4f}" for name in ("srcc", "plcc", "krcc", "rmse"))
            self.training_bar.write(f"epoch {state.epoch or 0:.3g}, validation: {found}")
        elif "loss" in logs:
            hidden = ("epoch", "learning_rate", "grad_norm")
            shown = {name: f"{value:.4g}" for name, value in logs.items() if name not in hidden}
            self.training_bar.set_postfix(shown)


class EpochsAndStates(TrainerCallback):
    """Tells the sampler its epoch, and writes a resumable state every `steps` steps besides that of every epoch.

    transformers does not reach the sampler when a resumed epoch starts in the middle, cannot combine states by steps
    with evaluation by epoch, and finds the best state by the path that the output folder had when it was written.
    """

    def __init__(self, sampler: MixedSampler, steps: int | None) -> None:
        self.sampler, self.steps = sampler, steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Not at the end of an epoch: the state written there comes after the evaluation, and knows its result."""
        if self.steps is not None and state.global_step % self.steps == 0 and not _epoch_is_complete(state):
            control.should_save = True


class StopOnSignal(TrainerCallback):
    """SIGTERM and Ctrl-C end the step, write a resumable state and stop; a second signal acts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number)
            self._restore()

        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, handle)
            except ValueError:  # not in the main thread: whoever runs us there handles signals
                return

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._any_process_received(args):
            control.should_training_stop = True
            control.should_save = not _epoch_is_complete(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch that ends here by a signal is not evaluated: it would compete for the best state."""
        if control.should_training_stop and not _epoch_is_complete(state):
            control.should_evaluate = control.should_save = False

    def _any_process_received(self, args: TrainingArguments) -> bool:
        """All processes stop at the same step, or one would wait for the others for ever."""
        received = self.received is not None
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return received
        flag = torch.tensor(int(received), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def _epoch_is_complete(state: TrainerState) -> bool:
    return float(state.epoch or 0).is_integer()
