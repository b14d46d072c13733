"""The three formulations on a real pretrained language model, SmolLM2-135M, trained on opinions of real photos.

    python benchmarks/biq2021.py BIQ2021 runs/biq2021
    python benchmarks/formulations_decoder.py runs/biq2021 runs/decoder [--seeds 3]

The backbone is that of `smollm2_backbone.py`. Every formulation gets the same 400 photos of BIQ2021's training part,
two epochs, and a search over the same two learning rates (one epoch of 400 other photos, judged on 200 more, with a
seed of its own); it is tested on 300 photos of the validation part, which has no near-duplicates of training photos
and chooses nothing. BIQ2021 gives no spread of opinions: `level_soft` gets 0.5 on the scale 1..5.

Every run is kept in OUTPUT, so a second call goes on; `results/formulations_decoder.json` has all of them. What
training did to the language of these models, `pyiqa-qscorer confusion --tuned OUTPUT/train_.../checkpoint_qscorer`
tells.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from formulations_photos import MEASURES, RESULTS, SPREAD, Run, paired
from rich.console import Console
from rich.table import Table
from smollm2_backbone import StatisticsTower, settings, write_backbone
from source_commit import source_commit
from transformers.utils import logging as transformers_logging

from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train

FORMULATIONS = ("score_token", "level_onehot", "level_soft")
RATES = (5e-4, 1e-3)
PARTS = {"train": 400, "search": 400, "search_test": 200}  # of the training photos, one after the other
TESTED = 300
SEARCH_SEED = 100


def main(
    data: Annotated[Path, typer.Argument(help="what benchmarks/biq2021.py wrote")],
    output: Annotated[Path, typer.Argument(help="backbone, runs and checkpoints")],
    seeds: Annotated[int, typer.Option(min=2)] = 3,
) -> None:
    """Run what is missing, then report."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    StatisticsTower.known = {}
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "backbone").exists():
        write_backbone(output / "backbone", data)
    make_tables(data, output)
    rates, search = {}, []
    for name in FORMULATIONS:
        found = [run_once(data, output, name, rate, SEARCH_SEED, "search") for rate in RATES]
        rates[name] = max(found, key=lambda run: run["srcc"])["rate"]
        search += found
    runs = [run_once(data, output, name, rates[name], seed, "train") for seed in range(seeds) for name in FORMULATIONS]
    report(runs, search, rates)


def make_tables(data: Path, output: Path) -> None:
    """`train.csv`, `search.csv`, `search_test.csv` and `test.csv`, each with a column of assumed spreads."""

    def rows(name: str) -> list[dict[str, str]]:
        with (data / f"{name}.csv").open(newline="") as file:
            found = [{"file": row["file"], "mos": row["mos"], "std": str(SPREAD)} for row in csv.DictReader(file)]
        return [found[index] for index in np.random.default_rng(1).permutation(len(found))]

    photos = rows("train")
    tables, start = {"test": rows("validation")[:TESTED]}, 0
    for part, count in PARTS.items():
        tables[part] = photos[start : start + count]
        start += count
    for part, content in tables.items():
        with (output / f"{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "mos", "std"])
            writer.writeheader()
            writer.writerows(content)


def run_once(data: Path, output: Path, name: str, rate: float, seed: int, part: str) -> Run:
    """One training and its agreement with people, kept as a JSON file."""
    folder = output / f"{part}_{name}_{rate:g}_{seed}"
    file = output / f"{folder.name}.json"
    if file.exists():
        return json.loads(file.read_text())
    started = time.monotonic()
    content = settings(output / "backbone", data, output / f"{part}.csv", 2 if part == "train" else 1)
    tested, photos = ("test", "validation") if part == "train" else ("search_test", "train")
    column = {"std_column": "std"}
    content["output"] = str(folder)
    content["model"]["formulation"] = name
    content["data"]["train"][0] |= column
    content["data"]["flip"] = False
    content["data"]["validation"][0] |= {"folder": str(data / photos), "csv": str(output / f"{tested}.csv")} | column
    content["training"] |= {"learning_rate": rate, "seed": seed, "load_best_model_at_end": False, "save_total_limit": 1}
    content["training"]["eval_delay"] = content["training"]["num_train_epochs"]
    result = train(parse_config(content))
    if not result.finished:
        raise SystemExit("stopped; the same command goes on from the last state")
    run: dict[str, Any] = {"name": name, "size": PARTS[part], "rate": rate, "seed": seed}
    run |= {measure: result.metrics[f"validation_{measure}"] for measure in MEASURES}
    run["minutes"] = round((time.monotonic() - started) / 60, 1)
    file.write_text(json.dumps(run))
    Console().print(run)
    return run


def report(runs: list[Run], search: list[Run], rates: dict[str, float]) -> None:
    """Table on the terminal, JSON in `results/`."""
    size = PARTS["train"]
    differences = paired(runs, size, list(FORMULATIONS[1:]))
    content = {
        "commit": source_commit(),
        "hours_of_all_runs": round(sum(run["minutes"] for run in [*runs, *search]) / 60, 2),
        "learning_rates": rates,
        "differences_from_score_token": differences,
        "runs": runs,
        "search": search,
    }
    (RESULTS / "formulations_decoder.json").write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title=f"SmolLM2-135M, {size} photos, tested on {TESTED}: mean ± standard deviation over seeds")
    for column in ("formulation", *MEASURES, "SRCC - score_token's", "p (Holm)"):
        table.add_column(column)
    for name in FORMULATIONS:
        columns = [[run[measure] for run in runs if run["name"] == name] for measure in MEASURES]
        cells = [f"{np.mean(one):.4f} ± {np.std(one, ddof=1):.4f}" for one in columns]
        less = differences.get(name)
        compared = "" if less is None else f"{less['difference']:+.4f} [{less['low']:+.4f}, {less['high']:+.4f}]"
        table.add_row(name, *cells, compared, "" if less is None else f"{less['p_holm']:.3f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
