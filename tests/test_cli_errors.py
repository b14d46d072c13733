"""`pyiqa-qscorer errors`: what it prints and writes, how it refuses, and trained networks of the three formulations."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from tiny_training import make_pictures, settings

from pyiqa_qscorer.analysis.measured import LABEL_OF, MeasuredModel, measure
from pyiqa_qscorer.data.labels import gaussian_soft_label, level_centers, one_hot, restore
from pyiqa_qscorer.data.score_rows import ScoreRow, write_rows
from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.metric import QScorer
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.dataset import LabelledImages, read_dataset
from pyiqa_qscorer.training.dataset_config import FolderDataset
from pyiqa_qscorer.training.run import train

FORMULATIONS = ("score_token", "level_onehot", "level_soft")


class Result(commands.Result):
    def __init__(self, *arguments: object) -> None:
        super().__init__("errors", *arguments)

    def line(self, *words: str) -> list[float]:
        """Numbers of the first line that starts with these words."""
        pattern = r"\s*" + r"\s+".join(re.escape(word) for word in words) + r"\s+[-\d]"
        line = next(line for line in self.out.splitlines() if re.match(pattern, line))
        return [float(cell) for cell in line.split() if re.fullmatch(r"[-+.\de]+", cell)]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path, values = tmp_path / "labels.csv", np.random.default_rng(0).uniform(0, 100, 80)
    path.write_text("name,mos,std\n" + "".join(f"{i}.png,{value},12\n" for i, value in enumerate(values)))
    return path


def test_tables_on_stdout_facts_on_stderr(labels: Path) -> None:
    result = Result("--mos", labels, "--std-column", "std", "--range", "0", "100", "--levels", "4..6,9")
    assert result.code == 0 and "images: 80" in result.err
    assert "0 to 100 (stated)" in result.err
    assert [line.split()[0] for line in result.out.splitlines() if re.match(r"\d+\s", line)] == ["4", "5", "6", "9"]
    assert result.line("one hot", "integers")[0] == pytest.approx(0.3, abs=0.05)
    assert result.line("gaussian pdf", "integers")[0] < 0.05


def test_vote_columns_and_columns_that_hold_no_opinions(tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text("c1,c2,c3,s\n1,1,0,0.5\n0,1,1,0.5\n0,0,2,0\n3,0,0,0\n")
    result = Result("--mos", path, "--vote-columns", "c1", "c2", "c3", "--std-column", "s", "--levels", "5")
    assert result.code == 0 and "4 of 4 images, 2 of them 0" in result.err
    path = tmp_path / "scores.csv"
    write_rows(path, [ScoreRow(f"{n}.png", n / 2, metric="qscorer-mini", identity="0") for n in range(6)])
    result = Result("--mos", path, "--mos-column", "score", "--levels", "5")
    assert result.code == 2 and "column 'score' holds scores that pyiqa-qscorer predicted" in result.err
    assert Result("--mos", path, "--levels", "5").code == 2  # says with which option the MOS is named


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--levels", "1..5"], "--levels must be whole numbers from 2 to 100"),
        (["--levels", "five"], "got 'five'"),
        (["--levels", "9..3"], "got '9..3'"),
        (["--mos-column", "quality"], "no column 'quality'; its columns are name, mos, std"),
        (["--range", "0", "5"], "outside the stated range"),
        (["c1", "c2"], "errors takes options only, got 'c1 c2'"),
        (["--checkpoint", "folder"], "--checkpoint and --data go together"),
        (["--data", "folder"], "--checkpoint and --data go together"),
        (["--data", "d", "--checkpoint", "c", "--skip-rows", "1"], "do not go with --checkpoint"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(labels: Path, arguments: list[str], message: str) -> None:
    result = Result("--mos", labels, *arguments)
    assert result.code == 2 and result.out == ""
    assert message in " ".join(result.err.split())


def test_a_table_needs_no_torch_and_the_command_line_no_analysis() -> None:
    program = """
import sys
import pyiqa_qscorer.cli.app
print(sorted({"pandas", "scipy", "matplotlib", "torch"} & sys.modules.keys()))
import pyiqa_qscorer.analysis.error_report
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[]", "False"], done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint of each formulation; `pictures` is the folder they were trained on."""
    folder = tmp_path_factory.mktemp("trained")
    found = {"pictures": make_pictures(folder / "pictures", count=16)}
    for name in FORMULATIONS:
        content = settings(
            found["pictures"], folder / name, model={"formulation": name}, training={"num_train_epochs": 3}
        )
        found[name] = train(parse_config(content)).folders["qscorer"]
    return found


def dataset(pictures: Path, **changes: Any) -> LabelledImages:
    content = {"folder": pictures, "csv": pictures / "labels.csv", "mos_range": (0, 100), "std_column": "std"}
    return read_dataset(FolderDataset(**{**content, **changes}), "test")


@pytest.fixture(scope="module")
def measured(trained: dict[str, Path]) -> dict[str, MeasuredModel]:
    data = dataset(trained["pictures"])
    return {name: measure(name, QScorer(trained[name]), data, "cpu", batch_size=5) for name in FORMULATIONS}


def mos_and_std(data: LabelledImages) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([getattr(image, name) for image in data.images]) for name in ("mos", "std"))


def logits_one_by_one(checkpoint: Path, data: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Level logits (N, K) and the share of the vocabulary's softmax that the levels get, image by image."""
    metric = QScorer(checkpoint)
    rows, shares = [], []
    for image in data.images:
        pixels = pixels_from_pil(open_image(image.path), metric.image_size)[None]
        with torch.no_grad():
            output = metric.network.score_prompted(pixels, metric.prompt)
        logits, ids = output.first_logits[0].double(), metric.network.config.level_token_ids
        rows.append(logits[ids])
        shares.append(logits.softmax(-1)[ids].sum())
    return torch.stack(rows), torch.stack(shares)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_measured_parts_add_up_and_errors_are_those_of_the_scores(trained, measured, name) -> None:
    found, data = measured[name], dataset(trained["pictures"])
    metric = QScorer(trained[name])
    with torch.no_grad():
        pixels = torch.stack([pixels_from_pil(open_image(image.path), metric.image_size) for image in data.images])
        scores = metric.score_pixels(pixels).double().numpy()
    mos, _ = mos_and_std(data)
    assert (found.formulation, found.images, found.failed, found.levels) == (name, 16, 0, 5)
    assert found.error.rmse == pytest.approx(math.sqrt(np.mean((scores - mos) ** 2)), abs=1e-5)
    assert found.error.bias == pytest.approx(np.mean(scores - mos), abs=1e-5)
    assert found.fitting_part + found.conversion_part + found.cross_term == pytest.approx(found.error.rmse**2)
    assert found.conversion_part == pytest.approx(found.predicted.rmse**2)


def test_predicted_error_is_that_of_the_label_each_formulation_teaches(trained, measured) -> None:
    mos, std = mos_and_std(dataset(trained["pictures"]))
    soft = gaussian_soft_label(mos, std, 5, normalise=True)
    expected = {
        "level_onehot": np.abs(restore(one_hot(mos, 5), level_centers(5)) - mos).mean(),
        "level_soft": np.abs(restore(soft, level_centers(5)) - mos).mean(),
        "score_token": np.abs(mos.astype(np.float32) - mos).mean(),
    }
    for name, value in expected.items():
        assert measured[name].predicted.mae == pytest.approx(value, abs=1e-12)
    assert measured["score_token"].predicted.mae < 1e-6 < measured["level_soft"].predicted.mae
    assert measured["level_soft"].predicted.mae < measured["level_onehot"].predicted.mae / 10


@pytest.mark.parametrize("name", list(LABEL_OF))
def test_readings_are_of_the_networks_own_probabilities(trained, measured, name) -> None:
    data, found = dataset(trained["pictures"]), measured[name]
    logits, shares = logits_one_by_one(trained[name], data)
    mos, std = mos_and_std(data)
    p = logits.softmax(-1).numpy()
    expected = {
        "integers": p @ np.arange(1, 6),
        "interval_centers": p @ np.array([1.4, 2.2, 3.0, 3.8, 4.6]),
        "most likely level": p.argmax(axis=1) + 1.0,
        "open set": p @ np.arange(1, 6) * shares.numpy(),
    }
    for reading, scores in expected.items():
        assert found.readings[reading].mae == pytest.approx(np.abs(scores - mos).mean(), abs=1e-5)
    assert found.readings["optimal"].rmse <= min(found.readings[reading].rmse for reading in list(expected)[:2]) + 1e-9
    assert found.leaked_mass == pytest.approx(1 - shares.mean().item(), abs=1e-5)
    assert found.peak == pytest.approx(p.max(axis=1).mean(), abs=1e-5)
    label = one_hot(mos, 5) if name == "level_onehot" else gaussian_soft_label(mos, std, 5)
    assert found.right is not None
    assert found.right.share == pytest.approx(np.mean(p.argmax(axis=1) == label.argmax(axis=1)))


def test_broken_pictures_are_left_out_with_their_labels(trained: dict[str, Path], tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", count=16)
    (pictures / "03.png").write_bytes(b"no picture")
    found = measure("one-hot", QScorer(trained["level_onehot"]), dataset(pictures), "cpu", batch_size=5)
    data = dataset(trained["pictures"])
    without = LabelledImages(data.name, [*data.images[:3], *data.images[4:]], data.scale)
    expected = measure("one-hot", QScorer(trained["level_onehot"]), without, "cpu", batch_size=4)
    assert (found.images, found.failed) == (15, 1)
    assert found.readings["integers"].rmse == pytest.approx(expected.readings["integers"].rmse, abs=1e-6)
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(QScorerError, match="could not score any of the 16 pictures"):
        measure("one-hot", QScorer(trained["level_onehot"]), dataset(pictures), "cpu")
    data = dataset(trained["pictures"], std_column=None)  # soft labels need spreads
    with pytest.raises(QScorerError, match="16 of 16 pictures have none; give --std-column"):
        measure("soft", QScorer(trained["level_soft"]), data, "cpu")
    assert measure("one-hot", QScorer(trained["level_onehot"]), data, "cpu").images == 16


def test_command_measures_all_three_beside_the_prediction(trained, measured, tmp_path) -> None:
    table = ["--mos", trained["pictures"] / "labels.csv", "--std-column", "std", "--range", "0", "100", "--levels", "5"]
    networks = [word for name in FORMULATIONS for word in ("--checkpoint", trained[name])]
    result = Result(*table, "--data", trained["pictures"], *networks, "--device", "cpu", "-o", tmp_path / "report")
    assert result.code == 0, result.err
    for name in FORMULATIONS:
        images, mae, rmse, *_ = result.line(name, name.replace("_", " "))
        assert images == 16
        assert (mae, rmse) == pytest.approx((measured[name].error.mae, measured[name].error.rmse), abs=1e-4)
    stored = json.loads((tmp_path / "report" / "errors.json").read_text())["measured"]
    assert [model["name"] for model in stored] == list(FORMULATIONS)
    assert stored[1]["predicted"]["mae"] == pytest.approx(measured["level_onehot"].predicted.mae)
    assert (tmp_path / "report" / "measured.png").exists()


def test_command_leaves_out_rows_that_cannot_be_measured(trained: dict[str, Path], tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", count=16)
    (pictures / "03.png").write_bytes(b"no picture")
    (pictures / "05.png").unlink()
    table = pictures / "labels.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]
    rows[8][rows[0].index("mos")] = ""
    table.write_text("".join(",".join(row) + "\n" for row in rows) + "gone.png,50,10\n")
    arguments = ["--mos", table, "--range", "0", "100", "--levels", "5", "--data", pictures]
    result = Result(*arguments, "--checkpoint", trained["score_token"], "--device", "cpu")
    assert result.code == 0, result.err
    assert result.line("score_token", "score token")[0] == 13
    said = result.err.splitlines()
    place = said.index("4 rows left out of the measurement:")
    assert said[place + 1 : place + 5] == [
        f"  {pictures / '05.png'}: the image is missing",
        f"  {pictures / '07.png'}: its MOS is missing",
        f"  {pictures / 'gone.png'}: the image is missing",
        "  and 1 more",
    ]
