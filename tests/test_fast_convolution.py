"""Convolutions of the feature network on the CPU: those of PyTorch and timm, whatever the number of threads."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from test_features import encoder, pixels
from timm.layers import Conv2dSame
from torch import Tensor, nn

from pyiqa_qscorer.model.fast_convolution import FastConvolution, make_fast
from pyiqa_qscorer.model.features import each_on_one_thread


@pytest.mark.parametrize("side", [16, 17, 15])
@pytest.mark.parametrize(("kernel", "step", "groups"), [(1, 1, 1), (3, 1, 8), (3, 2, 8), (5, 2, 8), (3, 2, 1)])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.ReLU(inplace=True), nn.SiLU(), nn.Identity()])
def test_fast_convolution_is_convolution_and_activation(
    side: int, kernel: int, step: int, groups: int, same: bool, activation: nn.Module
) -> None:
    torch.manual_seed(0)
    padding = {} if same else {"padding": kernel // 2}
    plain = (Conv2dSame if same else nn.Conv2d)(8, 8, kernel, step, groups=groups, **padding)
    nn.init.normal_(plain.weight, std=2)
    image, names = torch.randn(2, 8, side, side).contiguous(memory_format=torch.channels_last), list(plain.state_dict())
    wanted = activation(plain(image)).detach()
    left = make_fast(plain, activation)
    assert type(plain) is FastConvolution and list(plain.state_dict()) == names
    with torch.no_grad():
        found = left(plain(image))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert plain(image).dtype is torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(lambda one: left(plain(one[None])))(image)[:, 0], wanted)
    leaf = image.clone().requires_grad_()
    output = left(plain(leaf))
    assert torch.equal(output, found)
    of_plain = image.clone().requires_grad_()
    reference = activation((Conv2dSame if same else nn.Conv2d).forward(plain, of_plain))
    for one in (output, reference):
        one.square().sum().backward()
    torch.testing.assert_close(leaf.grad, of_plain.grad, rtol=1e-3, atol=1e-3)


def test_other_convolutions_stay_as_they_are() -> None:
    for odd in (nn.Conv2d(4, 4, (3, 1)), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same")):
        activation = nn.ReLU6()
        assert make_fast(odd, activation) is activation and type(odd) is nn.Conv2d


def test_statistics_have_the_same_bits_with_any_number_of_threads_and_in_any_batch() -> None:
    network, found, before = encoder().requires_grad_(False), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found += [
                    network.statistics(pixels(5)),
                    torch.cat([network.statistics(one) for one in pixels(5).split(1)]),
                ]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other, found[0])
    assert torch.equal(network.statistics(pixels(5).requires_grad_()).detach(), found[0])


def test_parts_are_computed_side_by_side_each_on_one_thread() -> None:
    before, together, elsewhere = torch.get_num_threads(), threading.Barrier(2, timeout=60), []

    def compute(part: Tensor) -> Tensor:
        together.wait()  # passes only if two are at work at once
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()
        return part + 1

    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            parts = each_on_one_thread(compute, torch.arange(4).split(1))
        assert torch.cat(parts).tolist() == [1, 2, 3, 4] and elsewhere == [2] * 4

        def fail(part: Tensor) -> Tensor:
            raise ValueError("planted")

        with pytest.raises(ValueError, match="planted"):
            each_on_one_thread(fail, torch.arange(4).split(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_settings_of_the_calling_thread_reach_every_image() -> None:
    network = encoder().requires_grad_(False)
    with torch.no_grad():
        one_by_one = torch.cat([network.statistics(image) for image in pixels(4).split(1)])
        value, slope = torch.func.jvp(network.statistics, (pixels(4),), (torch.ones(4, 3, 64, 64),))
        brighter = (network.statistics(pixels(4) + 1e-2) - one_by_one) / 1e-2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = network.statistics(pixels(4))
    torch.testing.assert_close(value, one_by_one, rtol=1e-4, atol=1e-4)
    assert float(slope.abs().max()) > 0.1 and (slope - brighter).abs().mean() < 0.05 * slope.abs().mean()
    assert 1e-4 < (coarse - one_by_one).abs().max() < 1
    with torch.inference_mode():
        assert torch.equal(network.statistics(pixels(4)), one_by_one)


def test_a_value_that_is_no_number_stays_one() -> None:
    image = pixels(2)
    image[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        found = encoder().statistics(image)
    assert bool(found[0].isfinite().all()) and bool(found[1].isnan().any())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own() -> None:
    program = """
import os, sys, torch
from pyiqa_qscorer.model.features import each_on_one_thread
torch.set_num_threads(2)
parts = torch.arange(4).split(1)
with torch.no_grad():
    each_on_one_thread(lambda part: part + 1, parts)
    child = os.fork()
    if child == 0:
        os._exit(int(torch.cat(each_on_one_thread(lambda part: part + 1, parts)).sum()))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 1 + 2 + 3 + 4
