"""Tiny checkpoints of every layout, complete with a tokenizer, also where `../shared` is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import write_sentencepiece
from torch import Tensor

from pyiqa_qscorer.checkpoints import LoadedCheckpoint
from pyiqa_qscorer.checkpoints.load import load_tokenizer
from pyiqa_qscorer.checkpoints.save import save_folder
from pyiqa_qscorer.metric import QScorer
from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring, ScoreOutput
from pyiqa_qscorer.prompt import score_tokens

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
LICENSED_TOKENIZER = TESTS.parent.parent / "shared" / "golden" / "base" / "tokenizer.model"
VOCABULARY = 32000
ADAPTED = "model.layers.0.self_attn.q_proj.weight"  # has an adapter in the LoRA folder


def published_folders(tmp_path: Path, *, stand_in: bool = False) -> tuple[Path, Path, Path]:
    """Copies of the golden LoRA, base and merged folders, the last two with a tokenizer.

    Args:
        stand_in: take the stand-in tokenizer even where the licensed one is at hand. Both give the same prompt ids,
            so scores are equal.
    """
    lora, base, merged = (tmp_path / name for name in ("lora", "base", "merged"))
    for folder, golden in ((lora, "official_lora_layout"), (base, "base"), (merged, "merged")):
        shutil.copytree(GOLDEN / golden, folder)
    for folder in (base, merged):
        add_tokenizer(folder, stand_in=stand_in)
    return lora, base, merged


def add_tokenizer(folder: Path, *, stand_in: bool = False) -> None:
    """Put `tokenizer.model` into a folder: the licensed one if it is at hand, else the stand-in."""
    if LICENSED_TOKENIZER.exists() and not stand_in:
        shutil.copyfile(LICENSED_TOKENIZER, folder / "tokenizer.model")
    else:
        write_sentencepiece(folder)


def shards(base: Path) -> list[Path]:
    return sorted(base.glob("pytorch_model-*.bin"))


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_weights(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def own_folder(tmp_path: Path, *, levels: int = 5, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A folder of our own layout: random weights, 56 x 56 pixels, `levels` score tokens."""
    tokenizer_source = tmp_path / "tokenizer"
    tokenizer_source.mkdir(parents=True)
    write_sentencepiece(tokenizer_source)
    tokenizer = load_tokenizer(tokenizer_source)
    tokenizer.add_tokens(score_tokens(levels), special_tokens=True)
    model = random_model(levels=levels, **sizes).to(dtype)
    return save_folder(tmp_path / "own", model, tokenizer)


def random_model(*, levels: int = 5, width: int = 8, visual_width: int = 8, seed: int = 0) -> QScorerForScoring:
    """A network with random weights of unit gain, so that scores spread and depend on the image."""
    visual = {"hidden_size": visual_width, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = QScorerConfig(
        vocab_size=VOCABULARY + levels,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        regressor_hidden_sizes=(width, 6),
        score_tokens=score_tokens(levels),
        score_token_ids=list(range(VOCABULARY, VOCABULARY + levels)),
        vision_config={**visual, "intermediate_size": 2 * visual_width, "image_size": 56},
        abstractor_config={**visual, "intermediate_size": 2 * visual_width, "num_learnable_queries": 5, "grid_size": 4},
        bos_token_id=1,
        eos_token_id=2,
    )
    model = QScorerForScoring(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            if name.endswith("norm.weight") or "norm" in name.rsplit(".", 2)[-2]:
                continue
            scale = 0.1 if name.endswith("bias") else 1.5 * fan_in**-0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.deepmlp.output_layer.bias.fill_(2.5)
    return model.eval()


def scored(loaded: LoadedCheckpoint | QScorer, pixels: Tensor) -> ScoreOutput:
    """What the network gives for (B, 3, S, S) pixels and the prompt of a checkpoint or metric."""
    model, prompt = getattr(loaded, "model", None) or loaded.network, loaded.prompt
    return model.score_prompted(pixels, prompt)
