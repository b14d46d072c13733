"""Properties of the decoder; `test_golden_stages.py` compares it with the published one."""

from types import SimpleNamespace

import pytest
import torch
from golden_data import (
    build,
    tensors,
)
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pyiqa_qscorer.model.attention import eager_attention
from pyiqa_qscorer.model.language import RMSNorm, rotary_tables, rotate
from pyiqa_qscorer.model.multiway import NO_VISUAL, Multiway, VisualSpan


def test_rotary_tables_equal_the_published_ones() -> None:
    golden = tensors("model_T/golden")
    cosines, sines = rotary_tables(torch.arange(128)[None], 16, 10000.0, torch.float32)
    torch.testing.assert_close(cosines[0, 0], golden["rope_cos_first128"], rtol=0, atol=1e-6)
    torch.testing.assert_close(sines[0, 0], golden["rope_sin_first128"], rtol=0, atol=1e-6)


def _gathered(multiway: Multiway, states: Tensor, visual: VisualSpan) -> Tensor:
    """The published way: choose per token."""
    text, image = (way(states) for way in multiway.multiway)
    is_visual = torch.zeros(states.shape[1], dtype=torch.bool)
    is_visual[visual.start : visual.stop] = True
    return torch.where(is_visual[None, :, None], image, text)


@pytest.mark.parametrize("span", [(0, 0), (0, 3), (0, 9), (2, 5), (5, 9), (9, 9), (4, 5)])
def test_slices_equal_a_choice_per_token_and_only_ways_in_use_get_a_gradient(span: tuple[int, int]) -> None:
    torch.manual_seed(0)
    multiway, visual = Multiway(lambda: nn.Linear(6, 4)), VisualSpan(*span)
    states = torch.randn(2, 9, 6)
    out = multiway(states, visual)
    torch.testing.assert_close(out, _gathered(multiway, states, visual), rtol=0, atol=1e-6)
    multiway.zero_grad()
    out.sum().backward()
    text, image = (way.weight.grad for way in multiway.multiway)
    assert (image is not None) == (span[1] > span[0]) and (text is not None) == (span != (0, 9))


@pytest.mark.parametrize(("is_causal", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_eager_softmax_is_wide_in_the_decoder_only(monkeypatch, is_causal, expected) -> None:
    """As published: float32 in the decoder, the working precision in the visual parts."""
    softmax, seen = torch.softmax, []

    def spy(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        seen.append(dtype or scores.dtype)
        return softmax(scores, dim, dtype=dtype)

    monkeypatch.setattr(torch, "softmax", spy)
    query, key, value = torch.randn(3, 1, 2, 93, 16).half()
    output, weights = eager_attention(SimpleNamespace(is_causal=is_causal), query, key, value, None, scaling=0.25)
    assert seen == [expected] and weights.dtype is output.dtype is torch.float16
    assert output.shape == (1, 93, 2, 16)


def test_norm_and_rotation() -> None:
    """In half precision the order of rounding and weight shows; published: round first."""
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-5).half()
    nn.init.normal_(norm.weight)
    states = torch.randn(4, 64).half()
    wide = states.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(states), norm.weight * normed.half())
    assert not torch.equal(norm(states), (norm.weight.float() * normed).half())
    # Values whose square overflows half:
    norm = RMSNorm(8, 1e-5).half()
    nn.init.ones_(norm.weight)
    assert torch.equal(norm(torch.full((1, 8), 4096.0).half()), torch.ones(1, 8).half())
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> Tensor:
        places = (rotary_tables(torch.tensor([[p]]), 16, 1e4, torch.float64) for p in (query_position, key_position))
        turned_query, turned_key = (rotate(states, place) for states, place in zip((query, key), places, strict=True))
        torch.testing.assert_close(turned_query.norm(), query.norm(), rtol=1e-6, atol=0)
        return (turned_query * turned_key).sum()

    torch.testing.assert_close(score(3, 1), score(92, 90), rtol=1e-5, atol=1e-5)
    assert (score(3, 1) - score(4, 1)).abs() > 1e-2


def _random_embeddings(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_token_does_not_see_those_after_it(attention: str) -> None:
    decoder, states = build("S", attention).model, _random_embeddings()
    changed = states.clone()
    changed[:, 7:] += 1
    with torch.no_grad():
        before, after = (decoder.decode(x, VisualSpan(2, 6)) for x in (states, changed))
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-5)
    assert ((before - after)[:, 7:].abs().amax(-1) > 1e-2).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cut", [2, 6, 8, 11])
def test_cache_equals_one_pass(attention: str, cut: int) -> None:
    """Cut before, at the end of and after the visual block; the second part is text only."""
    decoder, states = build("S", attention).model, _random_embeddings()
    span = VisualSpan(2, 6)
    with torch.no_grad():
        whole, cache = decoder.decode(states, span), DynamicCache()
        first_span = VisualSpan(min(span.start, cut), min(span.stop, cut))
        rest_span = NO_VISUAL if cut >= span.stop else VisualSpan(0, span.stop - cut)
        first = decoder.decode(states[:, :cut], first_span, cache=cache)
        assert cache.get_seq_length() == cut
        rest = decoder.decode(states[:, cut:], rest_span, cache=cache)
        assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(attention: str, side: str) -> None:
    decoder, states = build("S", attention).model, _random_embeddings()
    junk = 100 * torch.ones(2, 3, 32)
    padded = torch.cat([junk, states] if side == "left" else [states, junk], dim=1)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[:, slice(0, 3) if side == "left" else slice(12, 15)] = 0
    kept = slice(3, 15) if side == "left" else slice(0, 12)
    shift = kept.start
    with torch.no_grad():
        alone = decoder.decode(states, VisualSpan(2, 6))
        out = decoder.decode(padded, VisualSpan(2 + shift, 6 + shift), mask)
    torch.testing.assert_close(out[:, kept], alone, rtol=0, atol=1e-5)
    assert out.isfinite().all()
