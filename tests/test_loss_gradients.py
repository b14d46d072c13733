"""The metric as a loss: true gradients, and the value of scoring."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyiqa
import pytest
import torch
from pictures import to_tensor
from smooth_pixels import smooth_pixels
from test_features import ARCHITECTURE
from tiny_checkpoint import published_folders, scored
from torch import Tensor, nn

from pyiqa_qscorer.checkpoints import save_folder
from pyiqa_qscorer.images.preprocessing import pixels_from_tensor
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.loss import QScorerLoss
from pyiqa_qscorer.metric import QScorer
from pyiqa_qscorer.training.config import ModelConfig
from pyiqa_qscorer.training.starting_model import new_network
from pyiqa_qscorer.training.tokenizer import prompt_tokenizer

TESTS = Path(__file__).resolve().parent
# "tiny" has the published layout and vision encoder, "features" the mini's kind of encoder, both random weights.
NAMES = ["tiny", "features", "qscorer-mini"]
KINKED = ("qscorer-mini",)
"""Metrics with many activations cut off at 0 and 6: rounding or a step puts some of them on the other side."""

every_metric = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def create(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    tokenizer = prompt_tokenizer()
    model = new_network(ModelConfig(architecture=ARCHITECTURE), tokenizer)
    folders = {
        "tiny": published_folders(tmp_path_factory.mktemp("published"), stand_in=True)[2],
        "features": save_folder(tmp_path_factory.mktemp("features") / "own", model, tokenizer),
    }

    def build(name: str, **more: Any) -> Any:
        checkpoint = {"checkpoint": str(folders[name])} if name in folders else {}
        options = {"device": "cpu", "dtype": "float32", **checkpoint, **more}
        return pyiqa.create_metric("qscorer" if checkpoint else name, **options)

    return build


def photo(height: int = 90, width: int = 120, count: int = 1) -> Tensor:
    """Crops (count, 3, height, width) of a photo, in [0, 1]."""
    image = to_tensor(open_image(TESTS / "photos" / "coffee.jpg"))
    return torch.cat([image[..., 20 * i : 20 * i + height, 30 * i : 30 * i + width] for i in range(count)])


def gradient_of(function: Any, images: Tensor) -> Tensor:
    leaf = images.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def two_steps(metric: QScorer, blank: bool) -> None:
    """Have the network choose the blank (one pass is enough), or another token (the second step is needed)."""
    with torch.no_grad():
        row, states = metric.network.lm_head.weight[metric.prompt.blank], []
        hook = metric.network.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        metric(photo(count=2))
        hook.remove()
        row.copy_((100 if blank else -100) * states[0].mean(0) / states[0].mean(0).norm())


@every_metric
def test_generic_gradient(create: Any, name: str) -> None:
    """Of values beyond [0, 1], as an untrained network gives: finite, not zero inside, and not all outside."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = create(name, as_loss=True, clamp=name != "tiny")(images)
    assert value.shape == ()
    value.backward()
    assert images.grad.isfinite().all()
    inside = (images >= 0) & (images <= 1)
    assert (images.grad[inside] != 0).float().mean() > 0.9 and (images.grad.flatten(1).norm(dim=1) > 0).all()
    if name == "tiny":
        assert 0.3 < (images.grad != 0)[~inside].float().mean() < 0.7


@every_metric
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_generic_gpu_consistency(create: Any, name: str) -> None:
    images, results = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)), []
    for device in ("cpu", "cuda"):
        metric = create(name, as_loss=True, loss_reduction="none", device=device)
        leaf = images.to(device).requires_grad_()
        score = metric(leaf)
        score.sum().backward()
        results.append((score.detach().cpu(), leaf.grad.cpu()))
    (score, gradient), (score_gpu, gradient_gpu) = results
    torch.testing.assert_close(score_gpu, score, rtol=0, atol=1e-2)
    torch.testing.assert_close(gradient_gpu, gradient, rtol=0, atol=0.02 * gradient.abs().max().item())


@every_metric
@pytest.mark.parametrize("blank", [True, False])
def test_value_with_gradient_is_the_score_to_the_bit(create: Any, name: str, blank: bool) -> None:
    scoring, loss, checkpointed = (
        create(name, **more) for more in ({}, {"as_loss": True}, {"as_loss": True, "gradient_checkpointing": True})
    )
    for metric in (scoring, loss, checkpointed):
        two_steps(metric.net, blank)
    for images in (photo(count=3), photo(300, 40), photo(448, 448))[: 2 if name in KINKED else 3]:
        with torch.no_grad():
            output = scored(scoring.net, pixels_from_tensor(images, scoring.net.image_size))
        assert (output.first_token == scoring.net.prompt.blank).all() == blank
        expected = scoring(images)
        for metric in (loss, checkpointed):
            value = metric.net(images.clone().requires_grad_())
            assert value.requires_grad and torch.equal(value.detach(), expected)


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, size) for name in ("tiny", "features") for size in ((60, 90), (448, 448))), ("qscorer-mini", (60, 90))],
)
def test_directional_derivative_is_that_of_finite_differences(create: Any, name: str, size: tuple[int, int]) -> None:
    """On the smooth path, in float64, whole chain: pad, resize, normalise, vision, abstractor, decoder, regressor."""
    metric = create(name, clamp=False).net.double()

    def score(images: Tensor) -> Tensor:
        return scored(metric, smooth_pixels(images, metric.image_size)).raw_score

    images = photo(*size).double() * 0.8 + 0.1
    gradient, generator = gradient_of(score, images), torch.Generator().manual_seed(0)
    for direction in (gradient / gradient.norm(), torch.randn(images.shape, generator=generator).double()):
        # A smaller step crosses fewer kinks; a larger one loses less to rounding.
        step = (1e-7 if name in KINKED else 1e-5) / direction.abs().max()
        with torch.no_grad():
            slope = (score(images + step * direction) - score(images - step * direction)) / (2 * step)
        expected = (gradient * direction).sum()
        assert abs(slope.item() - expected.item()) < (1e-2 if name in KINKED else 1e-4) * abs(expected.item())


@every_metric
def test_gradient_of_the_score_is_that_of_the_smooth_path(create: Any, name: str) -> None:
    """Where nothing is rounded: 8-bit levels at the size of the network."""
    metric = create(name, as_loss=True, clamp=False).net
    images = photo(200, 200).expand(1, 3, 200, 200)
    images = nn.functional.interpolate(images, metric.image_size).mul(255).round().div(255)
    smooth = gradient_of(lambda leaf: scored(metric, smooth_pixels(leaf, metric.image_size).float()).raw_score, images)
    gradient = gradient_of(metric, images)
    if name in KINKED:
        assert (gradient - smooth).norm() < 2e-2 * smooth.norm()
    else:
        torch.testing.assert_close(gradient, smooth, rtol=0, atol=1e-4 * smooth.abs().max().item())


@every_metric
def test_gradient_does_not_depend_on_neighbours_and_parameters_hold_none(create: Any, name: str) -> None:
    metric, images = create(name, as_loss=True).net, photo(64, 64, count=3)
    for row, together in enumerate(gradient_of(metric, images)):
        alone = gradient_of(metric, images[row : row + 1])[0]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-3 * alone.abs().max().item())
    metric = create(name, as_loss=True)
    loss, images = QScorerLoss(metric.net), photo().requires_grad_()
    (loss(images) - metric(images)).backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loss.parameters())


@every_metric
@pytest.mark.parametrize("blank", [True, False])
def test_gradient_checkpointing_gives_equal_gradients_with_less_memory(create: Any, name: str, blank: bool) -> None:
    gradients, stored = [], []
    for checkpointing in (False, True):
        metric = create(name, as_loss=True, gradient_checkpointing=checkpointing).net
        two_steps(metric, blank)
        calls = Counter()
        metric.network.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.update("m"))
        leaf = pixels_from_tensor(photo(count=2), metric.image_size).requires_grad_()
        sizes: dict[int, int] = {}
        known = {tensor.untyped_storage().data_ptr() for tensor in (leaf, *metric.parameters())}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes, known: set[int] = known) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            score = metric.score_pixels(leaf).sum()
        stored.append(sum(sizes.values()))
        before = calls["m"]
        score.backward()
        assert (calls["m"] > before) == checkpointing
        gradients.append(leaf.grad)
        assert not any(module.training for module in metric.modules() if isinstance(module, nn.Linear))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 * gradients[0].abs().max().item())
    # The convolutions of a feature network are not recomputed, and hold nearly all of it.
    assert stored[1] < (0.5 if name == "tiny" else 1) * stored[0]


def test_gradient_checkpointing_while_parameters_train(own: Path) -> None:
    """As in pyiqa's trainer: train mode, gradients of the weights too."""
    gradients = []
    for checkpointing in (False, True):
        metric = QScorer(own, gradient_checkpointing=checkpointing).requires_grad_(True).train()
        metric(photo(56, 56, count=2)).sum().backward()
        gradients.append({name: p.grad for name, p in metric.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and len(plain) > 50
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-5, msg=name)


@every_metric
def test_autocast(create: Any, name: str) -> None:
    """bfloat16 keeps 8 bits of each number: a near value, a gradient of the same direction."""
    metric = create(name, as_loss=True, clamp=False).net
    two_steps(metric, blank=True)
    images = photo(150, 150)  # not the flat corner alone, where the gradient of the mini nearly vanishes
    exact, gradient = metric(images.clone().requires_grad_()), gradient_of(metric, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = images.clone().requires_grad_()
        half = metric(leaf)
        half.sum().backward()
    assert half.dtype is torch.float32 and abs(half - exact).item() < 0.3
    direction = torch.cosine_similarity(leaf.grad.flatten(), gradient.flatten(), dim=0)
    assert direction > (0.6 if name in KINKED else 0.9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_half_precision(create: Any, dtype: str) -> None:
    leaf = photo().to(getattr(torch, dtype)).requires_grad_()
    create("tiny", as_loss=True, dtype=dtype).net(leaf).sum().backward()
    assert leaf.grad.dtype == leaf.dtype and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("start", ["inside", "outside"])
def test_optimising_pixels_raises_the_score_and_stays_in_range(own: Path, start: str) -> None:
    """Sign descent without any projection: never more than a step outside, nor further out than at the start."""
    metric = QScorer(own, clamp=False)
    two_steps(metric, blank=True)
    loss, images = QScorerLoss(metric), photo(56, 56, count=2)
    step, reach = (0.004, 0.004) if start == "inside" else (0.02, 0.3)
    if start == "outside":
        images[:, :, :10], images[:, :, 10:20] = 1.3, -0.3
    before = loss.rewards(images)
    for _ in range(50):
        images = images - step * gradient_of(loss, images).sign()
    assert images.min() >= -reach - 1e-5 and images.max() <= 1 + reach + 1e-5
    if start == "inside":
        assert (loss.rewards(images) > before + 0.05).all()
    else:
        assert ((images[:, :, :20] >= 0) & (images[:, :, :20] <= 1)).float().mean() > 0.2
