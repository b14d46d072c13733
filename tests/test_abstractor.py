"""Visual abstractor against the published one, stage by stage."""

from collections.abc import Callable
from types import MethodType

import pytest
import torch
from golden_data import (
    IMAGE_NAMES,
    SMALL,
    build,
    check,
    check_mistake,
    check_small,
    pixel_values,
    relative_error,
    run_small,
    tensors,
)
from torch import Tensor, nn

from pyiqa_qscorer.model import QScorerAbstractorConfig, QScorerConfig, QScorerForScoring, QScorerVisionConfig
from pyiqa_qscorer.model.abstractor import CrossAttention, CrossAttentionBlock, key_position_table, sine_table
from pyiqa_qscorer.model.attention import attend, split_heads

ROOT = "model.visual_abstractor"
PATHS = {
    "abstractor.visual_fc": f"{ROOT}.visual_fc",
    "abstractor.last_hidden_state": ROOT,
    **{
        f"abstractor.layer{index}{golden}": f"{ROOT}.encoder.layers.{index}{ours}"
        for index in range(2)
        for golden, ours in (
            ("", ""),
            (".attention_context", ".crossattention.attention"),
            (".norm1", ".crossattention.norm1"),
            (".normk", ".crossattention.normk"),
            (".mlp_out", ".crossattention.output.mlp"),
        )
    },
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SMALL)
def test_every_stage_equals_the_published_one(name: str, attention: str) -> None:
    outputs = run_small(build(name, attention), PATHS)
    stages = [stage for stage in PATHS if f"fwd.{stage}" in tensors(f"model_{name}/golden")]
    assert len(stages) == (12 if name == "S" else 3)
    check_small(name, outputs, stages)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_images_give_the_published_visual_tokens(attention: str) -> None:
    model, golden = build("T", attention), tensors("model_T/golden")
    with torch.no_grad():
        tokens = model.model.encode_images(pixel_values())
    for row, image in enumerate(IMAGE_NAMES):
        check(tokens[row], golden[f"single.{image}.abstractor"], what=image)


@pytest.mark.parametrize("name", ["S", "E", "T"])
def test_position_tables_are_the_published_formula(name: str) -> None:
    """To one unit in the last place of the largest angle (63: 3.8e-6), by which numpy and torch may differ."""
    attention = build(name).model.visual_abstractor.encoder.layers[0].crossattention.attention
    queries, keys = attention.position_tables()
    torch.testing.assert_close(queries, attention.q_pos_embed, rtol=0, atol=4e-6)
    torch.testing.assert_close(keys, attention.k_pos_embed, rtol=0, atol=4e-6)
    assert queries.dtype is keys.dtype is torch.float32


def test_key_positions_are_column_first_and_spare_the_cls_token() -> None:
    table = key_position_table(3, 8)
    assert table.shape == (10, 8)
    assert (table[0] == 0).all()
    cells = table[1:].unflatten(0, (3, 3))
    line = sine_table(torch.arange(3), 4)
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(cells[row, column], torch.cat([line[column], line[row]]), rtol=0, atol=0)


def test_a_checkpoint_brings_its_own_rounded_position_tables() -> None:
    model = build("S")
    state = model.state_dict()
    rounded = {name: value.half().float() if name.endswith("pos_embed") else value for name, value in state.items()}
    assert any((rounded[name] != state[name]).any() for name in state)
    other = QScorerForScoring(model.config)
    other.load_state_dict(rounded)
    key = f"{ROOT}.encoder.layers.1.crossattention.attention.k_pos_embed"
    assert torch.equal(other.get_buffer(key), state[key].half().float())
    seen = run_small(other.eval(), PATHS)["abstractor.last_hidden_state"]
    golden = tensors("model_S/golden")["fwd.abstractor.last_hidden_state"]
    assert (seen - golden).abs().max() > 1e-4  # the rounded copy is used


def _blocks(model: QScorerForScoring) -> list[CrossAttentionBlock]:
    return [layer.crossattention for layer in model.model.visual_abstractor.encoder.layers]


def _eps_of_norm1_and_normk(model: QScorerForScoring) -> None:
    for block in _blocks(model):
        block.norm1.eps = block.normk.eps = 1e-6


def _eps_of_norm2(model: QScorerForScoring) -> None:
    for block in _blocks(model):
        block.output.norm2.eps = 1e-6


def _eps_of_ffn_ln(model: QScorerForScoring) -> None:
    for block in _blocks(model):
        block.output.mlp.ffn_ln.eps = 1e-5


def _residual_from_queries_before_the_norm(model: QScorerForScoring) -> None:
    def forward(block: CrossAttentionBlock, queries: Tensor, image_tokens: Tensor) -> Tensor:
        normed = block.norm1(queries)
        tokens = torch.cat([normed, block.normk(image_tokens)], dim=1)
        return block.output(block.attention(normed, tokens), residual=queries)

    for block in _blocks(model):
        block.forward = MethodType(forward, block)


def _rows_and_columns_swapped(model: QScorerForScoring) -> None:
    for block in _blocks(model):
        table = block.attention.k_pos_embed
        half = table.shape[1] // 2
        block.attention.k_pos_embed = torch.cat([table[:, half:], table[:, :half]], dim=1)


def _positions_on_values(model: QScorerForScoring) -> None:
    def forward(attention: CrossAttention, queries: Tensor, tokens: Tensor) -> Tensor:
        placed = tokens + torch.cat([attention.q_pos_embed, attention.k_pos_embed])
        query = split_heads(attention.query(queries + attention.q_pos_embed), attention.heads)
        key, value = (split_heads(linear(placed), attention.heads) for linear in (attention.key, attention.value))
        return attend(attention, query, key, value, None)

    for block in _blocks(model):
        block.attention.forward = MethodType(forward, block.attention)


def _no_ffn_ln(model: QScorerForScoring) -> None:
    for block in _blocks(model):
        block.output.mlp.ffn_ln = nn.Identity()


def _w1_and_w3_swapped(model: QScorerForScoring) -> None:
    for block in _blocks(model):
        mlp = block.output.mlp
        mlp.w1, mlp.w3 = mlp.w3, mlp.w1


def _end_token_first(model: QScorerForScoring) -> None:
    abstractor = model.model.visual_abstractor
    own = abstractor.forward
    abstractor.forward = lambda tokens: own(tokens).roll(1, dims=1)


@pytest.mark.parametrize(
    ("mistake", "make"),
    [
        ("abstractor norm1/k eps 1e-6", _eps_of_norm1_and_normk),
        ("abstractor norm2 eps 1e-6", _eps_of_norm2),
        ("ffn_ln eps 1e-5", _eps_of_ffn_ln),
        ("residual from un-normed query", _residual_from_queries_before_the_norm),
        ("k pos row/column swapped", _rows_and_columns_swapped),
        ("position added to values", _positions_on_values),
        ("no ffn_ln", _no_ffn_ln),
        ("w1 and w3 swapped", _w1_and_w3_swapped),
        ("vit_eos first", _end_token_first),
    ],
)
def test_goldens_show_a_mistake(mistake: str, make: Callable[[QScorerForScoring], None]) -> None:
    check_mistake(mistake, make)


def test_the_end_token_is_learned_and_follows_the_queries() -> None:
    abstractor = build("S").model.visual_abstractor
    with torch.no_grad():
        tokens = abstractor(torch.randn(2, 17, 24))
    assert tokens.shape == (2, abstractor.config.num_learnable_queries + 1, 32)
    for row in tokens:
        assert torch.equal(row[-1], abstractor.vit_eos[0, 0])


def test_every_parameter_gets_a_gradient() -> None:
    abstractor = build("S").model.visual_abstractor
    tokens = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    abstractor(tokens).square().sum().backward()
    without = {name.split("crossattention.")[-1] for name, p in abstractor.named_parameters() if p.grad.norm() < 1e-6}
    assert without <= {"attention.key.bias"}  # moves all scores of a query alike, which softmax ignores
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_position_tables_keep_float32_in_a_half_precision_model(dtype: torch.dtype) -> None:
    """They are cast where they are used, as published."""
    model = build("S", dtype=dtype)
    attention = model.model.visual_abstractor.encoder.layers[0].crossattention.attention
    assert attention.q_pos_embed.dtype is torch.float32
    seen = run_small(model, PATHS)["abstractor.last_hidden_state"]
    assert seen.dtype is dtype
    exact = tensors("model_S/golden")["fwd.abstractor.last_hidden_state"]
    assert relative_error(seen.float(), exact) < {torch.float16: 6e-3, torch.bfloat16: 8e-2}[dtype]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4 for the 2-D sine table, got 6"):
        QScorerAbstractorConfig(hidden_size=6, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"hidden_size must equal vision_config.hidden_size, got 48 and 32"):
        QScorerConfig(
            vision_config=QScorerVisionConfig(32, num_attention_heads=2),
            abstractor_config=QScorerAbstractorConfig(48, num_attention_heads=2),
        )
    with pytest.raises(ValueError, match="grid_size must be image_size / patch_size"):
        QScorerConfig(vision_config={"image_size": 56})
