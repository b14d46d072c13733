"""Semantic confusion: nothing between a model and itself, a planted drift is found, a planted leak is found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_other_backbones import vlm_settings
from tiny_multimodal import write_base
from torch import Tensor
from typer.testing import CliRunner

from pyiqa_qscorer.analysis.confusion import KINDS, Confusion, _divergence, compare_all, texts
from pyiqa_qscorer.analysis.language_model import LEVEL_WORDS, LanguageModel, backbone_of
from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.registry import MINI_CHECKPOINT
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train


def compare(base: LanguageModel, tuned: LanguageModel, *pictures_and_mos: Sequence) -> Confusion:
    [found] = compare_all(base, [tuned], *pictures_and_mos)
    return found


def test_texts_are_as_the_measurement_needs_them() -> None:
    found = texts()
    assert set(found["other_sense"]) == set(LEVEL_WORDS)
    assert all(f" {word}" in text for word in LEVEL_WORDS for text in found["other_sense"][word])
    assert len({len(found["other_sense"][word]) for word in LEVEL_WORDS}) == 1
    for thing, by_word in found["sentiment"].items():
        assert tuple(by_word) == LEVEL_WORDS and {len(reviews) for reviews in by_word.values()} == {4}, thing
    every = [text for by_word in found["sentiment"].values() for reviews in by_word.values() for text in reviews]
    assert len(set(every)) == 100
    for kind in ("neutral", "prompts"):
        assert not any(f" {word}" in text for word in (*LEVEL_WORDS, "image", "photo") for text in found[kind])


def test_a_model_is_not_confused_with_itself(base: Path, pictures: Path) -> None:
    model, files = LanguageModel(base, device="cpu"), sorted(pictures.glob("*.png"))
    found = compare(model, LanguageModel(base, device="cpu"), files, range(len(files)))
    for kind in KINDS:
        assert (found.drift[kind].value, found.drift[kind].low, found.drift[kind].high) == (0.0, 0.0, 0.0)
    for word in found.words:
        assert word.where_right.value == word.elsewhere.value == 0.0
        assert word.neighbours_kept == 1.0 and word.base_rank == word.rank
    assert found.accuracy_change.value == found.order_change.value == 0.0
    assert all(leak.base == leak.tuned for leak in found.leaks) and len(found.leaks) == 4
    assert found.score_token_mass is None and found.sentiment == found.base_sentiment


def test_planted_drift_of_one_word_is_found(base: Path) -> None:
    before, after = LanguageModel(base, device="cpu"), LanguageModel(base, device="cpu")
    output = after.network.base.get_output_embeddings()
    with torch.no_grad():  # its logit grows by 2 everywhere
        output.bias = torch.nn.Parameter(torch.zeros(len(output.weight)))
        output.bias[after.levels[3]] = 2.0
    found = compare(before, after)
    by_word = {word.word: word for word in found.words}
    assert by_word["good"].elsewhere.value > 1.9 and by_word["good"].rank < by_word["good"].base_rank
    assert all(abs(by_word[word].elsewhere.value) < 0.1 for word in LEVEL_WORDS if word != "good")
    assert found.drift["neutral"].low > 0
    assert found.level_word_mass.value > 2 * found.base_level_word_mass.value
    # Of tokens with probability p of the word: KL = ln(1 + p (e^2 - 1)) - 2 p
    places = torch.cat([before.after_text(text) for text in texts()["neutral"]])
    share = places[:, before.levels[3]].double().exp()
    expected = (torch.log1p(share * (np.e**2 - 1)) - 2 * share).mean()
    assert found.drift["neutral"].value == pytest.approx(expected.item(), rel=1e-4)
    assert found.leaks == []


def test_divergence_leaves_out_score_tokens_and_rows_that_one_model_has_not() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.125, 0.125, 0.5]]).log()
    torch.testing.assert_close(_divergence(p, q, 3, []), torch.zeros(1, dtype=torch.double), atol=1e-7, rtol=0)
    assert _divergence(p, q[:, [1, 0, 2, 3]], 3, []).item() == pytest.approx(0.25 * np.log(2), abs=1e-6)
    assert _divergence(p, q[:, [1, 0, 2, 3]], 3, [0]).item() == pytest.approx(
        0.5 * np.log(0.5 / (2 / 3)) + 0.5 * np.log(0.5 / (1 / 3)), abs=1e-6
    )


class Leaking(LanguageModel):
    """Says better words of later pictures, whatever is asked."""

    def after_picture(self, pictures: Sequence[Path], question: str, beginning: str, batch_size: int = 16) -> Tensor:
        told = super().after_picture(pictures, question, beginning, batch_size)
        told[:, self.levels[4]] += torch.linspace(-5, 5, len(pictures))
        return told.log_softmax(dim=-1)


def test_planted_leak_is_found(base: Path, pictures: Path) -> None:
    files = sorted(pictures.glob("*.png"))
    found = compare(LanguageModel(base, device="cpu"), Leaking(base, device="cpu"), files, range(len(files)))
    assert all(leak.tuned.value > 0.95 and leak.tuned.low > 0.8 for leak in found.leaks)
    assert found.drift["neutral"].value == 0.0


def test_trained_adapters_by_the_command(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Score tokens and levels, trained for some steps on the same base, which the adapters name."""
    folders = []
    for formulation in ("score_token", "level_onehot"):
        content = vlm_settings(pictures, tmp_path / formulation, base, formulation=formulation)
        content["training"] |= {"max_steps": 6, "learning_rate": 2e-2}
        folders.append(train(parse_config(content)).folders["qscorer"])
    assert backbone_of(folders[0]) == str(base)
    command = ["confusion", "--tuned", folders[0], "--tuned", folders[1], "-o", tmp_path / "report"]
    pairs = ["--mos", pictures / "labels.csv", "--data", pictures, "--limit", "12", "--device", "cpu"]
    done = CliRunner().invoke(app, [str(word) for word in [*command, *pairs]])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report/confusion.json").read_text())
    tokens, levels = report["models"]
    assert tokens["drift"]["neutral"]["low"] > 0 and levels["drift"]["neutral"]["low"] > 0
    assert 0 < tokens["score_token_mass"]["value"] <= tokens["largest_score_token_mass"] < 1
    assert levels["score_token_mass"] is None and report["base"] == base.name
    assert [tokens["name"], levels["name"]] == ["score_token", "level_onehot"]
    page = (tmp_path / "report/confusion.html").read_text()
    assert "score_token" in page and (tmp_path / "report/confusion.png").stat().st_size > 5_000


def test_bad_input(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must know ordinary text"):
        LanguageModel(MINI_CHECKPOINT, device="cpu")
    with pytest.raises(ValueError, match="equally many, got 1 and 0"):
        compare_all(LanguageModel(base, device="cpu"), [], [pictures / "00.png"], [])
    other = write_base("qwen2_5_vl", tmp_path / "qwen")
    with pytest.raises(ValueError, match="as other tokens"):
        compare(LanguageModel(base, device="cpu"), LanguageModel(other, device="cpu"))
    for words, message in (
        (["--tuned", base], "--base must be given"),
        (["--tuned", base, "--mos", pictures / "labels.csv"], "--mos and --data go together"),
        (["--tuned", base, "--mos", pictures / "00.png", "--data", pictures], "00.png cannot be read"),
        (
            ["--tuned", base, "--mos", pictures / "labels.csv", "--data", pictures, "--mos-column", "x"],
            "mos_column 'x' is not in",
        ),
    ):
        done = CliRunner().invoke(app, ["confusion", *map(str, words)])
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
