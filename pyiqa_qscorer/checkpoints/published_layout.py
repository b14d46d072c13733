"""The published checkpoints' own formats: LoRA adapters, image settings, files of the slow tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json, write_json
from ..images.preprocessing import MEAN, STD
from .layouts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NON_LORA_WEIGHTS
from .weights import read_shard


class LoraAdapter:
    """Low-rank updates of a published LoRA folder: W' = W + (alpha / r) B A."""

    def __init__(self, folder: Path) -> None:
        settings = read_json(folder / ADAPTER_CONFIG)
        self.file = next(folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists())
        plain = {"peft_type": "LORA", "bias": "none"}
        refused = [name for name, value in plain.items() if settings.get(name, value) != value]
        unset = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
        refused += [name for name in unset if settings.get(name)]
        if refused:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: {refused[0]}={settings.get(refused[0])!r} is not supported; merge the "
                "adapter with peft first and load the merged folder"
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

    def merge(self, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, those that the adapter changes merged into a copy of `dtype`."""
        for name, tensor in tensors:
            yield name, self._merged(name, tensor, dtype) if name in self._factors else tensor

    def _merged(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum in float32.

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


def image_settings(image_size: int) -> dict[str, Any]:
    """`preprocessor_config.json` as the published checkpoints have it."""
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "resample": 3,  # Pillow's number for bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }


def check_image_settings(path: Path, image_size: int) -> None:
    """Refuse a checkpoint whose image settings are not the ones that our preprocessing computes.

    A folder without `preprocessor_config.json` (the LoRA one) is taken to mean the published settings.

    Raises:
        CheckpointError: another size, mean, standard deviation or resampling filter.
    """
    file = path / "preprocessor_config.json"
    if not file.exists():
        return
    settings, expected = read_json(file), image_settings(image_size)
    for name in ("size", "crop_size", "image_mean", "image_std", "resample"):
        wanted, found = expected[name], settings.get(name, expected[name])
        if name.endswith("size"):
            wanted, found = image_size, _edge(found)
        if found != wanted:
            raise CheckpointError(f"{file}: {name} must be {wanted}, got {found}")


def _edge(size: Any) -> Any:
    """Releases of transformers write a size as a number or as an object."""
    return size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size


def save_published_tokenizer(folder: Path, names: list[str], ids: list[int], source: Path | None) -> None:
    """Files of the slow LLaMA tokenizer, with the score tokens, that transformers 4.36 reads."""
    assert source is not None  # checked before anything was written
    shutil.copyfile(source, folder / "tokenizer.model")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    listed = dict(enumerate(special.values())) | dict(zip(ids, names, strict=True))
    write_json(folder / "added_tokens.json", dict(zip(names, ids, strict=True)))
    write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": [{"content": name, **plain} for name in names],
            **{role: {"content": token, **plain} for role, token in special.items()},
            "pad_token": {"content": "<unk>", **plain},
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(index): {"content": token, **plain, "special": True} for index, token in listed.items()
            },
            "additional_special_tokens": names,
            **special,
            "pad_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 2048,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
        },
    )
