"""`qscorer-mini`, the metric whose weights are inside the package."""

import csv
import json
import socket
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from transformers import AutoConfig, AutoModel

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.checkpoints import load_checkpoint
from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.model import QScorerConfig
from pyiqa_qscorer.registry import DEFAULT_METRIC, MINI_CHECKPOINT
from pyiqa_qscorer.synthetic.distortions import apply_chain, single_step

PHOTOS = Path(__file__).with_name("photos")
FILES = sorted(PHOTOS.glob("*.jpg"))


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer("qscorer-mini", device="cpu")


def test_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    metric = pyiqa.create_metric("qscorer-mini", device="cpu")
    score = metric(str(PHOTOS / "cat.jpg"))
    assert score.shape == (1, 1) and score.dtype == torch.float32 and 1 <= score.item() <= 5


def test_is_small_and_comes_with_its_card_and_history() -> None:
    assert DEFAULT_METRIC == Scorer().name == "qscorer-mini"
    assert sum(file.stat().st_size for file in MINI_CHECKPOINT.iterdir()) < 16e6
    card = (MINI_CHECKPOINT / "MODEL_CARD.md").read_text()
    for words in ("Intended use", "Limits", "EfficientNet-lite0", "Apache", "synthetic distortions"):
        assert words in card
    history = json.loads((MINI_CHECKPOINT / "training.json").read_text())
    assert history["configuration"]["model"]["formulation"] == "score_token"
    assert set(history["metrics"]) >= {"validation_srcc", "validation_rmse"}


def test_is_a_q_scorer(scorer: Scorer) -> None:
    """Score tokens in the vocabulary, chosen after the blank, and regression from the state before them."""
    network, prompt = scorer.metric.network, scorer.metric.prompt
    assert network.config.formulation == "score_token" and len(network.config.score_token_ids) == 5
    pixels = torch.stack([pixels_from_pil(Image.open(file), scorer.metric.image_size) for file in FILES])
    with torch.no_grad():
        output = network.score_prompted(pixels, prompt)
        logits = network.lm_head(output.hidden_state)
    assert output.first_token.tolist() == [prompt.blank] * len(FILES)
    assert set(logits.argmax(-1).tolist()) <= set(network.config.score_token_ids)
    level = logits[:, network.config.score_token_ids].argmax(-1) + 1
    assert stats.spearmanr(level, output.raw_score).statistic > 0.8


def test_sample_photos_come_in_the_right_order(scorer: Scorer) -> None:
    pairs = [("astronaut", "astronaut_slightly_blurred"), ("astronaut_slightly_blurred", "astronaut_blurred")]
    pairs += [("astronaut", "astronaut_jpeg_5"), ("cat", "cat_jpeg_15"), ("cat", "cat_noisy")]
    scores = dict(zip((file.stem for file in FILES), scorer.score(FILES), strict=True))
    for better, worse in [*pairs, ("coffee", "coffee_upscaled_4x")]:
        assert scores[better] > scores[worse] + 0.2, worse


def test_score_falls_under_realistic_steps(scorer: Scorer) -> None:
    photos = [np.asarray(Image.open(PHOTOS / f"{name}.jpg").convert("RGB")) for name in ("astronaut", "cat", "coffee")]
    plain = scorer.score(photos).mean()
    for kind in ("jpeg", "webp", "avif", "jpeg2000", "video", "gaussian_blur", "defocus", "resample", "sensor_noise"):
        step = single_step(kind, 0.8)
        assert scorer.score([apply_chain(photo, [step], 1) for photo in photos]).mean() < plain - 0.5, kind


def test_file_picture_tensor_mirror_and_crop_score_alike(scorer: Scorer) -> None:
    pictures, scores = [Image.open(file).convert("RGB") for file in FILES], scorer.score(FILES)
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures[::4]]
    metric = pyiqa.create_metric("qscorer-mini", device="cpu")
    for same in (scorer.score(pictures[::4]), scorer.score(tensors), [metric(str(file)).item() for file in FILES[::4]]):
        np.testing.assert_allclose(same, scores[::4], atol=1e-5)
    mirrored = scorer.score([ImageOps.mirror(picture) for picture in pictures])
    assert np.abs(mirrored - scores).mean() < 0.1
    cropped = [ImageOps.crop(picture, round(min(picture.size) / 100)) for picture in pictures]
    assert np.abs(scorer.score(cropped) - scores).mean() < 0.2


def test_agrees_with_people_on_live_jpeg(scorer: Scorer, shared: Path) -> None:
    with (shared / "data/live_jpeg/meta_info_LIVEJPEG.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = scorer.score([shared / "data/live_jpeg/images" / row["img_name"] for row in rows])
    assert -stats.spearmanr(scores, [float(row["mos"]) for row in rows]).statistic > 0.9


def test_transformers_auto_classes_know_the_model() -> None:
    pixels = torch.rand(2, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    ours = load_checkpoint(MINI_CHECKPOINT, dtype="float32")
    assert isinstance(AutoConfig.from_pretrained(MINI_CHECKPOINT), QScorerConfig)
    theirs = AutoModel.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        found, expected = (model.score_prompted(pixels, ours.prompt).raw_score for model in (theirs, ours.model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
