"""A backbone whose two parts of a scoring pass run through `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .language import Decoder
    from .multiway import VisualSpan


class CompiledBackbone:
    """`encode_images` and `decode` of a backbone, compiled for static shapes; not for gradients.

    Compiling takes minutes for a large model, once for every batch size; batches are therefore filled up to the next
    power of two. On CUDA the kernels of a part are recorded as one graph and replayed, which leaves the CPU nothing
    to do.
    """

    def __init__(self, backbone: Decoder) -> None:
        self.backbone = backbone
        self._functions: dict[str, Callable[..., Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"backbone": self.backbone, "_functions": {}}  # copies of the model compile anew

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) pixels -> (B, V, width) visual tokens."""
        if pixel_values.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return self._run("encode_images", pixel_values)

    def decode(self, embeddings: Tensor, visual: VisualSpan, *, cache: Cache | None, last: int) -> Tensor:
        """(B, T, width) embeddings -> (B, last, width) states at the end."""
        return self._run("decode", embeddings, visual, None, cache, last)

    def _run(self, name: str, batch: Tensor, *arguments: Any) -> Tensor:
        if name not in self._functions:
            mode = "reduce-overhead" if batch.is_cuda else "default"
            self._functions[name] = torch.compile(
                getattr(self.backbone, name), mode=mode, dynamic=False, fullgraph=True
            )
        result = self._functions[name](_filled_up(batch), *arguments)
        return result[: len(batch)].clone()  # the next replay of a graph writes into the memory of its last result


def _filled_up(batch: Tensor) -> Tensor:
    """The batch with its last row repeated up to a power of two."""
    rows = len(batch)
    wanted = 1 << (rows - 1).bit_length()
    return batch if wanted == rows else torch.cat([batch, batch[-1:].expand(wanted - rows, *batch.shape[1:])])
