"""`QScorer`: the metric as pyiqa builds it, (B, C, H, W) images in [0, 1] -> (B, 1) scores."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import LoadedCheckpoint, Precision, half_precision, load_checkpoint
from .errors import ImageError, QScorerError
from .images.model_images import ModelImages, SquareImages
from .images.preprocessing import check_images, straight_through, values_in_range, values_near_range
from .model import QScorerForScoring
from .model.attention import checkpoint_in_eval_mode, enable_gradient_checkpointing
from .model.compiled import CompiledBackbone
from .registry import SCORE_RANGE


class QScorer(nn.Module):
    """No-reference image quality by a Q-Scorer model; higher is better.

    Args:
        checkpoint: Hub id or local folder, in any layout.
        base: Hub id or local folder of the model under a LoRA checkpoint; not touched for whole models. Adapters on
            another backbone name theirs.
        revision, base_revision: branch, tag or commit on the Hub.
        dtype: `auto`, `float16`, `bfloat16`, `float32`, `8bit` or `4bit`. `auto`: float32 for a checkpoint of this
            package saved in float32, else float16 on accelerators and bfloat16 on the CPU, also after `.to(device)`.
        prompt: `score`, `evaluation`, `training` or a text with one `<|image|>`; None: what the checkpoint says.
        min_pixels, max_pixels: of a picture as a backbone of dynamic resolution (Qwen2.5-VL) sees it; None: what the
            checkpoint says. Other values give other scores. Not with networks whose pictures have one size.
        clamp: keep scores inside [0, 5], as the published `model.score` does; its scripts do not.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        compile: run scoring (not gradients) through `torch.compile`, with CUDA graphs on CUDA: minutes at first, once
            for every batch size up to the next power of two. Not with 8-bit and 4-bit weights.
        local_files_only: never go to the network.
        cache_dir: folder of downloads, instead of the Hub's own cache.
        device: where the metric is going to run; decides `auto`, and where 8-bit and 4-bit weights are made. None: cuda
            if there is one. Does not move anything: that is `.to(device)`. pyiqa's `create_metric` keeps its `device`
            to itself and moves the metric afterwards: 8-bit and 4-bit weights are then made on torch's current CUDA
            device, which needs the room, whatever its `device` says. `torch.cuda.set_device` chooses that one.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing what it needs: the same
            gradients with less memory and about a third more time. Only matters where there are gradients.

    Raises:
        CheckpointError, DownloadError: the weights cannot be had or do not fit.
        ValueError: an option outside its choices.

    Example:
        >>> from pyiqa_qscorer import METRICS
        >>> metric = QScorer(**METRICS["qscorer-mini"].options)
        >>> metric(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        base_revision: str | None = None,
        dtype: Precision = "auto",
        prompt: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        clamp: bool = True,
        attn_implementation: str | None = None,
        compile: bool = False,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if compile and dtype in ("8bit", "4bit"):
            raise ValueError(
                f"compile must be False with dtype={dtype!r}: bitsandbytes layers cannot be recorded; "
                "use dtype='float16'"
            )
        loaded: LoadedCheckpoint = load_checkpoint(
            checkpoint,
            base,
            revision=revision,
            base_revision=base_revision,
            dtype=dtype,
            prompt=prompt,
            pixels={"min_pixels": min_pixels, "max_pixels": max_pixels},
            attn_implementation=attn_implementation,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            device=device,
        )
        self.network: Any = loaded.model  # a `ScoringNetwork`
        if compile:
            if not isinstance(loaded.model, QScorerForScoring):
                raise ValueError(f"compile must be False on another backbone than the published one: {checkpoint}")
            loaded.model.compiled = CompiledBackbone(loaded.model.model)
        self.prompt = loaded.prompt
        self.clamp = clamp
        self.images: ModelImages = loaded.images
        self.smallest_side: int = loaded.images.smallest_side
        if isinstance(loaded.images, SquareImages):
            self.image_size, self.image_fit = loaded.images.size, loaded.images.fit
        self._quantised = dtype in ("8bit", "4bit")
        self._fingerprint = loaded.fingerprint
        self._follow_device = dtype == "auto" and self.dtype != torch.float32 and not loaded.folder.is_vlm
        self._gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.network)
        self.eval()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: that of the weights that quantisation leaves alone."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def identity(self) -> str:
        """Hex digest of everything a score depends on but the image: weights, precision, prompt, clamping.

        Equal identities give equal scores up to rounding; a resumed run compares them.
        """
        facts = (self._fingerprint, str(self.dtype), self.prompt, self.clamp)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QScorer:
        # pyiqa moves the metric to its device only after building it, so `dtype="auto"` is settled here. A caller who
        # changes the precision himself (`.half()`, `.float()`, `.to(dtype)`) has decided.
        before = self.dtype
        super()._apply(fn, recurse)
        if self.dtype != before:
            self._follow_device = False
        elif self._follow_device and self.dtype != (wanted := half_precision(self.device.type)):
            super()._apply(lambda t: t.to(wanted) if t.is_floating_point() else t, recurse)
        return self

    def train(self, mode: bool = True) -> QScorer:
        super().train(mode)
        if self._gradient_checkpointing:
            checkpoint_in_eval_mode(self.network)
        return self

    def forward(self, images: Tensor, **_: Any) -> Tensor:
        """Scores of a batch.

        Args:
            images: (B, 3 or 1, H, W), floating point, in [0, 1], RGB. With gradients enabled (pyiqa's `as_loss=True`)
                values outside are clamped, unless they are on average further outside than 1, as 8-bit values are;
                otherwise they are an error.

        Returns:
            (B, 1) float32, higher is better, in [0, 5] where `clamp` is on. Differentiable, equal to the bit with and
            without gradients; for the gradient of values outside see `preprocessing.pixels_from_tensor`. Where the
            score is clamped, the gradient is that of the unclamped score.

        Raises:
            ImageError: another shape or type, NaN or infinite values, or values outside [0, 1].
        """
        return self.score_images(images, clamp_images=torch.is_grad_enabled())[:, None]

    def score_images(self, images: Tensor, clamp_images: bool = False) -> Tensor:
        """As `forward`, but (B,), and values outside [0, 1] are clamped where `clamp_images` says so."""
        check_images(images)
        if min(images.shape[-2:]) < self.smallest_side:
            warnings.warn(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels are smaller than the {self.smallest_side} "
                "pixels that this model can judge: their scores mean little",
                stacklevel=2,
            )
        if images.requires_grad and torch.is_grad_enabled() and self._quantised and self.device.type == "cpu":
            raise QScorerError(
                "a model with dtype 8bit or 4bit cannot be differentiated on the CPU: bitsandbytes gives no or wrong "
                "gradients there; use dtype='float32' or 'bfloat16', or a GPU"
            )
        images = images.to(self.device)
        valid = values_near_range(images) if clamp_images else values_in_range(images)
        return self.score_pixels(self.images.inputs_from_batch(images), valid)

    def read_prefix(self) -> Any:
        """The prompt before the image, read by the model: for several `score_pixels` while no weight changes."""
        return self.network.read_prefix(self.prompt)

    def score_pixels(self, pixel_values: Any, valid: Tensor | None = None, prefix: Any = None) -> Tensor:
        """Scores of preprocessed images.

        Args:
            pixel_values: what `images` (see `ModelImages`) makes of a batch, on any device: of the published network
                (B, 3, 448, 448) float32 normalised pixels, on another backbone a list of 8-bit pictures (3, H, W).
            valid: (B,) flags of images whose values can be scored. They are read after the model ran, so that the
                device is waited for only once.
            prefix: `read_prefix()`, only without gradients; None: the prompt is read anew.

        Returns:
            (B,) float32 on the device of the model.

        Raises:
            ImageError: an image that is not `valid`.
            QScorerError: the model gave a number that is not finite.
        """
        output = self.network.score_prompted(pixel_values, self.prompt, prefix)
        raw = output.raw_score.float()
        if valid is not None and not bool(valid.all()):
            rows = (~valid).nonzero().flatten().tolist()
            raise ImageError(
                f"images must hold finite values in [0, 1], images {rows} of the batch do not; divide 8-bit values "
                "by 255, undo a normalisation (times std, plus mean), and clamp the output of a network"
            )
        if not bool(raw.isfinite().all()):
            raise QScorerError(
                f"the model gave scores that are not finite ({raw.tolist()}) in {self.dtype}; "
                "try dtype='float32' or 'bfloat16', and check that the checkpoint is intact"
            )
        return straight_through(raw.clamp(*SCORE_RANGE), raw) if self.clamp else raw
