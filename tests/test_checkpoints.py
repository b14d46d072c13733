"""Loading the three layouts: equal to the published loader, strict about what is wrong, sparing with memory."""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import IMAGE_NAMES, check, check_scores, pixel_values, table, tensors
from safetensors.torch import save_file
from tiny_checkpoint import ADAPTED, edit_json, edit_weights, own_folder, published_folders, scored, shards
from torch import Tensor

from pyiqa_qscorer.checkpoints import LoadedCheckpoint, load_checkpoint, load_folder, recognise
from pyiqa_qscorer.checkpoints.layouts import Layout
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.model import ScoreOutput
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.starting_model import from_checkpoint

GOLDEN_LOADS = table("lora_golden/summary")
NEAR_TIE = IMAGE_NAMES.index("g_rgb_451x333")  # its two best first tokens lie within float16 rounding


@torch.no_grad()
def score(loaded: LoadedCheckpoint) -> ScoreOutput:
    return scored(loaded, pixel_values())


def state(*folders: Path, dtype: str = "float32") -> dict[str, Tensor]:
    return load_folder(*folders, dtype=dtype).model.state_dict()


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("key", "dtype", "attention"),
    [
        ("load_fp32_eager", "float32", "eager"),
        ("load_fp32_sdpa", "float32", "sdpa"),
        ("merged_fp32_eager", "float32", "eager"),
        ("load_fp16_eager", "float16", "eager"),
        ("load_fp16_default", "float16", "sdpa"),
        ("merged_fp16_default", "float16", "sdpa"),
    ],
)
def test_scores_are_the_published_ones(folders: tuple[Path, Path, Path], key: str, dtype: str, attention: str) -> None:
    lora, base, merged = folders
    where = (merged,) if key.startswith("merged") else (lora, base)
    output, published = score(load_folder(*where, dtype=dtype, attn_implementation=attention)), GOLDEN_LOADS[key]
    golden, states = torch.tensor(published["raw"]), tensors("lora_golden/golden")[f"{key}.h2"]
    if dtype == "float32":
        assert output.first_token.tolist() == published["tok1"]
        check_scores(output.raw_score, golden, key)
        check(output.hidden_state, states, what=key)
        return
    # In float16 the two implementations round differently; published float16 is up to 0.03 away from float32.
    settled = torch.arange(len(golden)) != NEAR_TIE
    assert output.first_token[settled].tolist() == torch.tensor(published["tok1"])[settled].tolist()
    check_scores(output.raw_score.float()[settled], golden[settled], key, tolerance=0.06)


def test_every_loaded_weight_is_the_published_one(folders: tuple[Path, Path, Path]) -> None:
    """Bit for bit, the merged ones included."""
    lora, base, merged = folders
    published = GOLDEN_LOADS["load_fp16_default"]["weights_sha256"]
    assert len(published) == 120
    for where in ((lora, base), (merged,)):
        loaded = state(*where, dtype="float16")
        assert loaded.keys() == published.keys()
        for name, tensor in loaded.items():
            assert tensor.dtype is (torch.float32 if name.endswith("pos_embed") else torch.float16)
            assert sha256(tensor) == published[name], name
    # Bit for bit, but for the products of the adapters, which another BLAS may round differently.
    published, golden = GOLDEN_LOADS["load_fp32_eager"]["weights_sha256"], tensors("lora_golden/golden")
    loaded = state(*folders[:2])
    other = {name for name, tensor in loaded.items() if sha256(tensor) != published[name]}
    merged = {
        f"model.layers.{layer}.self_attn.{ours}.weight": golden[f"load_fp32_eager.merged.{theirs}{layer}"]
        for layer in range(2)
        for ours, theirs in (("q_proj", "q_proj"), ("v_proj.multiway.1", "v_proj_multiway1_"))
    }
    assert other <= merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=2**-22)  # 2 units in the last place of 1


def adapter_factors(lora: Path) -> tuple[Tensor, Tensor]:
    factors = torch.load(lora / "adapter_model.bin", weights_only=True)
    root = f"base_model.model.{ADAPTED.removesuffix('.weight')}"
    return factors[f"{root}.lora_A.weight"].float(), factors[f"{root}.lora_B.weight"].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_of_any_precision(copies: tuple[Path, Path, Path], dtype: torch.dtype) -> None:
    lora, base, _ = copies
    adapter = lora / "adapter_model.bin"
    edit_weights(adapter, lambda factors: factors.update({name: t.to(dtype) for name, t in factors.items()}))
    low, high = adapter_factors(lora)
    stored = torch.load(shards(base)[0], weights_only=True)[ADAPTED]
    expected = (stored.float() + 2.0 * (high @ low)).half()
    assert torch.equal(state(lora, base, dtype="float16")[ADAPTED], expected)


def test_a_base_in_float32_is_rounded_before_the_merge_as_published(copies: tuple[Path, Path, Path]) -> None:
    lora, base, _ = copies
    noise = torch.Generator().manual_seed(0)

    def widen(content: dict[str, Tensor]) -> None:
        for name, tensor in content.items():
            content[name] = tensor.float() * (1 + 1e-3 * torch.rand(tensor.shape, generator=noise))

    for shard in shards(base):
        edit_weights(shard, widen)
    low, high = adapter_factors(lora)
    stored, delta = torch.load(shards(base)[0], weights_only=True)[ADAPTED], 2.0 * (high @ low)
    assert torch.equal(state(lora, base, dtype="float16")[ADAPTED], (stored.half().float() + delta).half())
    assert torch.equal(state(lora, base)[ADAPTED], stored + delta)


def renamed(file: str, old: str, new: str) -> Callable[[Path, Path], None]:
    def change(content: dict[str, Tensor]) -> None:
        for name in list(content):
            content[name.replace(old, new)] = content.pop(name)

    return lambda lora, base: edit_weights(lora / file, change)


def _adapter_as_safetensors(lora: Path, base: Path) -> None:
    save_file(torch.load(lora / "adapter_model.bin", weights_only=True), lora / "adapter_model.safetensors")
    (lora / "adapter_model.bin").unlink()


def _every_parameter_dumped(lora: Path, base: Path) -> None:
    """As an older release did: base weights, and the adapters too."""
    dumped = {f"base_model.model.{name}": t for name, t in whole(base).items() if not name.endswith("pos_embed")}
    dumped.update(torch.load(lora / "adapter_model.bin", weights_only=True))
    edit_weights(lora / "non_lora_trainables.bin", lambda own: own.update({**dumped, **own}))


def _files_of_torch_before_1_6(lora: Path, base: Path) -> None:
    for file in (*shards(base), lora / "adapter_model.bin", lora / "non_lora_trainables.bin"):
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def whole(base: Path) -> dict[str, Tensor]:
    return {name: t for shard in shards(base) for name, t in torch.load(shard, weights_only=True).items()}


def _base_in_one_file(lora: Path, base: Path) -> None:
    content = whole(base)
    for file in (*shards(base), base / "pytorch_model.bin.index.json"):
        file.unlink()
    torch.save(content, base / "pytorch_model.bin")


def _base_as_safetensors_beside_damaged_bin(lora: Path, base: Path) -> None:
    """A Hub repository may hold both; safetensors go first."""
    save_file({name: tensor.contiguous() for name, tensor in whole(base).items()}, base / "model.safetensors")
    for shard in shards(base):
        shard.write_bytes(b"damaged")


def _rotary_tables_of_old_transformers(lora: Path, base: Path) -> None:
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    edit_weights(shards(base)[0], lambda content: content.update(tables))


@pytest.mark.parametrize(
    "change",
    [
        _adapter_as_safetensors,
        _every_parameter_dumped,
        _files_of_torch_before_1_6,
        _base_in_one_file,
        _base_as_safetensors_beside_damaged_bin,
        _rotary_tables_of_old_transformers,
        renamed("adapter_model.bin", ".weight", ".default.weight"),  # the keys of a peft state dict
        renamed("non_lora_trainables.bin", "base_model.model.", ""),
        lambda lora, base: edit_json(lora / "adapter_config.json", base_model_name_or_path="/nowhere/at/all"),
        lambda lora, base: (base / "preprocessor_config.json").rename(lora / "preprocessor_config.json"),
    ],
)
def test_variants_load_bit_for_bit_alike(folders, copies, change) -> None:
    lora, base, _ = copies
    change(lora, base)
    assert_equal_states(state(lora, base), state(*folders[:2]))


def test_base_without_position_tables_gets_the_formula(copies: tuple[Path, Path, Path]) -> None:
    lora, base, _ = copies

    def drop(content: dict[str, Tensor]) -> None:
        for name in [name for name in content if name.endswith("pos_embed")]:
            del content[name]

    edit_weights(shards(base)[0], drop)
    model = load_folder(lora, base, dtype="float16").model
    attention = model.model.visual_abstractor.encoder.layers[1].crossattention.attention
    for own, formula in zip((attention.q_pos_embed, attention.k_pos_embed), attention.position_tables(), strict=True):
        assert torch.equal(own, formula)


@pytest.mark.parametrize("count", [1, 7])
def test_any_number_of_score_tokens(copies: tuple[Path, Path, Path], count: int) -> None:
    lora, base, _ = copies
    edit_json(lora / "config.json", vocab_size=32000 + count)

    def resize(own: dict[str, Tensor]) -> None:
        for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
            rows = own[name]
            own[name] = torch.cat([rows, rows])[: 32000 + count].contiguous()

    edit_weights(lora / "non_lora_trainables.bin", resize)
    loaded = load_folder(lora, base, dtype="float32")
    assert loaded.model.config.score_token_ids == list(range(32000, 32000 + count))
    assert loaded.model.config.score_tokens[-1] == f"<score{count}>"
    assert score(loaded).raw_score.isfinite().all()


def test_layouts_are_recognised_and_a_base_is_not_looked_at_where_none_is_needed(folders, own) -> None:
    lora, base, merged = folders
    found = [recognise(lora, base).layout, recognise(merged).layout, recognise(own).layout]
    assert found == [Layout.PUBLISHED_LORA, Layout.PUBLISHED_MERGED, Layout.QSCORER]
    loaded = load_checkpoint(merged, "nobody/nothing", local_files_only=True, dtype="float32")
    assert loaded.folder.base is None


def test_precision_of_auto(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    merged, half = folders[2], torch.float16
    own32, own16 = own_folder(tmp_path / "32"), own_folder(tmp_path / "16", dtype=half)
    full = torch.float32
    for path, on_cpu, on_cuda in ((merged, torch.bfloat16, half), (own32, full, full), (own16, torch.bfloat16, half)):
        for device, expected in (("cpu", on_cpu), ("cuda", on_cuda)):
            loaded = load_folder(path, device=device)
            assert {p.dtype for p in loaded.model.parameters()} == {expected}
            assert {b.dtype for b in loaded.model.buffers()} == {torch.float32} and not loaded.model.training
            assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("start", ["model", "base"])
def test_flash_attention_without_its_package_says_what_to_do(folders: tuple[Path, Path, Path], start: str) -> None:
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    with pytest.raises(
        CheckpointError, match=r"'flash_attention_2' needs the package flash_attn .*pip .*, or .* 'sdpa'"
    ):
        if start == "model":
            load_folder(folders[2], attn_implementation="flash_attention_2")
        else:
            model = {"checkpoint": str(folders[1]), "attn_implementation": "flash_attention_2"}
            data = {"train": [{"csv": "labels.csv", "mos_range": [0, 1]}]}
            from_checkpoint(parse_config({"output": "out", "model": model, "data": data}), torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp16"}, r"dtype must be one of auto, float16, .*, got 'fp16'"),
        ({"attn_implementation": "nonsense"}, "attn_implementation"),
        ({"prompt": "rate this"}, "prompt must be one of score, evaluation, training or a text"),
    ],
)
def test_options_outside_their_choices(folders: tuple[Path, ...], options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_folder(folders[2], **options)


def test_prompts_are_those_of_checkpoint_or_caller_and_of_either_tokenizer(folders, tmp_path, shared) -> None:
    own = own_folder(tmp_path)
    edit_json(own / "config.json", prompt="evaluation")
    assert load_folder(own).prompt == load_folder(folders[2], prompt="evaluation").prompt
    assert load_folder(own, prompt="training").prompt == load_folder(folders[2], prompt="training").prompt
    assert len(load_folder(own).prompt.suffix) == 12
    lora, base, merged = published_folders(tmp_path)
    for licensed, where in (((lora, base), folders[:2]), ((merged,), folders[2:])):
        assert load_folder(*licensed).prompt == load_folder(*where).prompt
        assert load_folder(*licensed).fingerprint == load_folder(*where).fingerprint


def fingerprint(*folders: Path, **options: Any) -> str:
    return load_folder(*folders, **{"dtype": "float16", **options}).fingerprint


def test_whatever_changes_a_score_changes_the_fingerprint(folders, copies) -> None:
    lora, base, merged = copies
    seen = {fingerprint(*folders[:2])}
    assert seen == {fingerprint(merged)}
    # The merged folder was rounded to float16, so in float32 the two are different models.
    assert fingerprint(lora, base, dtype="float32") != fingerprint(merged, dtype="float32")

    def differs(*where: Path, **options: Any) -> None:
        new = fingerprint(*where, **options)
        assert new not in seen
        seen.add(new)

    factor = "base_model.model.model.layers.1.self_attn.v_proj.multiway.1.lora_B.weight"
    edit_weights(lora / "adapter_model.bin", lambda factors: factors.update({factor: factors[factor] * 1.1}))
    differs(lora, base)
    differs(lora, base, dtype="bfloat16")
    edit_json(lora / "config.json", rms_norm_eps=1e-6)
    differs(lora, base)
    edit_json(lora / "config.json", rope_theta=5000.0)
    differs(lora, base)
    edit_json(merged / "config.json", num_attention_heads=1, num_key_value_heads=1)
    differs(merged)
