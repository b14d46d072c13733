"""Three formulations of the score on the same small network, data and seeds, cross-validated by picture content.

    python benchmarks/formulations.py --images FOLDER --table CSV [--seeds 3] [--epochs 60]

The table needs the columns img_name, mos, std and reference; pictures of one reference never stand on both sides of a
fold. Prints SRCC, PLCC and RMSE (1..5 scale) of all held-out predictions, mean and spread over seeds; writes
`results/formulations.json` and a plot of the training curves.
"""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.image_files import open_image
from pyiqa_qscorer.preprocessing import PAD_COLOR
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train
from pyiqa_qscorer.training.trainer import correlations

RESULTS = Path(__file__).resolve().parent / "results"
FORMULATIONS = ("score_token", "level_onehot", "level_soft")
SIZE, FOLDS = 112, 5
PART = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURE = {
    **PART,
    "initializer_range": 0.15,
    "regressor_hidden_sizes": [32, 16],
    "vision_config": {**PART, "image_size": SIZE, "patch_size": 14},
    "abstractor_config": {**PART, "num_learnable_queries": 8, "grid_size": SIZE // 14},
}


def main(
    images: Annotated[Path, typer.Option(help="folder of the pictures")],
    table: Annotated[Path, typer.Option(help="CSV with img_name, mos (lower is better), std, reference")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 60,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Run the comparison."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    fold_of = folds([row["reference"] for row in rows])
    values = np.array([float(row["mos"]) for row in rows])
    mos_range = (float(np.floor(values.min())), float(np.ceil(values.max())))
    target = 1 + 4 * (mos_range[1] - values) / (mos_range[1] - mos_range[0])
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    curves: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    started = time.monotonic()
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        shrink(images, rows, work)
        for seed in range(seeds):
            for formulation in FORMULATIONS:
                predicted = np.full(len(rows), np.nan)
                for fold in range(FOLDS):
                    held_out = [index for index in range(len(rows)) if fold_of[index] == fold]
                    output = work / f"{formulation}_{seed}_{fold}"
                    content = configuration(work, rows, held_out, mos_range, formulation, seed, epochs, output)
                    folder = train(parse_config(content)).folders["qscorer"]
                    scorer = Scorer("qscorer", "cpu", checkpoint=folder)
                    predicted[held_out] = scorer.score([work / rows[index]["img_name"] for index in held_out])
                    history = json.loads((folder / "training.json").read_text())["curves"]
                    curves[formulation].append(
                        [(entry["epoch"], entry["train_srcc"]) for entry in history if "train_srcc" in entry]
                    )
                measured = correlations(predicted, target)
                measured["train_srcc"] = float(np.mean([curve[-1][1] for curve in curves[formulation][-FOLDS:]]))
                found[formulation].append(measured)
                Console().print(f"seed {seed} {formulation}: " + show(measured), highlight=False)
    report(found, curves, {"seeds": seeds, "epochs": epochs, "threads": threads, "images": len(rows)}, started)


def folds(references: list[str]) -> list[int]:
    """Fold of each picture; contents are dealt out, the largest first, so that folds are of like size."""
    sizes = {name: references.count(name) for name in references}
    load, chosen = [0] * FOLDS, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        chosen[name] = load.index(min(load))
        load[chosen[name]] += sizes[name]
    return [chosen[name] for name in references]


def shrink(images: Path, rows: list[dict[str, str]], work: Path) -> None:
    """Padded and resized once: preprocessing leaves such a picture as it is, so runs see the same pixels, sooner."""
    for row in rows:
        picture = open_image(images / row["img_name"])
        side = max(picture.size)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        square.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(work / row["img_name"])


def configuration(
    work: Path,
    rows: list[dict[str, str]],
    held_out: list[int],
    mos_range: tuple[float, float],
    formulation: str,
    seed: int,
    epochs: int,
    output: Path,
) -> dict[str, Any]:
    table = output.with_suffix(".csv")
    with table.open("w", newline="") as file:
        kept = [row for index, row in enumerate(rows) if index not in held_out]
        writer = csv.DictWriter(file, ["img_name", "mos", "std"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
    data = {"folder": str(work), "csv": str(table), "mos_range": mos_range, "lower_better": True, "std_column": "std"}
    return {
        "output": str(output),
        "model": {"architecture": ARCHITECTURE, "formulation": formulation, "gradient_checkpointing": False},
        "data": {"train": [data], "flip": True, "workers": 0},
        "objective": {"scale": 1.0, "clamp_score": False},
        "lora": {"enabled": False},
        "trainable": {"everything": True},
        "optimisation": {
            "epochs": epochs,
            "batch_size": 12,
            "learning_rate": 1e-3,
            "precision": "float32",
            "seed": seed,
            "log_steps": 6,
            "save_steps": 100000,
        },
        "device": "cpu",
    }


def show(measured: dict[str, float]) -> str:
    return ", ".join(f"{name} {measured[name]:.3f}" for name in ("srcc", "plcc", "rmse", "train_srcc"))


def report(
    found: dict[str, list[dict[str, float]]],
    curves: dict[str, list[list[tuple[float, float]]]],
    settings: dict[str, int],
    started: float,
) -> None:
    """Table on the terminal, JSON and plot in `results/`."""
    table = Table(title=f"Held-out pictures, {FOLDS} folds by content, mean ± spread over {settings['seeds']} seeds")
    for column in ("formulation", "SRCC", "PLCC", "RMSE", "SRCC while training"):
        table.add_column(column, justify="left" if column == "formulation" else "right")
    for formulation, runs in found.items():
        cells = []
        for name in ("srcc", "plcc", "rmse", "train_srcc"):
            values = [run[name] for run in runs]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
        table.add_row(formulation, *cells)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    facts = {
        "settings": settings,
        "results": found,
        "seconds": round(time.monotonic() - started),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": settings["threads"]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit,
    }
    (RESULTS / "formulations.json").write_text(json.dumps(facts, indent=2) + "\n")
    figure, axes = plt.subplots(1, len(found), figsize=(12, 3.6), sharey=True)
    for axis, (formulation, runs) in zip(axes, curves.items(), strict=True):
        for curve in runs:
            axis.plot(*zip(*curve, strict=True), color="tab:blue", alpha=0.2, linewidth=0.8)
        epochs = [epoch for epoch, _ in runs[0]]
        axis.plot(epochs, np.mean([[value for _, value in curve] for curve in runs], axis=0), color="tab:blue")
        axis.set_title(formulation)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("SRCC on training batches")
    figure.tight_layout()
    figure.savefig(RESULTS / "formulations.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
