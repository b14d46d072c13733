"""Command `pyiqa-qscorer demo`: argument parsing and printing only."""

from __future__ import annotations

import signal
import threading
from typing import Annotated, Any

from .console import clean_errors, require, say, say_loading
from .options import Debug, Device, ScoreMetric, chosen_metric, model_options, option
from .serve import LOOPBACK, listen, warn_of_others


@model_options("checkpoint", "base", "dtype", "prompt", "local_files_only")
def demo(
    metric: ScoreMetric = None,
    host: Annotated[str, option("address to listen on", metavar="ADDRESS")] = LOOPBACK[0],
    port: Annotated[int, option("0: any that is free", min=0, max=65535, metavar="N")] = 7860,
    max_bytes: Annotated[int, option("of one picture", min=1, metavar="N")] = 64 * 2**20,
    device: Device = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Open a page to drop photos on: scores, where a picture is bad, two side by side.

    It works without a network, reads nothing but what is dropped on it, and is seen by this computer alone unless
    --host says otherwise. Ctrl-C ends it.

    [bold]Examples[/bold]
    $ pyiqa-qscorer demo
    $ pyiqa-qscorer demo --port 0 --checkpoint runs/mine/checkpoint_qscorer
    """
    with clean_errors(debug):
        require("demo", "gradio")
        metric = chosen_metric(metric, options)
        with listen(host, port) as free:  # gradio opens it once the model is loaded; a port in use is said before
            port = free.getsockname()[1]
        say_loading(metric, options["checkpoint"])
        from ..scorer import Scorer
        from ..serving.drop_page import create_page, offline_settings

        page = create_page(Scorer(metric, device, 16, **options))
        where: dict[str, Any] = {"server_name": host, "server_port": port, "prevent_thread_lock": True}
        address = page.launch(**where, **offline_settings(max_bytes))[1]
        warn_of_others(host)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        say("Open ", (address, "bold"), " in a browser; Ctrl-C ends it")
        stop.wait()
        page.close(verbose=False)
