"""Three formulations of the score on the same small network, data and seeds.

    python benchmarks/formulations.py --synthetic 800 [--seeds 3] [--epochs 20]
    python benchmarks/formulations.py --live FOLDER [--epochs 300]

`--synthetic`: generated textures, blurred by a continuous amount that decides their MOS; a quarter is held out. Every
formulation is trained with every seed. `--live`: the LIVE JPEG pictures with their human scores, five folds, picture
contents apart, score tokens only: a test of fitting, since 43 pictures teach a network from nothing little that
generalises.

Prints SRCC, PLCC and RMSE (1..5 scale) on held-out and on training pictures, mean and spread over seeds or folds;
writes `results/formulations_*.json` and a plot of the training curves.
"""

from __future__ import annotations

import csv
import json
import platform
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from source_commit import source_commit
from transformers.utils import logging as transformers_logging

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.images.preprocessing import PAD_COLOR
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train
from pyiqa_qscorer.training.trainer import agreement

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


OPINION_STD = 0.5  # spread that the soft labels assume
Row = dict[str, str]


def main(
    synthetic: Annotated[int | None, typer.Option(min=8, help="number of generated textures")] = None,
    live: Annotated[
        Path | None, typer.Option(help="folder with images/ and a CSV: img_name, mos, std, reference")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Run the comparison."""
    if (synthetic is None) == (live is None):
        raise typer.BadParameter("give either --synthetic or --live")
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    started = time.monotonic()
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        if live is not None:
            with next(live.glob("*.csv")).open(newline="") as file:
                rows = list(csv.DictReader(file))
            shrink(live / "images", rows, work)
            fold_of = folds([row["reference"] for row in rows])
            plan = [("score_token", 0, fold_of, fold) for fold in range(FOLDS)]
            values = [float(row["mos"]) for row in rows]
            scale = {"mos_range": [float(np.floor(min(values))), float(np.ceil(max(values)))], "lower_better": True}
        else:
            rows = textures(cast(int, synthetic), work)
            fold_of = [int(row["reference"]) % 4 for row in rows]
            plan = [(formulation, seed, fold_of, 0) for seed in range(seeds) for formulation in FORMULATIONS]
            scale = {"mos_range": [1.0, 5.0]}
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        curves: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
        for number, (formulation, seed, folded, held) in enumerate(plan):
            measured, curve = one_run(work, rows, folded, held, scale, formulation, seed, epochs, number)
            found[formulation].append(measured)
            curves[formulation].append(curve)
            Console().print(f"{formulation}, seed {seed}, fold {held}: {show(measured)}", highlight=False)
    settings = {"epochs": epochs, "threads": threads, "images": len(rows), "seeds": seeds if live is None else 1}
    report("live" if live is not None else "synthetic", found, curves, settings, started)


def one_run(
    work: Path,
    rows: list[Row],
    fold_of: list[int],
    held: int,
    scale: dict[str, Any],
    formulation: str,
    seed: int,
    epochs: int,
    number: int,
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Train on all folds but one; correlations on the held-out and on the training pictures, and the training curve."""
    kept = [row for row, fold in zip(rows, fold_of, strict=True) if fold != held]
    rest = [row for row, fold in zip(rows, fold_of, strict=True) if fold == held]
    content = configuration(work, kept, scale, formulation, seed, epochs, work / f"run_{number}")
    folder = train(parse_config(content)).folders["qscorer"]
    scorer = Scorer("qscorer", "cpu", checkpoint=folder)

    def measure(some: list[Row]) -> dict[str, float]:
        low, high = scale["mos_range"]
        target = 1 + 4 * (np.array([float(row["mos"]) for row in some]) - low) / (high - low)
        target = 6 - target if scale.get("lower_better") else target
        return agreement(scorer.score([work / row["img_name"] for row in some]), target)

    history = json.loads((folder / "training.json").read_text())["curves"]
    curve = [(entry["epoch"], entry["train_srcc"]) for entry in history if "train_srcc" in entry]
    return {**measure(rest), "train_srcc": measure(kept)["srcc"]}, curve


def textures(count: int, work: Path) -> list[Row]:
    """Noise of several octaves, strengths and colours drawn, blurred by sigma 0.3..4; MOS = 1 + 4 exp(0.3 - sigma)."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(count):
        values = np.full((SIZE, SIZE, 3), 128.0)
        for octave in (1, 2, 4, 8, 16):
            size = SIZE // octave
            noise = Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8))
            layer = np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64) - 128
            values += layer * random.uniform(0.1, 0.5) * random.uniform(0.5, 1, 3)
        sigma = float(np.exp(random.uniform(np.log(0.3), np.log(4))))
        name = f"{index:04d}.png"
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        picture.filter(ImageFilter.GaussianBlur(sigma)).save(work / name)
        mos = 1 + 4 * float(np.exp(0.3 - sigma))
        rows.append({"img_name": name, "mos": f"{mos:.4f}", "std": str(OPINION_STD), "reference": str(index)})
    return rows


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
    work: Path, kept: list[Row], scale: dict[str, Any], formulation: str, seed: int, epochs: int, output: Path
) -> dict[str, Any]:
    table = output.with_suffix(".csv")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["img_name", "mos", "std"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
    return {
        "output": str(output),
        "model": {"architecture": ARCHITECTURE, "formulation": formulation, "gradient_checkpointing": False},
        "data": {
            "train": [{"folder": str(work), "csv": str(table), "std_column": "std", **scale}],
            "flip": True,
        },
        "objective": {"scale": 1.0, "clamp_score": False},
        "lora": {"enabled": False},
        "trainable": {"everything": True},
        "training": {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 12 if len(kept) < 100 else 24,
            "learning_rate": 1e-3,
            "bf16": False,
            "seed": seed,
            "logging_steps": max(6, len(kept) // 24),
            "save_total_limit": 1,
            "dataloader_num_workers": 0,
            "use_cpu": True,
        },
    }


def show(measured: dict[str, float]) -> str:
    return ", ".join(f"{name} {measured[name]:.3f}" for name in ("srcc", "plcc", "rmse", "train_srcc"))


def report(
    name: str,
    found: dict[str, list[dict[str, float]]],
    curves: dict[str, list[list[tuple[float, float]]]],
    settings: dict[str, int],
    started: float,
) -> None:
    """Table on the terminal, JSON and plot in `results/`."""
    table = Table(title="Mean ± spread over " + ("folds" if name == "live" else "seeds"))
    for column in ("formulation", "SRCC", "PLCC", "RMSE", "SRCC on what it saw"):
        table.add_column(column, justify="left" if column == "formulation" else "right")
    for formulation, runs in found.items():
        cells = []
        for measure in ("srcc", "plcc", "rmse", "train_srcc"):
            values = [run[measure] for run in runs]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
        table.add_row(formulation, *cells)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "settings": settings,
        "results": found,
        "seconds": round(time.monotonic() - started),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": settings["threads"]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": source_commit(),
    }
    (RESULTS / f"formulations_{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), sharey=True, squeeze=False)
    for axis, (formulation, runs) in zip(axes[0], curves.items(), strict=True):
        for curve in runs:
            axis.plot(*zip(*curve, strict=True), color="tab:blue", alpha=0.35, linewidth=0.8)
        epochs = np.linspace(0, max(epoch for epoch, _ in runs[0]), 60)[1:]
        means = np.mean([np.interp(epochs, *zip(*curve, strict=True)) for curve in runs], axis=0)
        axis.plot(epochs, means, color="tab:blue")
        axis.set_title(formulation)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("SRCC on training batches")
    figure.tight_layout()
    figure.savefig(RESULTS / f"formulations_{name}.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
