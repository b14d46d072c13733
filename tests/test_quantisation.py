"""8-bit and 4-bit loading with bitsandbytes, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import relative_error
from tiny_checkpoint import own_folder, scored
from torch import Tensor, nn
from transformers.quantizers import quantizer_bnb_8bit

from pyiqa_qscorer.checkpoints import load_folder
from pyiqa_qscorer.checkpoints.load import UNQUANTISED
from pyiqa_qscorer.errors import CheckpointError, QScorerError
from pyiqa_qscorer.metric import QScorer
from pyiqa_qscorer.model import QScorerForScoring
from pyiqa_qscorer.model.fast_linear import FastLinear
from pyiqa_qscorer.scorer import build_metric

# pyiqa installs it everywhere but on macOS.
bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="8 and 4 bits need bitsandbytes, an optional package: pip install it"
)

DECODER_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths are multiples of 64, the block that bitsandbytes quantises."""
    return own_folder(tmp_path_factory.mktemp("own"), width=64, visual_width=64)


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def metric(request: pytest.FixtureRequest, checkpoint: Path) -> QScorer:
    return QScorer(checkpoint, dtype=request.param, clamp=False)


def images() -> Tensor:
    return torch.rand(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def quantised_class(metric: QScorer) -> type[nn.Module]:
    eight = metric.network.config.quantization_config.load_in_8bit
    return bitsandbytes.nn.Linear8bitLt if eight else bitsandbytes.nn.Linear4bit


def test_decoder_is_quantised_and_nothing_else(metric: QScorer) -> None:
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    assert not any(module.training for module in metric.modules())
    kind = quantised_class(metric)
    linears = {name: module for name, module in metric.network.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in linears.items() if isinstance(module, kind)}
    decoder = {name for name in linears if name.startswith("model.layers.")}
    assert quantised == decoder
    assert {name.split(".multiway.")[0].rsplit(".", 1)[-1] for name in decoder} == DECODER_LINEARS
    assert len(decoder) == 2 * 9  # two layers; keys and values have two ways
    for name in linears.keys() - quantised:
        assert type(linears[name]) in (nn.Linear, FastLinear) and name.startswith(tuple(UNQUANTISED))
        assert linears[name].weight.dtype is metric.dtype


def stored_weight(linear: Any, dtype: str) -> Tensor:
    """What a quantised module stands for, in float32."""
    weight = linear.weight
    if dtype == "8bit":
        return weight.data.float() * weight.SCB[:, None] / 127
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


@pytest.mark.parametrize(("dtype", "weight_error"), [("8bit", 0.01), ("4bit", 0.12)])
def test_scores_are_those_of_the_rounded_weights(checkpoint: Path, dtype: str, weight_error: float) -> None:
    """Reference: the float32 network with every decoder matrix rounded as bitsandbytes has it.

    What is left is the rounding of activations (8 bits), 3 % of the logits of this random network.
    """
    quantised, reference = (QScorer(checkpoint, dtype=option, clamp=False) for option in (dtype, "float32"))
    for name, module in quantised.network.named_modules():
        if name.startswith("model.layers.") and isinstance(module, nn.Linear):
            exact = reference.network.get_submodule(name).weight
            rounded = stored_weight(module, dtype)
            assert 0 < relative_error(rounded, exact) < weight_error, name
            exact.data.copy_(rounded)
    pixels = images() * 2 - 1
    with torch.no_grad():
        output, expected = (scored(one, pixels) for one in (quantised, reference))
        scores = quantised(images())
    assert relative_error(output.first_logits, expected.first_logits) < 0.1
    same = output.first_token == expected.first_token  # a token that flips is a jump, as in any other precision
    assert same.any() and relative_error(output.hidden_state[same], expected.hidden_state[same]) < 0.1
    assert scores.shape == (4, 1) and scores.dtype is torch.float32 and scores.isfinite().all()


def test_batches_score_as_their_images_and_gradients_on_the_cpu_are_refused(metric: QScorer) -> None:
    with torch.no_grad():
        together, alone = metric(images()), torch.cat([metric(image[None]) for image in images()])
        assert torch.equal(metric.to("cpu")(images()), together)  # as pyiqa does after building it
    # LLM.int8 tells outlying channels by all tokens of a pass, so its rounding depends on what is in the batch.
    torch.testing.assert_close(together, alone, rtol=0, atol=0.1)
    # Eight bits fail there in autograd; four bits give zeros once the model has scored without gradients.
    with pytest.raises(QScorerError, match="cannot be differentiated on the CPU"):
        metric(images().requires_grad_())
    assert metric(images()).isfinite().all()


def test_position_tables_survive_quantisation_and_identities_differ(checkpoint: Path, metric: QScorer) -> None:
    for layer in metric.network.model.visual_abstractor.encoder.layers:
        attention = layer.crossattention.attention
        own = (attention.q_pos_embed, attention.k_pos_embed)
        for table, formula in zip(own, attention.position_tables(), strict=True):
            torch.testing.assert_close(table.float(), formula, rtol=0, atol=4e-3)
    others = {QScorer(checkpoint, dtype=dtype, clamp=False).identity for dtype in ("float16", "bfloat16", "float32")}
    assert metric.identity not in others


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_weights_are_quantised_on_the_device_that_is_asked_for(checkpoint, device, monkeypatch) -> None:
    passed = []

    def from_pretrained(*_: Any, config: Any, device_map: Any, **__: Any) -> QScorerForScoring:
        passed.append(device_map)
        return QScorerForScoring(config)

    monkeypatch.setattr(QScorerForScoring, "from_pretrained", from_pretrained)
    options = {"checkpoint": checkpoint}
    build_metric("qscorer_4bit", options, torch.device(device))
    assert passed == [{"": device}]


def test_attention_kernel_is_kept_and_bitsandbytes_is_asked_for(checkpoint, monkeypatch) -> None:
    model = load_folder(checkpoint, dtype="8bit", attn_implementation="eager").model
    parts = (model.config, model.config.vision_config, model.config.abstractor_config)
    assert {part._attn_implementation for part in parts} == {"eager"}
    monkeypatch.setattr(quantizer_bnb_8bit, "is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(CheckpointError, match=r"dtype='8bit' needs bitsandbytes and accelerate: .*pip install"):
        load_folder(checkpoint, dtype="8bit")
