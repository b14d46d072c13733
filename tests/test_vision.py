"""Properties of the vision encoder; `test_golden_stages.py` compares it with the published one."""

import pytest
import torch
from golden_data import build, relative_error, small_inputs, tensors

from pyiqa_qscorer.model import QScorerVisionConfig
from pyiqa_qscorer.model.vision import VisionEncoder


def test_tokens_do_not_depend_on_neighbours_and_every_parameter_gets_a_gradient() -> None:
    encoder, pixels = build("S").model.vision_model, small_inputs()[1]
    with torch.no_grad():
        together, alone = encoder(pixels), torch.cat([encoder(image[None]) for image in pixels])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    encoder, pixels = build("S").model.vision_model, small_inputs()[1].clone().requires_grad_()
    encoder(pixels).square().sum().backward()
    # A constant added to all keys moves all scores of a query alike, so their bias has (nearly) no gradient, but q and
    # v share its tensor.
    assert [name for name, parameter in encoder.named_parameters() if not parameter.grad.abs().sum() > 0] == []
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0


def test_sizes_follow_the_configuration_and_others_are_refused() -> None:
    encoder = build("S").model.vision_model
    for shape in ((1, 3, 28, 28), (1, 3, 84, 84), (1, 3, 56, 28), (1, 1, 56, 56), (3, 56, 56), (1, 4, 56, 56)):
        with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, 56, 56\), got \(") as caught:
            encoder(torch.zeros(shape))
        assert str(shape) in str(caught.value)
    config = QScorerVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=14
    )
    config._attn_implementation = "sdpa"
    assert VisionEncoder(config)(torch.zeros(2, 3, 42, 42)).shape == (2, 10, 8)
    with pytest.raises(ValueError, match="multiple of patch_size, got 450 and 14"):
        QScorerVisionConfig(image_size=450)
    with pytest.raises(ValueError, match="multiple of num_attention_heads, got 48, 5"):
        QScorerVisionConfig(hidden_size=48, num_attention_heads=5)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float16, 3e-3), (torch.bfloat16, 3e-2), (torch.float64, 5e-6)],  # 11, 8 and 53 bits
)
def test_works_in_other_precisions(dtype: torch.dtype, limit: float) -> None:
    exact, pixels = tensors("model_S/golden")["fwd.vision.last_hidden_state"], small_inputs()[1]
    with torch.no_grad():
        tokens = build("S").model.vision_model.to(dtype)(pixels.to(dtype))
    assert tokens.dtype is dtype and relative_error(tokens.float(), exact) < limit
