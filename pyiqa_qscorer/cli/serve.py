"""Command `pyiqa-qscorer serve`: argument parsing and printing only."""

from __future__ import annotations

import signal
import socket
import sys
from typing import Annotated, Any

import typer

from .console import clean_errors, require, say, say_loading
from .options import (
    AttnImplementation,
    Base,
    BaseRevision,
    CacheDir,
    Checkpoint,
    Clamp,
    Compile,
    Debug,
    Device,
    Dtype,
    LocalFilesOnly,
    MaxPixels,
    MinPixels,
    Prompt,
    Revision,
    ScoreMetric,
    chosen_metric,
    option,
)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    context: typer.Context,
    metric: ScoreMetric = None,
    host: Annotated[str, option("address to listen on", metavar="ADDRESS")] = LOOPBACK[0],
    port: Annotated[int, option("0: any that is free", min=0, max=65535, metavar="N")] = 8000,
    batch_size: Annotated[int, option("images per pass of the model", min=1, metavar="N")] = 16,
    max_bytes: Annotated[int, option("of one request; more: 413", min=1, metavar="N")] = 32 * 2**20,
    max_images: Annotated[int, option("in one request; more: 400", min=1, metavar="N")] = 64,
    queue: Annotated[int, option("requests held at a time; more: 503", min=1, metavar="N")] = 32,
    device: Device = None,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    dtype: Dtype = None,
    prompt: Prompt = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    clamp: Clamp = None,
    attn_implementation: AttnImplementation = None,
    compile: Compile = None,
    local_files_only: LocalFilesOnly = None,
    cache_dir: CacheDir = None,
    debug: Debug = False,
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
        metric, options = chosen_metric(context)
        for number in (signal.SIGINT, signal.SIGTERM):  # while it serves, uvicorn's own take their place
            signal.signal(number, _stop)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listening:
            import uvicorn

            from ..scorer import Scorer
            from ..serving.web import create_app
            from ..serving.worker import ScoringThread

            say_loading(metric, checkpoint)
            scorer = Scorer(metric, device, batch_size, **options)
            thread = ScoringThread(scorer)
            try:
                app = create_app(scorer, thread, max_bytes=max_bytes, max_images=max_images, queue=queue)
                server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False))
                if host not in LOOPBACK:
                    say(("warning: ", "yellow"), f"whoever reaches {host} can use it: there is no login")
                shown = f"[{host}]" if ":" in host else host
                say("Serving ", (metric, "bold"), f" on http://{shown}:{listening.getsockname()[1]}")
                server.run(sockets=[listening])
            finally:
                thread.close()


def _stop(*_: Any) -> None:
    sys.exit(0)
