"""A Q-Scorer on another backbone where the published one goes: leaderboard, error analysis, Hub, resume; bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_machine import server  # noqa: F401
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file, save_file
from test_other_backbones import vlm_settings
from test_training_run import run
from tiny_multimodal import write_base
from tiny_training import ARCHITECTURE, settings
from typer.testing import CliRunner

from pyiqa_qscorer import QScorer, Scorer
from pyiqa_qscorer.checkpoints import load_checkpoint, vlm_checkpoint
from pyiqa_qscorer.checkpoints.layouts import checkpoint_files
from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.errors import CheckpointError, TrainingConfigError, TrainingFailedError
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train

WITHOUT_PICTURES = "{% for m in messages %}{{ m['role'] }}{{ m['content'][-1]['text'] }}{% endfor %}"
SMALL_HEAD = {"architecture": {**ARCHITECTURE, "regressor_hidden_sizes": [64, 32]}}


@pytest.fixture(scope="module")
def checkpoint(base: Path, pictures: Path) -> Path:
    content = vlm_settings(pictures, base.parent / "out", base)
    content["training"]["max_steps"] = 4
    return train(parse_config(content)).folders["qscorer"]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def fails(place: Path, *words: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(place, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# --- use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"formulation": "level_onehot"},
        {"formulation": "level_soft"},
        {"regressor": "hyper", "regressor_hidden_sizes": [8, 4]},
        {"levels": 3, "prompts": ["<|image|>Rate it.", "How sharp is <|image|>?"], "gradient_checkpointing": True},
    ],
)
def test_every_formulation_trains_and_loads(base: Path, pictures: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    content = vlm_settings(pictures, tmp_path / "out", base, **model)
    content["training"]["max_steps"] = 3
    result = train(parse_config(content))
    scorer = Scorer(checkpoint=result.folders["qscorer"], device="cpu")
    config = scorer.metric.network.config
    assert config.formulation == model.get("formulation", "score_token")
    assert len(config.quality_token_ids) == model.get("levels", 5)
    assert np.isfinite(scorer.score(sorted(pictures.glob("*.png"))[:2])).all()


def test_leaderboard_and_error_analysis(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    columns = ["--range", 0, 100, "--std-column", "std"]
    table = ["--mos", pictures / "labels.csv", "--data", pictures, *columns, "--output", tmp_path / "errors"]
    done = CliRunner().invoke(app, list(map(str, ["errors", *table, "--checkpoint", checkpoint, "--device", "cpu"])))
    assert done.exit_code == 0, done.output
    metric = ["--metric", "qscorer", "--set", f"qscorer.checkpoint={checkpoint}", "--device", "cpu"]
    arguments = ["benchmark", *metric, "-d", pictures / "labels.csv", "-o", tmp_path / "board"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "24" in done.output


def test_one_head_reads_the_states_of_any_backbone(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    """Head weights of one network under three others, of equal width: each score is that head of its own state."""
    squares = train(parse_config(settings(pictures, tmp_path / "out", training={"max_steps": 1}, model=SMALL_HEAD)))
    metrics = [QScorer(checkpoint), QScorer(squares.folders["qscorer"], dtype="float32")]
    head = metrics[0].network.deepmlp
    metrics[1].network.deepmlp.load_state_dict(head.state_dict())
    scores = []
    for metric in metrics:
        levels = [metric.images.levels_from_pil(Image.open(file)) for file in sorted(pictures.glob("*.png"))[:2]]
        output = metric.network.score_prompted(metric.images.inputs(levels), metric.prompt)
        torch.testing.assert_close(output.raw_score, head(output.hidden_state), atol=1e-6, rtol=0)
        scores += output.raw_score.tolist()
    assert len(set(scores)) == 4


def test_a_killed_run_goes_on_to_the_same_losses(base: Path, pictures: Path, tmp_path: Path) -> None:
    content = vlm_settings(pictures, tmp_path / "out", base)
    content["training"] |= {"max_steps": 6, "save_steps": 2}
    assert run(content, tmp_path, KILL_AT_STEP="5")[0] == -9
    assert (tmp_path / "out/checkpoint-4").exists() and not (tmp_path / "out/checkpoint_qscorer").exists()
    losses = []
    for output in (tmp_path / "out", tmp_path / "other"):
        folder = train(parse_config({**content, "output": str(output)})).folders["qscorer"]
        losses.append(
            [line["loss"] for line in json.loads((folder / "training.json").read_text())["curves"] if "loss" in line]
        )
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_downloads_adapter_and_backbone_from_the_hub(
    server: HubServer,  # noqa: F811
    checkpoint: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    """The adapter names its backbone and the commit: nobody has to give them."""
    commit = server.add_repo("lab/backbone", {file.name: file.read_bytes() for file in base.iterdir()})
    server.add_repo("lab/backbone", {"config.json": b"{}"})  # a later commit, which is not the one trained on
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()}
    config = json.loads(files["qscorer_config.json"])
    files["qscorer_config.json"] = json.dumps({**config, "base": "lab/backbone", "base_revision": commit}).encode()
    server.add_repo("lab/adapter", files)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pyiqa_qscorer import Scorer\n"
        "print(Scorer(checkpoint='lab/adapter', device='cpu').score(sys.argv[1])[0])"
    )
    image = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(image)
    done = subprocess.run(
        [sys.executable, program, image], env=server.environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = Scorer(checkpoint=checkpoint, device="cpu").score(image)[0]
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-6)


def test_settings_of_the_processor_are_kept_and_what_it_refuses_stops_nothing(pictures: Path, tmp_path: Path) -> None:
    base = write_base("qwen2_5_vl", tmp_path / "base")
    content = vlm_settings(pictures, tmp_path / "out", base, processor={"max_pixels": 32 * 32})
    content["training"]["max_steps"] = 1
    loaded = load_checkpoint(train(parse_config(content)).folders["qscorer"])
    assert loaded.model.encode.processor.image_processor.size["longest_edge"] == 32 * 32
    narrow, good = Image.new("RGB", (900, 2)), Image.open(sorted(pictures.glob("*.png"))[0])
    options = {"checkpoint": loaded.folder.path, "device": "cpu", "clamp": False}
    scored = list(Scorer(**options).score_iter([good, narrow, good]))
    assert scored[0].score == scored[2].score is not None
    other = Scorer(**options, max_pixels=16 * 16)
    assert other.score(good)[0] != scored[0].score and other.identity != Scorer(**options).identity
    assert scored[1].error is not None and "does not take 900x2" in scored[1].error


# --- bad input ------------------------------------------------------------------------------------------------------


def test_what_is_no_backbone_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    def start(place: Path, **model: Any) -> None:
        train(parse_config(vlm_settings(pictures, tmp_path / "out", place, **model)))

    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    (broken / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    with pytest.raises(CheckpointError, match="no image-text-to-text model of transformers"):
        start(broken)
    broken = Path(shutil.copytree(base, tmp_path / "mute"))
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="LlavaProcessor has no chat template"):
        start(broken)
    (broken / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}{{ m['content'][-1]['text'] }}{% endfor %}"
    )
    with pytest.raises(CheckpointError, match="does its chat template take pictures"):
        start(broken)
    with pytest.raises(CheckpointError, match="'magnificent' must be one token behind"):
        start(base, formulation="level_onehot", level_words=["bad", "poor", "fair", "good", "magnificent"])
    with pytest.raises(CheckpointError, match=r"'<score1>' must be one token .*added as a special token"):
        vlm_checkpoint.load_processor(base).prompt("training", ["<score1>"])  # which nobody added: it is split
    with pytest.raises(CheckpointError, match="CLIPImageProcessor has no setting 'max_pixel'"):
        start(base, processor={"max_pixel": 9})
    content = vlm_settings(pictures, tmp_path / "out", base)
    content["lora"]["target_modules"] = "nothing"
    with pytest.raises(TrainingFailedError, match=r"lora.target_modules .* end in .*q_proj"):
        train(parse_config(content))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": {"vision_model": True}}, "lora.modules_to_save"),
        ({"lora": {"enabled": False}}, "model.backbone trains adapters"),
        ({"layouts": ["published"]}, "pyiqa-qscorer merge"),
    ],
)
def test_sections_that_do_not_go_with_a_backbone(changes: dict[str, Any], words: str) -> None:
    content = {**vlm_settings(Path("pictures"), Path("out"), Path("base")), **changes}
    with pytest.raises(TrainingConfigError, match=words):
        parse_config(content)


def test_damaged_checkpoints_are_refused(
    copy: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(copy / "adapter_model.safetensors")
    gone = next(name for name in whole if "lora_B" in name)
    save_file({name: value for name, value in whole.items() if name != gone}, copy / "adapter_model.safetensors")
    fails(copy, "adapter_model.safetensors", "missing or unknown", gone)
    save_file(whole, copy / "adapter_model.safetensors")
    fails(copy, "is not the one", "give that one as base=", base=write_base("llava", tmp_path / "other", seed=1))
    config = json.loads((copy / "qscorer_config.json").read_text())
    (copy / "qscorer_config.json").write_text(json.dumps({**config, "quality_token_ids": [1, 2, 3, 4, 5]}))
    fails(copy, "do not belong together")
    (copy / "qscorer_config.json").write_text(json.dumps({**config, "quality_token_ids": "12345"}))
    fails(copy, "must be a list of ids")
    (copy / "qscorer_config.json").write_text(json.dumps({**config, "colour": "red"}))
    fails(copy, "unknown fields colour")
    (copy / "qscorer_config.json").write_text(json.dumps({**config, "base": str(tmp_path / "gone")}))
    fails(copy, "no such folder")
    (copy / "qscorer_config.json").write_text(json.dumps(config))
    (copy / "regressor.safetensors").write_bytes(b"torn")
    fails(copy, "regressor.safetensors")
    (copy / "regressor.safetensors").unlink()
    fails(copy, "lacks regressor.safetensors")


def test_too_little_memory_is_said_before_loading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr(vlm_checkpoint.psutil, "virtual_memory", Little)
    monkeypatch.setattr(
        vlm_checkpoint.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("read")
    )
    fails(checkpoint, "takes", "of memory are free")


def test_options_of_the_published_network_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="compile must be False"):
        QScorer(checkpoint, compile=True)
    fails(checkpoint, "needs a CUDA GPU", dtype="4bit", device="cpu")
    fails(checkpoint, "CLIPImageProcessor has no setting 'max_pixels'", pixels={"max_pixels": 9})
    with pytest.raises(ValueError, match="max_pixels goes with a backbone of dynamic resolution"):
        Scorer("qscorer-mini", "cpu", max_pixels=9)


def test_files_that_are_downloaded() -> None:
    names = ["adapter_model.safetensors", "regressor.safetensors", "qscorer_config.json", "chat_template.jinja", "x.py"]
    assert set(checkpoint_files(names)) == set(names[:-1])
