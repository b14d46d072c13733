"""One thread that scores the images of many callers, in the order they come."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread

from ..scorer import ScoredImage, Scorer


class ScoringThread:
    """Scores what waits, in batches that callers share; nobody else may use the scorer."""

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
