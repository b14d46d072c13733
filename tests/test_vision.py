"""Vision encoder against the published one, stage by stage."""

from collections.abc import Callable

import pytest
import torch
from golden_data import (
    IMAGE_NAMES,
    SMALL,
    Recorder,
    build,
    check,
    check_mistake,
    check_small,
    pixel_values,
    positions,
    relative_error,
    run_small,
    small_inputs,
    tensors,
)
from torch import Tensor, nn
from torch.nn.functional import gelu

from pyiqa_qscorer.model import QScorerForScoring, QScorerVisionConfig
from pyiqa_qscorer.model.vision import VisionEncoder

ROOT = "model.vision_model"
PATHS = {
    "vision.patch_conv": f"{ROOT}.embeddings.patch_embed",
    "vision.embeddings_after_pre_layernorm": f"{ROOT}.embeddings",
    "vision.last_hidden_state": ROOT,
    **{
        f"vision.layer{index}{golden}": f"{ROOT}.encoder.layers.{index}{ours}"
        for index in range(2)
        for golden, ours in (("", ""), (".self_attn_out", ".self_attn"), (".mlp_out", ".mlp"))
    },
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SMALL)
def test_every_stage_equals_the_published_one(name: str, attention: str) -> None:
    outputs = run_small(build(name, attention), PATHS)
    stages = [stage for stage in PATHS if f"fwd.{stage}" in tensors(f"model_{name}/golden")]
    assert len(stages) == (9 if name == "S" else 4)
    check_small(name, outputs, stages)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_images_give_the_published_patch_tokens(attention: str) -> None:
    encoder, golden = build("T", attention).model.vision_model, tensors("model_T/golden")
    with torch.no_grad(), Recorder(encoder, {"embeddings": "embeddings"}) as seen:
        tokens = encoder(pixel_values())
    sample = positions((1025, 48), 1500, "vision")
    for row, image in enumerate(IMAGE_NAMES):
        check(tokens[row].flatten()[sample], golden[f"single.{image}.vision_sub"], what=image)
    check(tokens[0], golden["full.a.vision_last_hidden"], what="all tokens of image a")
    embeddings = seen["embeddings"][0].flatten()[positions((1025, 48), 3000, "visemb")]
    check(embeddings, golden["full.a.vision_embeddings_sub"], what="embeddings of image a")


def _qkv_in_three_blocks(model: QScorerForScoring) -> None:
    for layer in model.model.vision_model.encoder.layers:
        attention = layer.self_attn
        for tensor in (attention.query_key_value.weight, attention.query_key_value.bias):
            blocks = tensor.data.unflatten(0, (3, attention.heads, -1))
            tensor.data = blocks.transpose(0, 1).flatten(0, 2)


def _erf_gelu(model: QScorerForScoring) -> None:
    for layer in model.model.vision_model.encoder.layers:
        mlp = layer.mlp
        mlp.forward = lambda states, mlp=mlp: mlp.fc2(gelu(mlp.fc1(states)))


def _no_post_layernorm(model: QScorerForScoring) -> None:
    model.model.vision_model.post_layernorm = nn.Identity()


def _eps(model: QScorerForScoring) -> None:
    for module in model.model.vision_model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def _cls_after_patches(model: QScorerForScoring) -> None:
    def forward(pixels: Tensor) -> Tensor:
        patches = embeddings.patch_embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches, embeddings.cls_token.expand(len(patches), -1, -1)], dim=1)
        return embeddings.pre_layernorm(tokens + embeddings.position_embedding)

    embeddings = model.model.vision_model.embeddings
    embeddings.forward = forward


@pytest.mark.parametrize(
    ("mistake", "make"),
    [
        ("qkv as [q;k;v]", _qkv_in_three_blocks),
        ("erf gelu in vision", _erf_gelu),
        ("no post_layernorm", _no_post_layernorm),
        ("vision eps 1e-5", _eps),
        ("cls after patches", _cls_after_patches),
    ],
)
def test_goldens_show_a_mistake(mistake: str, make: Callable[[QScorerForScoring], None]) -> None:
    check_mistake(mistake, make)


def test_tokens_of_an_image_do_not_depend_on_its_neighbours() -> None:
    encoder, pixels = build("S").model.vision_model, small_inputs()[1]
    with torch.no_grad():
        together, alone = encoder(pixels), torch.cat([encoder(image[None]) for image in pixels])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "shape", [(1, 3, 28, 28), (1, 3, 84, 84), (1, 3, 56, 28), (1, 1, 56, 56), (3, 56, 56), (1, 4, 56, 56)]
)
def test_other_image_shapes_are_refused(shape: tuple[int, ...]) -> None:
    encoder = build("S").model.vision_model
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, 56, 56\), got \(") as caught:
        encoder(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_every_parameter_gets_a_gradient() -> None:
    encoder, pixels = build("S").model.vision_model, small_inputs()[1].clone().requires_grad_()
    encoder(pixels).square().sum().backward()
    without = [name for name, parameter in encoder.named_parameters() if not parameter.grad.abs().sum() > 0]
    # A constant added to all keys moves all scores of a query alike, so their bias has (nearly) no gradient, but q and
    # v share its tensor.
    assert without == []
    assert pixels.grad.isfinite().all()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_works_in_other_precisions(dtype: torch.dtype) -> None:
    exact, pixels = tensors("model_S/golden")["fwd.vision.last_hidden_state"], small_inputs()[1]
    with torch.no_grad():
        tokens = build("S").model.vision_model.to(dtype)(pixels.to(dtype))
    assert tokens.dtype is dtype
    limit = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float64: 5e-6}[dtype]  # 11, 8 and 53 bits
    assert relative_error(tokens.float(), exact) < limit


def test_image_size_must_be_a_multiple_of_the_patch_size() -> None:
    with pytest.raises(ValueError, match="multiple of patch_size, got 450 and 14"):
        QScorerVisionConfig(image_size=450)
    with pytest.raises(ValueError, match="multiple of num_attention_heads, got 48, 5"):
        QScorerVisionConfig(hidden_size=48, num_attention_heads=5)


def test_number_of_tokens_follows_the_configuration() -> None:
    config = QScorerVisionConfig(8, 16, 1, 2, image_size=42, patch_size=14)
    config._attn_implementation = "sdpa"
    assert VisionEncoder(config)(torch.zeros(2, 3, 42, 42)).shape == (2, 10, 8)
