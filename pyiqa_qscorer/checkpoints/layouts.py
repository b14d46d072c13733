"""The three checkpoint layouts: recognising a folder and naming its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import listed, read_json

PUBLISHED_MODEL_TYPE = "mplug_owl2"
OUR_MODEL_TYPE = "qscorer"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_WEIGHTS = "non_lora_trainables.bin"
VLM_CONFIG, VLM_REGRESSOR = "qscorer_config.json", "regressor.safetensors"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_BIN, TORCH_BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SETTINGS_FILES = re.compile(
    r"config\.json|\w+_config\.json|(special_tokens_map|added_tokens|tokenizer|vocab|chat_template)\.json|\w+\.model|"
    r"chat_template\.jinja|merges\.txt|regressor\.safetensors"
)


class Layout(Enum):
    """Layouts that load; the values are what messages call them."""

    PUBLISHED_LORA = "published LoRA folder (needs a base)"
    PUBLISHED_MERGED = "published merged folder"
    QSCORER = "pyiqa-qscorer folder"
    VLM_ADAPTER = "pyiqa-qscorer adapter of another backbone (needs that one)"
    VLM_MERGED = "pyiqa-qscorer folder on another backbone"


@dataclass(frozen=True)
class CheckpointFolder:
    """A recognised local checkpoint.

    Attributes:
        base: folder of the base model, only for adapters.
        config: parsed config.json of `path`; on another backbone, of its qscorer_config.json.
    """

    layout: Layout
    path: Path
    base: Path | None
    config: dict[str, Any]

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: a published LoRA folder has none of its own."""
        return self.base if self.layout is Layout.PUBLISHED_LORA and self.base is not None else self.path

    @property
    def is_vlm(self) -> bool:
        """Whether it stands on an image-text-to-text model of transformers, not on the published network."""
        return self.layout in (Layout.VLM_ADAPTER, Layout.VLM_MERGED)


def has_lora_files(names: Iterable[str]) -> bool:
    """True where any of the file names belongs to the published LoRA layout."""
    return not {ADAPTER_CONFIG, *ADAPTER_WEIGHTS, NON_LORA_WEIGHTS}.isdisjoint(names)


def recognise(path: Path, base: Path | None = None) -> CheckpointFolder:
    """Tell the layout of a local folder and check that its files are complete.

    Raises:
        CheckpointError: none of the layouts, an incomplete one, or a LoRA folder without a base. The message says what
            was found and what was expected.
    """
    if (path / VLM_CONFIG).exists():
        return _recognise_vlm(path, base)
    if has_lora_files(entry.name for entry in path.iterdir()):
        return _recognise_lora(path, base)
    if not (path / "config.json").exists():
        raise CheckpointError(_unknown(path))
    config = read_json(path / "config.json")
    layouts = {OUR_MODEL_TYPE: Layout.QSCORER, PUBLISHED_MODEL_TYPE: Layout.PUBLISHED_MERGED}
    model_type = str(config.get("model_type"))
    if model_type not in layouts:
        raise CheckpointError(f"{_unknown(path)} config.json says model_type={config.get('model_type')!r}.")
    weight_shards(path)
    return CheckpointFolder(layouts[model_type], path, None, config)


def _recognise_lora(path: Path, base: Path | None) -> CheckpointFolder:
    needed = [ADAPTER_CONFIG, NON_LORA_WEIGHTS, "config.json"]
    missing = [name for name in needed if not (path / name).exists()]
    if not any((path / name).exists() for name in ADAPTER_WEIGHTS):
        missing.append(" or ".join(ADAPTER_WEIGHTS))
    if missing:
        raise CheckpointError(f"{path} is a LoRA folder but lacks {', '.join(missing)}")
    if base is None:
        raise CheckpointError(
            f"{path} is a LoRA folder: give the model it was trained on as base=, e.g. MAGAer13/mplug-owl2-llama2-7b"
        )
    base_type = read_json(base / "config.json").get("model_type")
    if base_type != PUBLISHED_MODEL_TYPE:
        raise CheckpointError(
            f"base must be an mPLUG-Owl2 folder (config.json with model_type {PUBLISHED_MODEL_TYPE!r}), "
            f"got model_type {base_type!r} in {base}"
        )
    weight_shards(base)
    return CheckpointFolder(Layout.PUBLISHED_LORA, path, base, read_json(path / "config.json"))


def _recognise_vlm(path: Path, base: Path | None) -> CheckpointFolder:
    config = read_json(path / VLM_CONFIG)
    adapter = (path / ADAPTER_CONFIG).exists()
    needed = [VLM_REGRESSOR, *([ADAPTER_WEIGHTS[0]] if adapter else [])]
    if missing := [name for name in needed if not (path / name).exists()]:
        raise CheckpointError(f"{path} is a Q-Scorer on another backbone but lacks {', '.join(missing)}")
    if not adapter:
        weight_shards(path)
        return CheckpointFolder(Layout.VLM_MERGED, path, None, config)
    if base is None:
        raise CheckpointError(f"{path} is an adapter: give the model it was trained on, {config.get('base')}, as base=")
    return CheckpointFolder(Layout.VLM_ADAPTER, path, base, config)


def weight_shards(path: Path) -> list[Path]:
    """Weight files of a full model folder, safetensors before `.bin`, every shard present.

    Raises:
        CheckpointError: no weights at all, a malformed index, or one that names anything but files beside it.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH_BIN, TORCH_BIN_INDEX)):
        if (path / index).exists():
            weight_map = read_json(path / index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(
                    f"{path / index}: weight_map must be a JSON object with the name of a weight file for every tensor"
                )
            names = sorted(set(weight_map.values()))
            beside = {entry.name for entry in path.iterdir() if entry.is_file()}  # never "../x" or "/x"
            missing = [name for name in names if name not in beside]
            if missing or not names:
                raise CheckpointError(
                    f"{path / index} names weight files that do not lie beside it: {listed(missing) or 'none at all'}"
                )
            return [path / name for name in names]
        if (path / single).exists():
            return [path / single]
    raise CheckpointError(_unknown(path))


def checkpoint_files(names: Sequence[str]) -> list[str]:
    """The files of a checkpoint among all of a repository: weights, settings, tokenizer; nothing in subfolders.

    The model and the adapter are taken once: as safetensors if complete, otherwise as `.bin`. Optimizer states,
    scripts, pictures and other formats stay.
    """
    flat = [name for name in names if "/" not in name]
    chosen = [name for name in flat if SETTINGS_FILES.fullmatch(name) or name == NON_LORA_WEIGHTS]
    for stem, bin_stem in (("model", "pytorch_model"), ("adapter_model", "adapter_model")):
        stored = [_stored_weights(flat, stem, "safetensors"), _stored_weights(flat, bin_stem, "bin")]
        complete = [files for files, is_complete in stored if is_complete]
        chosen += next(iter(complete + [files for files, _ in stored if files]), [])
    return chosen


def _stored_weights(names: Sequence[str], stem: str, suffix: str) -> tuple[list[str], bool]:
    """The files of one set of weights in one format, and whether all its shards are among them."""
    if f"{stem}.{suffix}" in names:
        return [f"{stem}.{suffix}"], True
    # Numbers come padded (00001-of-00002) or not (1-of-33), by age of the release.
    numbered = re.compile(rf"{stem}-0*(\d+)-of-0*(\d+)\.{suffix}")
    shards = {name: match for name in names if (match := numbered.fullmatch(name))}
    index = [name for name in names if name == f"{stem}.{suffix}.index.json"]
    return [*shards, *index], any(len(shards) == int(match[2]) for match in shards.values())


def _unknown(path: Path) -> str:
    found = listed(entry.name for entry in path.iterdir())
    return (
        f"{path} is none of the known checkpoint layouts. Found: {found or 'nothing'}. Expected one of: "
        f"{ADAPTER_CONFIG} + {ADAPTER_WEIGHTS[1]} + {NON_LORA_WEIGHTS} + config.json (published LoRA, with base=); "
        f"config.json with model_type {PUBLISHED_MODEL_TYPE!r} + weights (published merged); "
        f"config.json with model_type {OUR_MODEL_TYPE!r} + {SAFETENSORS} (pyiqa-qscorer)."
    )
