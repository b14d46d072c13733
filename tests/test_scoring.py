"""`Scorer`: images in, scores out, and those that cannot be scored, with a quick stand-in for the model."""

import itertools
import math
import pickle
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_metric import FakeMetric
from pictures import encoded, random_image, to_tensor
from PIL import Image

from pyiqa_qscorer import scorer as scoring
from pyiqa_qscorer.errors import FailedImagesError, ImageError, QScorerError
from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.images.staging import Stager
from pyiqa_qscorer.registry import METRICS, resolve_metric_options
from pyiqa_qscorer.scorer import Scorer


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return random_image(height, width, seed)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return to_tensor(image)[0]


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(FakeMetric(), batch_size=4, workers=2)


def test_every_kind_of_image_has_the_same_score(scorer: Scorer, tmp_path: Path) -> None:
    image, path = picture(1), tmp_path / "image.png"
    image.save(path)
    kinds = [
        str(path),
        path,
        path.read_bytes(),
        image,
        Image.open(path),
        as_tensor(image),
        as_tensor(image).half(),
        np.asarray(image),
        np.dstack([np.asarray(image), np.full((30, 40), 7, np.uint8)]),  # alpha is dropped
        np.asarray(image)[:, ::-1][:, ::-1],  # not contiguous
    ]
    scores = scorer.score(kinds)
    assert scores.dtype == np.float32 and scores.shape == (len(kinds),) and np.all(scores == scores[0])
    for kind in kinds:
        assert scorer.score(kind).tolist() == [scores[0]]
    gray = picture(2).convert("L")
    values = np.asarray(gray)
    scores = scorer.score([gray, values, values[:, :, None], torch.from_numpy(values.copy())[None] / 255])
    assert np.all(scores == scores[0])
    lazy = Image.open(path)  # one of PIL's, decoded on first use, in eight threads
    scores = Scorer(FakeMetric(), batch_size=8, workers=8).score([lazy] * 24)
    assert np.all(scores == scores[0])


def test_sources_axes_and_sizes(scorer: Scorer, tmp_path: Path) -> None:
    images = [picture(seed) for seed in range(3)]
    expected = scorer.score(images).tolist()
    assert scorer.score(torch.stack([as_tensor(image) for image in images])).tolist() == expected
    assert scorer.score(np.stack([np.asarray(image) for image in images])).tolist() == expected
    assert scorer.score([]).shape == (0,)
    path = str(tmp_path / "3.png")
    picture(3, 23).save(path)
    on_disk, in_memory = scorer.score_iter([path, picture(1, 8, 9)])
    assert (on_disk.index, on_disk.source, on_disk.width, on_disk.height) == (0, path, 23, 30)
    assert (in_memory.index, in_memory.source, in_memory.width) == (1, "<PIL image 8x9>", 8)
    assert on_disk.score is not None and on_disk.error is None
    assert len(repr(on_disk.score)) <= 10 and np.float32(on_disk.score) == scorer.score(path)[0]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 4), (16, 2), (100, 1)])
def test_order_and_values_do_not_depend_on_batching(batch_size: int, workers: int) -> None:
    chance, images = random.Random(batch_size), []
    for seed in range(37):
        image = picture(seed, chance.randint(1, 90), chance.randint(1, 90))
        images.append(chance.choice([image, encoded(image), as_tensor(image), np.asarray(image)]))
    alone = Scorer(FakeMetric(), batch_size=1, workers=1)
    expected, metric = [alone.score(image).item() for image in images], FakeMetric()
    assert Scorer(metric, batch_size=batch_size, workers=workers).score(images).tolist() == expected
    assert sum(metric.batches) == 37 and max(metric.batches) <= batch_size


def test_lazy_input_and_its_errors(scorer: Scorer) -> None:
    taken = itertools.count()
    endless = (picture(next(taken)) for _ in itertools.repeat(None))
    results = scorer.score_iter(endless)
    assert [next(results).index for _ in range(9)] == list(range(9))
    assert next(taken) <= 3 * 4 + 3 * 4 + 2  # three batches were begun, two more and the workers run ahead
    results.close()
    assert not [thread.name for thread in threading.enumerate() if "qscorer" in thread.name]

    def images():
        yield from (picture(seed) for seed in range(6))
        raise OSError("the share is gone")

    results = scorer.score_iter(images())
    assert [next(results).index for _ in range(6)] == list(range(6))
    with pytest.raises(OSError, match="share is gone"):
        next(results)


def test_the_model_gets_the_pixels_of_pillow_to_the_bit(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(seed, 20 + 9 * seed, 40) for seed in range(7)]
    seen: list[torch.Tensor] = []
    score = scorer.metric.score_pixels
    monkeypatch.setattr(scorer.metric, "score_pixels", lambda pixels: (seen.append(pixels), score(pixels))[1])
    given = [as_tensor(image).requires_grad_() if seed % 2 else image for seed, image in enumerate(images)]
    for _ in scorer.score_iter(given):
        assert torch.is_grad_enabled()
    expected = torch.stack([pixels_from_pil(image, 56) for image in images])
    assert torch.equal(torch.cat(seen), expected)


def test_the_next_batch_is_brought_while_the_model_works(monkeypatch: pytest.MonkeyPatch) -> None:
    staged, waits = threading.Semaphore(0), []
    stage = Stager.stage

    def counted(self: Stager, prepared: object) -> object:
        batch = stage(self, prepared)
        staged.release()
        return batch

    class Waiting(FakeMetric):
        def score_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
            # Its own batch and, but for the last, the next.
            count = 2 if not self.batches else 1 if len(self.batches) < 2 else 0
            waits.append(all(staged.acquire(timeout=20) for _ in range(count)))
            return super().score_pixels(pixel_values)

    monkeypatch.setattr(Stager, "stage", counted)
    metric = Waiting()
    assert len(Scorer(metric, batch_size=2, workers=1).score([picture(seed) for seed in range(6)])) == 6
    assert metric.batches == [2, 2, 2] and waits == [True, True, True]


def faulty(tmp_path: Path) -> dict[str, tuple[object, str]]:
    """Images that must fail, with words that the reason must have."""
    good = encoded(picture(0))
    for name, content in {"truncated.png": good[:600], "text.png": b"not an image", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
    nan = as_tensor(picture(0))
    nan[1, 2, 3] = math.nan
    return {
        "truncated": (str(tmp_path / "truncated.png"), "truncated"),
        "not an image": (tmp_path / "text.png", "not an image"),
        "empty": (str(tmp_path / "empty.png"), "empty"),
        "missing": (str(tmp_path / "missing.png"), "no such file"),
        "folder": (str(tmp_path), "folder"),
        "url": ("https://example.org/a.png", "URL"),
        "bytes": (good[:600], "truncated"),
        "rank": (torch.zeros(3, 4), r"\(3, 4\)"),
        "channels": (torch.zeros(2, 4, 4), "channels"),
        "nan": (nan, "finite"),
        "8-bit values": (as_tensor(picture(0)) * 255, "divide by 255"),
        "sparse tensor": (as_tensor(picture(0)).to_sparse(), "dense .* torch.sparse_coo: give"),
        "meta tensor": (torch.zeros(3, 4, 4, device="meta"), "hold values.* meta"),
        "mkldnn tensor": (as_tensor(picture(0)).to_mkldnn(), "dense .*mkldnn"),
        "integer tensor": (torch.zeros(3, 4, 4, dtype=torch.uint8), "uint8"),
        "float array": (np.zeros((4, 4, 3), np.float32), "uint8"),
        "nothing": (np.zeros((0, 4, 3), np.uint8), "uint8"),
        "kind": (42, "int"),
    }


def test_failed_images_are_listed_and_the_others_scored(scorer: Scorer, tmp_path: Path) -> None:
    cases = faulty(tmp_path)
    images = [item for image, _ in cases.values() for item in (image, picture(1))]
    expected = scorer.score(picture(1)).item()
    with pytest.raises(FailedImagesError) as caught:
        scorer.score(images)
    error = caught.value
    assert isinstance(error, ImageError) and error.scores.tolist()[1::2] == [expected] * len(cases)
    assert np.isnan(error.scores[::2]).all()
    assert [failure.index for failure in error.failures] == list(range(0, len(images), 2))
    for failure, (_, words) in zip(error.failures, cases.values(), strict=True):
        assert failure.score is None and failure.error is not None
        assert re.search(words, failure.error) and "\n" not in failure.error
    assert f"[0] {tmp_path / 'truncated.png'}: " in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.failures == error.failures
    np.testing.assert_array_equal(scorer.score(images, on_error="nan"), error.scores)
    with pytest.raises(FailedImagesError, match=r"25 of 25.*\n(.*\n){20}  and 5 more: see .failures"):
        scorer.score(["missing.png"] * 25)


CANNOT = "cannot be used here .*: use 'cpu' or 'cuda'"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: Scorer(FakeMetric()).score([], on_error="ignore"),
            ValueError,
            "must be 'raise' or 'nan', not 'ignore'",
        ),
        (lambda: Scorer(FakeMetric()).score_iter("a.png"), TypeError, "iterable of images, not a str"),
        (
            lambda: Scorer(FakeMetric(), batch_size=0),
            ValueError,
            "batch_size must be a whole number of at least 1, not 0",
        ),
        (lambda: Scorer(FakeMetric(), workers=2.5), ValueError, "workers"),
        (lambda: Scorer(torch.nn.Linear(1, 1)), TypeError, "Linear has no score_pixels"),
        (lambda: Scorer(FakeMetric(), dtype="float32"), TypeError, "dtype: options go with a metric name"),
        (lambda: Scorer("qscorrer"), QScorerError, "no metric 'qscorrer'; did you mean 'qscorer'"),
        (lambda: Scorer("qscorer", chekpoint="x"), TypeError, "no option 'chekpoint'; did you mean 'checkpoint'"),
        (lambda: Scorer(FakeMetric(), devise="x"), TypeError, "no option 'devise'; did you mean 'device'"),
        (lambda: Scorer(FakeMetric(), worker="x"), TypeError, "no option 'worker'; did you mean 'workers'"),
        (lambda: Scorer(FakeMetric(), device="gpu"), QScorerError, "must be like 'cpu'"),
        (lambda: Scorer(FakeMetric(), device="cuda:99"), QScorerError, "does not exist"),
        (lambda: Scorer(FakeMetric(), device="meta"), QScorerError, CANNOT),
        (lambda: Scorer(FakeMetric(), device="ipu"), QScorerError, CANNOT),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "qscorer-mini"),
        ({"checkpoint": "x"}, "qscorer"),  # not taken for one of the small model
        ({"metric": "qscorer_4bit", "checkpoint": "x", "clamp": False}, "qscorer_4bit"),
    ],
)
def test_name_and_options_reach_the_metric(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], name: str) -> None:
    built = []

    def build(name: str, options: dict, device: torch.device) -> FakeMetric:
        built.append(resolve_metric_options(name, options))
        return FakeMetric()

    monkeypatch.setattr(scoring, "build_metric", build)
    scorer = Scorer(device="cpu", **given)
    assert built == [METRICS[name].options | {key: value for key, value in given.items() if key != "metric"}]
    assert repr(scorer).startswith(f"Scorer({name!r}, device='cpu', batch_size=16, workers=")
    assert scorer.identity == "0123456789abcdef" and Scorer(FakeMetric()).device == torch.device("cpu")
    assert scoring.resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("batch_size", "raised", "error", "words"),
    [
        (4, KeyError("a bug"), KeyError, "a bug"),
        (4, torch.cuda.OutOfMemoryError("CUDA out of memory"), QScorerError, r"lower batch_size \(now 4\)"),
        (1, torch.cuda.OutOfMemoryError("CUDA out of memory"), QScorerError, "smaller dtype"),
    ],
)
def test_errors_of_the_model_are_raised_and_memory_has_advice(monkeypatch, batch_size, raised, error, words) -> None:
    def broken(pixel_values: torch.Tensor) -> torch.Tensor:
        raise raised

    scorer = Scorer(FakeMetric(), batch_size=batch_size)
    monkeypatch.setattr(scorer.metric, "score_pixels", broken)
    with pytest.raises(error, match=words):
        scorer.score([picture(0)] * 5)


def test_refused_images_and_scores_that_are_no_numbers(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(seed) for seed in range(6)] + [Image.new("RGB", (9, 9), "white")]
    scores = Scorer(FakeMetric()).score(images)
    bright = scores.argmax()
    picky = Scorer(FakeMetric(refuse=float(np.sort(scores)[-2]) + 1e-6), batch_size=4)
    with pytest.raises(FailedImagesError, match="not finite") as caught:
        picky.score(images)
    assert [failure.index for failure in caught.value.failures] == [bright]
    assert np.delete(caught.value.scores, bright).tolist() == np.delete(scores, bright).tolist()
    monkeypatch.setattr(scorer.metric, "score_pixels", lambda pixels: torch.tensor([math.nan, 1.0, math.inf]))
    results = list(scorer.score_iter([picture(0)] * 3))
    assert [item.score for item in results] == [None, 1.0, None]
    assert results[0].error == "the model's score is nan"
