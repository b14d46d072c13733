"""Work ahead: order, bounds, and where an exception shows."""

import itertools
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from pyiqa_qscorer.files import ordered_prefetch


def test_order_bounds_and_exceptions() -> None:
    taken = itertools.count()
    results = ordered_prefetch(lambda item: time.sleep(0.01 * (item % 3)) or item, taken, workers=3, ahead=4)
    assert [next(results) for _ in range(20)] == list(range(20))
    assert next(taken) == 23  # 19 taken before the last, and 4 under way
    results.close()
    before = threading.active_count()
    results = ordered_prefetch(lambda item: 1 // item, [1, 0, 1], workers=2, ahead=3)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == [] and threading.active_count() == before
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert list(ordered_prefetch(abs, [-2, 1], pool, 1)) == [2, 1] and pool.submit(abs, -1).result() == 1


@pytest.mark.parametrize(("workers", "ahead"), [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(workers: int, ahead: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        next(ordered_prefetch(abs, [], workers, ahead))
