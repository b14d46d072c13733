"""`QScore` in the ways of torchmetrics: batches, collections, copies, checkpoints, processes."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchmetrics import MetricCollection

from pyiqa_qscorer import ImageError, QScorer, QScorerLoss
from pyiqa_qscorer.registry import METRICS
from pyiqa_qscorer.torchmetrics import QScore


@pytest.fixture(scope="module")
def mini() -> QScorer:
    return QScorer(**METRICS["qscorer-mini"].options, device="cpu")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 64, 80, generator=torch.Generator().manual_seed(0))


def test_mean_of_all_images_however_they_are_split(mini: QScorer, images: Tensor) -> None:
    expected = mini(images).mean()
    score = QScore(mini)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert score.compute().isnan()
    for part in images.split([1, 3, 1]):
        score.update(part)
    torch.testing.assert_close(score.compute(), expected, rtol=0, atol=1e-5)
    assert score.compute().dtype is torch.float32 and not score.compute().requires_grad
    score.reset()
    assert score.images == 0
    torch.testing.assert_close(score(images), expected)  # of this batch, as torchmetrics' forward
    levels = (images * 255).round().to(torch.uint8)
    score.reset()
    score.update(levels)
    assert score.compute() == mini(levels.float() / 255).double().mean().float()
    overshot = images.clone()
    overshot[0, 0, 0, 0] = 1.2
    score.update(overshot)


def test_a_refused_batch_leaves_no_trace(mini: QScorer, images: Tensor) -> None:
    score = QScore(mini)
    score.update(images[:1])
    before = score.compute()
    for bad in (images * 255, images[0], torch.full_like(images, torch.nan), torch.full_like(images, 200).long()):
        with pytest.raises(ImageError):
            score.update(bad)
    assert score.images == 1 and score.total.isfinite()
    score._computed = None
    assert score.compute() == before


def test_part_of_a_module_that_trains(mini: QScorer, images: Tensor) -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 3, 1)
            self.metrics = MetricCollection({"quality": QScore(mini)})

    model = Trained().train()
    assert list(model.state_dict()) == ["net.weight", "net.bias"]
    assert len(list(model.parameters())) == 2
    model.load_state_dict(model.state_dict())
    model.metrics.update(images)
    found = model.metrics.compute()["quality"]
    for other in (copy.deepcopy(model.metrics), pickle.loads(pickle.dumps(model.metrics))):
        assert other.compute()["quality"] == found
        other.update(images[:1])
    model.half()  # torchmetrics' metrics keep their types; so does the network
    model.metrics.reset()
    model.metrics.update(images)
    assert model.metrics.compute()["quality"] == found


def test_moves_the_network_along(mini: QScorer) -> None:
    score = QScore(copy.deepcopy(mini))
    score.to("meta")
    assert score._held[0].metric.network.device.type == "meta"


def score_a_part(rank: int, folder: str, images: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    score = QScore(device="cpu")
    score.update(images[:3] if rank == 0 else images[3:])  # unequal parts
    (Path(folder) / f"{rank}").write_text(str(score.compute().item()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_are_summed_up(mini: QScorer, images: Tensor, tmp_path: Path) -> None:
    mp.spawn(score_a_part, (str(tmp_path), images), nprocs=2)
    expected = mini(images).mean().item()
    assert [float((tmp_path / str(rank)).read_text()) for rank in (0, 1)] == pytest.approx([expected] * 2, abs=1e-5)


def test_options_go_to_the_network() -> None:
    score = QScore("qscorer-mini", "cpu", {"dtype": "bfloat16"}, sync_on_compute=False)
    assert score._held[0].metric.dtype is torch.bfloat16
    assert isinstance(score._held[0], QScorerLoss)
    with pytest.raises(ValueError, match="options go with a metric name"):
        QScore(score._held[0].metric, metric_options={"dtype": "float32"})
