"""Reading weight files one shard at a time, and putting their tensors into a model."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import listed
from ..model import QScorerForScoring
from ..model.abstractor import CrossAttention
from .layouts import CheckpointFolder

FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTER_SUFFIX = "num_batches_tracked"  # of batch norms, the only whole numbers in a model
# Tables that old transformers releases saved and every release recomputes.
RECOMPUTED_SUFFIX = "rotary_emb.inv_freq"


def read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of one weight file on the CPU, memory-mapped where the format allows it.

    Pickle files are read with `weights_only=True`: nothing in them is executed.

    Raises:
        CheckpointError: the file is damaged, or holds something other than tensors of finite floating point numbers.
    """
    for name, tensor in _stored(path):
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} must be a tensor, got {type(tensor).__name__}")
        if not str(name).endswith(COUNTER_SUFFIX):
            _check_values(path, name, tensor)
        yield name, tensor


def _check_values(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what a cast to the model's precision would hide, or would make every score NaN."""
    dense = tensor.layout is torch.strided and not tensor.is_meta
    if tensor.dtype not in FLOATING_POINT or not dense:
        kind = tensor.dtype if dense else "a tensor without dense values"
        raise CheckpointError(
            f"{path}: {name} must hold floating point numbers, got {kind}; a quantised checkpoint has to be saved in "
            "float16, bfloat16 or float32 first (dtype='8bit' and '4bit' quantise while loading)"
        )
    # Smallest and largest value pass NaN on, take no memory, and are found faster than the file is read.
    if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
        raise CheckpointError(
            f"{path}: {name} holds NaN or infinite values; the training that wrote it failed, or the file is damaged: "
            "take an earlier checkpoint, or fetch it again"
        )


def _stored(path: Path) -> Iterator[tuple[str, Any]]:
    """What a weight file holds, unchecked."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as shard:
                for name in shard.keys():  # noqa: SIM118  (no iterator in safetensors)
                    yield name, shard.get_tensor(name)
            return
        mapped = zipfile.is_zipfile(path)  # files of torch < 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or ["no content"])[0]  # an empty file gives an EOFError without a text
        raise CheckpointError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason}); delete it and fetch it again"
        ) from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(tensors).__name__}")
    yield from tensors.items()


class WeightFiller:
    """Puts tensors into a model on the meta device and keeps account of what came."""

    def __init__(self, model: QScorerForScoring, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.seen: set[str] = set()
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if name not in self.expected:
                if not name.endswith(RECOMPUTED_SUFFIX):
                    self.unexpected.append(name)
            elif tensor.shape != self.expected[name]:
                self.seen.add(name)  # so that it is not reported as missing as well
                self.misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(self.expected[name])}")
            else:
                self._put(name, tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        module_name, _, own_name = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if own_name not in module._buffers:
            module._parameters[own_name] = nn.Parameter(tensor.to(self.dtype), requires_grad=False)
        elif isinstance(module, CrossAttention):
            module._buffers[own_name] = tensor.float()  # position tables: kept as saved, cast when used
        else:
            module._buffers[own_name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        self.seen.add(name)

    def finish(self, folder: CheckpointFolder, may_lack: str | None = None) -> None:
        """Compute what a formula gives, then raise `CheckpointError` unless exactly the expected keys came.

        Args:
            may_lack: prefix of keys that need not be there; they stay on the meta device.
        """
        tables: set[str] = set()
        for path, module in self.model.named_modules():
            if isinstance(module, CrossAttention):
                tables |= {f"{path}.q_pos_embed", f"{path}.k_pos_embed"}
                if module.q_pos_embed.is_meta:
                    # LoRA training saves parameters only; the tables are a formula.
                    module.q_pos_embed, module.k_pos_embed = module.position_tables()
        missing = self.expected.keys() - self.seen - tables
        if may_lack is not None:
            missing = {name for name in missing if not name.startswith(may_lack)}
        wrong = {"missing keys": missing, "unexpected keys": self.unexpected, "wrong shapes": self.misshapen}
        if any(wrong.values()):
            details = "; ".join(f"{len(w)} {what}: {listed(w)}" for what, w in wrong.items() if w)
            raise CheckpointError(f"{folder.path} ({folder.layout.value}) does not fit Q-Scorer: {details}")
