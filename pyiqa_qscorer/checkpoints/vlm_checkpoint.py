"""Checkpoints on an image-text-to-text model of transformers: an adapter folder of peft, or a whole model.

Both hold `qscorer_config.json` (see `VlmConfig`), `regressor.safetensors`, tokenizer and processor. Beside that lie
the adapters with the rows of new tokens, as peft writes them, or the weights, as transformers does: other programs of
either library load them too, without our regressor.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..errors import CheckpointError
from ..files import listed, read_json, readable_size, write_json
from ..model.vlm import VlmConfig, VlmQScorer
from ..model.vlm_inputs import VlmInputs
from .layouts import (
    ADAPTER_WEIGHTS,
    VLM_CONFIG,
    VLM_REGRESSOR,
    CheckpointFolder,
    Layout,
    weight_shards,
)
from .new_folder import check_output, new_folder, write_notes

if TYPE_CHECKING:
    from peft import PeftModel

NOT_IN_ADAPTER = "README.md"  # peft's card, of empty headings; ours stands in its place
BYTES = {"8bit": 1, "4bit": 0.5}  # per weight
# Heads and vision encoders, which stay in 16 bit.
UNQUANTISED_PARTS = ["lm_head", "vision_tower", "visual", "vision_model", "multi_modal_projector"]


def bits_and_bytes(bits: str, dtype: Any, kept: list[str]) -> BitsAndBytesConfig:
    """Quantisation to `8bit` or `4bit`, computed in `dtype`, of all linear layers but those whose names begin so."""
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def load_processor(path: Path, settings: Mapping[str, Any] = MappingProxyType({})) -> VlmInputs:
    """Processor of a folder, with changed settings of its image processor, such as `max_pixels`. No remote code.

    Raises:
        CheckpointError: none, a damaged one, or one without such a setting.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        images = processor.image_processor
        known = images.valid_kwargs.__annotations__.keys()
        if odd := sorted(settings.keys() - known):
            raise CheckpointError(f"{type(images).__name__} has no setting {odd[0]!r}: it has {listed(known)}")
        if settings:
            kept = {name: value for name, value in images.to_dict().items() if name not in settings}
            processor.image_processor = type(images).from_dict({**kept, **settings})
    except CheckpointError:
        raise
    except Exception as error:  # of the tokenizers library among others, which raises `Exception` itself
        raise CheckpointError(
            f"{path} has no processor that can be read ({type(error).__name__}: {error}): an image-text-to-text model "
            "needs tokenizer, preprocessor_config.json and processor_config.json"
        ) from error
    return VlmInputs(processor)


def load_base(
    path: Path, dtype: torch.dtype, attn_implementation: str, device: torch.device, bits: str | None = None
) -> PreTrainedModel:
    """The backbone of a folder, frozen, on the CPU; with `bits` (`8bit`, `4bit`) on `device`. No remote code.

    Raises:
        CheckpointError: no image-text-to-text model, damaged, or more than the memory that is free, which is said
            before anything is read.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has no configuration that transformers knows: {error}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise CheckpointError(
            f"{path} is a {config.model_type!r}, no image-text-to-text model of transformers; take one such as "
            "Qwen/Qwen3-VL-2B-Instruct, or leave out backbone for the published network"
        )
    stored = sum(shard.stat().st_size for shard in weight_shards(path))
    saved: Any = config.dtype or torch.float32
    needed = int(stored * (dtype.itemsize if bits is None else BYTES[bits]) / saved.itemsize)
    free = torch.cuda.mem_get_info(device)[0] if bits and device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise CheckpointError(
            f"backbone {path} takes {readable_size(needed)} in {bits or str(dtype).removeprefix('torch.')}, and "
            f"{readable_size(free)} of memory are free: close other programs, or use dtype='bfloat16', '8bit' or '4bit'"
        )
    extra: dict[str, Any] = {}
    if bits is not None:
        quantised = bits_and_bytes(bits, dtype, UNQUANTISED_PARTS)
        extra = {"quantization_config": quantised, "device_map": {"": str(device)}}
    try:
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False, **extra
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be loaded as a {config.model_type}: {error}") from error
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def make_room(base: PreTrainedModel, token_ids: list[int]) -> None:
    """Lengthen the vocabulary tables where an id lies beyond them; many models have spare rows."""
    table: Any = base.get_input_embeddings()
    if max(token_ids) >= len(table.weight):
        base.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)


def base_fingerprint(path: Path) -> str:
    """Digest of a backbone's weight files: names, shapes and the first values of every tensor, whatever loads them."""
    digest = hashlib.sha256()
    for shard in weight_shards(path):
        if shard.suffix != ".safetensors":
            raise CheckpointError(f"{shard}: a backbone must be in safetensors; convert it with save_pretrained")
        with safe_open(shard, "pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = part.get_shape()
                first = part[:1] if shape else file.get_tensor(name)
                digest.update(f"{name} {shape}".encode())
                digest.update(first.flatten()[:16].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_vlm(
    folder: CheckpointFolder,
    dtype: torch.dtype,
    attn_implementation: str,
    device: torch.device,
    bits: str | None,
    processor: Mapping[str, Any] = MappingProxyType({}),
) -> VlmQScorer:
    """A recognised folder as a network that scores, its adapters merged in (not where it is quantised).

    Raises:
        CheckpointError: files that are damaged, or a base that is not the one that was trained on.
    """
    try:
        config = VlmConfig.from_dict(folder.config)
    except ValueError as error:
        raise CheckpointError(f"{folder.path / VLM_CONFIG}: {error}") from error
    encode = load_processor(folder.path, processor)
    found = encode.quality_ids(config.quality_tokens)
    if found != config.quality_token_ids:
        raise CheckpointError(
            f"{folder.path}: the tokenizer gives {config.quality_tokens} the ids {found}, the checkpoint expects "
            f"{config.quality_token_ids}; tokenizer and checkpoint do not belong together"
        )
    path = folder.base or folder.path
    if folder.base is not None and config.base_fingerprint not in (None, base_fingerprint(folder.base)):
        raise CheckpointError(
            f"base {folder.base} is not the one that {folder.path} was trained on ({config.base}, revision "
            f"{config.base_revision}): its weights differ; give that one as base="
        )
    base = load_base(path, dtype, attn_implementation, device, bits)
    make_room(base, config.quality_token_ids)
    if folder.layout is Layout.VLM_ADAPTER:
        base = _with_adapters(base, folder.path, merge=bits is None)
    network = VlmQScorer(base, encode, config)
    try:
        load_model(network.deepmlp, folder.path / VLM_REGRESSOR)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder.path / VLM_REGRESSOR} does not fit its configuration: {error}") from error
    network.deepmlp.to(base.device)
    return network


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Without its warnings of what transformers is going to rename, and of what is checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield


def _with_adapters(base: PreTrainedModel, path: Path, merge: bool) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds

    try:
        with safe_open(path / ADAPTER_WEIGHTS[0], "pt") as file:
            stored = set(file.keys())
        with peft_quiet():
            adapted = PeftModel.from_pretrained(base, path)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the adapters do not fit the backbone: {error}") from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if odd := stored ^ wanted:
        raise CheckpointError(f"{path / ADAPTER_WEIGHTS[0]}: tensors that are missing or unknown: {listed(odd)}")
    adapted.requires_grad_(False)
    return cast("PreTrainedModel", adapted.merge_and_unload() if merge else adapted.get_base_model())


def save_vlm_folder(
    output: Path,
    network: VlmQScorer,
    adapters: PeftModel | None = None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint: the adapters, or, without, the whole model.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, or the disk is full.
    """
    check_output(output, "qscorer", None)
    with new_folder(output) as folder:
        if adapters is None:
            network.base.save_pretrained(folder, max_shard_size="1GB")
        else:
            adapters.peft_config["default"].base_model_name_or_path = network.config.base
            adapters.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / NOT_IN_ADAPTER).unlink(missing_ok=True)
        network.encode.processor.save_pretrained(folder)
        save_model(network.deepmlp, str(folder / VLM_REGRESSOR))
        write_json(folder / VLM_CONFIG, network.config.to_dict())
        write_notes(folder, notes)
    return output


def saved_dtype(backbone: Path) -> torch.dtype:
    """Number format that a backbone's weights are stored in."""
    config = read_json(backbone / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")  # as older releases of transformers call it
    found = getattr(torch, str(name), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32
