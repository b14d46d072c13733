"""From checkpoint files to a model that scores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import CheckpointError
from ..files import listed, read_json
from ..images.model_images import ModelImages, SquareImages, WholePictures
from ..model import QScorerConfig, QScorerForScoring
from ..model.fast_linear import use_fast_linear
from ..model.vlm import VlmQScorer
from ..model.vlm_inputs import ChatPrompt
from ..prompt import PromptTokens, score_tokens, tokenize_prompt
from .layouts import CheckpointFolder, Layout, recognise, weight_shards
from .published_layout import LoraAdapter, check_image_settings, read_non_lora
from .source import CheckpointSource, PathOrId
from .vlm_checkpoint import bits_and_bytes, load_vlm, saved_dtype
from .weights import WeightFiller, read_shard

TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
Precision = Literal["auto", "float16", "bfloat16", "float32", "8bit", "4bit"]
# Parts that stay in 16 bit under quantisation: small, and the score hangs on them. Full paths, since transformers
# compares them with the beginning of a module's name.
UNQUANTISED = ["lm_head", "deepmlp", "model.vision_model", "model.visual_abstractor"]


@dataclass
class LoadedCheckpoint:
    """A model ready to score.

    Attributes:
        model: a `ScoringNetwork` in evaluation mode, parameters frozen, on the CPU unless quantised.
        tokenizer: knows prompt and score tokens.
        prompt: as the model takes it: of the published network the ids.
        images: how pictures become its inputs.
        folder: where it came from.
        fingerprint: hex digest of the configuration and a sample of every weight; equal weights in equal precision give
            equal fingerprints, whatever the layout.
    """

    model: QScorerForScoring | VlmQScorer
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptTokens | ChatPrompt
    images: ModelImages
    folder: CheckpointFolder
    fingerprint: str


def load_checkpoint(
    checkpoint: PathOrId,
    base: PathOrId | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    dtype: Precision = "auto",
    prompt: str | None = None,
    pixels: Mapping[str, int | None] = MappingProxyType({}),
    attn_implementation: str | None = None,
    local_files_only: bool = False,
    cache_dir: PathOrId | None = None,
    device: str | torch.device | None = None,
) -> LoadedCheckpoint:
    """Download where needed and load; see `CheckpointSource` and `load_folder` for arguments and errors.

    Example:
        >>> from pyiqa_qscorer.registry import MINI_CHECKPOINT
        >>> load_checkpoint(MINI_CHECKPOINT).model.config.model_type
        'qscorer'
    """
    source = CheckpointSource(checkpoint, base, revision, base_revision, local_files_only, cache_dir)
    return load_folder(
        *source.fetch(),
        dtype=dtype,
        prompt=prompt,
        pixels=pixels,
        attn_implementation=attn_implementation,
        device=device,
    )


def load_folder(
    path: Path,
    base: Path | None = None,
    *,
    dtype: Precision = "auto",
    prompt: str | None = None,
    pixels: Mapping[str, int | None] = MappingProxyType({}),
    attn_implementation: str | None = None,
    device: str | torch.device | None = None,
) -> LoadedCheckpoint:
    """Load a local checkpoint of any layout; the peak memory is that of the weights plus one shard's mapped pages.

    Args:
        path, base: folders; `base` only for the LoRA layout.
        dtype: `auto` keeps a checkpoint saved in float32 as it is, and gives others float16 on an accelerator and
            bfloat16 on the CPU. `8bit` and `4bit` quantise the decoder with bitsandbytes.
        prompt: name or text; None: what the checkpoint says.
        pixels: `min_pixels` and `max_pixels` of a backbone of dynamic resolution; None: what the checkpoint says.
        attn_implementation: `sdpa` (default), `eager` or `flash_attention_2`.
        device: where the model is going to run; None: `cuda` if there is one, else `cpu`. Only a quantised model is
            put there.

    Raises:
        CheckpointError: files missing, damaged or of an unknown layout; missing, unexpected or wrongly shaped keys; a
            package that `dtype` or `attn_implementation` needs is not there.
        ValueError: an option outside its choices.
    """
    if dtype not in get_args(Precision):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Precision))}, got {dtype!r}")
    folder = recognise(path, base)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = {name: value for name, value in pixels.items() if value is not None}
    if folder.is_vlm:
        return _load_vlm_folder(folder, dtype, prompt, given, attn_implementation or "sdpa", device)
    if given:
        raise ValueError(f"{next(iter(given))} goes with a backbone of dynamic resolution, not with {path}")
    tokenizer = load_tokenizer(folder.tokenizer_folder)
    config = _configuration(folder, tokenizer)
    check_image_settings(folder.tokenizer_folder, config.vision_config.image_size)
    prompt_tokens = tokenize_prompt(tokenizer, prompt or config.prompt, published=folder.layout is not Layout.QSCORER)
    config._attn_implementation = attn_implementation or "sdpa"
    torch_dtype = _torch_dtype(dtype, folder, device.type)
    model = _read_weights(folder, config, torch_dtype)
    fingerprint = _fingerprint(model, _settings(config, dtype))
    if dtype in ("8bit", "4bit"):
        model = quantise(model, dtype, device)
    use_fast_linear(model)
    model.eval().requires_grad_(False)
    vision = config.vision_config
    images = SquareImages(vision.image_size, vision.image_fit, vision.smallest_side)
    return LoadedCheckpoint(model, tokenizer, prompt_tokens, images, folder, fingerprint)


def _load_vlm_folder(
    folder: CheckpointFolder,
    dtype: Precision,
    prompt: str | None,
    pixels: Mapping[str, int],
    attn_implementation: str,
    device: torch.device,
) -> LoadedCheckpoint:
    bits = dtype if dtype in ("8bit", "4bit") else None
    if bits and device.type == "cpu":
        raise CheckpointError(f"dtype={dtype!r} of another backbone needs a CUDA GPU; use 'bfloat16' or 'float32'")
    if dtype in ("float16", "bfloat16", "float32"):
        number_format = getattr(torch, dtype)
    else:
        number_format = torch.bfloat16 if bits else saved_dtype(folder.base or folder.path)
    model = load_vlm(folder, number_format, attn_implementation, device, bits, pixels)
    settings = (dtype if bits else "", model.config.formulation, model.config.quality_token_ids)
    images = repr(model.encode.processor.image_processor.to_dict())
    fingerprint = _fingerprint(model, (*settings, model.base.config.model_type, images))
    model.deepmlp.to(number_format)
    model.eval().requires_grad_(False)
    chat_prompt = model.encode.prompt(prompt or model.config.prompt, model.config.quality_tokens)
    return LoadedCheckpoint(model, model.encode.processor.tokenizer, chat_prompt, WholePictures(), folder, fingerprint)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder: `tokenizer.json` (ours) or LLaMA's `tokenizer.model`. No remote code.

    Raises:
        CheckpointError: there is none, or a file of it is damaged.
    """
    file = next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model")
    needed = ["tokenizer_config.json"] if file.suffix == ".json" else []
    found = [name for name in TOKENIZER_SETTINGS if name in needed or (folder / name).exists()]
    kind = {name: read_json(folder / name) for name in found}.get("tokenizer_config.json", {}).get("tokenizer_class")
    llama = file.suffix == ".model" or str(kind).startswith("Llama")
    try:
        return (LlamaTokenizer if llama else PreTrainedTokenizerFast).from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises `Exception` itself
        raise CheckpointError(
            f"{file} cannot be read as a tokenizer ({type(error).__name__}); fetch it again"
        ) from error


def _configuration(folder: CheckpointFolder, tokenizer: PreTrainedTokenizerBase) -> QScorerConfig:
    """Our configuration of a checkpoint. Completes the score tokens, in the configuration and in the tokenizer."""
    try:
        if folder.layout is Layout.QSCORER:
            config = QScorerConfig.from_pretrained(folder.path)
        else:
            config = QScorerConfig.from_published(folder.config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder.path / 'config.json'}: {error}") from error
    if folder.base is not None:
        # The published loader appends the tokens to the base vocabulary; the LoRA folder itself does not name them.
        first = read_json(folder.base / "config.json").get("vocab_size", 32000)
        names = score_tokens(config.vocab_size - first) if config.vocab_size > first else []
        config.score_tokens, config.score_token_ids = names, list(range(first, config.vocab_size))
    kind = "score" if config.formulation == "score_token" else "level"
    tokens, expected = getattr(config, f"{kind}_tokens"), getattr(config, f"{kind}_token_ids")
    if not tokens:
        raise CheckpointError(f"{folder.path} has no {kind} tokens: it is a base model, or was never trained to score")
    if kind == "score":
        tokenizer.add_tokens(tokens, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if ids != expected:
        raise CheckpointError(
            f"{folder.tokenizer_folder}: the tokenizer gives {tokens} the ids {ids}, the checkpoint expects "
            f"{expected}; tokenizer and checkpoint do not belong together"
        )
    return config


def _torch_dtype(dtype: Precision, folder: CheckpointFolder, device_type: str) -> torch.dtype:
    if dtype in ("float16", "bfloat16", "float32"):
        return getattr(torch, dtype)
    if dtype == "8bit":
        return torch.float16  # the only type that LLM.int8 computes with
    saved = folder.config.get("dtype", folder.config.get("torch_dtype"))
    if dtype == "auto" and folder.layout is Layout.QSCORER and saved == "float32":
        return torch.float32
    return half_precision(device_type)


def half_precision(device_type: str) -> torch.dtype:
    """16-bit type of a device: float16 on accelerators, as published; bfloat16 on CPUs, where float16 is slow."""
    return torch.bfloat16 if device_type == "cpu" else torch.float16


def _read_weights(folder: CheckpointFolder, config: QScorerConfig, dtype: torch.dtype) -> QScorerForScoring:
    """Model with the weights of a checkpoint, in `dtype`, on the CPU; strict about keys and shapes."""
    config.dtype = dtype
    model = empty_model(config)
    filler = WeightFiller(model, dtype)
    if folder.base is not None:
        trained, adapter = read_non_lora(folder.path), LoraAdapter(folder.path)
        if unknown := adapter.names - filler.expected.keys():
            raise CheckpointError(f"{adapter.file}: adapters of unknown modules: {listed(unknown)}")
        for shard in weight_shards(folder.base):
            frozen = ((name, tensor) for name, tensor in read_shard(shard) if name not in trained)
            filler.take(adapter.merge(frozen, dtype))
        filler.take(adapter.merge(trained.items(), dtype))
    else:
        filler.take(pair for shard in weight_shards(folder.path) for pair in read_shard(shard))
    filler.finish(folder)
    model.tie_weights()
    return model


def empty_model(config: QScorerConfig) -> QScorerForScoring:
    """Model on the meta device, without storage. Raises `CheckpointError` if its attention kernel cannot be had."""
    try:
        with torch.device("meta"):
            return QScorerForScoring(config)
    except ImportError as error:
        name = config._attn_implementation
        raise CheckpointError(
            f"attn_implementation={name!r} needs the package flash_attn and a GPU that it supports ({error}): "
            "pip install flash-attn, or use 'sdpa'"
        ) from error


def _settings(config: QScorerConfig, dtype: Precision) -> tuple[Any, ...]:
    """Those that no weight shows."""
    return (
        dtype if dtype in ("8bit", "4bit") else "",
        *(config.num_attention_heads, config.rms_norm_eps, config.rope_base),
        *(config.formulation, config.score_token_ids, config.level_token_ids),
        *((part.num_attention_heads, part.layer_norm_eps) for part in (config.vision_config, config.abstractor_config)),
    )


def _fingerprint(model: nn.Module, settings: tuple[Any, ...]) -> str:
    """Digest of the settings that no weight shows and of about 1,000 evenly spaced elements of every tensor.

    Training changes nearly all elements, so a sample is enough.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def quantise(model: QScorerForScoring, dtype: Precision, device: str | torch.device) -> QScorerForScoring:
    """The same model with a bitsandbytes decoder, on `device` (bitsandbytes quantises there)."""
    try:
        return QScorerForScoring.from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            quantization_config=bits_and_bytes(dtype, model.config.dtype, UNQUANTISED),
            dtype=model.config.dtype,
            attn_implementation=model.config._attn_implementation,
            device_map={"": str(device)},
        )
    except ImportError as error:
        raise CheckpointError(
            f"dtype={dtype!r} needs bitsandbytes and accelerate: {error}; pip install bitsandbytes accelerate"
        ) from error
