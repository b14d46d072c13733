"""Writing checkpoints: what is written loads and scores alike, and a failure leaves nothing behind."""

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import full_disk
from golden_data import GOLDEN, pixel_values, table
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_checkpoint import own_folder, scored
from torch import Tensor

from pyiqa_qscorer.checkpoints import CheckpointSource, LoadedCheckpoint, load_folder, merge_checkpoint, save_folder
from pyiqa_qscorer.checkpoints.layouts import Layout, recognise
from pyiqa_qscorer.checkpoints.published_layout import image_settings
from pyiqa_qscorer.checkpoints.save import save_lora_folder
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.model import QScorerConfig


@pytest.fixture(scope="module")
def loaded(folders: tuple[Path, Path, Path]) -> LoadedCheckpoint:
    return load_folder(*folders[:2], dtype="float16")


@torch.no_grad()
def scores(loaded: LoadedCheckpoint) -> Tensor:
    return scored(loaded, pixel_values()[:2]).raw_score


def tensors_in(file: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(file, "pt") as content:
        slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("qscorer", "float16"), ("qscorer", "float32"), ("published", "float16"), ("published", "bfloat16")],
)
def test_merged_scores_are_those_of_the_lora_bit_for_bit(folders, tmp_path, layout, dtype) -> None:
    lora, base, _ = folders
    output = merge_checkpoint(tmp_path / "out", CheckpointSource(lora, base), layout=layout, dtype=dtype)
    assert recognise(output).layout is (Layout.QSCORER if layout == "qscorer" else Layout.PUBLISHED_MERGED)
    merged, original = load_folder(output, dtype=dtype), load_folder(lora, base, dtype=dtype)
    assert torch.equal(scores(merged), scores(original)) and merged.fingerprint == original.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_own_layout_round_trip(tmp_path: Path) -> None:
    own = own_folder(tmp_path, levels=7)
    loaded = load_folder(own)
    copy = save_folder(tmp_path / "copy", loaded.model, loaded.tokenizer)
    again = load_folder(copy)
    assert again.fingerprint == loaded.fingerprint and again.prompt == loaded.prompt
    assert again.model.config.to_dict() == loaded.model.config.to_dict()
    assert again.model.config.score_tokens == [f"<score{i}>" for i in range(1, 8)]
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert (copy / "model.safetensors").read_bytes() == (own / "model.safetensors").read_bytes()
    out = save_folder(
        tmp_path / "out", loaded.model, loaded.tokenizer, layout="published", tokenizer_source=tmp_path / "tokenizer"
    )
    assert load_folder(out, dtype="float32").fingerprint == loaded.fingerprint
    loaded.model.config.prompt = "training"
    copy = save_folder(tmp_path / "again", loaded.model, loaded.tokenizer)
    assert load_folder(copy).prompt == load_folder(copy, prompt="training").prompt != loaded.prompt


@pytest.fixture(scope="module")
def published(folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge_checkpoint(
        tmp_path_factory.mktemp("merge") / "out", CheckpointSource(*folders[:2]), layout="published"
    )


def test_published_files_are_those_of_the_golden_folder(published: Path, folders: tuple[Path, ...]) -> None:
    written, golden = (tensors_in(folder / "model.safetensors") for folder in (published, GOLDEN / "merged"))
    assert len(written) == 120 and written.keys() == golden.keys()
    for name, (shape, dtype) in golden.items():
        # Our position tables stay float32, as the published code keeps them in memory; it reads either.
        assert written[name] == (shape, "F32" if name.endswith("pos_embed") else dtype), name
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert read(published / name) == read(GOLDEN / "merged" / name), name
    assert (published / "tokenizer.model").read_bytes() == (folders[1] / "tokenizer.model").read_bytes()
    assert image_settings(448) == table("merged/preprocessor_config")


def test_published_configuration_says_what_the_golden_one_says(published: Path) -> None:
    written, golden = read(published / "config.json"), read(GOLDEN / "merged" / "config.json")
    ignored = {
        # Settings of the training run and of transformers 4.36 that the forward pass does not read.
        *("freeze_vision_model", "image_grid_pinpoints", "tune_visual_abstractor", "visual_abstractor_lr"),
        *("weight_desp", "weight_next_token", "transformers_version", "pretraining_tp", "use_cache"),
        "attention_dropout",
    }
    own = {name: value for name, value in golden.items() if name not in ignored and name != "visual_config"}
    assert {name: written.get(name, "missing") for name in own} == own
    for part, fields in golden["visual_config"].items():
        ours = written["visual_config"][part]
        assert ours == {name: fields[name] for name in ours}
        numbers = {name for name in ("hidden_size", "num_hidden_layers", "layer_norm_eps", "initializer_range")}
        assert numbers <= ours.keys()
    assert QScorerConfig.from_published(written).to_dict() == QScorerConfig.from_published(golden).to_dict()


def test_an_output_in_use_is_refused_an_empty_folder_or_missing_parents_are_fine(loaded, tmp_path) -> None:
    for name in ("out", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        with pytest.raises(CheckpointError, match=rf"output must be a new or empty folder, got .*{name}"):
            save_folder(tmp_path / name, loaded.model, loaded.tokenizer)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    for output in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert save_folder(output, loaded.model, loaded.tokenizer) == output
        assert (output / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a umask")
@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
@pytest.mark.parametrize("how", ["saved", "merged"])
def test_who_may_read_a_checkpoint_is_what_the_umask_says(loaded, folders, tmp_path, umask, how) -> None:
    """Left alone, the weights and the temporary folder would be for the owner only."""
    output, before = tmp_path / "a" / "out", os.umask(umask)
    try:
        if how == "saved":
            save_folder(output, loaded.model, loaded.tokenizer, notes={"README.md": "A card."})
        else:
            merge_checkpoint(output, CheckpointSource(*folders[:2]), layout="published")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}
    assert "model.safetensors" in modes and modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~umask


def test_notes_and_deleted_weights(loaded: LoadedCheckpoint, tmp_path: Path, folders: tuple[Path, Path, Path]) -> None:
    notes = {"README.md": "A card, in UTF-8: é\n", "history.csv": "step,loss\n1,0.5\n"}
    output = save_folder(tmp_path / "out", loaded.model, loaded.tokenizer, notes=notes)
    assert {name: (output / name).read_text(encoding="utf-8") for name in notes} == notes
    assert load_folder(output, dtype="float16").fingerprint == loaded.fingerprint
    with pytest.raises(CheckpointError, match=r"could not write .*no/folder\.md.*; nothing was left behind"):
        save_folder(tmp_path / "other", loaded.model, loaded.tokenizer, notes={"no/folder.md": "A card."})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # They are memory-mapped; taking the folder away must not pull the model's weights from under it.
    copy = shutil.copytree(folders[2], tmp_path / "copy")
    loaded = load_folder(copy, dtype="float16")
    before = scores(loaded)
    shutil.rmtree(copy)
    assert torch.equal(scores(loaded), before)


def test_options_that_cannot_be_written(loaded: LoadedCheckpoint, folders: tuple[Path, ...], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"layout must be .*, got 'hf'"):
        save_folder(output, loaded.model, loaded.tokenizer, layout="hf")
    for dtype in ("8bit", "auto"):
        with pytest.raises(ValueError, match=f"dtype must be float16, .* to be written, got '{dtype}'"):
            merge_checkpoint(output, CheckpointSource(folders[2]), dtype=dtype)
    for source in (None, tmp_path):
        with pytest.raises(CheckpointError, match=r"needs the original tokenizer\.model, not found in"):
            save_folder(output, loaded.model, loaded.tokenizer, layout="published", tokenizer_source=source)
    with pytest.raises(CheckpointError, match="lora"):
        save_lora_folder(output, loaded.model, None)
    assert list(tmp_path.iterdir()) == []


class Interrupted(BaseException):
    """Like Ctrl+C, which is no Exception."""


@pytest.mark.parametrize("error", [Interrupted("now"), RuntimeError("broken"), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing_behind(loaded, tmp_path, monkeypatch, error) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(loaded.tokenizer), "save_pretrained", fail)  # the weights are written by then
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        save_folder(tmp_path / "out", loaded.model, loaded.tokenizer)
    if isinstance(error, OSError):
        assert "could not write" in str(caught.value)
        assert "No space left on device; nothing was left behind" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("layout", ["qscorer", "published_lora"])
def test_a_full_disk_leaves_nothing_behind(folders: tuple[Path, Path, Path], tmp_path: Path, layout: str) -> None:
    loaded, output = load_folder(folders[2], dtype="float16"), tmp_path / "out"
    words = f"could not write {re.escape(str(output))}: the disk is full: .*nothing was left behind"
    if layout == "published_lora":
        adapters = get_peft_model(loaded.model, LoraConfig(r=64, target_modules=["q_proj"]))
    with full_disk(300_000), pytest.raises(CheckpointError, match=words):
        if layout == "published_lora":
            save_lora_folder(output, loaded.model, adapters)
        else:
            save_folder(output, loaded.model, loaded.tokenizer, layout=layout, tokenizer_source=folders[2])
    assert list(tmp_path.iterdir()) == []
