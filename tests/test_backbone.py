"""Training on the cached statistics of a frozen feature network."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_features import ARCHITECTURE, BACKBONE, encoder
from tiny_training import settings

import pyiqa_qscorer
from pyiqa_qscorer import Scorer
from pyiqa_qscorer.checkpoints.load import load_folder
from pyiqa_qscorer.errors import CheckpointError, TrainingConfigError, TrainingDataError, TrainingFailedError
from pyiqa_qscorer.images.model_images import SquareImages
from pyiqa_qscorer.training.cached_statistics import CachedStatistics, fit_standardisation, load_backbone
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.dataset import QualityDataset, read_dataset
from pyiqa_qscorer.training.run import train
from pyiqa_qscorer.training.starting_model import with_changed_vision

MINI = Path(pyiqa_qscorer.__file__).parent / "weights" / "mini"


def feature_settings(pictures: Path, output: Path, **sections: Any) -> dict[str, Any]:
    weights = pictures / "backbone.pth"
    if not weights.exists():
        torch.manual_seed(3)
        torch.save(timm.create_model(BACKBONE).state_dict(), weights)
    model = {"architecture": {**ARCHITECTURE, "initializer_range": 0.15}, "backbone_weights": [str(weights)]}
    sections.setdefault("trainable", {"everything": True, "vision_backbone": False})
    return settings(pictures, output, model=model, **sections)


def dataset(pictures: Path) -> QualityDataset:
    config = parse_config(settings(pictures, pictures / "out"))
    return QualityDataset([read_dataset(config.data.train[0], "train")], SquareImages(64).sample)


def test_caches_hold_what_the_network_gives_and_standardise(pictures: Path, tmp_path: Path) -> None:
    data, network = dataset(pictures), encoder()
    cached = CachedStatistics(data, network, tmp_path)
    assert len(cached) == len(data) == 18
    with torch.no_grad():
        for index in (0, 7, 17):
            expected = network.statistics(data[index]["pixel_values"][None])[0]
            torch.testing.assert_close(cached[index]["pixel_values"], expected, atol=1e-3, rtol=1e-3)
            facts = {name: value for name, value in cached[index].items() if name != "pixel_values"}
            assert facts == {name: value for name, value in data[index].items() if name != "pixel_values"}
    data, network = dataset(pictures), encoder()
    cached = CachedStatistics(data, network, tmp_path)
    fit_standardisation(network, cached)
    values = network.standardise(torch.stack([cached[index]["pixel_values"] for index in range(len(cached))]))
    flat = values.flatten(0, 1).detach()
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    moving = flat.std(0) > 0.5
    np.testing.assert_allclose(flat.std(0)[moving], 1, atol=1e-3)
    assert moving.float().mean() > 0.9
    from_pixels = encoder()
    fit_standardisation(from_pixels, data)
    torch.testing.assert_close(from_pixels.standardise.mean, network.standardise.mean, atol=1e-3, rtol=1e-2)


def test_mirrored_pictures_have_the_cells_of_the_cache_in_mirrored_order(pictures: Path, tmp_path: Path) -> None:
    config, network = parse_config(settings(pictures, pictures / "out")), encoder()
    parts = [read_dataset(config.data.train[0], "train")]
    plain = CachedStatistics(QualityDataset(parts, SquareImages(64).sample), network, tmp_path)
    mirrored = CachedStatistics(QualityDataset(parts, SquareImages(64).sample, flip=True), network, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # one file serves both
    grid, found = network.config.image_size // network.config.patch_size, set()
    for item in [(index, epoch) for index in range(6) for epoch in range(2)]:
        before, after = plain[item]["pixel_values"], mirrored[item]["pixel_values"]
        assert torch.equal(before[0], after[0])  # the whole picture
        flipped, cells = mirrored.data.flipped(*item), before[1:].unflatten(0, (grid, grid))
        assert torch.equal(after[1:], (cells.flip(1) if flipped else cells).flatten(0, 1))
        found.add(flipped)
    assert found == {True, False}


def test_backbone_weights_of_a_trained_checkpoint_go_over_those_of_more_stages(pictures: Path, tmp_path: Path) -> None:
    network, before = encoder(), encoder().backbone.state_dict()
    first, *others = before
    stored = {f"model.vision_model.backbone.{first}": before[first] + 0.5, "lm_head.weight": torch.zeros(2, 2)}
    save_file(stored, tmp_path / "model.safetensors")
    load_backbone(network, str(tmp_path / "model.safetensors"))
    after = network.backbone.state_dict()
    assert torch.equal(after[first], before[first] + 0.5)
    assert all(torch.equal(after[name], before[name]) for name in others)
    save_file({f"model.vision_model.backbone.{first}": before[first][:1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="another feature network"):
        load_backbone(network, str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "other", "pickle"])
def test_damaged_statistics_are_named(pictures: Path, tmp_path: Path, damage: str) -> None:
    data, network = dataset(pictures), encoder()
    CachedStatistics(data, network, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "other":
        np.save(file, np.zeros((18, 3), np.float16))
    elif damage == "pickle":
        np.save(file, np.array([print], dtype=object), allow_pickle=True)
    else:
        file.write_bytes({"cut": content[:-9], "header": content[:9] + b"(((" + content[12:], "empty": b""}[damage])
    with pytest.raises(TrainingDataError, match=rf"{file.name} is damaged: .*delete it"):
        CachedStatistics(data, network, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_fit": "sideways"}, "image_fit must be one of"),
        ({"stages": [0, 1, 2, 3, 4, 99]}, "has stages 0 to 4"),
        ({"stages": 3}, "not iterable"),
        ({"smallest_side": "x"}, "smallest_side must be an integer"),
    ],
)
def test_values_of_model_vision_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingFailedError, match=rf"model.vision does not make a vision encoder: .*{words}"):
        with_changed_vision(load_folder(MINI).model, changes, [])


def test_a_checkpoint_can_read_more_stages_and_keep_a_share_of_what_it_was(pictures: Path, tmp_path: Path) -> None:
    first = train(parse_config(feature_settings(pictures, tmp_path / "first"))).folders["qscorer"]
    data = {"cache_statistics": True}
    model: dict[str, Any] = {"architecture": None, "checkpoint": str(first)}
    model |= {"backbone_weights": [str(pictures / "backbone.pth")]}
    model |= {"vision": {"stages": [0, 1, 2, 3], "image_fit": "mirror"}}
    common: dict[str, Any] = {"lora": {"enabled": False}, "trainable": {"everything": True, "vision_backbone": False}}
    networks, errors = {}, {}
    for name, rate, more in (("unchanged", 1e-12, {}), ("trained", 1e-3, {}), ("half", 1e-3, {"start_share": 0.5})):
        training = {"num_train_epochs": 1, "weight_decay": 0.0, "average_decay": 0.5, "learning_rate": rate, **more}
        content = settings(pictures, tmp_path / name, model=model, data=data, training=training, **common)
        result = train(parse_config(content))
        networks[name] = Scorer("qscorer", checkpoint=str(result.folders["qscorer"]), device="cpu")
        errors[name] = result.metrics["validation_rmse"]
    assert errors["trained"] < errors["half"] < errors["unchanged"]  # measured on the weights that are kept
    squares = [Image.new("RGB", (64, 64), (40 * index, 90, 200 - 40 * index)) for index in range(4)]
    before = Scorer("qscorer", checkpoint=str(first), device="cpu").score(squares)
    np.testing.assert_allclose(networks["unchanged"].score(squares), before, atol=1e-4)
    values = {name: scorer.metric.network.state_dict() for name, scorer in networks.items()}
    vision = networks["half"].metric.network.config.vision_config
    assert vision.stages == [0, 1, 2, 3] and vision.image_fit == "mirror"
    for name, value in values["half"].items():
        middle = (values["unchanged"][name] + values["trained"][name]) / 2
        torch.testing.assert_close(value, middle, atol=1e-6, rtol=1e-4)
    columns = networks["trained"].metric.network.model.vision_model.columns_of([1, 3])
    assert (values["trained"]["model.vision_model.patch_projection.weight"][:, columns] != 0).any()
    for changes, words in (({"stages": [1]}, "must keep"), ({"patch_size": 8}, "can change stages")):
        content = settings(pictures, tmp_path / "wrong", model={**model, "vision": changes}, **common)
        with pytest.raises(TrainingFailedError, match=words):
            train(parse_config(content))


def test_cache_is_kept_until_images_or_network_change(pictures, tmp_path, monkeypatch) -> None:
    data, network = dataset(pictures), encoder()
    CachedStatistics(data, network, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(network, "statistics", lambda pixels: pytest.fail("computed again"))
        CachedStatistics(data, network, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        next(network.backbone.parameters()).add_(0.1)
    CachedStatistics(data, network, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    os.utime(data.images[0].path, ns=(1, 1))
    CachedStatistics(data, network, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with torch.no_grad():
        network.backbone.conv_stem.weight.mul_(1e9)
    with pytest.raises(CheckpointError, match="do not fit into float16"):
        CachedStatistics(data, network, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_training_on_the_cache_equals_training_on_pictures(pictures: Path, tmp_path: Path) -> None:
    results = []
    for cache in (True, False):
        output = tmp_path / f"run{cache}"
        content = feature_settings(pictures, output, data={"cache_statistics": cache}, training={"num_train_epochs": 2})
        results.append(train(parse_config(content)))
    assert results[0].metrics["validation_rmse"] == pytest.approx(results[1].metrics["validation_rmse"], rel=2e-2)
    trained = [Scorer("qscorer", checkpoint=str(result.folders["qscorer"]), device="cpu") for result in results]
    files = sorted(pictures.glob("*.png"))
    np.testing.assert_allclose(trained[0].score(files), trained[1].score(files), atol=2e-2)
    untrained = encoder()
    load_backbone(untrained, str(pictures / "backbone.pth"))
    for name, value in trained[0].metric.network.model.vision_model.backbone.state_dict().items():
        assert torch.equal(value, untrained.backbone.state_dict()[name])


def test_feature_network_can_have_its_own_learning_rate(pictures: Path, tmp_path: Path) -> None:
    """With next to none it stays what it was, while the rest trains; with the common one it changes."""
    untrained = encoder()
    load_backbone(untrained, str(pictures / "backbone.pth"))
    changes = {}
    for name, rate in (("own", 1e-12), ("common", None)):
        training = {"num_train_epochs": 1, "learning_rate": 1e-3, "vision_backbone_learning_rate": rate}
        content = feature_settings(pictures, tmp_path / name, trainable={"everything": True}, training=training)
        vision = load_folder(train(parse_config(content)).folders["qscorer"]).model.model.vision_model
        pairs = zip(vision.backbone.parameters(), untrained.backbone.parameters(), strict=True)
        changes[name] = max(float((after - before).detach().abs().max()) for after, before in pairs)
    assert changes["own"] < 1e-9 and changes["common"] > 1e-4


def test_the_first_stages_can_stay_as_they_are(pictures: Path, tmp_path: Path) -> None:
    training = {"num_train_epochs": 1, "learning_rate": 1e-3}
    trainable = {"everything": True, "frozen_stages": 1}
    content = feature_settings(pictures, tmp_path / "run", trainable=trainable, training=training)
    trained = load_folder(train(parse_config(content)).folders["qscorer"]).model.model.vision_model.backbone
    untrained = encoder()
    load_backbone(untrained, str(pictures / "backbone.pth"))
    last = untrained.backbone.feature_info[0]["module"]
    names = [name for name, _ in trained.named_parameters()]
    frozen = max(number for number, name in enumerate(names) if name.startswith(f"{last}."))
    for number, name in enumerate(names):
        same = torch.equal(trained.get_parameter(name), untrained.backbone.get_parameter(name))
        assert same == (number <= frozen), name
    content["trainable"]["frozen_stages"] = 9
    with pytest.raises(TrainingFailedError, match="frozen_stages must be at most"):
        train(parse_config({**content, "output": str(tmp_path / "other")}))


def test_settings_that_contradict_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingConfigError, match="cache_statistics needs"):
        changes = {"data": {"cache_statistics": True}, "trainable": {"everything": True}}
        parse_config(feature_settings(pictures, tmp_path / "run", **changes))
    for changes in (
        {"trainable": {"frozen_stages": 1}},
        {"trainable": {"vision_backbone": False}},
        {"training": {"vision_backbone_learning_rate": 1e-5}},
    ):
        with pytest.raises(TrainingFailedError, match="kind: features"):
            train(parse_config(settings(pictures, tmp_path / "run", **changes)))
