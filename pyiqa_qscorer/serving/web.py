"""Scores over HTTP: one thread that scores for all requests, and the application around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from .. import __version__
from ..errors import QScorerError
from ..scorer import ScoredImage, Scorer

BODY_SECONDS = 60  # for a whole body to arrive; a client that stalls must not hold its place, nor stop the end


class ScoringThread:
    """Scores what waits, in the order it came and in batches that callers share; nobody else may use the scorer."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: SimpleQueue[tuple[bytes, Future[ScoredImage]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="qscorer-serve")
        self._thread.start()

    def submit(self, image: bytes) -> Future[ScoredImage]:
        """Score the bytes of an image file; the future raises what the model raises."""
        future: Future[ScoredImage] = Future()
        self._waiting.put((image, future))
        return future

    def close(self) -> None:
        """Score what was submitted, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            taken = [self._waiting.get()]
            while not self._waiting.empty():  # nobody else takes from it
                taken.append(self._waiting.get())
            open_ = None not in taken
            # One whose caller is gone is left out; the others cannot be cancelled from here on.
            jobs = [job for job in taken if job is not None and job[1].set_running_or_notify_cancel()]
            try:
                results = self._scorer.score_iter(image for image, _ in jobs)
                for result, (_, future) in zip(results, jobs, strict=True):
                    future.set_result(result)
            except Exception as error:  # of the model: every caller without a score learns of it
                for _, future in jobs:
                    if not future.done():
                        future.set_exception(error)


def create_app(scorer: Scorer, thread: ScoringThread, *, max_bytes: int, max_images: int, queue: int) -> FastAPI:
    """Application that scores what is posted to it: POST /score, GET /health.

    Args:
        scorer: The one that `thread` uses; here only its name and device are read.
        max_bytes: Of one request's body; more is answered with 413, without keeping it.
        max_images: In one request; more is answered with 400.
        queue: Requests that are read, wait or are scored at a time; more are answered with 503 before their
            body is read. So memory stays below about `queue * max_bytes`, and the decoded images of a batch.
    """
    app = FastAPI(title="pyiqa-qscorer", version=__version__, openapi_url=None)
    held = 0

    @app.get("/health")
    async def health() -> dict[str, Any]:
        about = {"metric": scorer.name, "identity": scorer.identity, "device": str(scorer.device)}
        return {"status": "ok", **about, "version": __version__, "queue": held}

    @app.post("/score")
    async def score(request: Request) -> dict[str, Any]:
        nonlocal held
        if held >= queue:
            raise HTTPException(503, f"{queue} requests wait already: try again later", {"Retry-After": "1"})
        held += 1
        try:
            reading = _read_images(_BoundedRequest(request, max_bytes), max_images)
            images = await asyncio.wait_for(reading, BODY_SECONDS)
            futures = [asyncio.wrap_future(thread.submit(image)) for _, image in images]
            scored = await asyncio.gather(*futures)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
        except QScorerError as error:
            raise HTTPException(500, str(error)) from error
        finally:
            held -= 1
        rows = [
            {"name": name, "score": item.score} if item.error is None else {"name": name, "error": item.error}
            for (name, _), item in zip(images, scored, strict=True)
        ]
        return {"metric": scorer.name, "results": rows}

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    return app


class _BoundedRequest(Request):
    """A request whose body ends with 413 beyond `max_bytes`, as declared or as counted."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        super().__init__(request.scope, request.receive)
        self._max_bytes = max_bytes

    async def stream(self) -> AsyncGenerator[bytes, None]:
        size = int(self.headers.get("content-length", 0))  # a number, or the server has refused it
        tail = b""
        if size <= self._max_bytes:
            size = 0
            async for chunk in super().stream():
                size += len(chunk)
                if size > self._max_bytes:
                    break
                tail = (tail + chunk)[-4:] if chunk else tail
                yield chunk
        if size > self._max_bytes:
            raise HTTPException(413, f"the body has more than {self._max_bytes:,} bytes: send smaller or fewer images")
        # The parser of forms would drop an image that breaks off.
        if _is_form(self) and tail.rstrip(b"\r\n")[-2:] != b"--":
            raise HTTPException(400, "the form breaks off before its last boundary")


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def _read_images(request: _BoundedRequest, max_images: int) -> list[tuple[str, bytes]]:
    """Names and contents of the images in a body: the files of a form, else the body itself."""
    if not _is_form(request):
        return [("body", await request.body())]
    async with request.form(max_files=max_images) as form:
        images = []
        for field, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise HTTPException(400, f"field {field!r} is no file; with curl: -F {field}=@photo.jpg")
            images.append((value.filename or field, await value.read()))
    if not images:
        raise HTTPException(400, "the form holds no file; with curl: -F image=@photo.jpg")
    return images
