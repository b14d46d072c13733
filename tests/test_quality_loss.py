"""`QScorerLoss`: values, what it refuses, no waiting, compiled, in several processes, and in pyiqa's trainer."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyiqa
import pytest
import torch
import yaml
from pyiqa.utils import registry
from test_loss_gradients import gradient_of, photo, two_steps
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyiqa_qscorer.errors import ImageError, QScorerError
from pyiqa_qscorer.host.registration import AUTOLOAD_VARIABLE, register_loss
from pyiqa_qscorer.loss import QScorerLoss
from pyiqa_qscorer.metric import QScorer


class Synchronisations(TorchDispatchMode):
    """Counts operators after which the CPU must know a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def waits(self) -> dict[str, int]:
        return {name: self.counts[name] for name in ("_local_scalar_dense", "nonzero", "equal", "masked_select")}


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_synchronisations_do_not_grow_with_the_batch(small: QScorer, gradient: bool, blank: bool) -> None:
    two_steps(small, blank)
    loss, totals = QScorerLoss(small), []
    for count in (1, 7):
        images = photo(56, 56).repeat(count, 1, 1, 1).requires_grad_(gradient)
        with torch.set_grad_enabled(gradient), Synchronisations() as mode:
            result = loss(images)
            if gradient:
                result.backward()
        totals.append(mode.waits())
    assert 0 < sum(totals[0].values()) <= 7  # one of them for the prefix cache
    assert totals[0] == totals[1]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.layer(images)


@pytest.mark.slow
@pytest.mark.long
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
        command = [sys.executable, "-c", DDP, str(own), str(tmp_path / f"store{world}")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running = [subprocess.Popen([*command, str(rank), str(world)], **pipes) for rank in range(world)]
        for rank, process in enumerate(running):
            out, error = process.communicate(timeout=240)
            assert process.returncode == 0, error
            gradients[world, rank] = torch.tensor(yaml.safe_load(out.splitlines()[-1]))
    expected = gradients[1, 0]
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(expected[0], expected[1])
    for rank in (0, 1):
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
        assert value.dtype is torch.float32 and value.shape == losses.shape
        torch.testing.assert_close(value.detach(), losses, rtol=0, atol=1e-6)


def test_loss_is_minus_the_metric_of_pyiqa_and_a_hinge_leaves_good_images_alone(scored, own, folders) -> None:
    metric, images, scores = scored
    gradient = gradient_of(QScorerLoss(metric, target=2.5, hinge=True), images).flatten(1).norm(dim=1)
    assert ((gradient > 0) == (scores < 2.5)).all()
    options = {"checkpoint": str(own), "device": "cpu"}
    metric, loss = pyiqa.create_metric("qscorer", as_loss=True, **options), QScorerLoss("qscorer", **options)
    images = 3 * torch.rand(3, 3, 30, 56, generator=torch.Generator().manual_seed(0)) - 1
    assert torch.equal(loss(images), -metric(images))
    assert torch.equal(gradient_of(loss, images), gradient_of(lambda leaf: -metric(leaf), images))
    # Whose options would load it in float32.
    loss = QScorerLoss(checkpoint=folders[2], device="cpu")
    assert loss.metric.dtype is torch.bfloat16


def test_rewards_and_values_outside_the_range(scored: tuple[QScorer, Tensor, Tensor]) -> None:
    metric, images, scores = scored
    loss = QScorerLoss(metric, loss_weight=3, target=4, hinge=True, reduction="sum")
    rewards = loss.rewards(images.clone().requires_grad_())
    assert not rewards.requires_grad and torch.equal(rewards, scores)
    loss, outside = QScorerLoss(metric, reduction="none"), 3 * images - 1
    with torch.no_grad():
        value = loss(outside)
    assert torch.equal(loss(outside.clone().requires_grad_()).detach(), value)
    assert torch.equal(loss.rewards(outside), -value) and torch.equal(loss.rewards(outside.clamp(0, 1)), -value)


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


@pytest.mark.parametrize("gradient", [True, False])
def test_values_that_are_not_finite_are_refused(small: QScorer, gradient: bool) -> None:
    loss = QScorerLoss(small)
    for bad in (math.nan, math.inf, -math.inf):
        images = photo(count=3)
        images[1, 2, 3, 4] = bad
        for judged in (loss, loss.rewards):
            with torch.set_grad_enabled(gradient), pytest.raises(ImageError, match=r"images \[1\] of the batch"):
                judged(images.clone().requires_grad_(gradient))


def test_stays_in_eval_mode_and_frozen_inside_a_module_that_trains(small: QScorer) -> None:
    small.requires_grad_(True)
    whole = nn.ModuleDict({"restorer": Denoiser(), "loss": QScorerLoss(small)}).train()
    assert whole["loss"].training and not any(module.training for module in small.modules())
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


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        ("qscorer_9bit", {}, "did you mean 'qscorer_"),
        ("qscorer", {"weight": 2}, "no option 'weight'"),
        ("qscorer", {"device": "nonsense"}, "nonsense"),
    ],
)
def test_wrong_names_are_refused(own: Path, metric: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(QScorerError, match=words):
        QScorerLoss(metric, checkpoint=own, **options)


def test_registers_any_number_of_times_and_over_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nothing of ours is in pyiqa's registry."""
    monkeypatch.delenv(AUTOLOAD_VARIABLE, raising=False)
    own, foreign, off = (registry.Registry("loss") for _ in range(3))
    monkeypatch.setattr(registry, "LOSS_REGISTRY", own)
    register_loss()
    register_loss()
    assert own.get("QScorerLoss") is QScorerLoss
    register_loss()
    assert own.get("QScorerLoss") is QScorerLoss
    monkeypatch.setattr(registry, "LOSS_REGISTRY", foreign)
    foreign.register(Denoiser, name="QScorerLoss")
    with pytest.raises(QScorerError, match=r"already has 'QScorerLoss', from '.*:Denoiser'"):
        register_loss()
    assert foreign.get("QScorerLoss") is Denoiser
    monkeypatch.setattr(registry, "LOSS_REGISTRY", off)
    monkeypatch.setenv(AUTOLOAD_VARIABLE, "0")
    register_loss()
    assert "QScorerLoss" not in off
