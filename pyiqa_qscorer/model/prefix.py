"""Keys and values of the text before the image: the same for every image, so computed once.

In the 7B with the `score` prompt this is 15 of 93 tokens. The question is only when they must be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

SAMPLES = 64  # elements of each weight that are compared


class PrefixStates(DynamicCache):
    """Keys and values (1, heads, P, head_dim) of every layer, joined to those of a batch without growing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        batch = key_states.shape[0]
        keys = torch.cat([layer.keys.expand(batch, -1, -1, -1), key_states], dim=2)
        values = torch.cat([layer.values.expand(batch, -1, -1, -1), value_states], dim=2)
        return keys, values


class PrefixCache:
    """Remembers the `PrefixStates` of one prompt for one state of the weights.

    Two things tell that weights have changed. The first is free of waiting and asked before: which tensors there are,
    where, of which type, and how often PyTorch saw each change. It shows moves, loaded weights and optimiser steps, but
    not what is written to a `.data`, as peft does when it merges an adapter. So a sample of `SAMPLES` elements of every
    weight is compared too, on the device and with the answer read together with the score (`changed`). Who changes
    single elements through `.data` must call `clear`.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._states: PrefixStates | None = None
        self._views: dict[torch.dtype, list[Tensor]] = {}
        self._sample: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        return PrefixCache()  # a copy of the model has weights of its own

    def __reduce__(self) -> tuple[type[PrefixCache], tuple[()]]:
        return PrefixCache, ()

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def get(
        self, ids: tuple[int, ...], weights: Sequence[nn.Module], compute: Callable[[], DynamicCache]
    ) -> PrefixStates | None:
        """The states of a prompt, computed if need be.

        None where they must not be remembered: there is no prefix, a weight wants a gradient, training, weights whose
        changes cannot be seen (inference tensors, parts of other tensors) or that are spread over several devices.

        Args:
            ids: the text before the image.
            weights: modules that hold all that the states depend on.
            compute: runs the decoder over `ids`, once, with a fresh cache; called without gradients.
        """
        tensors = [tensor for module in weights for tensor in _tensors(module)]
        unsuited = (
            not ids
            or torch.compiler.is_compiling()
            or any(module.training for module in weights)
            or len({tensor.device for tensor in tensors}) != 1
            or any(tensor.is_meta or tensor.is_inference() or not tensor.is_contiguous() for tensor in tensors)
            or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        )
        if unsuited:
            return None
        key = (ids, *[(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in tensors])
        if key != self._key or self._states is None:
            # Not inference tensors, which a later call with gradients to the image could not use.
            with torch.inference_mode(False), torch.no_grad():
                filled = compute()
                states = PrefixStates()
                states.layers = filled.layers
                self._views = {}
                for tensor in tensors:
                    self._views.setdefault(tensor.dtype, []).append(_spread(tensor.detach()))
                self._sample = self._look()
            self._key, self._states = key, states
        return self._states

    def changed(self) -> Tensor | None:
        """A flag on the device: do the weights differ from those that the states came from? None: nothing to check."""
        if not self._sample:
            return None
        pairs = zip(self._look(), self._sample, strict=True)
        return torch.stack([(now != before).any() for now, before in pairs]).any()

    def _look(self) -> list[Tensor]:
        """The samples as bytes, so that equal NaNs are equal; one tensor for each type of weights."""
        with torch.no_grad():
            return [torch.cat(views).view(torch.uint8) for views in self._views.values()]


def _spread(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // SAMPLES)]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, depth first. `module.parameters()` takes four times as long."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    for buffer in module._buffers.values():
        if buffer is not None:
            yield buffer
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)
