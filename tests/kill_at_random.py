"""Runs commands to their end, then again and again: killed with SIGKILL at a random moment, and repeated to the end.

    python kill_at_random.py KILLS COMMANDS.json

COMMANDS: arguments by score, benchmark, train. Run N of a command is in folder COMMAND/N, run 0 undisturbed. Prints how
many kills came before the end of a run. One process imports everything and forks the runs, so that the moments are
those of the work and not of the imports.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.pyplot  # noqa: F401
import torch
from benchmark_world import FakeMetrics

from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.evaluation import leaderboard_report, plots, runner  # noqa: F401
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train


def started(folder: Path, kind: str, arguments: list[str]) -> int:
    """Process id of a run in its folder."""
    process = os.fork()
    if process:
        return process
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    status = 1
    try:
        if kind == "train":
            train(parse_config(json.loads(Path(arguments[0]).read_text())))
        else:
            app([kind, *arguments], standalone_mode=False)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    FakeMetrics().install()
    moments, killed = random.Random(0), {}
    for kind, arguments in json.loads(Path(sys.argv[2]).read_text()).items():
        killed[kind], seconds = 0, 0.0
        for run in range(int(sys.argv[1]) + 1):
            folder = Path(kind, str(run))
            folder.mkdir(parents=True)
            begin = time.monotonic()
            process = started(folder, kind, arguments)
            if run:
                time.sleep(moments.uniform(0.02, 0.9) * seconds)
                os.kill(process, signal.SIGKILL)
                killed[kind] += os.WIFSIGNALED(os.waitpid(process, 0)[1])
                process = started(folder, kind, arguments)
            os.waitpid(process, 0)
            seconds = seconds if run else time.monotonic() - begin
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
