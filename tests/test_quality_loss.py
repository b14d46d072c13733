"""The metric as a loss: true gradients, the value of scoring, and `QScorerLoss` in its trainers."""

import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyiqa
import pytest
import torch
import yaml
from pictures import to_tensor
from pyiqa.utils import registry
from pyiqa_training import train_in_pyiqa
from test_features import ARCHITECTURE
from tiny_checkpoint import published_folders
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyiqa_qscorer.checkpoints import save_folder
from pyiqa_qscorer.checkpoints.start import Formulation, start_new
from pyiqa_qscorer.errors import ImageError, QScorerError
from pyiqa_qscorer.host.registration import AUTOLOAD_VARIABLE, register_loss
from pyiqa_qscorer.images.preprocessing import pixels_from_tensor
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.loss import QScorerLoss
from pyiqa_qscorer.metric import QScorer
from pyiqa_qscorer.registry import METRICS
from pyiqa_qscorer.training.tokenizer import prompt_tokenizer

TESTS = Path(__file__).resolve().parent
# "tiny" has the published layout and vision encoder, "features" the mini's kind of encoder, both random weights;
# the mini joins as soon as there is one.
NAMES = ["tiny", "features", *(name for name in ("qscorer-mini",) if name in METRICS)]
KINKED = ("qscorer-mini",)
"""Metrics with many activations cut off at 0 and 6: rounding or a step puts some of them on the other side."""

every_metric = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def options_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Metric name of pyiqa and options for a name of `NAMES`."""
    merged = published_folders(tmp_path_factory.mktemp("published"), stand_in=True)[2]
    torch.manual_seed(0)
    start = start_new(ARCHITECTURE, prompt_tokenizer(), Formulation("score_token", 5, []))
    features = save_folder(tmp_path_factory.mktemp("features") / "own", start.model, start.tokenizer)

    def options(name: str) -> tuple[str, dict[str, Any]]:
        if name == "tiny":
            return "qscorer", {"checkpoint": str(merged), "dtype": "float32"}
        if name == "features":
            return "qscorer", {"checkpoint": str(features), "dtype": "float32"}
        return name, {"dtype": "float32"}

    return options


@pytest.fixture(scope="module")
def create(options_of: Any) -> Any:
    def build(name: str, **more: Any) -> Any:
        metric, options = options_of(name)
        return pyiqa.create_metric(metric, **{"device": "cpu", **options, **more})

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
        row = metric.network.lm_head.weight[metric.prompt.blank]
        states = []
        hook = metric.network.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        metric(photo(count=2))
        hook.remove()
        row.copy_((100 if blank else -100) * states[0].mean(0) / states[0].mean(0).norm())


@every_metric
def test_generic_forward(create: Any, name: str) -> None:
    scores = create(name)(torch.rand(2, 3, 224, 224))
    assert scores.shape == (2, 1)
    assert scores.isfinite().all()


@every_metric
def test_generic_gradient(create: Any, name: str) -> None:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).requires_grad_()
    create(name, as_loss=True)(images).backward()
    assert images.grad.isfinite().all()
    inside = (images >= 0) & (images <= 1)
    assert (images.grad[inside] != 0).float().mean() > 0.9
    for gradient in images.grad:
        assert gradient.norm() > 0


@every_metric
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_generic_gpu_consistency(create: Any, name: str) -> None:
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    results = []
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
    for images in (photo(count=3), photo(300, 40), photo(448, 448)):
        with torch.no_grad():
            output = scoring.net.network.score(
                pixels_from_tensor(images, scoring.net.image_size), *prompt_of(scoring.net)
            )
        assert (output.first_token == scoring.net.prompt.blank).all() == blank
        expected = scoring(images)
        for metric in (loss, checkpointed):
            value = metric.net(images.clone().requires_grad_())
            assert value.requires_grad
            assert torch.equal(value.detach(), expected)


def prompt_of(metric: QScorer) -> tuple[Any, Any, int]:
    return metric.prompt.prefix, metric.prompt.suffix, metric.prompt.blank


@every_metric
@pytest.mark.parametrize("size", [(60, 90), (448, 448)])
def test_directional_derivative_is_that_of_finite_differences(create: Any, name: str, size: tuple[int, int]) -> None:
    """On the smooth path, in float64, whole chain: pad, resize, normalise, vision, abstractor, decoder, regressor."""
    metric = create(name, clamp=False).net.double()

    def score(images: Tensor) -> Tensor:
        pixels = pixels_from_tensor(images, metric.image_size, exact=False)
        return metric.network.score(pixels, *prompt_of(metric)).raw_score

    images = photo(*size).double() * 0.8 + 0.1
    gradient = gradient_of(score, images)
    generator = torch.Generator().manual_seed(0)
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
    smooth = gradient_of(
        lambda leaf: (
            metric.network.score(
                pixels_from_tensor(leaf, metric.image_size, exact=False).float(), *prompt_of(metric)
            ).raw_score
        ),
        images,
    )
    gradient = gradient_of(metric, images)
    if name in KINKED:
        assert (gradient - smooth).norm() < 2e-2 * smooth.norm()
    else:
        torch.testing.assert_close(gradient, smooth, rtol=0, atol=1e-4 * smooth.abs().max().item())


@every_metric
def test_gradient_does_not_depend_on_neighbours(create: Any, name: str) -> None:
    metric = create(name, as_loss=True).net
    images = photo(64, 64, count=3)
    together = gradient_of(metric, images)
    for row in range(3):
        alone = gradient_of(metric, images[row : row + 1])
        scale = alone.abs().max().item()
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-3 * scale)


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
def test_parameters_hold_no_gradient_but_the_input_does(create: Any, name: str) -> None:
    metric = create(name, as_loss=True)
    loss = QScorerLoss(metric.net)
    images = photo().requires_grad_()
    (loss(images) - metric(images)).backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loss.parameters())


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
    assert half.dtype is torch.float32
    assert abs(half - exact).item() < 0.3
    direction = torch.cosine_similarity(leaf.grad.flatten(), gradient.flatten(), dim=0)
    assert direction > (0.6 if name in KINKED else 0.9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_half_precision(create: Any, dtype: str) -> None:
    leaf = photo().to(getattr(torch, dtype)).requires_grad_()
    create("tiny", as_loss=True, dtype=dtype).net(leaf).sum().backward()
    assert leaf.grad.dtype == leaf.dtype
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


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


class Synchronisations(TorchDispatchMode):
    """Counts operators after which the CPU must know a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_synchronisations_do_not_grow_with_the_batch(small: QScorer, gradient: bool, blank: bool) -> None:
    two_steps(small, blank)
    loss = QScorerLoss(small)
    totals = []
    for count in (1, 7):
        images = photo(56, 56).repeat(count, 1, 1, 1).requires_grad_(gradient)
        with torch.set_grad_enabled(gradient), Synchronisations() as mode:
            result = loss(images)
            if gradient:
                result.backward()
        totals.append(mode.counts)
    assert 0 < totals[0].total() <= 7  # one of them for the prefix cache
    assert totals[0] == totals[1]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.layer(images)


@pytest.mark.slow
def test_compiles(small: QScorer) -> None:
    """Restorer and loss together, traced; the code generator itself is left out, it takes minutes."""
    torch.manual_seed(0)
    loss, restorer = QScorerLoss(small), Denoiser()

    def step(images: Tensor) -> Tensor:
        return loss(restorer(images))

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        restorer.zero_grad()
        images = photo(50, 70, count=2).requires_grad_()
        value = function(images)
        value.backward()
        results.append((value.detach(), images.grad, restorer.layer.weight.grad.clone()))
    for plain, compiled in zip(*results, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        rewards = torch.compile(loss.rewards, backend="aot_eager")(photo(50, 70))
    torch.testing.assert_close(rewards, loss.rewards(photo(50, 70)), rtol=0, atol=1e-5)


DDP = """
import json, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pyiqa_qscorer import QScorerLoss
torch.set_num_threads(1)
folder, store, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(0)
images = torch.rand(4, 3, 56, 56)
class Trained(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.layer, loss = torch.nn.Conv2d(3, 3, 3, padding=1), QScorerLoss(checkpoint=folder, device="cpu")
        self.loss = loss if inside else [loss]
    def forward(self, images):
        restored = images + self.layer(images)
        return restored if isinstance(self.loss, list) else self.loss(restored)
found = []
for inside in (False, True):
    torch.manual_seed(1)
    module = Trained(inside)
    wrapped = DistributedDataParallel(module)
    part = wrapped(images[rank * 4 // world : (rank + 1) * 4 // world])
    (part if inside else module.loss[0](part)).backward()
    found.append(module.layer.weight.grad.flatten().tolist())
print(json.dumps(found))
del wrapped, part, module  # what holds the group keeps its threads, which can abort the interpreter at its end
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(own: Path, tmp_path: Path) -> None:
    """DDP, the loss beside the wrapped module and in it."""
    gradients = {}
    for world in (1, 2):
        commands = [
            [sys.executable, "-c", DDP, str(own), str(tmp_path / f"store{world}"), str(rank), str(world)]
            for rank in range(world)
        ]
        running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
        for process in running:
            out, error = process.communicate(timeout=240)
            assert process.returncode == 0, error
            gradients[world, commands[running.index(process)][5]] = torch.tensor(yaml.safe_load(out.splitlines()[-1]))
    expected = gradients[1, "0"]
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(expected[0], expected[1])
    for rank in ("0", "1"):
        torch.testing.assert_close(gradients[2, rank], expected, rtol=1e-3, atol=1e-6)


@pytest.fixture
def scored(small: QScorer) -> tuple[QScorer, Tensor, Tensor]:
    """Metric, images and their scores, which lie on both sides of 2.5."""
    two_steps(small, blank=True)
    images = torch.cat([photo(40, 56, count=4), torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))])
    last = small.network.deepmlp.output_layer
    with torch.no_grad():
        raw = small(images)[:, 0]
        last.weight /= raw.std()
        last.bias.copy_(2.5 - (raw.mean() - last.bias) / raw.std())
        scores = small(images)[:, 0]
    assert scores.min() < 2 and 3 < scores.max() < 5
    return small, images, scores


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda scores: -scores),
        ({"target": 2.5}, lambda scores: 2.5 - scores),
        ({"target": 2.5, "hinge": True}, lambda scores: (2.5 - scores).clamp(min=0)),
        ({"target": 5, "loss_weight": 0.25}, lambda scores: 0.25 * (5 - scores)),
        ({"loss_weight": 0}, lambda scores: 0 * scores),
    ],
)
def test_values(scored: tuple[QScorer, Tensor, Tensor], options: dict[str, Any], expected: Any, reduction: str) -> None:
    metric, images, scores = scored
    losses = expected(scores)
    losses = {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]
    loss = QScorerLoss(metric, reduction=reduction, **options)
    for batch in (images, images.clone().requires_grad_()):
        value = loss(batch)
        assert value.dtype is torch.float32
        assert value.shape == losses.shape
        torch.testing.assert_close(value.detach(), losses, rtol=0, atol=1e-6)


def test_hinge_leaves_good_images_alone(scored: tuple[QScorer, Tensor, Tensor]) -> None:
    metric, images, scores = scored
    gradient = gradient_of(QScorerLoss(metric, target=2.5, hinge=True), images).flatten(1).norm(dim=1)
    assert ((gradient > 0) == (scores < 2.5)).all()


def test_loss_is_minus_the_metric_of_pyiqa(own: Path) -> None:
    options = {"checkpoint": str(own), "device": "cpu"}
    metric, loss = pyiqa.create_metric("qscorer", as_loss=True, **options), QScorerLoss("qscorer", **options)
    images = 3 * torch.rand(3, 3, 30, 56, generator=torch.Generator().manual_seed(0)) - 1
    assert torch.equal(loss(images), -metric(images))
    assert torch.equal(gradient_of(loss, images), gradient_of(lambda leaf: -metric(leaf), images))


def test_a_checkpoint_alone_is_not_taken_for_the_small_model(options_of: Any) -> None:
    """Whose options would load it in float32."""
    loss = QScorerLoss(checkpoint=options_of("tiny")[1]["checkpoint"], device="cpu")
    assert loss.metric.dtype is torch.bfloat16


def test_rewards(scored: tuple[QScorer, Tensor, Tensor]) -> None:
    metric, images, scores = scored
    loss = QScorerLoss(metric, loss_weight=3, target=4, hinge=True, reduction="sum")
    rewards = loss.rewards(images.clone().requires_grad_())
    assert not rewards.requires_grad
    assert torch.equal(rewards, scores)


def test_value_outside_the_range_is_the_same_with_and_without_gradient(small: QScorer) -> None:
    loss = QScorerLoss(small, reduction="none")
    images = 3 * torch.rand(2, 3, 30, 56, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        value = loss(images)
    assert torch.equal(loss(images.clone().requires_grad_()).detach(), value)
    assert torch.equal(loss.rewards(images), -value)
    assert torch.equal(loss.rewards(images.clamp(0, 1)), -value)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_another_scale_is_refused_and_an_overshoot_is_not(small: QScorer, gradient: bool, channels: int) -> None:
    loss, images = QScorerLoss(small), photo(count=3)[:, :channels]
    images[:, :, ::2, ::2] *= 0  # black alone is black in every scale
    one = images.clone()
    one[1] *= 255
    for wrong, rows in ((images * 255, [0, 1, 2]), (one, [1]), (images.double() * 65535, [0, 1, 2])):
        for judged in (loss, loss.rewards):
            with (
                torch.set_grad_enabled(gradient),
                pytest.raises(ImageError, match=rf"images \{rows} of the batch.*divide 8-bit values by 255"),
            ):
                judged(wrong.clone().requires_grad_(gradient))
    images[0, 0, 0, 0] = 40.0  # one pixel runs away
    assert torch.equal(loss(images), loss(images.clamp(0, 1)))
    assert loss(torch.randn(2, 3, 40, 40)).isfinite()  # an untrained network


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gradient", [True, False])
def test_values_that_are_not_finite_are_refused(small: QScorer, bad: float, gradient: bool) -> None:
    loss, images = QScorerLoss(small), photo(count=3)
    images[1, 2, 3, 4] = bad
    with torch.set_grad_enabled(gradient), pytest.raises(ImageError, match=r"images \[1\] of the batch"):
        loss(images.requires_grad_(gradient))
    with pytest.raises(ImageError, match=r"images \[1\] of the batch"):
        loss.rewards(images)


def test_stays_in_eval_mode_and_frozen_inside_a_module_that_trains(small: QScorer) -> None:
    small.requires_grad_(True)
    whole = nn.ModuleDict({"restorer": Denoiser(), "loss": QScorerLoss(small)}).train()
    assert whole["loss"].training
    assert not any(module.training for module in small.modules())
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "average"}, ["reduction must be one of none, mean, sum", "'average'"]),
        ({"loss_weight": -1.0}, ["loss_weight must be a number finite and at least 0", "-1.0"]),
        ({"loss_weight": math.nan}, ["loss_weight", "nan"]),
        ({"loss_weight": math.inf}, ["loss_weight", "inf"]),
        ({"loss_weight": "1"}, ["loss_weight", "'1'"]),
        ({"target": 5.5}, ["target must be a number in [0, 5]", "5.5"]),
        ({"target": True}, ["target", "True"]),
        ({"hinge": True}, ["hinge", "target", "None"]),
        ({"dtype": "float32"}, ["dtype", "QScorer(...)"]),
        ({"gradient_checkpointing": True}, ["gradient_checkpointing", "QScorer(...)"]),
        ({"metric": nn.Identity()}, ["metric", "Identity"]),
    ],
)
def test_wrong_arguments_are_refused(small: QScorer, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        QScorerLoss(**{"metric": small, **options})
    for word in words:
        assert word in str(caught.value)


def test_wrong_names_are_refused(own: Path) -> None:
    with pytest.raises(QScorerError, match="did you mean 'qscorer_"):
        QScorerLoss("qscorer_9bit", checkpoint=own)
    with pytest.raises(QScorerError, match=r"no option 'weight'"):
        QScorerLoss("qscorer", checkpoint=own, weight=2)
    with pytest.raises(QScorerError, match="nonsense"):
        QScorerLoss("qscorer", checkpoint=own, device="nonsense")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> registry.Registry:
    """pyiqa's loss registry as in a process in which nothing of ours is in it."""
    empty = registry.Registry("loss")
    monkeypatch.setattr(registry, "LOSS_REGISTRY", empty)
    monkeypatch.delenv(AUTOLOAD_VARIABLE, raising=False)
    return empty


def test_registers_any_number_of_times(losses: registry.Registry) -> None:
    register_loss()
    register_loss()
    assert losses.get("QScorerLoss") is QScorerLoss
    register_loss()
    assert losses.get("QScorerLoss") is QScorerLoss


def test_does_not_register_over_another_loss_nor_where_switched_off(
    losses: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses.register(Denoiser, name="QScorerLoss")
    with pytest.raises(QScorerError, match=r"already has 'QScorerLoss', from '.*:Denoiser'"):
        register_loss()
    assert losses.get("QScorerLoss") is Denoiser
    empty = registry.Registry("loss")
    monkeypatch.setattr(registry, "LOSS_REGISTRY", empty)
    monkeypatch.setenv(AUTOLOAD_VARIABLE, "0")
    register_loss()
    assert "QScorerLoss" not in empty


TRAIN = """
import sys
import torch
from pyiqa.train import train_pipeline
from pyiqa.utils.registry import ARCH_REGISTRY
@ARCH_REGISTRY.register()
class SmallRestorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
    def forward(self, images):
        return images + self.layer(images)
train_pipeline(sys.argv.pop(1))
"""


@pytest.mark.slow
def test_trains_a_restorer_from_a_pyiqa_yaml(own: Path, tmp_path: Path) -> None:
    """pyiqa's own general model; images of one quality label, of which the loss takes no notice."""
    loss = {
        "type": "QScorerLoss",
        "checkpoint": str(own),
        "clamp": False,
        "loss_weight": 0.1,
        "target": 5,
        "gradient_checkpointing": True,
    }
    settings = {
        "model_type": "GeneralIQAModel",
        "network": {"type": "SmallRestorer"},
        "train": {"mos_loss_opt": loss},
        "val": {"val_freq": 100, "save_img": False, "metrics": {}},
    }
    done = train_in_pyiqa(TRAIN, tmp_path, settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Loss [QScorerLoss] is created" in done.stdout + done.stderr
    losses = [float(value) for value in re.findall(r"l_mos: (\S+)", done.stdout + done.stderr)]
    assert len(losses) == 6 and all(math.isfinite(value) for value in losses)
    saved = torch.load(next((tmp_path / "experiments").rglob("net_latest.pth")), weights_only=True)["params"]
    assert set(saved) == {"layer.weight", "layer.bias"}
    assert all(parameter.abs().min() > 0 for parameter in saved.values())
