"""Tiny random image-text-to-text models of transformers' own classes, with their real processors, one per family.

python tiny_multimodal.py FOLDER    writes all of them
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from pyiqa_qscorer.prompt import ANSWER, QUESTION

WORDS = ("bad", "poor", "fair", "good", "excellent")
CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of our prompts; `special` tokens stand for images and roles."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    roles = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=roles, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([f"{QUESTION} {ANSWER} {word}." for word in WORDS for _ in range(9)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )


def llava(tied: bool) -> tuple[dict[str, Any], Any]:
    text = tokenizer("<image>", image_token="<image>")
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **TEXT, "tie_word_embeddings": tied},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        "image_token_index": text.convert_tokens_to_ids("<image>"),
        "image_seq_length": 16,
        "vision_feature_layer": -1,
    }
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    return config, LlavaProcessor(
        images,
        text,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2_5_vl(tied: bool) -> tuple[dict[str, Any], Any]:
    text = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {
        name: text.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    config = {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **TEXT,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
    }
    size = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 64 * 64}
    images = Qwen2VLImageProcessor(**size)
    return config, Qwen2_5_VLProcessor(
        images,
        text,
        Qwen2VLVideoProcessor(**size),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen3_vl(tied: bool) -> tuple[dict[str, Any], Any]:
    older, processor = qwen2_5_vl(tied)
    text = {**older["text_config"], "model_type": "qwen3_vl_text"}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 1, 1]}
    sizes = {name: older["vision_config"][name] for name in ("depth", "hidden_size", "intermediate_size", "num_heads")}
    vision = {**sizes, "patch_size": 4, "spatial_merge_size": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    config = {**older, "model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    size = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    return {**config, "tie_word_embeddings": tied}, Qwen3VLProcessor(
        processor.image_processor,
        processor.tokenizer,
        Qwen3VLVideoProcessor(**size),
        chat_template=processor.chat_template,
    )


def idefics3(tied: bool) -> tuple[dict[str, Any], Any]:
    text = tokenizer(
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    config = {
        "model_type": "idefics3",
        "text_config": {"model_type": "llama", **TEXT, "tie_word_embeddings": tied},
        "vision_config": {**VISION, "image_size": 32, "patch_size": 8, "model_type": "idefics3_vision"},
        "image_token_id": text.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
        "tie_word_embeddings": tied,
    }
    size = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    images = Idefics3ImageProcessor(**size)
    return config, Idefics3Processor(images, text, image_seq_len=4, chat_template=CHAT.replace("IMAGE", "<image>"))


def internvl(tied: bool) -> tuple[dict[str, Any], Any]:
    text = tokenizer(
        "<IMG_CONTEXT>",
        "<img>",
        "</img>",
        "<video>",
        context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    )
    config = {
        "model_type": "internvl",
        "text_config": {"model_type": "qwen2", **TEXT, "tie_word_embeddings": tied},
        "vision_config": {"model_type": "internvl_vision", **VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        "image_token_id": text.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": tied,
    }
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=3)
    return config, InternVLProcessor(
        images,
        text,
        InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>"),
    )


def gemma3(tied: bool) -> tuple[dict[str, Any], Any]:
    text = tokenizer(
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    config = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **TEXT, "tie_word_embeddings": tied, "sliding_window": 64},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        "image_token_index": text.convert_tokens_to_ids("<image_soft_token>"),
        "boi_token_index": text.convert_tokens_to_ids("<start_of_image>"),
        "eoi_token_index": text.convert_tokens_to_ids("<end_of_image>"),
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": tied,
    }
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return config, Gemma3Processor(
        images, text, image_seq_length=4, chat_template=CHAT.replace("IMAGE", "<start_of_image>")
    )


FAMILIES: dict[str, Callable[[bool], tuple[dict[str, Any], Any]]] = {
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "idefics3": idefics3,
    "internvl": internvl,
    "gemma3": gemma3,
}


def write_base(family: str, folder: Path, tied: bool = True, seed: int = 0) -> Path:
    """A base model folder as the Hub has it: config, weights, tokenizer, processor, chat template."""
    settings, processor = FAMILIES[family](tied)
    settings["text_config"]["vocab_size"] = len(processor.tokenizer)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():  # Gemma's projector starts as zeros
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    for name in FAMILIES:
        print(write_base(name, Path(sys.argv[1]) / name))
