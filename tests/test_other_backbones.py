"""Q-Scorer on image-text-to-text models of transformers: six families, tied and untied vocabulary tables."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_multimodal import FAMILIES, write_base
from tiny_training import settings

from pyiqa_qscorer import QScorer, QScorerLoss, Scorer
from pyiqa_qscorer.checkpoints import CheckpointSource, merge_checkpoint
from pyiqa_qscorer.model.vlm import VlmQScorer
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train

STEPS = 20
NAMES = [*FAMILIES, "llava-untied"]


def vlm_settings(pictures: Path, output: Path, base: Path, **model: Any) -> dict[str, Any]:
    content = settings(pictures, output)
    content["model"] = {
        "backbone": str(base),
        "levels": 5,
        "gradient_checkpointing": False,
        "regressor_hidden_sizes": [64, 32],
        **model,
    }
    content["lora"] = {"r": 4, "lora_alpha": 8}
    content.pop("trainable", None)
    content["training"] |= {"max_steps": STEPS, "learning_rate": 0.02, "per_device_train_batch_size": 6}
    return content


@pytest.fixture(scope="module")
def checkpoint_of(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a run of 20 steps on a tiny random backbone of a family, by the family's name."""

    @functools.cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        family, _, untied = name.partition("-")
        base = write_base(family, folder / "base", tied=not untied)
        return train(parse_config(vlm_settings(pictures, folder / "out", base))).folders["qscorer"]

    return run


@pytest.fixture(scope="module", params=NAMES)
def trained(request: pytest.FixtureRequest, checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of(request.param)


@pytest.fixture(scope="module")
def metric(trained: Path) -> QScorer:
    return QScorer(trained, dtype="float32")


def test_training_lowers_the_loss_and_writes_a_small_checkpoint(trained: Path) -> None:
    losses = [line["loss"] for line in json.loads((trained / "training.json").read_text())["curves"] if "loss" in line]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4]), losses  # most of it is the cross entropy
    stored = sum(file.stat().st_size for file in trained.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in (trained.parents[1] / "base").glob("*.safetensors"))
    assert stored < whole
    named = json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(trained.parents[1] / "base")
    assert (trained / "README.md").read_text().startswith("---\nlibrary_name: peft")


def test_only_new_rows_of_the_vocabulary_are_stored(trained: Path) -> None:
    tensors = load_file(trained / "adapter_model.safetensors")
    rows = [value for name, value in tensors.items() if "token" in name and "lora" not in name]
    assert rows and all(value.shape[0] == 5 for value in rows), {name: value.shape for name, value in tensors.items()}
    assert len(rows) == (2 if "untied" in str(trained) else 1)


def test_files_pictures_and_tensors_score_alike_in_any_batch(trained: Path, metric: QScorer, pictures: Path) -> None:
    files = sorted(pictures.glob("*.png"))[:5]
    opened = [Image.open(file) for file in files]
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 for picture in opened]
    one = Scorer(metric, "cpu", batch_size=1)
    scores = one.score(files)
    assert len(set(scores)) == 5
    for given in (opened, tensors):
        np.testing.assert_array_equal(scores, one.score(given))
    np.testing.assert_array_equal(scores[:1], metric(tensors[0][None])[0].numpy())
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 130, 3), dtype=np.uint8))
    mixed = [wide, *opened]
    together = Scorer(metric, "cpu", batch_size=6).score(mixed)
    np.testing.assert_allclose(together, [one.score(picture)[0] for picture in mixed], atol=2e-5)
    np.testing.assert_allclose(Scorer(metric, "cpu", batch_size=6).score(mixed[::-1]), together[::-1], atol=2e-5)


def test_evaluation_in_training_scores_as_scoring_does(metric: QScorer, pictures: Path) -> None:
    network, prompt = metric.network, metric.prompt
    levels = [metric.images.sample(Image.open(file)) for file in sorted(pictures.glob("*.png"))[:3]]
    ids = network.config.quality_token_ids[:3]
    batch = network.encode.with_answer(network.encode(levels, [prompt] * 3), [prompt] * 3, ids)
    with torch.no_grad():
        found = network.score_collated(batch, prompt).raw_score
        assert torch.equal(found, network.score_prompted(levels, prompt).raw_score)


def test_a_fresh_process_gives_the_same_scores_by_plain_pyiqa(
    checkpoint_of: Callable[[str], Path], pictures: Path
) -> None:
    file = sorted(pictures.glob("*.png"))[3]
    program = (
        "import json, pyiqa, sys\n"
        "make = lambda place: pyiqa.create_metric('qscorer', checkpoint=place, device='cpu')\n"
        "print(json.dumps([make(place)(sys.argv[1]).item() for place in sys.argv[2:]]))"
    )
    places = [checkpoint_of(name) for name in NAMES]
    done = subprocess.run([sys.executable, "-c", program, file, *places], capture_output=True, text=True, check=True)
    expected = [Scorer(checkpoint=place, device="cpu").score(file)[0] for place in places]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-6)


def test_merged_is_the_adapter_and_loads_as_a_plain_model(
    trained: Path, metric: QScorer, pictures: Path, tmp_path: Path
) -> None:
    merged = merge_checkpoint(tmp_path / "merged", CheckpointSource(trained), dtype="float32")
    files = sorted(pictures.glob("*.png"))[:3]
    np.testing.assert_allclose(
        Scorer(QScorer(merged), "cpu").score(files), Scorer(metric, "cpu").score(files), atol=1e-5
    )
    from transformers import AutoModelForImageTextToText, AutoProcessor

    plain = AutoModelForImageTextToText.from_pretrained(merged)
    assert len(AutoProcessor.from_pretrained(merged).tokenizer) <= plain.get_input_embeddings().weight.shape[0]


def test_gradient_of_the_loss_is_that_of_finite_differences(metric: QScorer) -> None:
    """Of the smooth path, in float64: the scores themselves go in steps of 8 bits."""
    network: VlmQScorer = copy.deepcopy(metric.network).double()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 40, 56, generator=generator) * 0.8 + 0.1
    image = ((image * 255).round() / 255).requires_grad_()  # where rounding to 8 bits moves nothing
    loss = QScorerLoss(metric, device="cpu")(image)
    assert loss.item() == pytest.approx(-metric(image.detach()).item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, image)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    direction = torch.randn(image.shape, generator=generator)
    here, step = image.detach().double(), 1e-5
    exact = network.encode([image.detach()[0] * 255], [metric.prompt])  # what the score is read from, and the gradient

    def processed(picture: torch.Tensor) -> dict[str, torch.Tensor]:
        return network.encode._processed([picture[0] * 255], [metric.prompt])

    def smooth(picture: torch.Tensor) -> float:
        moved, still = processed(picture), processed(here)
        inputs = {n: v + moved[n] - still[n] if v.is_floating_point() else v for n, v in exact.items()}
        with torch.no_grad():
            states = network._states(inputs)
            read = network._read(states[:, -1], network.base.get_output_embeddings()(states[:, -1]), states[:, -1:])
        return -read.item()

    found = (smooth(here + step * direction) - smooth(here - step * direction)) / (2 * step)
    expected = (gradient * direction).sum().item()
    assert found == pytest.approx(expected, rel=0.05, abs=2e-3 * gradient.norm().item())
