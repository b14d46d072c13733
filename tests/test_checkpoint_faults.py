"""Checkpoints that must not load: the message names what is wrong, and nothing in them is executed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import ADAPTED, edit_json, edit_weights, own_folder, shards
from torch import Tensor

from pyiqa_qscorer.checkpoints import load_checkpoint, load_folder
from pyiqa_qscorer.checkpoints.weights import read_shard
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.registry import MINI_CHECKPOINT


def error_of(*folders: Path | None, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_folder(*folders, **options)
    return str(caught.value)


FILES = {
    "base": (lambda lora, base, merged: shards(base)[0], "model.layers.1.mlp.up_proj.weight"),
    "non_lora": (lambda lora, *_: lora / "non_lora_trainables.bin", "base_model.model.model.visual_abstractor.vit_eos"),
    "merged": (lambda lora, base, merged: merged / "model.safetensors", "deepmlp.model.1.linear.bias"),
    "adapter": (
        lambda lora, *_: lora / "adapter_model.bin",
        f"base_model.model.{ADAPTED}".replace(".weight", ".lora_B.weight"),
    ),
}


def where(file: str, copies: tuple[Path, Path, Path]) -> tuple[Path, ...]:
    return copies[2:] if file == "merged" else copies[:2]


def edit_any(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    if file.suffix == ".bin":
        return edit_weights(file, change)
    content = load_file(file)
    change(content)
    save_file(content, file)
    return None


@pytest.mark.parametrize("file", ["base", "non_lora", "merged"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_wrong_keys_are_named(copies: tuple[Path, Path, Path], file: str, fault: str) -> None:
    find, key = FILES[file]
    name = key.removeprefix("base_model.model.")

    def change(content: dict[str, Tensor]) -> None:
        if fault == "missing":
            del content[key]
        elif fault == "unexpected":
            content[f"{key}.extra"] = torch.zeros(2)
        else:
            content[key] = torch.zeros(3, 5)

    edit_any(find(*copies), change)
    if (file, fault) == ("non_lora", "missing"):  # the base has it too
        edit_any(shards(copies[1])[0], lambda content: content.pop(name))
    message = error_of(*where(file, copies), dtype="float32")
    expected = {
        "missing": f"1 missing keys: {name}",
        "unexpected": f"1 unexpected keys: {name}.extra",
        "misshapen": f"1 wrong shapes: {name} (3, 5) instead of (",
    }[fault]
    assert expected in message and str(where(file, copies)[0]) in message


LAYER_1 = "base_model.model.model.layers.1.self_attn"


def dropped(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda factors: [factors.pop(f"{LAYER_1}.{name}") for name in names]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {f"{LAYER_1.replace('1', '9')}.q_proj.lora_{letter}.weight": torch.zeros(8, 8) for letter in "AB"},
            "adapters of unknown modules: model.layers.9.self_attn.q_proj.weight",
        ),
        (
            {f"{LAYER_1}.q_proj.lora_B.weight": torch.zeros(9, 4)},
            "has shape (8, 8), but its adapter has lora_A (4, 8) and lora_B (9, 4)",
        ),
        (
            {f"{LAYER_1}.q_proj.lora_magnitude_vector": torch.zeros(8)},
            f"unexpected key {LAYER_1}.q_proj.lora_magnitude",
        ),
        (
            dropped("q_proj.lora_B.weight"),
            "model.layers.1.self_attn.q_proj.weight has ['lora_A'] instead of lora_A, lora_B",
        ),
        (
            dropped(*(f"v_proj.multiway.1.lora_{letter}.weight" for letter in "AB")),
            "no adapters for model.layers.1.self_attn.v_proj.multiway.1",
        ),
        (dict.clear, "no adapters for model.layers.0.self_attn.q_proj"),
    ],
)
def test_wrong_adapters_are_named(copies: tuple[Path, Path, Path], change: Any, expected: str) -> None:
    lora, base, _ = copies
    change = (lambda factors, more=change: factors.update(more)) if isinstance(change, dict) else change
    edit_weights(lora / "adapter_model.bin", change)
    message = error_of(lora, base)
    assert expected in message and "adapter_model.bin" in message


@pytest.mark.parametrize("content", ["cut", "empty", "noise"])
@pytest.mark.parametrize("file", FILES)
def test_damaged_weight_files_are_named(copies: tuple[Path, Path, Path], file: str, content: str) -> None:
    damaged = FILES[file][0](*copies)
    whole = damaged.read_bytes()
    damaged.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": bytes(range(256)) * 40}[content])
    message = error_of(*where(file, copies))
    assert str(damaged) in message and "cannot be read as weights" in message and "fetch it again" in message


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("file", ["base", "non_lora", "adapter"])
def test_code_in_a_pickle_is_refused_and_not_run(copies, tmp_path, file, legacy) -> None:
    poisoned, trace = FILES[file][0](*copies), tmp_path / "trace"
    torch.save({"weight": torch.zeros(2), "bomb": Bomb(trace)}, poisoned, _use_new_zipfile_serialization=not legacy)
    assert str(poisoned) in error_of(*copies[:2]) and not trace.exists()
    torch.load(poisoned, weights_only=False)  # the bomb itself works
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [([torch.zeros(2)], "must hold a dict of tensors, got list"), ({"step": 3}, "step must be a tensor, got int")],
)
def test_other_things_in_a_weight_file_are_refused(copies, content, expected) -> None:
    lora, base, _ = copies
    torch.save(content, lora / "non_lora_trainables.bin")
    assert expected in error_of(lora, base)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("values", [torch.nan, torch.inf, torch.int8, torch.complex64])
def test_weights_that_are_no_finite_floating_point_numbers_are_named(copies, file, values) -> None:
    find, key = FILES[file]

    def change(content: dict[str, Tensor]) -> None:
        if isinstance(values, torch.dtype):
            content[key] = content[key].to(values)
        else:
            content[key].view(-1)[-1] = values

    edit_any(find(*copies), change)
    message = error_of(*where(file, copies))
    assert f"{find(*copies)}: {key}" in message
    if isinstance(values, torch.dtype):
        assert f"must hold floating point numbers, got {values}" in message
    else:
        assert "holds NaN or infinite values" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 64, 1000, 70_001):
        weight = torch.randn(size, generator=generator).to(dtype)
        save_file({"weight": weight, "empty": weight[:0]}, tmp_path / "x.safetensors")
        assert torch.equal(dict(read_shard(tmp_path / "x.safetensors"))["weight"], weight)
        # Counters of batch norms are whole numbers.
        save_file({"bn1.num_batches_tracked": torch.tensor(3)}, tmp_path / "x.safetensors")
        assert dict(read_shard(tmp_path / "x.safetensors")) == {"bn1.num_batches_tracked": torch.tensor(3)}
        for value in (torch.nan, torch.inf, -torch.inf):
            broken = weight.clone()
            broken[int(torch.randint(size, (), generator=generator))] = value
            save_file({"weight": broken}, tmp_path / "x.safetensors")
            with pytest.raises(CheckpointError, match=r"x\.safetensors: weight holds NaN or infinite values"):
                list(read_shard(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        *((wrong, "must be a JSON object") for wrong in (None, [], "model.safetensors")),
        *(({"lm_head.weight": wrong}, "must be a JSON object") for wrong in (3, None, ["a", "b"])),
        ({}, "do not lie beside it: none at all"),
        ({"lm_head.weight": "pytorch_model-9.bin"}, "do not lie beside it: pytorch_model-9.bin"),
        ({"lm_head.weight": ""}, "do not lie beside it"),
        ({"lm_head.weight": ".."}, "do not lie beside it: .."),
        ({"lm_head.weight": "../outside.bin"}, "do not lie beside it: ../outside.bin"),
        ({"lm_head.weight": "{folder}/pytorch_model-00001-of-00002.bin"}, "do not lie beside it: /"),
        ({"lm_head.weight": "sub/inside.bin"}, "do not lie beside it: sub/inside.bin"),
        ({"lm_head.weight": "/etc/passwd"}, "do not lie beside it: /etc/passwd"),
        ({"lm_head.weight": "a\u0000b"}, "do not lie beside it: a"),
        ({"lm_head.weight": "x" * 5000}, "do not lie beside it: xxx"),
    ],
)
def test_an_index_may_only_name_files_beside_it(copies, weight_map, expected) -> None:
    lora, base, _ = copies
    (base / "sub").mkdir()
    for other in (base / "sub" / "inside.bin", base.parent / "outside.bin"):
        shutil.copyfile(shards(base)[0], other)
    index = base / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}).replace("{folder}", str(base)))
    message = error_of(lora, base)
    assert str(index) in message and expected in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "is none of the known checkpoint layouts. Found: photo.jpg. Expected one of: adapter_config.json"),
        ('{"model_type": "llama"}', "config.json says model_type='llama'"),
        ('{"model_type": "qscorer"}', "Found: config.json, photo.jpg. Expected one of"),
        ("{", "config.json is not readable JSON"),
        ("[]", "must hold a JSON object, got list"),
    ],
)
def test_other_folders_are_described(tmp_path: Path, config: str | None, expected: str) -> None:
    (tmp_path / "photo.jpg").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert expected in error_of(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "config.json"])
def test_incomplete_lora_folders_are_described(copies: tuple[Path, Path, Path], name: str) -> None:
    lora, base, _ = copies
    (lora / name).unlink()
    message = error_of(lora, base)
    assert "is a LoRA folder but lacks" in message and name in message


def test_a_lora_needs_its_base(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    lora, base, _ = folders
    assert "give the model it was trained on as base=, e.g. MAGAer13/mplug-owl2-llama2-7b" in error_of(lora)
    with pytest.raises(CheckpointError, match="is a LoRA: give the model it was trained on as base="):
        load_checkpoint(lora)
    assert "has no score tokens: it is a base model" in error_of(base)
    own = own_folder(tmp_path)
    assert f"got model_type 'qscorer' in {own}" in error_of(lora, own)
    assert "has no config.json" in error_of(lora, tmp_path)


@pytest.mark.parametrize(
    ("file", "fields", "expected"),
    [
        ("lora/adapter_config", {"use_dora": True}, "use_dora=True is not supported; merge the adapter"),
        ("lora/adapter_config", {"use_rslora": True}, "use_rslora=True is not supported"),
        ("lora/adapter_config", {"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ("lora/adapter_config", {"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ("lora/adapter_config", {"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ("lora/adapter_config", {"alpha_pattern": {"q_proj": 3}}, "alpha_pattern={'q_proj': 3} is not supported"),
        ("lora/adapter_config", {"rank_pattern": {"q_proj": 3}}, "rank_pattern={'q_proj': 3} is not supported"),
        ("lora/adapter_config", {"r": 0}, "needs the numbers lora_alpha and r > 0"),
        ("lora/adapter_config", {"lora_alpha": None}, "needs the numbers lora_alpha and r > 0"),
        ("merged/config", {"num_key_value_heads": 1}, "num_key_value_heads=1 is not supported"),
        ("merged/config", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling={'type': 'linear', 'fac"),
        ("merged/config", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("merged/config", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("merged/config", {"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size must be a multiple of"),
        ("merged/config", {"score_tokens": [], "score_token_id": []}, "has no score tokens"),
        ("merged/config", {"score_token_id": [32005, 32004, 32003, 32002, 32001]}, "the tokenizer gives ['<score1>'"),
        ("merged/tokenizer_config", {"add_bos_token": False}, "set add_bos_token to true in tokenizer_config.json"),
        ("base/preprocessor_config", {"size": {"shortest_edge": 224}}, "size must be 448, got 224"),
        ("base/preprocessor_config", {"crop_size": 336}, "crop_size must be 448, got 336"),
        ("base/preprocessor_config", {"image_mean": [0.5] * 3}, "image_mean must be [0.48145466, 0.4578275"),
        ("base/preprocessor_config", {"image_mean": None}, "got None"),
        ("base/preprocessor_config", {"image_std": 0.5}, "image_std must be"),
        ("base/preprocessor_config", {"resample": 2}, "resample must be 3, got 2"),
    ],
)
def test_settings_that_cannot_be_computed_are_refused(copies, file, fields, expected) -> None:
    lora, base, merged = copies
    edit_json(lora.parent / f"{file}.json", **fields)
    message = error_of(*((merged,) if file.startswith("merged") else (lora, base)))
    assert expected in message
    if "tokenizer" not in file:
        assert str(lora.parent / file.split("/")[0]) in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", 0, "hidden_size must be an integer above 0, got 0"),
        ("vocab_size", "x", "vocab_size must be an integer above 0, got 'x'"),
        ("num_hidden_layers", True, "num_hidden_layers must be an integer above 0, got True"),
        ("num_attention_heads", -1, "num_attention_heads must be an integer above 0, got -1"),
        ("rms_norm_eps", "nan", "rms_norm_eps must be a number above 0, got 'nan'"),
        ("rope_base", float("inf"), "rope_base must be a number above 0, got inf"),
        ("vision_config.image_size", 0, "vision_config: image_size must be an integer above 0, got 0"),
        ("abstractor_config.grid_size", "7", "abstractor_config: grid_size must be an integer above 0, got '7'"),
    ],
)
def test_numbers_of_a_configuration_are_checked(tmp_path: Path, field: str, value: object, words: str) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "config.json").read_text())
    *parts, last = field.split(".")
    section = content
    for part in parts:
        section = section[part]
    section[last] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    message = error_of(tmp_path)
    assert words in message and "config.json" in message
