"""A hostile week: mutated pictures, kills at any moment, and code in every file that is read.

QSCORER_HOSTILE=500 tries 500 pictures instead of 100, and 10 kills of each command instead of 3.
"""

import csv
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_world import write_dataset
from commands import program
from pictures import encoded, plain_pixels, random_image
from PIL import Image, ImageFile
from test_backbone import dataset
from test_checkpoint_faults import Bomb
from test_features import encoder
from tiny_training import make_pictures, settings

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.checkpoints import load_checkpoint
from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.evaluation.results import read_facts
from pyiqa_qscorer.synthetic.recipe import Recipe
from pyiqa_qscorer.synthetic.rendering import render
from pyiqa_qscorer.training.cached_statistics import CachedStatistics, load_backbone
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.output import opened_output, state_to_resume
from pyiqa_qscorer.training.run import train

pytestmark = pytest.mark.slow
PICTURES = int(os.environ.get("QSCORER_HOSTILE", 100))
KILLS = 3 if PICTURES <= 100 else 10


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, repeated, or lost at the end."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, length = draw.randrange(len(changed)), draw.choice((1, 2, 8, 40))
        part = changed[at : at + length]
        if (kind := draw.randrange(6)) == 0:
            del changed[max(1, at) :]
        else:
            changed[at : at + length] = (draw.randbytes(len(part)), part * 2, b"", bytes(len(part)), part)[kind - 1]
    return bytes(changed)


def test_mutated_pictures_score_as_plain_pillow_reads_them_or_fail_alone(own, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # pyiqa turns it on
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # decoding larger ones takes long
    draw, files = random.Random(0), []
    for number in range(PICTURES):
        kind = ("JPEG", "PNG", "WEBP", "GIF", "BMP")[number % 5]
        source = random_image(draw.randrange(1, 60), draw.randrange(1, 60), number)
        source = source.convert(draw.choice(("RGB", "RGB", "L")) if kind in ("JPEG", "BMP", "PNG") else "RGB")
        files.append(tmp_path / f"{number:03d}")
        files[-1].write_bytes(mutated(encoded(source, kind), draw))
    scorer = Scorer("qscorer", "cpu", checkpoint=own, batch_size=1)
    found = list(scorer.score_iter(files))
    assert [item.source for item in found] == [str(file) for file in files]
    for file, item in zip(files, found, strict=True):
        if item.error is None:
            with Image.open(file) as picture:
                pixels = plain_pixels(picture.convert("RGB"), 56)
            assert np.float32(item.score) == scorer.metric.score_pixels(pixels[None]).numpy(), file.name
        else:
            assert item.error
    assert 0.1 < np.mean([item.error is None for item in found]) < 0.9


def test_kills_at_random_moments_change_no_table(own: Path, tmp_path: Path) -> None:
    images, table = make_pictures(tmp_path / "images", 48), write_dataset(tmp_path / "data", range(40, 220, 6))
    content = settings(images, Path("out"), training={"num_train_epochs": 3})
    (tmp_path / "config.json").write_text(json.dumps(content))
    score = [str(images), "-o", "out.csv", "--resume", "--checkpoint", str(own), "--device", "cpu", "--batch-size", "2"]
    benchmark = ["-m", "brightness", "-d", str(table), "--images", str(table.parent / "images")]
    commands = {"score": score, "benchmark": benchmark, "train": [str(tmp_path / "config.json")]}
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, str(Path(__file__).with_name("kill_at_random.py")), str(KILLS), "commands.json"]
    slow = program(FAKE_SECONDS_PER_IMAGE=0.02)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300, **slow)
    assert done.returncode == 0, done.stderr
    for kind, killed in json.loads(done.stdout).items():
        assert killed >= 1
        expected, *found = (outcome(kind, tmp_path / kind / str(run)) for run in range(KILLS + 1))
        for one in found:
            assert one == expected


def outcome(kind: str, folder: Path) -> Any:
    if kind == "train":
        facts = json.loads((folder / "out" / "checkpoint_qscorer" / "training.json").read_text())
        return facts["best_state"], [(line.get("loss"), line.get("eval_srcc")) for line in facts["curves"]]
    tables = [folder / "out.csv"] if kind == "score" else sorted((folder / "benchmark" / "scores").rglob("*.csv"))
    assert tables, (folder / "log.txt").read_text()
    rows = [row for table in tables for row in csv.DictReader(table.open(newline=""))]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run with one state, whose checkpoint is still to be written."""
    folder = tmp_path_factory.mktemp("trained")
    content = settings(make_pictures(folder / "images"), folder / "out", training={"num_train_epochs": 1})
    content["training"]["average_decay"] = 0.5
    shutil.rmtree(train(parse_config(content)).folders["qscorer"])
    return content, folder / "out"


def resume(content: dict[str, Any], output: Path) -> None:
    config = parse_config({**content, "output": str(output)})
    state_to_resume(config, True)
    with opened_output(config):
        pass


#: Files beside those that are read, by reader: code in them is not even seen.
UNREAD = {
    "lora": {"README.md"},
    "base": {"generation_config.json"},
    "merged": {"generation_config.json"},
    "training": {"trainer_state.json"},  # taken for torn by a kill
}


@pytest.mark.parametrize("container", ["torch", "pickle"])
@pytest.mark.parametrize(
    "reader", ["lora", "base", "merged", "own", "training", "statistics", "backbone", "calibration", "facts"]
)
def test_code_in_a_file_is_never_run(reader, container, folders, own, trained, tmp_path) -> None:
    trace, (content, output) = tmp_path / "trace", trained
    lora, base, merged, ours, out = (
        Path(shutil.copytree(folder, tmp_path / name))
        for folder, name in zip((*folders, own, output), ("lora", "base", "merged", "own", "out"), strict=True)
    )
    for name in ("statistics", "backbone", "calibration", "facts"):
        (tmp_path / name).mkdir()
    photo = tmp_path / "photo.png"
    random_image(64, 64, 0).save(photo)
    (tmp_path / "calibration" / "calibration.json").touch()
    (tmp_path / "facts" / "leaderboard.json").touch()
    for ending in ("pth", "safetensors"):
        (tmp_path / "backbone" / f"weights.{ending}").touch()
    if reader == "statistics":
        data = dataset(Path(content["data"]["train"][0]["folder"]))
        CachedStatistics(data, encoder(), tmp_path / "statistics")
    chains = Recipe(kind="chains", count=1)
    read: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "lora": (lora, lambda file: load_checkpoint(lora, base)),
        "base": (base, lambda file: load_checkpoint(lora, base)),
        "merged": (merged, lambda file: load_checkpoint(merged)),
        "own": (ours, lambda file: load_checkpoint(ours)),
        "training": (out, lambda file: resume(content, out)),
        "statistics": (tmp_path / "statistics", lambda file: CachedStatistics(data, encoder(), file.parent)),
        "backbone": (tmp_path / "backbone", lambda file: load_backbone(encoder(), str(file))),
        "calibration": (tmp_path / "calibration", lambda file: render(chains, [photo], tmp_path / "set", file)),
        "facts": (tmp_path / "facts", read_facts),
    }
    folder, call = read[reader]
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if reader == "training":
        files = [out / "configuration.json", *out.glob("checkpoint-*/*")]
    unread = set()
    assert files
    for file in files:
        before = file.read_bytes()
        if container == "torch":
            torch.save({"weight": torch.zeros(2), "bomb": Bomb(trace)}, whole := io.BytesIO())
            file.write_bytes(whole.getvalue())
        else:
            file.write_bytes(pickle.dumps(Bomb(trace)))
        try:
            call(file)
            unread.add(file.name)
        except QScorerError as error:
            assert file.name in str(error), f"{file.name}: {error}"
        assert not trace.exists(), file
        file.write_bytes(before)
    assert unread == UNREAD.get(reader, set())
    pickle.loads(pickle.dumps(Bomb(trace)))  # the bomb itself works
    assert trace.exists()
