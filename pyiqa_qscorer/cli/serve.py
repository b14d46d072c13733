"""Command `pyiqa-qscorer serve`: argument parsing and printing only."""

from __future__ import annotations

import signal
import socket
import sys
from typing import Annotated, Any

from .console import clean_errors, require, say, say_loading
from .options import Debug, Device, ScoreMetric, chosen_metric, model_options, option

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@model_options()
def serve(
    metric: ScoreMetric = None,
    host: Annotated[str, option("address to listen on", metavar="ADDRESS")] = LOOPBACK[0],
    port: Annotated[int, option("0: any that is free", min=0, max=65535, metavar="N")] = 8000,
    batch_size: Annotated[int, option("images per pass of the model", min=1, metavar="N")] = 16,
    max_bytes: Annotated[int, option("of one request; more: 413", min=1, metavar="N")] = 32 * 2**20,
    max_images: Annotated[int, option("in one request; more: 400", min=1, metavar="N")] = 64,
    queue: Annotated[int, option("requests held at a time; more: 503", min=1, metavar="N")] = 32,
    device: Device = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Score images over HTTP.

    POST /score takes the files of a form, or one image file as the body.
    GET /health tells metric, device, version and requests held.
    Ctrl-C or SIGTERM: requests that are held are answered, then it ends with 0.

    [bold]Examples[/bold]
    $ pyiqa-qscorer serve --port 8000
    $ curl -F image=@photo.jpg -F image=@other.png http://127.0.0.1:8000/score
    $ curl --data-binary @photo.jpg http://127.0.0.1:8000/score
    """
    with clean_errors(debug):
        require("serve", "fastapi", "uvicorn", "python_multipart")
        metric = chosen_metric(metric, options)
        for number in (signal.SIGINT, signal.SIGTERM):  # while it serves, uvicorn's own take their place
            signal.signal(number, _stop)
        with listen(host, port) as listening:
            import uvicorn

            from ..scorer import Scorer
            from ..serving.web import ScoringThread, create_app

            say_loading(metric, options["checkpoint"])
            scorer = Scorer(metric, device, batch_size, **options)
            thread = ScoringThread(scorer)
            try:
                app = create_app(scorer, thread, max_bytes=max_bytes, max_images=max_images, queue=queue)
                server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False))
                warn_of_others(host)
                shown = f"[{host}]" if ":" in host else host
                say("Serving ", (metric, "bold"), f" on http://{shown}:{listening.getsockname()[1]}")
                server.run(sockets=[listening])
            finally:
                thread.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def warn_of_others(host: str) -> None:
    if host not in LOOPBACK:
        say(("warning: ", "yellow"), f"whoever reaches {host} can use it: there is no login")


def _stop(*_: Any) -> None:
    sys.exit(0)
