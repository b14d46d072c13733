"""Loading the three layouts: equal to the published loader, strict about what is wrong, sparing with memory."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import IMAGE_NAMES, check, check_scores, pixel_values, table, tensors
from safetensors.torch import save_file
from tiny_checkpoint import ADAPTED, edit_json, edit_weights, own_folder, published_folders, shards
from torch import Tensor

from pyiqa_qscorer.checkpoints import LoadedCheckpoint, load_checkpoint, load_folder, recognise
from pyiqa_qscorer.checkpoints.layouts import Layout
from pyiqa_qscorer.checkpoints.start import Formulation, start_from_checkpoint
from pyiqa_qscorer.errors import CheckpointError

GOLDEN_LOADS = table("lora_golden/summary")
NEAR_TIE = IMAGE_NAMES.index("g_rgb_451x333")  # its two best first tokens lie within float16 rounding


def score(loaded: LoadedCheckpoint) -> Any:
    prompt = loaded.prompt
    with torch.no_grad():
        return loaded.model.score(pixel_values(), prompt.prefix, prompt.suffix, prompt.blank)


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


def test_every_loaded_weight_is_the_published_one_in_float16(folders: tuple[Path, Path, Path]) -> None:
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


def test_every_loaded_weight_is_the_published_one_in_float32(folders: tuple[Path, Path, Path]) -> None:
    """Bit for bit, but for the products of the adapters, which another BLAS may round differently."""
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
    stored = torch.load(shards(base)[0], weights_only=True)[ADAPTED]
    delta = 2.0 * (high @ low)
    assert torch.equal(state(lora, base, dtype="float16")[ADAPTED], (stored.half().float() + delta).half())
    assert torch.equal(state(lora, base)[ADAPTED], stored + delta)


def _adapter_as_safetensors(lora: Path, base: Path) -> None:
    save_file(torch.load(lora / "adapter_model.bin", weights_only=True), lora / "adapter_model.safetensors")
    (lora / "adapter_model.bin").unlink()


def _keys_of_a_peft_state_dict(lora: Path, base: Path) -> None:
    def rename(factors: dict[str, Tensor]) -> None:
        for name in list(factors):
            factors[name.replace(".weight", ".default.weight")] = factors.pop(name)

    edit_weights(lora / "adapter_model.bin", rename)


def _every_parameter_dumped(lora: Path, base: Path) -> None:
    """As an older release did: base weights, and the adapters too."""
    dumped = {}
    for shard in shards(base):
        dumped.update(torch.load(shard, weights_only=True))
    dumped = {f"base_model.model.{name}": tensor for name, tensor in dumped.items() if not name.endswith("pos_embed")}
    dumped.update(torch.load(lora / "adapter_model.bin", weights_only=True))
    edit_weights(lora / "non_lora_trainables.bin", lambda own: own.update({**dumped, **own}))


def _names_without_peft_prefix(lora: Path, base: Path) -> None:
    def rename(own: dict[str, Tensor]) -> None:
        for name in list(own):
            own[name.removeprefix("base_model.model.")] = own.pop(name)

    edit_weights(lora / "non_lora_trainables.bin", rename)


def _files_of_torch_before_1_6(lora: Path, base: Path) -> None:
    for file in (*shards(base), lora / "adapter_model.bin", lora / "non_lora_trainables.bin"):
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def _base_in_one_file(lora: Path, base: Path) -> None:
    content = {}
    for shard in shards(base):
        content.update(torch.load(shard, weights_only=True))
        shard.unlink()
    (base / "pytorch_model.bin.index.json").unlink()
    torch.save(content, base / "pytorch_model.bin")


def _base_as_safetensors_beside_damaged_bin(lora: Path, base: Path) -> None:
    """A Hub repository may hold both; safetensors go first."""
    content = {}
    for shard in shards(base):
        content.update(torch.load(shard, weights_only=True))
        shard.write_bytes(b"damaged")
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, base / "model.safetensors")


def _another_base_named_in_the_adapter(lora: Path, base: Path) -> None:
    edit_json(lora / "adapter_config.json", base_model_name_or_path="/nowhere/at/all")


def _rotary_tables_of_old_transformers(lora: Path, base: Path) -> None:
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    edit_weights(shards(base)[0], lambda content: content.update(tables))


def _image_settings_beside_the_adapter(lora: Path, base: Path) -> None:
    (base / "preprocessor_config.json").rename(lora / "preprocessor_config.json")


@pytest.mark.parametrize(
    "change",
    [
        _adapter_as_safetensors,
        _keys_of_a_peft_state_dict,
        _every_parameter_dumped,
        _names_without_peft_prefix,
        _files_of_torch_before_1_6,
        _base_in_one_file,
        _base_as_safetensors_beside_damaged_bin,
        _another_base_named_in_the_adapter,
        _rotary_tables_of_old_transformers,
        _image_settings_beside_the_adapter,
    ],
)
def test_variants_load_bit_for_bit_alike(
    folders: tuple[Path, Path, Path], copies: tuple[Path, Path, Path], change: Callable[[Path, Path], None]
) -> None:
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


def test_layouts_are_recognised(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    lora, base, merged = folders
    assert recognise(lora, base).layout is Layout.PUBLISHED_LORA
    assert recognise(merged).layout is Layout.PUBLISHED_MERGED
    assert recognise(own_folder(tmp_path)).layout is Layout.QSCORER


def test_a_base_is_not_looked_at_where_none_is_needed(folders: tuple[Path, Path, Path]) -> None:
    merged = folders[2]
    loaded = load_checkpoint(merged, "nobody/nothing", local_files_only=True, dtype="float32")
    assert loaded.folder.base is None


def test_precision_of_auto(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    merged, half = folders[2], torch.float16
    own32, own16 = own_folder(tmp_path / "32"), own_folder(tmp_path / "16", dtype=half)
    for path, device, expected in (
        (merged, "cpu", torch.bfloat16),
        (merged, "cuda", half),
        (own32, "cpu", torch.float32),
        (own32, "cuda", torch.float32),
        (own16, "cpu", torch.bfloat16),
        (own16, "cuda", half),
    ):
        loaded = load_folder(path, device=device)
        assert {p.dtype for p in loaded.model.parameters()} == {expected}
        assert {b.dtype for b in loaded.model.buffers()} == {torch.float32}
        assert not loaded.model.training
        assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("start", ["model", "base"])
def test_flash_attention_without_its_package_says_what_to_do(folders: tuple[Path, Path, Path], start: str) -> None:
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    words = (
        r"attn_implementation='flash_attention_2' needs the package flash_attn .*pip install flash-attn, or .* 'sdpa'"
    )
    with pytest.raises(CheckpointError, match=words):
        if start == "model":
            load_folder(folders[2], attn_implementation="flash_attention_2")
        else:
            formulation = Formulation("score_token", 5, [])
            start_from_checkpoint(folders[1], None, formulation, torch.float32, "flash_attention_2")


def test_options_outside_their_choices(folders: tuple[Path, Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float16, .*, got 'fp16'"):
        load_folder(folders[2], dtype="fp16")
    with pytest.raises(ValueError, match="attn_implementation"):
        load_folder(folders[2], attn_implementation="nonsense")
    with pytest.raises(ValueError, match="prompt must be one of score, evaluation, training or a text"):
        load_folder(folders[2], prompt="rate this")


def test_prompt_of_the_checkpoint_and_of_the_caller(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    own = own_folder(tmp_path)
    edit_json(own / "config.json", prompt="evaluation")
    assert load_folder(own).prompt == load_folder(folders[2], prompt="evaluation").prompt
    assert load_folder(own, prompt="training").prompt == load_folder(folders[2], prompt="training").prompt
    assert len(load_folder(own).prompt.suffix) == 12


def test_licensed_tokenizer_gives_the_same_prompt_as_the_stand_in(
    folders: tuple[Path, Path, Path], shared: Path, tmp_path: Path
) -> None:
    lora, base, merged = published_folders(tmp_path)
    for licensed, where in (((lora, base), folders[:2]), ((merged,), folders[2:])):
        assert load_folder(*licensed).prompt == load_folder(*where).prompt
        assert load_folder(*licensed).fingerprint == load_folder(*where).fingerprint


def fingerprint(*folders: Path, **options: Any) -> str:
    return load_folder(*folders, **{"dtype": "float16", **options}).fingerprint


def test_equal_weights_have_equal_fingerprints_in_every_layout(folders: tuple[Path, Path, Path]) -> None:
    lora, base, merged = folders
    assert fingerprint(lora, base) == fingerprint(merged) == fingerprint(merged, attn_implementation="eager")
    # The merged folder was rounded to float16, so in float32 the two are different models.
    assert fingerprint(lora, base, dtype="float32") != fingerprint(merged, dtype="float32")


def test_whatever_changes_a_score_changes_the_fingerprint(
    folders: tuple[Path, Path, Path], copies: tuple[Path, Path, Path]
) -> None:
    lora, base, merged = copies
    seen = {fingerprint(*folders[:2])}

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


PEAK_OF_LOADING = """
import sys, threading, time
import torch
from pathlib import Path
torch.set_num_threads(1)
from pyiqa_qscorer.checkpoints import load_folder

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.002)

torch.ones(64, 64) @ torch.ones(64, 64)
done, seen, before = threading.Event(), [], anonymous()
thread = threading.Thread(target=watch)
thread.start()
loaded = load_folder(*map(Path, sys.argv[1:]), dtype="bfloat16")
done.set()
thread.join()
weights = sum(t.numel() * t.element_size() for t in loaded.model.state_dict().values())
print(weights, max(seen) - before, anonymous() - before)
"""


def widened_lora(tmp_path: Path, width: int, layers: int) -> tuple[Path, Path]:
    """LoRA and base folder with a wider decoder: float16 on disk, so that loading in bfloat16 must convert."""
    lora, base, _ = published_folders(tmp_path, stand_in=True)
    template = state(lora, base)
    decoder = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    for folder in (lora, base):
        edit_json(folder / "config.json", **decoder)
    sizes = {8: width, 24: 3 * width}

    def blank(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        in_decoder = name.startswith(("model.layers", "model.norm", "model.embed", "lm_head"))
        shape = [sizes.get(n, n) for n in tensor.shape] if in_decoder else list(tensor.shape)
        if name == "deepmlp.model.0.linear.weight" or name == "model.visual_abstractor.visual_fc.weight":
            shape = [shape[0], width] if name.startswith("deepmlp") else [width, shape[1]]
        if name in ("model.visual_abstractor.visual_fc.bias", "model.visual_abstractor.vit_eos"):
            shape = [*shape[:-1], width]
        return torch.ones(shape, dtype=dtype)

    trained = ("model.embed_tokens", "lm_head", "deepmlp", "model.vision_model", "model.visual_abstractor")
    own, rest = {}, {}
    for name, tensor in template.items():
        if name.startswith(trained):
            own[f"base_model.model.{name}"] = blank(name, tensor, torch.float16)
        elif name.startswith("model.layers.0."):
            for layer in range(layers):
                rest[name.replace("layers.0.", f"layers.{layer}.")] = blank(name, tensor, torch.float16)
        elif not name.startswith("model.layers."):
            rest[name] = blank(name, tensor, torch.float16)
    own = {name: tensor for name, tensor in own.items() if not name.endswith("pos_embed")}
    torch.save(own, lora / "non_lora_trainables.bin")
    for shard in shards(base):
        shard.unlink()
    names = sorted(rest)
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, keys in halves.items():
        torch.save({key: rest[key] for key in keys}, base / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    targets = [f"model.layers.{i}.self_attn.{m}" for i in range(layers) for m in ("q_proj", "v_proj.multiway.1")]
    edit_json(lora / "adapter_config.json", target_modules=targets)
    factors = {"lora_A": torch.ones(4, width), "lora_B": torch.ones(width, 4)}
    adapter = {f"base_model.model.{target}.{factor}.weight": t for target in targets for factor, t in factors.items()}
    torch.save(adapter, lora / "adapter_model.bin")
    return lora, base


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_peak_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    lora, base = widened_lora(tmp_path, width=1024, layers=4)
    environment = {**os.environ, "PYIQA_QSCORER_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_LOADING, str(lora), str(base)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    weights, peak, after = map(int, done.stdout.split())
    assert weights > 250e6
    assert after > 0.9 * weights  # converted, so not the mapped file itself
    assert peak < weights + 80e6, f"{weights / 1e6:.0f} MB of weights took {peak / 1e6:.0f} MB"
