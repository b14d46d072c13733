"""8-bit and 4-bit loading with bitsandbytes, on the CPU."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import own_folder
from torch import Tensor, nn

from pyiqa_qscorer.checkpoints import load_folder
from pyiqa_qscorer.checkpoints.loading import UNQUANTISED
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.metric import QScorer

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="bitsandbytes has no wheel for macOS that pyiqa asks for")

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths are multiples of 64, the block that bitsandbytes quantises."""
    return own_folder(tmp_path_factory.mktemp("own"), width=64, visual_width=64)


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def metric(request: pytest.FixtureRequest, checkpoint: Path) -> QScorer:
    pytest.importorskip("bitsandbytes")
    return QScorer(checkpoint, dtype=request.param, clamp=False)


def images() -> Tensor:
    return torch.rand(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def quantised_class(metric: QScorer) -> type[nn.Module]:
    import bitsandbytes

    eight = metric.network.config.quantization_config.load_in_8bit
    return bitsandbytes.nn.Linear8bitLt if eight else bitsandbytes.nn.Linear4bit


def test_decoder_is_quantised_and_nothing_else(metric: QScorer) -> None:
    kind = quantised_class(metric)
    linears = {name: module for name, module in metric.network.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in linears.items() if isinstance(module, kind)}
    decoder = {name for name in linears if name.startswith("model.layers.")}
    assert quantised == decoder
    assert {name.removesuffix(".multiway.0").removesuffix(".multiway.1").rsplit(".", 1)[-1] for name in decoder} == set(
        DECODER_LINEARS
    )
    assert len(decoder) == 2 * 9
    for name in linears.keys() - quantised:
        assert type(linears[name]) is nn.Linear
        assert name.startswith(tuple(UNQUANTISED))
        assert linears[name].weight.dtype is metric.dtype


def test_scores_are_finite_and_near_those_of_the_weights(metric: QScorer, checkpoint: Path) -> None:
    """Where the first token is the same; a token that flips is a jump, as in any other precision."""
    exact = QScorer(checkpoint, dtype="float32", clamp=False)
    with torch.no_grad():
        pair = [one.network.score(images() * 2 - 1, *prompt(one)) for one in (metric, exact)]
        scores = metric(images())
    assert scores.shape == (4, 1)
    assert scores.dtype is torch.float32
    assert scores.isfinite().all()
    quantised, reference = pair
    assert quantised.hidden_state.isfinite().all()
    same = quantised.first_token == reference.first_token
    logits, exact_logits = quantised.first_logits.float(), reference.first_logits
    error = (logits - exact_logits).norm() / exact_logits.norm()
    eight = metric.network.config.quantization_config.load_in_8bit
    assert error < (0.05 if eight else 0.4)
    assert error > 0  # it is quantised
    states = quantised.hidden_state.float()[same] - reference.hidden_state[same]
    if same.any():
        assert states.norm() < (0.1 if eight else 0.5) * reference.hidden_state[same].norm()


def prompt(metric: QScorer) -> tuple[Any, ...]:
    return metric.prompt.prefix, metric.prompt.suffix, metric.prompt.blank


def test_moving_to_a_device_as_pyiqa_does(metric: QScorer) -> None:
    with torch.no_grad():
        before = metric(images())
        assert torch.equal(metric.to("cpu")(images()), before)
        assert torch.equal(metric.to(torch.device("cpu"))(images()), before)


def test_a_batch_scores_as_its_images(metric: QScorer) -> None:
    with torch.no_grad():
        together = metric(images())
        alone = torch.cat([metric(image[None]) for image in images()])
    torch.testing.assert_close(together, alone, rtol=0, atol=0.05)


def test_parameters_are_frozen_and_the_network_evaluates(metric: QScorer) -> None:
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    assert not any(module.training for module in metric.modules())


def test_gradients_reach_the_image(metric: QScorer) -> None:
    leaf = images().requires_grad_()
    metric(leaf).sum().backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad.flatten(1).norm(dim=1) > 0).all()


def test_position_tables_survive_quantisation(metric: QScorer) -> None:
    for layer in metric.network.model.visual_abstractor.encoder.layers:
        attention = layer.crossattention.attention
        for own, formula in zip((attention.q_pos_embed, attention.k_pos_embed), attention.position_tables(), strict=True):
            torch.testing.assert_close(own.float(), formula, rtol=0, atol=4e-3)


def test_identities_differ(checkpoint: Path, metric: QScorer) -> None:
    others = {QScorer(checkpoint, dtype=dtype, clamp=False).identity for dtype in ("float16", "bfloat16", "float32")}
    assert metric.identity not in others


def test_attention_kernel_is_kept(checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_folder(checkpoint, dtype="8bit", attn_implementation="eager").model
    parts = (model.config, model.config.vision_config, model.config.abstractor_config)
    assert {part._attn_implementation for part in parts} == {"eager"}


def test_without_bitsandbytes_the_message_says_what_to_install(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_8bit

    monkeypatch.setattr(quantizer_bnb_8bit, "is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(CheckpointError, match=r"dtype='8bit' needs bitsandbytes and accelerate: .*pip install"):
        load_folder(checkpoint, dtype="8bit")
    assert builtins is sys.modules["builtins"]
