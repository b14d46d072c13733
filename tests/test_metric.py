"""The metric as pyiqa uses it: what goes in, what comes out, and what is an error."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import pytest
import torch
from golden_data import GOLDEN, IMAGE_NAMES, SCORE_TOLERANCE, table
from pictures import encoded, random_image, to_tensor
from torch import Tensor, nn

from pyiqa_qscorer.errors import CheckpointError, ImageError, QScorerError
from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.metric import QScorer

PHOTOS = [GOLDEN / "images" / f"{name}.png" for name in IMAGE_NAMES]
GOOD = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))


def create(checkpoint: Path, **options: Any) -> Any:
    options = {"dtype": "float32", "device": "cpu", **options}
    return pyiqa.create_metric("qscorer", checkpoint=str(checkpoint), **options)


def changed(value: float) -> Tensor:
    images = GOOD.clone()
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize("key", ["load_fp32_eager", "merged_fp32_eager"])
def test_golden_images_score_as_published(folders: tuple[Path, Path, Path], key: str) -> None:
    lora, base, merged = folders
    where = {"checkpoint": lora, "base": str(base)} if key == "load_fp32_eager" else {"checkpoint": merged}
    metric = create(**where, attn_implementation="eager")
    assert isinstance(metric.net, QScorer)
    assert (metric.metric_mode, metric.lower_better, metric.score_range) == ("NR", False, "0, 5")
    scores = torch.cat([metric(str(path)) for path in PHOTOS])
    golden = torch.tensor(table("lora_golden/summary")[key]["score"])
    torch.testing.assert_close(scores[:, 0], golden, rtol=0, atol=SCORE_TOLERANCE)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(64, 48), (33, 70), (56, 56), (448, 448), (1, 1), (3, 3), (500, 7)])
def test_path_bytes_pil_and_tensor_score_alike_to_the_bit(own, tmp_path, size, mode) -> None:
    metric, image = create(own), random_image(*size, seed=0).convert(mode)
    path, tensor = tmp_path / "photo.png", to_tensor(image.convert("RGB"))
    image.save(path)
    with torch.no_grad():
        by_pillow = metric.net.score_pixels(pixels_from_pil(image.convert("RGB"), 56)[None])[:, None]
        ways = {
            "path": metric(str(path)),
            "bytes": metric(encoded(image)),
            "PIL": metric(image),
            "tensor": metric(tensor if mode == "RGB" else tensor[:, :1]),
            "float16 tensor": metric.net(tensor.half()),  # pyiqa refuses the value 1 in float16
            "own path": metric.net.score_pixels(pixels_from_pil(open_image(path), 56)[None])[:, None],
        }
    for way, score in ways.items():
        assert score.shape == (1, 1) and score.dtype is torch.float32
        assert torch.equal(score, by_pillow), way


def test_reductions_and_weight_of_a_loss(own: Path) -> None:
    images = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0], [0.0], [2.0]])
    with torch.no_grad():
        scores = QScorer(own)(images)
    for options, expected in (
        ({"loss_reduction": "mean"}, scores.mean()),
        ({"loss_reduction": "sum"}, scores.sum()),
        ({"loss_reduction": "none"}, scores),
        ({"loss_reduction": "sum", "loss_weight": weights}, (scores * weights).sum()),
    ):
        torch.testing.assert_close(create(own, as_loss=True, **options)(images), expected)


def test_clamping_copies_and_saving(own: Path, small: QScorer) -> None:
    raw, clamped = QScorer(own, clamp=False), QScorer(own)
    images = torch.cat([to_tensor(random_image(48, 64, seed)) for seed in range(12)])
    with torch.no_grad():
        free, kept = raw(images), clamped(images)
    assert (free > 5).any() and (free < 5).any() and torch.equal(kept, free.clamp(0, 5))
    leaf = images.clone().requires_grad_()
    clamped(leaf).sum().backward()
    assert (leaf.grad.flatten(1).norm(dim=1) > 0).all()  # also where the score was cut off
    twin, other = copy.deepcopy(small), QScorer(own)
    nn.init.zeros_(other.network.deepmlp.output_layer.weight)
    other.load_state_dict(small.state_dict())
    with torch.no_grad():
        for same in (twin, other):
            assert torch.equal(same(GOOD), small(GOOD))


def test_values_that_are_no_image_and_no_number_are_refused(small: QScorer) -> None:
    with torch.no_grad():
        for value in (float("nan"), float("inf"), -float("inf"), 1.01, -0.01, 255.0):
            with pytest.raises(ImageError, match=r"finite values in \[0, 1\], images \[1\] of the batch do not"):
                small(changed(value))
        assert torch.equal(small(changed(1 + 5e-7)), small(changed(1.0)))  # a network's rounding is tolerated
    small.network.deepmlp.output_layer.bias.fill_(float("inf"))
    with torch.no_grad(), pytest.raises(QScorerError, match=r"scores that are not finite .* in torch.float32; try"):
        small(GOOD)


def test_what_is_no_batch_and_unknown_options_are_refused(own: Path, small: QScorer) -> None:
    for images, words in ((torch.zeros(1, 8, 8, 3), "channels"), (np.zeros((1, 3, 8, 8)), "Tensor")):
        with pytest.raises(ImageError, match=words):
            small(images)
    with pytest.raises(TypeError, match="clip"):
        create(own, clip=False)
    with pytest.raises(ValueError, match="dtype must be one of"):
        create(own, dtype="half")
    with pytest.raises(CheckpointError, match="nowhere"):
        create(own.parent / "nowhere")


def dtypes(metric: QScorer) -> set[torch.dtype]:
    return {parameter.dtype for parameter in metric.network.parameters()}


def test_precision_of_auto_follows_the_device(folders, small, monkeypatch) -> None:
    """As on a machine with a GPU: built for float16, then moved to the CPU by pyiqa."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    metric = QScorer(folders[2])
    assert dtypes(metric) == {torch.float16}
    monkeypatch.undo()
    assert dtypes(metric.to("cpu")) == {torch.bfloat16} == {metric.dtype} == dtypes(QScorer(folders[2]))
    assert dtypes(small.to("cpu")) == {torch.float32}  # as it was saved


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda metric: metric.half(), torch.float16),
        (lambda metric: metric.float(), torch.float32),
        (lambda metric: metric.to(torch.float16), torch.float16),
        (lambda metric: metric.to("cpu", torch.float32), torch.float32),
    ],
)
def test_a_precision_that_the_caller_sets_stays(folders: tuple[Path, ...], change: Any, expected: torch.dtype) -> None:
    before, metric = QScorer(folders[2]).identity, change(QScorer(folders[2]))
    assert dtypes(metric) == {expected} == dtypes(metric.to("cpu")) and metric.identity != before
    asked = QScorer(folders[2], dtype=str(expected).removeprefix("torch."))
    assert dtypes(asked.to("cpu")) == {expected}
    with torch.no_grad():
        score = metric(GOOD)
    assert score.dtype is torch.float32 and score.isfinite().all()


def test_identity_tells_apart_what_changes_a_score_and_nothing_else(folders: tuple[Path, ...], own: Path) -> None:
    lora, base, merged = folders
    options = [{}, {"dtype": "float16"}, {"dtype": "float32"}, {"clamp": False}]
    options += [{"prompt": "evaluation"}, {"prompt": "training"}]
    identities = [QScorer(own).identity, *(QScorer(merged, **one).identity for one in options)]
    assert len(set(identities)) == len(identities)
    assert all(len(identity) == 64 and int(identity, 16) >= 0 for identity in identities)
    same = [QScorer(lora, base, dtype="float16"), QScorer(merged, dtype="float16").to("cpu")]
    same.append(QScorer(merged, dtype="float16", attn_implementation="eager", prompt="score"))
    assert {metric.identity for metric in same} == {identities[2]}
