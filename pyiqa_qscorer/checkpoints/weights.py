"""Reading weight files one shard at a time, and merging LoRA adapters while reading."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .layouts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NON_LORA_WEIGHTS, read_json

# Tables that old transformers releases saved and every release recomputes.
RECOMPUTED_SUFFIX = "rotary_emb.inv_freq"


def read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of one weight file on the CPU, memory-mapped where the format allows it.

    Pickle files are read with `weights_only=True`: nothing in them is executed.

    Raises:
        CheckpointError: the file is damaged or holds something other than tensors.
    """
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
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} must be a tensor, got {type(tensor).__name__}")
        yield name, tensor


class LoraAdapter:
    """Low-rank updates of a published LoRA folder: W' = W + (alpha / r) B A."""

    def __init__(self, folder: Path) -> None:
        settings = read_json(folder / ADAPTER_CONFIG)
        self.file = next(folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists())
        refused = {
            "peft_type": settings.get("peft_type", "LORA") == "LORA",
            "bias": settings.get("bias", "none") == "none",
            **{
                name: not settings.get(name)
                for name in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
            },
        }
        for name, supported in refused.items():
            if not supported:
                raise CheckpointError(
                    f"{folder / ADAPTER_CONFIG}: {name}={settings.get(name)!r} is not supported; merge the adapter "
                    "with peft first and load the merged folder"
                )
        try:
            self.scale = settings["lora_alpha"] / settings["r"]
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: needs the numbers lora_alpha and r > 0") from error
        self._factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_shard(self.file):
            module, factor = self._parse(name)
            self._factors.setdefault(module, {})[factor] = tensor
        for module, factors in self._factors.items():
            if set(factors) != {"lora_A", "lora_B"}:
                raise CheckpointError(f"{self.file}: {module} has {sorted(factors)} instead of lora_A, lora_B")
        self._check_complete(settings.get("target_modules"))

    def _check_complete(self, targets: list[str] | str | None) -> None:
        """Every listed target must have come; a lost one would leave its module as in the base, unnoticed."""
        modules = [name.removesuffix(".weight") for name in self._factors]
        listed = targets if isinstance(targets, list) else []
        lost = [target for target in listed if not any(f".{name}".endswith(f".{target}") for name in modules)]
        if lost or not modules:
            raise CheckpointError(f"{self.file}: no adapters for {', '.join(lost[:8]) or 'any module'}")

    def _parse(self, name: str) -> tuple[str, str]:
        """`base_model.model.<module>.lora_A[.default].weight` -> (`<module>.weight`, `lora_A`)."""
        module, _, tail = name.removeprefix("base_model.model.").partition(".lora_")
        factor = tail.replace(".default", "").removesuffix(".weight")
        if factor not in ("A", "B"):
            raise CheckpointError(f"{self.file}: unexpected key {name}")
        return f"{module}.weight", f"lora_{factor}"

    @property
    def names(self) -> set[str]:
        """Parameters that the adapter changes."""
        return set(self._factors)

    def merge(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Merged copy of a weight, summed in float32.

        In float16 bit for bit what the published loader and peft 0.4 give: base rounded to float16, then the sum.
        """
        factors = self._factors[name]
        low, high = factors["lora_A"].float(), factors["lora_B"].float()
        if (high.shape[0], low.shape[1]) != tuple(weight.shape) or high.shape[1] != low.shape[0]:
            raise CheckpointError(
                f"{self.file}: {name} has shape {tuple(weight.shape)}, but its adapter has lora_A "
                f"{tuple(low.shape)} and lora_B {tuple(high.shape)}"
            )
        base = weight.half() if dtype == torch.float16 else weight
        return (base.float() + (high @ low) * self.scale).to(dtype)


def read_non_lora(folder: Path) -> dict[str, Tensor]:
    """Fully trained parameters beside a LoRA adapter, under plain names.

    An older release dumped every parameter; those are accepted and override the base.
    """
    stripped = {name.removeprefix("base_model."): tensor for name, tensor in read_shard(folder / NON_LORA_WEIGHTS)}
    if any(name.startswith("model.model.") for name in stripped):
        stripped = {name.removeprefix("model."): tensor for name, tensor in stripped.items()}
    return {name: tensor for name, tensor in stripped.items() if ".lora_" not in name}
