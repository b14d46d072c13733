"""Work ahead in parallel, results in order: one loop for everything that reads, renders or computes ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | Executor, ahead: int
) -> Generator[Result, None, None]:
    """`map(function, items)` with several calls under way.

    Args:
        function: Called once per item, in other threads or processes.
        items: Any length, also endless; taken from one by one, in the thread that takes the results.
        workers: Number of threads (>= 1), or an executor, which stays open.
        ahead: Calls (>= 1) that are under way or finished and not yet taken, so memory is bounded.

    Yields:
        The results in the order of `items`. What a call raises is raised in its place, and ends the loop.

    Raises:
        ValueError: `workers` or `ahead` is below 1.

    >>> list(ordered_prefetch(abs, [-3, 1, -2], workers=2, ahead=2))
    [3, 1, 2]
    """
    if ahead < 1 or (not isinstance(workers, Executor) and workers < 1):
        raise ValueError(f"workers and ahead must be >= 1, got {workers} and {ahead}")
    pool = workers if isinstance(workers, Executor) else ThreadPoolExecutor(workers, thread_name_prefix="qscorer-ahead")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the caller takes no more, or a call has failed
        for future in pending:
            future.cancel()
        if pool is not workers:
            pool.shutdown()
