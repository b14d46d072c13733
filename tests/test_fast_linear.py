"""Linear layers on the CPU: oneDNN's are those of PyTorch, also in gradients, copies and transforms."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyiqa_qscorer.model import fast_linear
from pyiqa_qscorer.model.fast_linear import FastLinear, onednn_linear, use_fast_linear
from pyiqa_qscorer.model.vision import quick_gelu


@pytest.mark.parametrize("shape", [(1, 33, 24), (3, 5, 24), (7, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_linear_is_linear(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn(16, 24, generator=generator).requires_grad_()
    offset = torch.randn(16, generator=generator).requires_grad_() if bias else None
    inputs, results = [tensor for tensor in (states, weight, offset) if tensor is not None], []
    for linear in (F.linear, onednn_linear):
        output = linear(states, weight, offset)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs, allow_unused=True)
        results.append([output, *first, *[tensor for tensor in second if tensor is not None]])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_weight_gradient_of_a_slice_is_made_from_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's product of a transposed slice is right, but 1,000 times slower."""
    operands: list[Tensor] = []

    def product(states: Tensor, weight: Tensor, *rest: object) -> Tensor:
        operands.append(weight)
        return states @ weight.t()

    monkeypatch.setattr(fast_linear, "_onednn", product)
    states, weight = torch.randn(3, 5, 24), torch.randn(16, 24).requires_grad_()
    onednn_linear(states[:, 0], weight).square().sum().backward()
    plain = torch.autograd.grad(F.linear(states[:, 0], weight).square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, plain)
    assert len(operands) == 2 and operands[1].t().is_contiguous()


def test_only_plain_linear_layers_are_taken_over_and_quick_gelu_is_the_same() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    states, twice = torch.randn(2, 3, 4), Doubling(4, 4)
    plain = nn.Linear(4, 5)
    model = nn.Sequential(twice, copy.deepcopy(plain), nn.Linear(5, 1))
    names = list(model.state_dict())
    use_fast_linear(model)
    assert [type(layer) for layer in model] == [Doubling, FastLinear, nn.Linear]
    assert list(model.state_dict()) == names
    layer = model[1]
    torch.testing.assert_close(layer(states), plain(states))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is FastLinear and torch.equal(other(states), layer(states))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(states).dtype is torch.bfloat16
    assert layer(states[:, :0]).shape == (2, 0, 5)
    states = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    kept = states.clone()
    with torch.no_grad():
        in_place = quick_gelu(states)
    assert torch.equal(in_place, quick_gelu(states.requires_grad_())) and torch.equal(states, kept)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_go_through_fast_linear() -> None:
    layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(False)
    states = torch.randn(6, 2, 4)

    def total(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    expected = torch.func.vmap(torch.func.grad(total))(states)
    use_fast_linear(layer)
    for found in (
        torch.func.vmap(torch.func.grad(total))(states),
        torch.stack([torch.func.grad(total)(x) for x in states]),
    ):
        torch.testing.assert_close(found, expected)
