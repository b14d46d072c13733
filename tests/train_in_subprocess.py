"""Trains from a JSON configuration, for tests that kill, stop or multiply the process.

    python train_in_subprocess.py CONFIG.json LOSSES.json

Environment: KILL_AT_STEP sends SIGKILL to itself when that step ends, STOP_AT_STEP SIGTERM,
PAUSE_AT_STEP SIGSTOP; KILL_WORKER_AT_STEP kills the processes that read images; FILE_SIZE_LIMIT
fills the "disk": no file can grow beyond that many bytes.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pyiqa_qscorer.training import run, trainer
from pyiqa_qscorer.training.config import parse_config


class SignalAtStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == int(os.environ.get("KILL_AT_STEP", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == int(os.environ.get("STOP_AT_STEP", -1)):
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_step == int(os.environ.get("PAUSE_AT_STEP", -1)):
            os.kill(os.getpid(), signal.SIGSTOP)
        if state.global_step == int(os.environ.get("KILL_WORKER_AT_STEP", -1)):
            for worker in multiprocessing.active_children():
                worker.kill()


class WatchedTrainer(trainer.QScorerTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, SignalAtStep())
        WatchedTrainer.last = self


def main() -> None:
    torch.set_num_threads(1)
    run.QScorerTrainer = WatchedTrainer
    config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
    if "FILE_SIZE_LIMIT" in os.environ:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = int(os.environ["FILE_SIZE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    result = run.train(config)
    history = WatchedTrainer.last.state.log_history
    losses = {str(entry["step"]): entry["loss"] for entry in history if "loss" in entry}
    if WatchedTrainer.last.is_world_process_zero():
        Path(sys.argv[2]).write_text(
            json.dumps({"finished": result.finished, "losses": losses, "metrics": result.metrics})
        )


if __name__ == "__main__":
    main()
