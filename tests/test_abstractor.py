"""Properties of the visual abstractor; `test_golden_stages.py` compares it with the published one."""

import pytest
import torch
from golden_data import (
    build,
    relative_error,
    run_small,
    tensors,
)

from pyiqa_qscorer.model import QScorerAbstractorConfig, QScorerConfig, QScorerForScoring, QScorerVisionConfig
from pyiqa_qscorer.model.abstractor import key_position_table, sine_table

ROOT = "model.visual_abstractor"


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
    assert table.shape == (10, 8) and (table[0] == 0).all()
    cells, line = table[1:].unflatten(0, (3, 3)), sine_table(torch.arange(3), 4)
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
    seen = run_small(other.eval(), {"tokens": ROOT})["tokens"]
    golden = tensors("model_S/golden")["fwd.abstractor.last_hidden_state"]
    assert (seen - golden).abs().max() > 1e-4  # the rounded copy is used


def test_the_end_token_follows_the_queries_and_every_parameter_gets_a_gradient() -> None:
    abstractor = build("S").model.visual_abstractor
    tokens = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = abstractor(tokens)
    assert found.shape == (2, abstractor.config.num_learnable_queries + 1, 32)
    assert all(torch.equal(row[-1], abstractor.vit_eos[0, 0]) for row in found)
    found.square().sum().backward()
    without = {name.split("crossattention.")[-1] for name, p in abstractor.named_parameters() if p.grad.norm() < 1e-6}
    assert without <= {"attention.key.bias"}  # moves all scores of a query alike, which softmax ignores
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_position_tables_keep_float32_in_a_half_precision_model(dtype: torch.dtype) -> None:
    """They are cast where they are used, as published."""
    model = build("S", dtype=dtype)
    attention = model.model.visual_abstractor.encoder.layers[0].crossattention.attention
    assert attention.q_pos_embed.dtype is torch.float32
    seen = run_small(model, {"tokens": ROOT})["tokens"]
    assert seen.dtype is dtype
    exact = tensors("model_S/golden")["fwd.abstractor.last_hidden_state"]
    assert relative_error(seen.float(), exact) < {torch.float16: 6e-3, torch.bfloat16: 8e-2}[dtype]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4 for the 2-D sine table, got 6"):
        QScorerAbstractorConfig(hidden_size=6, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"hidden_size must equal vision_config.hidden_size, got 48 and 32"):
        QScorerConfig(
            vision_config=QScorerVisionConfig(hidden_size=32, num_attention_heads=2),
            abstractor_config=QScorerAbstractorConfig(hidden_size=48, num_attention_heads=2),
        )
    with pytest.raises(ValueError, match="grid_size must be image_size / patch_size"):
        QScorerConfig(vision_config={"image_size": 56})
