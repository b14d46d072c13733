"""The whole network: golden scores of models S and T, the two-step procedure, and life as a transformers model."""

import copy
import gzip
import hashlib
import json
import pickle
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import (
    BLANK,
    IMAGE_NAMES,
    LOGIT_TOLERANCE,
    build,
    check,
    check_scores,
    pixel_values,
    positions,
    small_inputs,
    table,
    tensors,
    weights,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring, ScoreOutput
from pyiqa_qscorer.model.multiway import VisualSpan
from pyiqa_qscorer.model.qscorer import IMAGE_TOKEN_ID
from pyiqa_qscorer.model.regressor import ScoreRegressor

SCORE_LOGITS = slice(32000, 32005)


def prompt_sides(ids: Sequence[int]) -> tuple[list[int], list[int]]:
    column = list(ids).index(IMAGE_TOKEN_ID)
    return list(ids[:column]), list(ids[column + 1 :])


def golden_score(model: QScorerForScoring, key: str = "prompt_ids", rows: slice = slice(None)) -> ScoreOutput:
    prefix, suffix = prompt_sides(table("tokenizer/tokenizer")[key])
    with torch.no_grad():
        return model.score(pixel_values()[rows], prefix, suffix, BLANK)


def test_rebuilt_weights_are_the_golden_ones() -> None:
    for name, entry in table("model_T/config_and_weights")["weights"].items():
        if name.endswith("pos_embed"):
            continue
        digest = hashlib.sha256(weights("T")[name].contiguous().numpy().tobytes()).hexdigest()
        assert digest == entry["sha256_fp16"], name


def check_score(model: QScorerForScoring, output: ScoreOutput, golden: dict[str, Tensor], key: str) -> None:
    """Everything that the published code reports of its two passes."""
    with torch.no_grad():
        second_logits = model.lm_head(output.hidden_state)
    assert output.first_token.tolist() == golden[f"{key}.tok1"].tolist()
    assert second_logits.argmax(-1).tolist() == golden[f"{key}.tok2"].tolist()
    check_scores(output.raw_score, golden[f"{key}.raw"], f"{key}.raw")
    check_scores(output.raw_score.clamp(0, 5), golden[f"{key}.score"], f"{key}.score")
    check(output.hidden_state, golden[f"{key}.h2"], what=f"{key}.h2")
    for logits, name in ((output.first_logits, "1"), (second_logits, "2")):
        if f"{key}.sl{name}" in golden:
            check(logits[:, SCORE_LOGITS], golden[f"{key}.sl{name}"], LOGIT_TOLERANCE, f"{key}.sl{name}")
            best = logits.topk(2).values
            gap = best[:, 0] - best[:, 1]
            check_scores(gap, golden[f"{key}.gap{name}"], f"{key}.gap{name}", 2 * LOGIT_TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_golden_image_alone(attention: str) -> None:
    model, golden = build("T", attention), tensors("model_T/golden")
    sample = positions((32005,), 500, "logits")
    for row, image in enumerate(IMAGE_NAMES):
        key = f"single.{image}"
        output = golden_score(model, rows=slice(row, row + 1))
        check_score(model, output, golden, key)
        check(output.first_logits[0, sample], golden[f"{key}.logits1_sub"], LOGIT_TOLERANCE, f"{key}.logits1")
        second_logits = model.lm_head(output.hidden_state).detach()
        check(second_logits[0, sample], golden[f"{key}.logits2_sub"], LOGIT_TOLERANCE, f"{key}.logits2")


@pytest.mark.parametrize(
    ("attention", "prompt", "key"),
    [
        ("eager", "prompt_ids", "batch"),
        ("sdpa", "prompt_ids", "sdpa.batch"),
        ("eager", "iqa_eval_prompt_ids", "iqa_eval_prompt.batch"),
    ],
)
def test_golden_images_in_one_batch(attention: str, prompt: str, key: str) -> None:
    model = build("T", attention)
    check_score(model, golden_score(model, prompt), tensors("model_T/golden"), key)


def test_golden_images_where_the_blank_is_chosen_and_one_pass_is_enough() -> None:
    model, golden = build("T"), tensors("model_T/golden")
    model.lm_head.weight.data[BLANK] = golden["space_row.lm_head_row_29871"].float()
    passes = []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: passes.append(tuple(output.shape[:2])))
    output = golden_score(model)
    assert set(output.first_token.tolist()) == {BLANK}
    assert passes == [(1, 15), (11, 78)]  # the prefix once, the rest for every image
    check_score(model, output, golden, "space_row.batch")


def test_states_at_the_end_of_the_prompt() -> None:
    model, golden = build("T", "sdpa"), tensors("model_T/golden")
    ids = torch.tensor([table("tokenizer/tokenizer")["prompt_ids"]] * len(IMAGE_NAMES))
    with torch.no_grad():
        output = model(ids, pixel_values())
    assert output.logits.shape == (11, 92, 32005)
    check(output.last_hidden_state[:, -1], golden["batch.h1"], what="h1")


def test_wider_regressor_with_residual_blocks() -> None:
    model = build("T", "sdpa")
    model.deepmlp = ScoreRegressor(64, (64, 64, 24))
    own = tensors("model_T/deepmlp_64_64_24_fp16")
    model.deepmlp.load_state_dict({name.removeprefix("deepmlp."): tensor.float() for name, tensor in own.items()})
    check_scores(golden_score(model).raw_score, tensors("model_T/golden")["deepmlp_64_64_24.batch.raw"], "raw")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_the_published_code(dtype: torch.dtype, attention: str) -> None:
    """Errors to float32, of the images whose first token is that of float32: another one is a jump, see the spec.

    They are rounding, so ours are other ones than theirs, of the same size: below twice theirs in root mean square.
    """
    key = f"{'fp16' if dtype is torch.float16 else 'bf16'}_{attention}.batch"
    golden, output = tensors("model_T/golden"), golden_score(build("T", attention, dtype))
    assert output.raw_score.dtype is dtype
    same = output.first_token == golden["batch.tok1"]
    theirs_same = golden[f"{key}.tok1"] == golden["batch.tok1"]
    assert same.sum() >= theirs_same.sum() - 1
    ours = (output.raw_score.float() - golden["batch.raw"])[same & theirs_same].square().mean().sqrt()
    theirs = (golden[f"{key}.raw"] - golden["batch.raw"])[same & theirs_same].square().mean().sqrt()
    assert ours <= 2 * theirs
    assert theirs <= (0.02 if dtype is torch.float16 else 0.4)  # what the published precision is worth


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("row", range(3))
def test_two_steps_of_model_s(row: int, attention: str) -> None:
    """The answer must not depend on which token is called the blank: chosen first (one pass) or not (two)."""
    model, golden = build("S", attention), tensors("model_S/golden")
    ids, pixels = small_inputs()
    chosen = int(golden["twostep.tok1"][row])
    for blank in (chosen, 0):
        with torch.no_grad():
            output = model.score(pixels[row : row + 1], *prompt_sides(ids[row].tolist()), blank)
        assert output.first_token.item() == chosen
        assert model.lm_head(output.hidden_state).argmax() == golden["twostep.tok2"][row]
        check_scores(output.raw_score, golden["twostep.raw"][row : row + 1], "raw")
        check(output.hidden_state, golden["twostep.hidden2"][row : row + 1], what="hidden2")


MIXED_BLANK = 139  # what model S chooses after the first golden prompt for images 0, 2 and 4


def mixed_case() -> tuple[QScorerForScoring, Tensor, list[int], list[int]]:
    ids, pixels = small_inputs()[0][0].tolist(), tensors("model_S/inputs")["pixel_values"]
    return build("S", "sdpa"), pixels, *prompt_sides(ids)


def two_full_passes(model: QScorerForScoring, pixels: Tensor, prefix: list[int], suffix: list[int]) -> Tensor:
    """The published procedure, plainly: choose a token, append it, run everything again. No cache, no blank."""
    ids = torch.tensor([[*prefix, IMAGE_TOKEN_ID, *suffix]] * len(pixels))
    chosen = model(ids, pixels).logits[:, -1].argmax(-1)
    ids = torch.cat([ids, chosen[:, None]], dim=1)
    return model.deepmlp(model(ids, pixels).last_hidden_state[:, -1])


@pytest.mark.parametrize("rows", [[0], [1], [0, 2], [1, 3, 5], [0, 1], [1, 0, 2], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1, 0]])
def test_mixed_batches_equal_two_full_passes(rows: list[int]) -> None:
    model, pixels, prefix, suffix = mixed_case()
    with torch.no_grad():
        output = model.score(pixels[rows], prefix, suffix, MIXED_BLANK)
        reference = two_full_passes(model, pixels[rows], prefix, suffix)
    blank = (output.first_token == MIXED_BLANK).tolist()
    assert blank == [row in (0, 2, 4) for row in rows]
    check_scores(output.raw_score, reference, "two full passes")


def test_mixed_batch_of_golden_images_equals_two_full_passes() -> None:
    """With the published prompt: the blank's row of the LM head is scaled so that two of five images choose it."""
    model, golden = build("T", "sdpa"), tensors("model_T/golden")
    states, row = golden["batch.h1"][:5], golden["space_row.lm_head_row_29871"].float()
    best_other = (states @ model.lm_head.weight.detach().T).amax(-1)
    needed = (best_other / (states @ row)).sort().values  # scale at which an image begins to choose the blank
    model.lm_head.weight.data[BLANK] = (needed[1] + needed[2]) / 2 * row
    output = golden_score(model, rows=slice(0, 5))
    assert output.first_token.eq(BLANK).sum() == 2
    prompt = prompt_sides(table("tokenizer/tokenizer")["prompt_ids"])
    with torch.no_grad():
        reference = two_full_passes(model, pixel_values()[:5], *prompt)
    check_scores(output.raw_score, reference, "two full passes")


def test_a_score_does_not_depend_on_its_neighbours() -> None:
    model, pixels, prefix, suffix = mixed_case()
    with torch.no_grad():
        together = model.score(pixels, prefix, suffix, MIXED_BLANK)
        for order in ([5, 4, 3, 2, 1, 0], [3, 1, 5, 0, 2, 4]):
            shuffled = model.score(pixels[order], prefix, suffix, MIXED_BLANK)
            assert shuffled.first_token.tolist() == together.first_token[order].tolist()
            check_scores(shuffled.raw_score, together.raw_score[order], f"order {order}")
        alone = torch.cat([model.score(image[None], prefix, suffix, MIXED_BLANK).raw_score for image in pixels])
    check_scores(alone, together.raw_score, "alone")


def test_gradients_of_a_mixed_batch_are_those_of_two_full_passes() -> None:
    gradients = []
    for scored in (lambda *case: case[0].score(*case[1:], MIXED_BLANK).raw_score, two_full_passes):
        model, pixels, prefix, suffix = mixed_case()
        pixels = pixels.clone().requires_grad_()
        scored(model, pixels, prefix, suffix).sum().backward()
        own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        gradients.append({"pixels": pixels.grad, **own})
    ours, reference = gradients
    # The last layer computes only the states that are read; what is not there had no influence.
    for name in reference.keys() - ours.keys():
        assert not reference.pop(name).any(), name
    assert ours.keys() == reference.keys()
    assert (ours["pixels"].flatten(1).norm(dim=1) > 1e-2).all()
    for name, gradient in reference.items():
        scale = gradient.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)


def test_output_describes_itself() -> None:
    model, pixels, prefix, suffix = mixed_case()
    output = model.score(pixels, prefix, suffix, MIXED_BLANK)
    assert output.raw_score.shape == output.first_token.shape == (6,)
    assert output.first_logits.shape == (6, 320)
    assert output.hidden_state.shape == (6, 32)
    assert output.first_logits.argmax(-1).tolist() == output.first_token.tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_rows_equal_rows_alone(attention: str) -> None:
    """Rows of different length before the image are padded on the left, which aligns the images."""
    model, (ids, pixels) = build("S", attention), small_inputs()
    prefix, suffix = prompt_sides(ids[0].tolist())
    rows = [[*prefix[skip:], IMAGE_TOKEN_ID, *suffix[: len(suffix) - skip]] for skip in (0, 2, 3)]
    width = max(len(row) for row in rows) + 2
    left = [len(prefix) - row.index(IMAGE_TOKEN_ID) for row in rows]
    padded = torch.full((3, width), 7)
    mask = torch.zeros((3, width), dtype=torch.long)
    for index, (row, start) in enumerate(zip(rows, left, strict=True)):
        padded[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = 1
    with torch.no_grad():
        together = model(padded, pixels, mask)
        assert torch.equal(together.logits, model(padded, pixels, mask.bool()).logits)
        for index, (row, start) in enumerate(zip(rows, left, strict=True)):
            alone = model(torch.tensor([row]), pixels[index : index + 1]).logits[0]
            torch.testing.assert_close(together.logits[index, start : start + len(alone)], alone, rtol=0, atol=5e-5)


def test_golden_training_batch_with_right_padding() -> None:
    """Rows of equal prompt length, padded on the right: the published training batch."""
    inputs, golden = tensors("model_S/inputs"), tensors("model_S/golden")
    ids, mask = inputs["train.input_ids"], inputs["train.attention_mask"]
    columns = (ids == IMAGE_TOKEN_ID).nonzero()[:, 1]
    model, merged = build("S"), golden["train.merged_attention_mask"]
    for row, column in enumerate(columns.tolist()):  # images stand in different columns, so one row at a time
        with torch.no_grad():
            output = model(ids[row : row + 1], inputs["pixel_values"][row : row + 1], mask[row : row + 1])
        kept = merged[row]
        assert output.visual_span.start == column
        check(output.logits[0][kept], golden["train.logits"][row][kept], LOGIT_TOLERANCE, f"row {row}")


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2, 3, 4]],
        [[1, -200, 3, -200]],
        [[1, -200, 3, 4], [-200, 1, 3, 4]],
        [[1, -200, 3, 4], [1, 2, 3, 4]],
        [[1, 2, 3, 4], [-200, 1, 3, -200]],
    ],
)
def test_images_must_stand_once_in_every_row_and_in_one_column(ids: list[list[int]]) -> None:
    model, pixels = build("S"), small_inputs()[1]
    with pytest.raises(ValueError, match="image placeholder -200 once per row and in one column"):
        model(torch.tensor(ids), pixels[: len(ids)])


def test_one_image_per_row() -> None:
    ids, pixels = small_inputs()
    with pytest.raises(ValueError, match="got 2 images and 3 rows"):
        build("S")(ids, pixels[:2])


def logits_of(model: QScorerForScoring) -> Tensor:
    with torch.no_grad():
        return model(*small_inputs()).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build("S", "sdpa").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    return folder


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_saved_and_loaded_bit_for_bit(saved: Path, options: dict[str, Any]) -> None:
    model, report = QScorerForScoring.from_pretrained(saved, output_loading_info=True, **options)
    assert not any(report.values()), report
    original = build("S", "sdpa")
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(logits_of(model), logits_of(original))
    assert model.config.to_dict()["score_token_ids"] == [315, 316, 317, 318, 319]


def test_one_file_loads_like_shards(saved: Path, tmp_path: Path) -> None:
    QScorerForScoring.from_pretrained(saved).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = QScorerForScoring.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(QScorerForScoring.from_pretrained(saved)))


def test_attention_of_the_visual_parts_follows_that_of_the_model(saved: Path) -> None:
    def used(model: QScorerForScoring) -> set[str | None]:
        parts = (model.config, model.config.vision_config, model.config.abstractor_config)
        return {part._attn_implementation for part in parts}

    assert used(QScorerForScoring.from_pretrained(saved)) == {"sdpa"}
    assert used(QScorerForScoring.from_pretrained(saved, attn_implementation="eager")) == {"eager"}
    model = QScorerForScoring(QScorerConfig.from_pretrained(saved))
    assert used(model) == {"sdpa"}


def test_attention_kernels_agree(saved: Path) -> None:
    eager, sdpa = (QScorerForScoring.from_pretrained(saved, attn_implementation=name) for name in ("eager", "sdpa"))
    torch.testing.assert_close(logits_of(eager), logits_of(sdpa), rtol=0, atol=5e-5)


def test_flash_attention_without_its_package_says_so(saved: Path) -> None:
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    with pytest.raises(ImportError, match=r"FlashAttention2 .* doesn't seem to be installed"):
        QScorerForScoring.from_pretrained(saved, attn_implementation="flash_attention_2")


def test_nothing_is_left_uninitialised_where_keys_are_missing(tmp_path: Path) -> None:
    """Loading builds on the meta device, so every bare parameter and buffer must be filled by `_init_weights`."""
    model = build("S")
    state = model.state_dict()
    norms = ("norm.weight", "norm.bias", "norm1.weight", "normk.bias", "norm2.weight", "ffn_ln.weight")
    bare = ("query_embeds", "vit_eos", "cls_token", "position_embedding", "pos_embed")
    missing = {name for name in state if name.endswith((*norms, *bare)) or "deepmlp" in name or "layers.1." in name}
    model.config.save_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in state.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = QScorerForScoring.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    own_tables = model.model.visual_abstractor.encoder.layers[0].crossattention.attention.position_tables()
    for name, tensor in loaded.state_dict().items():
        if name not in missing:
            assert torch.equal(tensor, state[name]), name
        elif name.endswith("pos_embed"):
            assert torch.equal(tensor, own_tables["k_pos" in name]), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name
        else:  # N(0, 0.02), as transformers leaves the published regressor
            assert 0.01 < tensor.std() < 0.03, name
            assert tensor.abs().max() < 0.12, name


def test_a_new_model_scores() -> None:
    model = QScorerForScoring(build("S").config).eval()
    assert logits_of(model).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in later transformers
def test_gradient_checkpointing_gives_equal_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("S", "sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(*small_inputs()).logits.square().mean().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-6)


def test_copies() -> None:
    model = build("S", "sdpa")
    expected = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(logits_of(other), expected)
            other.lm_head.weight.zero_()
        assert torch.equal(logits_of(model), expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_peft_targets_are_the_published_ones_and_train() -> None:
    wanted = r".*\.self_attn\.(q_proj|v_proj\.multiway\.1)"
    base = build("S", "sdpa")
    expected = logits_of(base)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=wanted))
    adapted = {name.removesuffix(".lora_A.default.weight") for name, _ in model.named_parameters() if "lora_A" in name}
    published = table("lora_golden/find_all_linear_names_tiny")  # two layers, as model S has
    assert adapted == {f"base_model.model.{name}" for name in published}
    with torch.no_grad():
        assert torch.equal(model(*small_inputs()).logits, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        ids, pixels = small_inputs()
        loss = (model(input_ids=ids, pixel_values=pixels).logits[:, -1] - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    assert isinstance(merged, QScorerForScoring)
    assert merged.state_dict().keys() == build("S").state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_peft_targets_of_the_full_size_are_the_published_ones() -> None:
    stored = full_size_table()
    with torch.device("meta"):
        model = QScorerForScoring(QScorerConfig.from_published(stored["config"]))
        model = get_peft_model(model, LoraConfig(r=128, target_modules=r".*\.self_attn\.(q_proj|v_proj\.multiway\.1)"))
    lora = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in lora}
    assert adapted == set(stored["find_all_linear_names"])
    assert sum(lora.values()) == table("full_size/counts")["lora_r128_trainable"]


@pytest.mark.parametrize("part", ["decode", "encode_images"])
def test_compiles_without_graph_breaks(part: str) -> None:
    """Traced in full; the code generator itself is left out, it takes minutes."""
    model = build("S", "sdpa")
    inputs = (torch.randn(2, 12, 32), VisualSpan(2, 6)) if part == "decode" else (small_inputs()[1],)
    function = getattr(model.model, part)
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(compiled, function(*inputs), rtol=0, atol=5e-5)


def full_size_table() -> dict[str, Any]:
    path = Path(__file__).parent / "golden" / "full_size" / "state_dict_keys.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def test_full_size_has_the_published_keys_shapes_and_parameters() -> None:
    stored, counts = full_size_table(), table("full_size/counts")
    with torch.device("meta"):
        model = QScorerForScoring(QScorerConfig.from_published(stored["config"]))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 868 == counts["n_state_dict_keys"]
    assert shapes == {name: list(shape) for name, shape in stored["state_dict"].items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_208_390_145 == counts["total_parameters"]
    assert [name for name, _ in model.named_buffers()] == counts["persistent_buffers"]


def test_defaults_are_the_published_sizes() -> None:
    stored = QScorerConfig.from_published(full_size_table()["config"])
    ours = QScorerConfig()
    for part in ("vision_config", "abstractor_config"):
        assert getattr(ours, part).to_dict() == getattr(stored, part).to_dict()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(stored, name)
    assert ours.regressor_hidden_sizes == stored.regressor_hidden_sizes == [2048, 1024]
    assert ours.num_visual_tokens == 65
