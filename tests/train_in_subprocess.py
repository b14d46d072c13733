"""Trains from a JSON configuration, in this process or in one of its own, which tests kill, stop or multiply.

    python train_in_subprocess.py CONFIG.json LOSSES.json

Environment: KILL_AT_STEP sends SIGKILL to itself when that step ends, STOP_AT_STEP SIGTERM; KILL_WORKER_AT_STEP kills
the processes that read images; FILE_SIZE_LIMIT fills the "disk": no file can grow beyond that many bytes.
"""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pyiqa_qscorer.training import run as training
from pyiqa_qscorer.training import trainer
from pyiqa_qscorer.training.config import parse_config


class SignalAtStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, number in (("KILL", signal.SIGKILL), ("STOP", signal.SIGTERM)):
            if state.global_step == int(os.environ.get(f"{name}_AT_STEP", -1)):
                os.kill(os.getpid(), number)
        if state.global_step == int(os.environ.get("KILL_WORKER_AT_STEP", -1)):
            for worker in multiprocessing.active_children():
                worker.kill()


class WatchedTrainer(trainer.QScorerTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, SignalAtStep())
        WatchedTrainer.last = self


def run_here(content: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Whether it finished, losses by step, and metrics. With one thread, so that all runs compute the same."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "QScorerTrainer", WatchedTrainer)
        for name, value in environment.items():
            patch.setenv(name, value)
        torch.set_num_threads(1)
        try:
            result = training.train(parse_config(content))
        finally:
            torch.set_num_threads(threads)
    losses = {str(entry["step"]): entry["loss"] for entry in WatchedTrainer.last.state.log_history if "loss" in entry}
    return {"finished": result.finished, "losses": losses, "metrics": result.metrics}


def run(content: dict[str, Any], folder: Path, processes: int = 1, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and what `run_here` returns, of a training in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config, losses = folder / "config.json", folder / "losses.json"
    config.write_text(json.dumps(content))
    losses.unlink(missing_ok=True)
    command = [__file__, str(config), str(losses)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    env, pipes = {**os.environ, **environment}, {"capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command], env=env, timeout=300, **pipes)
    return done.returncode, json.loads(losses.read_text()) if losses.exists() else {"stderr": done.stderr}


if __name__ == "__main__":
    if "FILE_SIZE_LIMIT" in os.environ:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_SIZE_LIMIT"]),) * 2)
    outcome = run_here(json.loads(Path(sys.argv[1]).read_text()))
    if WatchedTrainer.last.is_world_process_zero():
        Path(sys.argv[2]).write_text(json.dumps(outcome))
