"""Score regressor against the published one, and its properties."""

import pytest
import torch
from golden_data import check, tensors

from pyiqa_qscorer.model.regressor import RegressorBlock, ScoreRegressor


@pytest.mark.parametrize(
    ("sizes", "weights", "golden"),
    [((48, 24), "model_T/core_fp16", "out_48_24"), ((64, 64, 24), "model_T/deepmlp_64_64_24_fp16", "out_64_64_24")],
)
def test_probe_vectors_give_the_published_scores(sizes: tuple[int, ...], weights: str, golden: str) -> None:
    """64 -> 64 -> 64 -> 24 has two residual blocks."""
    regressor = ScoreRegressor(64, sizes)
    own = {k.removeprefix("deepmlp."): v.float() for k, v in tensors(weights).items() if k.startswith("deepmlp.")}
    regressor.load_state_dict(own)
    probe = tensors("model_T/golden")
    with torch.no_grad():
        check(regressor(probe["deepmlp_probe.in"]), probe[f"deepmlp_probe.{golden}"], what=golden)


@pytest.mark.parametrize(
    ("width", "sizes", "residual"),
    [(4096, (2048, 1024), [False, False]), (64, (64, 64, 24), [True, True, False]), (8, (16, 16), [False, True])],
)
def test_residual_where_the_width_does_not_change(width: int, sizes: tuple[int, ...], residual: list[bool]) -> None:
    with torch.device("meta"):
        regressor = ScoreRegressor(width, sizes)
    assert [block.residual for block in regressor.model] == residual


def test_residuals_names_and_leading_axes() -> None:
    block = RegressorBlock(3, 3)
    with torch.no_grad():
        block.linear.weight.copy_(-torch.eye(3))
        block.linear.bias.zero_()
    states = torch.tensor([[1.0, -2.0, 3.0]])
    assert block(states).tolist() == [[1.0, 0.0, 3.0]]  # relu(-x) + x, not relu(-x + x)
    regressor = ScoreRegressor(4, (3, 2))
    for shape in ((4,), (2, 4), (2, 5, 4), (0, 4)):
        assert regressor(torch.zeros(shape)).shape == shape[:-1]
    blocks = {f"model.{i}.linear.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert set(regressor.state_dict()) == blocks | {"output_layer.weight", "output_layer.bias"}
