"""Losses and gradients of the published training, with our network and our objectives."""

import functools

import golden_data
import pytest
import torch
from torch import Tensor

from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.model.qscorer import IGNORED_LABEL, IMAGE_TOKEN_ID, quality_positions
from pyiqa_qscorer.training.objectives import next_token_cross_entropy, score_regression

LOSS_TOLERANCE = 5e-4
GRADIENT_TOLERANCE = 1e-4  # relative


def align_on_image(input_ids: Tensor, labels: Tensor, attention_mask: Tensor, visual_tokens: int) -> dict[str, Tensor]:
    """Rows padded on the right, as published -> rows padded so that the image stands in one column, and merged labels.

    Each row is shifted to the right by what its image lacks to the last image's column.
    """
    columns = (input_ids == IMAGE_TOKEN_ID).int().argmax(dim=1)
    last, lengths = int(columns.max()), attention_mask.sum(dim=1)
    width = int((lengths + last - columns).max())
    aligned = {
        "input_ids": torch.zeros(len(columns), width, dtype=torch.long),
        "labels": torch.full((len(columns), width), IGNORED_LABEL),
        "attention_mask": torch.zeros(len(columns), width, dtype=torch.bool),
    }
    source = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    for row, (column, length) in enumerate(zip(columns.tolist(), lengths.tolist(), strict=True)):
        for name, values in source.items():
            aligned[name][row, last - column : last - column + length] = values[row, :length]
    before, after = aligned.pop("labels").split([last, width - last], dim=1)
    visual = torch.full((len(columns), visual_tokens), IGNORED_LABEL)
    return {**aligned, "merged_labels": torch.cat([before, visual, after[:, 1:]], dim=1)}


class Published:
    """Losses and gradients of our network with our objectives on a golden training batch."""

    def __init__(self, name: str, attention: str, batch: dict[str, Tensor], pixels: Tensor, gt: Tensor) -> None:
        # sdpa in float32, and eager of T in float64: the only unclamped score there is 0.09 from its MOS, so that a
        # rounding of the score by 1e-5, usual in float32, already is 1e-4 of the gradient.
        dtype = torch.float64 if (name, attention) == ("T", "eager") else torch.float32
        self.model = golden_data.build(name, attention).to(dtype)
        config = self.model.config
        visual = config.abstractor_config.num_learnable_queries + 1
        aligned = align_on_image(batch["input_ids"], batch["labels"], batch["attention_mask"], visual)
        labels, output = aligned.pop("merged_labels"), self.model(**aligned, pixel_values=pixels)
        rows, positions = quality_positions(labels, config.score_token_ids)
        self.states = output.last_hidden_state[rows, positions]
        self.raw = self.model.deepmlp(self.states)
        self.cross_entropy = next_token_cross_entropy(output.logits, labels)
        self.score_loss = score_regression(self.raw, gt[rows], len(labels))
        self.total = 0.05 * (self.cross_entropy + self.score_loss)
        self.total.backward()
        self.gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}


@functools.cache
def published(name: str, attention: str) -> Published:
    if name == "S":
        inputs = golden_data.tensors("model_S/inputs")
        batch = {name: inputs[f"train.{name}"] for name in ("input_ids", "labels", "attention_mask")}
        return Published("S", attention, batch, inputs["pixel_values"][:3], inputs["train.gt_scores"])
    stored = golden_data.tensors("training_T/golden")
    images = [entry["image"] for entry in golden_data.table("training_T/meta")]
    pixels = torch.stack([pixels_from_pil(open_image(golden_data.GOLDEN / "images" / name)) for name in images])
    return Published("T", attention, stored, pixels, stored["gt_scores"])


def check(ours: Published, golden: dict[str, Tensor], norms: dict[str, float]) -> None:
    """Losses; gradient norms within 1e-3, where those that are 0 but for rounding (key biases) need only be small."""
    for name, value in (
        ("ce", ours.cross_entropy),
        ("score_loss", ours.score_loss),
        ("total_forward_mlp", ours.cross_entropy + ours.score_loss),
        ("total_single", ours.total),
    ):
        assert value.item() == pytest.approx(golden[name].item(), abs=LOSS_TOLERANCE), name
    assert norms.keys() == ours.gradients.keys()
    negligible = 1e-6 * max(norms.values())
    for name, expected in norms.items():
        found = ours.gradients[name]
        length = 0.0 if found is None else found.double().norm().item()
        assert length == pytest.approx(expected, rel=1e-3, abs=negligible), name


def without_prefix(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


@pytest.mark.parametrize("attention, run", [("eager", "train"), ("sdpa", "train_sdpa")])
def test_small_training_batch_as_published(attention: str, run: str) -> None:
    """Rows with 1, 2 and 0 score tokens, images in different columns."""
    ours, golden = published("S", attention), without_prefix(golden_data.tensors("model_S/golden"), f"{run}.")
    check(ours, golden, golden_data.table("model_S/summary")["grad_norms"][run])
    assert (ours.raw - golden["raw_at_score_positions"]).abs().max() < golden_data.SCORE_TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_full_size_images_training_batch_as_published(attention: str) -> None:
    """Three samples through the published dataset, collator and forward."""
    ours = published("T", attention)
    golden = without_prefix(golden_data.tensors("training_T/golden"), f"{attention}.")
    check(ours, golden, golden_data.table("training_T/summary")[attention]["grad_norm"])
    assert (ours.raw - golden["raw_scores"]).abs().max() < golden_data.SCORE_TOLERANCE
    assert (ours.states - golden["score_embeddings"]).abs().max() < golden_data.HIDDEN_TOLERANCE


@pytest.mark.parametrize(
    "name, file, prefix", [("S", "model_S/golden", "train.grad."), ("T", "training_T/golden", "grad_sub.")]
)
def test_training_gradients_as_published(name: str, file: str, prefix: str) -> None:
    """Whole ones of model S, samples of model T."""
    gradients, golden = published(name, "eager").gradients, without_prefix(golden_data.tensors(file), prefix)
    assert golden
    for parameter, expected in golden.items():
        found = gradients[parameter]
        if name == "T":
            found = found.flatten()[golden_data.positions(tuple(found.shape), 400, f"grad:{parameter}")]
        error = golden_data.relative_error(found.reshape(expected.shape).double(), expected.double())
        assert error < GRADIENT_TOLERANCE, f"{parameter}: {error:.1e}"
