"""The metric as pyiqa uses it: what goes in, what comes out, and what is an error."""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import pytest
import torch
from golden_data import GOLDEN, IMAGE_NAMES, SCORE_TOLERANCE, table
from PIL import Image
from tiny_checkpoint import published_folders
from torch import Tensor, nn

from pyiqa_qscorer.errors import CheckpointError, ImageError, QScorerError
from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.metric import QScorer

PHOTOS = [GOLDEN / "images" / f"{name}.png" for name in IMAGE_NAMES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return published_folders(tmp_path_factory.mktemp("published"), stand_in=True)


@pytest.fixture(scope="module")
def metric(folders: tuple[Path, Path, Path]) -> Any:
    return create(folders[2])


def create(checkpoint: Path, **options: Any) -> Any:
    options = {"dtype": "float32", "device": "cpu", **options}
    return pyiqa.create_metric("qscorer", checkpoint=str(checkpoint), **options)


def photo(size: tuple[int, int] = (64, 48), seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)


def as_tensor(image: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(image.convert("RGB")))
    return levels.permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("key", ["load_fp32_eager", "merged_fp32_eager"])
def test_golden_images_score_as_published(folders: tuple[Path, Path, Path], key: str) -> None:
    lora, base, merged = folders
    if key == "load_fp32_eager":
        metric = create(lora, base=str(base), attn_implementation="eager")
    else:
        metric = create(merged, attn_implementation="eager")
    scores = torch.cat([metric(str(path)) for path in PHOTOS])
    golden = torch.tensor(table("lora_golden/summary")[key]["score"])
    torch.testing.assert_close(scores[:, 0], golden, rtol=0, atol=SCORE_TOLERANCE)


def test_pyiqa_knows_what_the_score_means(metric: Any) -> None:
    assert isinstance(metric.net, QScorer)
    assert (metric.metric_mode, metric.lower_better, metric.score_range) == ("NR", False, "0, 5")


@pytest.mark.parametrize("size", [(64, 48), (33, 70), (56, 56), (448, 448), (1, 1), (3, 3), (500, 7)])
def test_path_bytes_pil_and_tensor_score_alike_to_the_bit(own: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    metric, image = create(own), photo(size)
    path, buffer = tmp_path / "photo.png", io.BytesIO()
    image.save(path)
    image.save(buffer, "png")
    with torch.no_grad():
        by_pillow = metric.net.score_pixels(pixels_from_pil(image, 56)[None])[:, None]
        ways = {
            "path": metric(str(path)),
            "bytes": metric(buffer.getvalue()),
            "PIL": metric(image),
            "tensor": metric(as_tensor(image)),
            "float16 tensor": metric.net(as_tensor(image).half()),  # pyiqa refuses the value 1 in float16
            "own path": metric.net.score_pixels(pixels_from_pil(open_image(path), 56)[None])[:, None],
        }
    for way, score in ways.items():
        assert score.shape == (1, 1)
        assert score.dtype is torch.float32
        assert torch.equal(score, by_pillow), way


def test_gray_tensors_and_images_are_repeated(metric: Any) -> None:
    image = photo(mode="L")
    gray = torch.from_numpy(np.array(image))[None, None].float() / 255
    with torch.no_grad():
        assert torch.equal(metric(gray), metric(gray.expand(-1, 3, -1, -1)))
        assert torch.equal(metric(gray), metric(image))


def test_a_batch_scores_as_its_images(small: QScorer) -> None:
    images = torch.cat([as_tensor(photo(seed=seed)) for seed in range(5)])
    with torch.no_grad():
        together = small(images)
        alone = torch.cat([small(image[None]) for image in images])
    assert together.shape == (5, 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert together.std() > 0.1  # the random checkpoint does look at the image


@pytest.mark.parametrize("clamp", [True, False])
def test_backward_of_pyiqa_s_generic_test(folders: tuple[Path, Path, Path], clamp: bool) -> None:
    """Values outside [0, 1], as an untrained network gives: finite gradients, not zero inside, and not all outside."""
    loss = create(folders[2], as_loss=True, clamp=clamp)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(images)
    assert value.shape == ()
    value.backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    outside = (images < 0) | (images > 1)
    assert (images.grad != 0)[~outside].float().mean() > 0.9
    assert 0.3 < (images.grad != 0)[outside].float().mean() < 0.7
    assert all(parameter.grad is None for parameter in loss.net.parameters())


def test_reductions_and_weight_of_a_loss(own: Path) -> None:
    images = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = QScorer(own)(images)
    options = {"as_loss": True}
    mean, total = (create(own, **options, loss_reduction=how)(images) for how in ("mean", "sum"))
    torch.testing.assert_close(mean, scores.mean())
    torch.testing.assert_close(total, scores.sum())
    each = create(own, **options, loss_reduction="none")(images)
    torch.testing.assert_close(each, scores)
    weights = torch.tensor([[1.0], [0.0], [2.0]])
    weighted = create(own, **options, loss_weight=weights, loss_reduction="sum")(images)
    torch.testing.assert_close(weighted, (scores * weights).sum())


def test_gradient_is_the_slope_of_the_score(own: Path) -> None:
    """Against differences of one 8-bit level per pixel, the smallest that a score can see. 56 x 56 is not resized."""
    metric = QScorer(own, clamp=False).double()
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(60, 190, (1, 3, 56, 56), generator=generator).double()
    direction = torch.randint(0, 2, levels.shape, generator=generator).double() * 2 - 1
    image = (levels / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(metric(image).sum(), image)
    with torch.no_grad():
        higher, lower = metric((levels + direction) / 255), metric((levels - direction) / 255)
        uphill = metric((levels + gradient.sign()) / 255)
        here = metric(image)
    slope, expected = (higher - lower).item() / (2 / 255), (gradient * direction).sum().item()
    assert abs(slope - expected) < 0.1 * abs(expected)
    assert uphill > here


def test_clamping(own: Path) -> None:
    raw, clamped = QScorer(own, clamp=False), QScorer(own)
    images = torch.cat([as_tensor(photo(seed=seed)) for seed in range(12)])
    with torch.no_grad():
        free, kept = raw(images), clamped(images)
    assert (free > 5).any()
    assert (free < 5).any()
    assert torch.equal(kept, free.clamp(0, 5))
    leaf = images.clone().requires_grad_()
    clamped(leaf).sum().backward()
    assert (leaf.grad.flatten(1).norm(dim=1) > 0).all()  # also where the score was cut off


def test_parameters_are_frozen_and_the_network_evaluates(metric: Any) -> None:
    assert not any(parameter.requires_grad for parameter in metric.net.parameters())
    assert not any(module.training for module in metric.net.modules())


def test_survives_a_trainer_that_deep_copies_and_saves_it(own: Path, small: QScorer) -> None:
    images = torch.rand(2, 3, 56, 56)
    twin = copy.deepcopy(small)
    with torch.no_grad():
        assert torch.equal(twin(images), small(images))
    other = QScorer(own)
    nn.init.zeros_(other.network.deepmlp.output_layer.weight)
    other.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images), small(images))


GOOD = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))


def changed(value: float, row: int = 1) -> Tensor:
    images = GOOD.clone()
    images[row, 2, 3, 4] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.01, -0.01, 255.0])
def test_values_that_are_no_image_are_refused(small: QScorer, value: float) -> None:
    expected = r"finite values in \[0, 1\], images \[1\] of the batch do not"
    with torch.no_grad(), pytest.raises(ImageError, match=expected):
        small(changed(value))


def test_a_loss_clamps_what_lies_outside(small: QScorer) -> None:
    with torch.enable_grad():
        assert torch.equal(small(changed(1.5).requires_grad_()), small(changed(1.0).requires_grad_()))


def test_rounding_errors_of_a_network_are_within_tolerance(small: QScorer) -> None:
    with torch.no_grad():
        assert torch.equal(small(changed(1 + 5e-7)), small(changed(1.0)))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 8, 8), "axes"),
        (torch.zeros(1, 4, 8, 8), "alpha"),
        (torch.zeros(1, 8, 8, 3), "channels"),
        (torch.zeros(0, 3, 8, 8), "image"),
        (torch.zeros(1, 3, 0, 8), "pixel"),
        (np.zeros((1, 3, 8, 8)), "Tensor"),
    ],
)
def test_shapes_and_types_that_are_no_batch_are_refused(small: QScorer, images: Any, expected: str) -> None:
    with pytest.raises(ImageError, match=expected):
        small(images)


def test_a_model_that_gives_no_number_is_an_error(small: QScorer) -> None:
    small.network.deepmlp.output_layer.bias.fill_(float("inf"))
    with torch.no_grad(), pytest.raises(QScorerError, match=r"scores that are not finite .* in torch.float32; try"):
        small(GOOD)


def test_unknown_options_are_refused(own: Path) -> None:
    with pytest.raises(TypeError, match="clip"):
        create(own, clip=False)
    with pytest.raises(ValueError, match="dtype must be one of"):
        create(own, dtype="half")
    with pytest.raises(CheckpointError, match="nowhere"):
        create(own.parent / "nowhere")


def dtypes(metric: QScorer) -> set[torch.dtype]:
    return {parameter.dtype for parameter in metric.network.parameters()}


def test_precision_of_auto_follows_the_device(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU: built for float16, then moved to the CPU by pyiqa."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    metric = QScorer(folders[2])
    assert dtypes(metric) == {torch.float16}
    monkeypatch.undo()
    assert dtypes(metric.to("cpu")) == {torch.bfloat16}
    assert metric.dtype is torch.bfloat16
    assert dtypes(QScorer(folders[2])) == {torch.bfloat16}


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
    metric = change(QScorer(folders[2]))
    assert dtypes(metric) == {expected}
    assert dtypes(metric.to("cpu")) == {expected}
    with torch.no_grad():
        score = metric(as_tensor(photo()))
    assert score.dtype is torch.float32
    assert score.isfinite().all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_precision_that_is_asked_for_stays(folders: tuple[Path, Path, Path], dtype: str) -> None:
    metric = QScorer(folders[2], dtype=dtype)
    assert dtypes(metric.to("cpu")) == {getattr(torch, dtype)}


def test_own_checkpoint_in_float32_stays_so(small: QScorer) -> None:
    assert dtypes(small.to("cpu")) == {torch.float32}


def test_half_precision_scores_near_the_exact_ones(folders: tuple[Path, Path, Path]) -> None:
    images = torch.cat([as_tensor(photo(seed=seed)) for seed in range(4)])
    with torch.no_grad():
        exact, half = (QScorer(folders[2], dtype=dtype)(images) for dtype in ("float32", "float16"))
    torch.testing.assert_close(half, exact, rtol=0, atol=0.1)


def test_identity_tells_apart_what_changes_a_score(folders: tuple[Path, Path, Path], own: Path) -> None:
    merged = folders[2]
    variants = [
        QScorer(merged),
        QScorer(merged, dtype="float16"),
        QScorer(merged, dtype="float32"),
        QScorer(merged, clamp=False),
        QScorer(merged, prompt="evaluation"),
        QScorer(merged, prompt="training"),
        QScorer(own),
    ]
    identities = [metric.identity for metric in variants]
    assert len(set(identities)) == len(variants)
    assert all(len(identity) == 64 and int(identity, 16) >= 0 for identity in identities)


def test_identity_is_the_same_where_scores_are(folders: tuple[Path, Path, Path]) -> None:
    lora, base, merged = folders
    one = QScorer(merged, dtype="float16").identity
    assert QScorer(lora, base, dtype="float16").identity == one
    assert QScorer(merged, dtype="float16", attn_implementation="eager", prompt="score").identity == one
    assert QScorer(merged, dtype="float16").to("cpu").identity == one


def test_identity_follows_a_change_of_precision(folders: tuple[Path, Path, Path]) -> None:
    metric = QScorer(folders[2], dtype="float16")
    before = metric.identity
    assert metric.float().identity != before
