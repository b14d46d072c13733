"""Time and memory of a Q-Scorer on a multimodal model of 2 billion parameters with random weights.

    python benchmarks/backbone_speed.py OUTPUT [--tiny] [--device cuda]

The model is a Qwen2.5-VL of the sizes of Qwen3-VL-2B, made here (4 GB in OUTPUT); `--tiny` makes a tiny one, to see
that this program runs. Measured: seconds of a training step (LoRA, batch 4, without the first three) and of a batch of
1 and of 32 pictures of 448 x 448 that are decoded already, and the peak of the GPU's memory in each part. OUTPUT gets
`backbone_speed.json`. Nobody has run it on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from source_commit import source_commit
from transformers import AutoConfig, AutoModelForImageTextToText, TrainerCallback

from pyiqa_qscorer import QScorer
from pyiqa_qscorer.training import run
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.trainer import QScorerTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny_multimodal import qwen2_5_vl
from tiny_training import make_pictures

TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "out_hidden_size": 2048,
    "window_size": 128,
    "fullatt_block_indexes": [5, 11, 17, 23],
}
STEPS = 8


ENDS: list[float] = []  # of training steps


class StepTimes(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ENDS.append(time.perf_counter())


class TimedTrainer(QScorerTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(StepTimes())


def write_base(folder: Path, tiny: bool, device: str) -> None:
    settings, processor = qwen2_5_vl(True)
    if tiny:
        settings["text_config"]["vocab_size"] = len(processor.tokenizer)
    else:
        settings["text_config"] |= TEXT
        settings["vision_config"] |= VISION
        size = {"patch_size": 16, "size": {"shortest_edge": 256 * 256, "longest_edge": 448 * 448}}
        processor.image_processor = type(processor.image_processor).from_dict(
            {**processor.image_processor.to_dict(), **size}
        )
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def peak(device: str) -> int | None:
    """Bytes since the last call, on a GPU."""
    if device == "cpu":
        return None
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def seconds(metric: QScorer, batch: int, repeats: int) -> float:
    """Of one batch: the median."""
    pictures = torch.randint(0, 256, (batch, 3, 448, 448), dtype=torch.uint8, device=metric.device)
    taken = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            started = time.perf_counter()
            metric.score_pixels(list(pictures))  # reads the scores, so the device is done
            taken.append(time.perf_counter() - started)
    return sorted(taken[2:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    base = options.output / "base"
    if not base.exists():
        write_base(base, options.tiny, options.device)
    pictures = make_pictures(options.output / "pictures", count=4 * STEPS + 8)
    run.QScorerTrainer = TimedTrainer  # type: ignore[misc]
    data = {"csv": str(pictures / "labels.csv"), "folder": str(pictures), "mos_range": [0, 100]}
    training = {"max_steps": STEPS, "per_device_train_batch_size": 4, "use_cpu": options.device == "cpu"}
    content = {
        "output": str(options.output / "run"),
        "model": {"backbone": str(base)},
        "data": {"train": [data]},
        "training": {**training, "dataloader_num_workers": 0, "report_to": "none"},
    }
    checkpoint = run.train(parse_config(content)).folders["qscorer"]
    facts: dict[str, Any] = {"commit": source_commit(), "device": options.device, "tiny": options.tiny}
    if options.device != "cpu":
        facts["device"] = torch.cuda.get_device_name()
    facts["seconds of a training step"] = (ENDS[-1] - ENDS[2]) / (len(ENDS) - 3)
    facts["bytes in training"] = peak(options.device)
    metric = QScorer(checkpoint, dtype="bfloat16", device=options.device).to(options.device)
    for batch, repeats in ((1, 20), (32, 5)):
        facts[f"seconds of a batch of {batch}"] = seconds(metric, batch, repeats)
        facts[f"bytes at a batch of {batch}"] = peak(options.device)
    facts["parameters"] = sum(parameter.numel() for parameter in metric.parameters())
    (options.output / "backbone_speed.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
