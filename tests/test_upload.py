"""What a training wrote, uploaded to a Hub on loopback with the tools that people have, and scored with from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_machine import server  # noqa: F401
from hub_server import TOKEN, HubServer
from PIL import Image
from tiny_training import settings

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train

SCORE = (
    "import sys, pyiqa\n"
    "metric = pyiqa.create_metric('qscorer', checkpoint=sys.argv[1], device='cpu')\n"
    "print(metric(sys.argv[2]).item())"
)
PUSH = (
    "import sys\nfrom pyiqa_qscorer.model import QScorerForScoring\n"
    "QScorerForScoring.from_pretrained(sys.argv[1]).push_to_hub('lab/pushed')"
)


@pytest.fixture(scope="module")
def checkpoint(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = settings(pictures, tmp_path_factory.mktemp("run") / "out", training={"max_steps": 3})
    return train(parse_config(content)).folders["qscorer"]


def run(server: HubServer, home: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:  # noqa: F811
    environment = server.environment(home, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def files_of(server: HubServer, repo_id: str) -> dict[str, bytes]:  # noqa: F811
    """The newest commit, without what the Hub itself puts into a new repository."""
    repo = server.repos[repo_id]
    return {name: file.content for name, file in repo.commits[repo.refs["main"]].items() if name != ".gitattributes"}


def test_hf_upload_publishes_a_folder_that_scores_from_its_hub_id(
    server: HubServer,  # noqa: F811
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    done = run(server, tmp_path / "mine", Path(sys.executable).with_name("hf"), "upload", "lab/scorer", checkpoint)
    assert "metadata" not in done.stderr  # the card's header is what the Hub asks for
    sent = files_of(server, "lab/scorer")
    assert sent == {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    card = sent["README.md"].decode()
    assert card.startswith("---\nlibrary_name: pyiqa-qscorer\n") and "| labels | train | 18 |" in card
    image = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(image)
    scored = run(server, tmp_path / "theirs", sys.executable, "-c", SCORE, "lab/scorer", image)
    expected = Scorer(checkpoint=checkpoint, device="cpu").score(image)[0]
    assert float(scored.stdout.split()[-1]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_push_to_hub_of_the_network_is_that_of_transformers(
    server: HubServer,  # noqa: F811
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    """It sends configuration and weights: the network knows no tokenizer."""
    run(server, tmp_path, sys.executable, "-c", PUSH, checkpoint)
    sent = files_of(server, "lab/pushed")
    assert sent.keys() == {"config.json", "model.safetensors", "README.md"}
    assert sent["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
