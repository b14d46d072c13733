"""The two parts of a scoring pass that can be compiled: images to visual tokens, tokens to states."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .multiway import VisualSpan
    from .prefix import PrefixStates
    from .qscorer import QScorerBackbone


class Steps:
    """Runs the parts as they are, or compiled for static shapes.

    Compiling takes minutes for a large model, once for every batch size; batches are therefore filled up to the next
    power of two. On CUDA the kernels of a part are recorded as one graph and replayed, which leaves the CPU nothing
    to do. Where there are gradients the parts always run as they are.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self._functions: dict[str, Callable[..., Tensor]] = {}

    def __reduce__(self) -> tuple[type[Steps], tuple[bool]]:
        return Steps, (self.compiled,)  # copies of the model compile anew

    def encode(self, backbone: QScorerBackbone, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) pixels -> (B, V, width) visual tokens."""
        if not self._use_compiled():
            return backbone.encode_images(pixel_values)
        batch = len(pixel_values)
        if pixel_values.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return self._run("encode", backbone.encode_images, _filled_up(pixel_values))[:batch]

    def decode(
        self, backbone: QScorerBackbone, embeddings: Tensor, span: VisualSpan, prefix: PrefixStates | None, wanted: int
    ) -> Tensor:
        """(B, T, width) embeddings -> (B, wanted, width) states at the end."""
        if not self._use_compiled():
            return backbone.decode(embeddings, span, cache=prefix, last=wanted)
        batch = len(embeddings)

        def decode(embeddings: Tensor, start: int, stop: int, prefix: PrefixStates | None, wanted: int) -> Tensor:
            return backbone.decode(embeddings, type(span)(start, stop), cache=prefix, last=wanted)

        return self._run("decode", decode, _filled_up(embeddings), *span, prefix, wanted)[:batch]

    def _use_compiled(self) -> bool:
        return self.compiled and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _run(self, name: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if name not in self._functions:
            mode = "reduce-overhead" if arguments[0].is_cuda else "default"
            self._functions[name] = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
        # The next replay of a graph writes into the memory of its last result.
        return self._functions[name](*arguments).clone()


def _filled_up(batch: Tensor) -> Tensor:
    """The batch with its last row repeated up to a power of two."""
    rows = len(batch)
    wanted = 1 << (rows - 1).bit_length()
    return batch if wanted == rows else torch.cat([batch, batch[-1:].expand(wanted - rows, *batch.shape[1:])])
