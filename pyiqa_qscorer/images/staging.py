"""From decoded images to a batch on the device, while the device works on the batch before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .model_images import ModelImages, SquareImages
from .preprocessing import normalise


@dataclass(frozen=True)
class PreparedImage:
    """An image on its way to the model; the fields that `ScoredImage` has too are explained there.

    Attributes:
        levels: uint8 (3, H, W), as the model's `ModelImages` makes them; on the CPU, or where a tensor came from.
    """

    source: str
    levels: Tensor | None = None
    error: str | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class StagedBatch:
    """Images in input order, and the network's inputs of those without an error, on the device."""

    images: list[PreparedImage]
    pixels: Any | None
    ready: torch.cuda.Event | None = None  # reached once the pixel values are there

    def wait(self) -> Any | None:
        """The network's inputs, for use in the current stream."""
        if self.ready is not None and isinstance(self.pixels, Tensor):
            stream = torch.cuda.current_stream(self.pixels.device)
            stream.wait_event(self.ready)
            self.pixels.record_stream(stream)  # its memory belongs to the other stream
        return self.pixels


class Stager:
    """Collects prepared images into batches and brings them to a device; meant for a thread of its own.

    To CUDA they travel as 8-bit levels, a quarter of the bytes, from pinned memory and in a stream of their own.
    """

    def __init__(self, device: torch.device, images: ModelImages) -> None:
        self.device, self.images = device, images
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def stage(self, prepared: Sequence[Future[PreparedImage]]) -> StagedBatch:
        """Wait for the images, then for none of their copies."""
        images = [future.result() for future in prepared]
        levels = [image.levels for image in images if image.levels is not None]
        if not levels:
            return StagedBatch(images, None)
        with torch.no_grad():
            if not isinstance(self.images, SquareImages):  # of any size: each goes on its own
                return StagedBatch(images, self.images.inputs([one.to(self.device) for one in levels]))
            if self._stream is None:
                return StagedBatch(images, self.images.inputs([one.cpu() for one in levels]).to(self.device))
            with torch.cuda.stream(self._stream):
                if all(one.device.type == "cpu" for one in levels):
                    pinned = torch.empty((len(levels), *levels[0].shape), dtype=torch.uint8, pin_memory=True)
                    moved = torch.stack(levels, out=pinned).to(self.device, non_blocking=True)
                else:
                    moved = torch.stack([one.to(self.device, non_blocking=True) for one in levels])
                pixels = normalise(moved)
                ready = torch.cuda.Event()
                ready.record(self._stream)
            return StagedBatch(images, pixels, ready)
