"""The whole network: golden scores of models S and T, the two-step procedure, teacher-forced passes."""

import hashlib
from collections.abc import Sequence

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
from torch import Tensor

from pyiqa_qscorer.model import QScorerForScoring, ScoreOutput
from pyiqa_qscorer.model.qscorer import IMAGE_TOKEN_ID
from pyiqa_qscorer.model.regressor import ScoreRegressor
from pyiqa_qscorer.prompt import PromptTokens

SCORE_LOGITS = slice(32000, 32005)


def prompt_sides(ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    column = list(ids).index(IMAGE_TOKEN_ID)
    return tuple(ids[:column]), tuple(ids[column + 1 :])


def golden_score(model: QScorerForScoring, key: str = "prompt_ids", rows: slice = slice(None)) -> ScoreOutput:
    prefix, suffix = prompt_sides(table("tokenizer/tokenizer")[key])
    with torch.no_grad():
        return model.score_prompted(pixel_values()[rows], PromptTokens(prefix, suffix, BLANK))


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
        key, output = f"single.{image}", golden_score(model, rows=slice(row, row + 1))
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


def test_states_at_the_end_of_the_prompt_and_a_wider_regressor() -> None:
    model, golden = build("T", "sdpa"), tensors("model_T/golden")
    ids = torch.tensor([table("tokenizer/tokenizer")["prompt_ids"]] * len(IMAGE_NAMES))
    with torch.no_grad():
        output = model(ids, pixel_values())
    assert output.logits.shape == (11, 92, 32005)
    check(output.last_hidden_state[:, -1], golden["batch.h1"], what="h1")
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
            output = model.score_prompted(pixels[row : row + 1], PromptTokens(*prompt_sides(ids[row].tolist()), blank))
        assert output.first_token.item() == chosen
        assert model.lm_head(output.hidden_state).argmax() == golden["twostep.tok2"][row]
        check_scores(output.raw_score, golden["twostep.raw"][row : row + 1], "raw")
        check(output.hidden_state, golden["twostep.hidden2"][row : row + 1], what="hidden2")


MIXED_BLANK = 139  # what model S chooses after the first golden prompt for images 0, 2 and 4


def mixed_case() -> tuple[QScorerForScoring, Tensor, tuple[int, ...], tuple[int, ...]]:
    ids, pixels = small_inputs()[0][0].tolist(), tensors("model_S/inputs")["pixel_values"]
    return build("S", "sdpa"), pixels, *prompt_sides(ids)


def two_full_passes(model: QScorerForScoring, pixels: Tensor, *prompt: tuple[int, ...]) -> Tensor:
    """The published procedure, plainly: choose a token, append it, run everything again. No cache, no blank."""
    ids = torch.tensor([[*prompt[0], IMAGE_TOKEN_ID, *prompt[1]]] * len(pixels))
    chosen = model(ids, pixels).logits[:, -1].argmax(-1)
    ids = torch.cat([ids, chosen[:, None]], dim=1)
    return model.deepmlp(model(ids, pixels).last_hidden_state[:, -1])


def one_pass(model: QScorerForScoring, pixels: Tensor, *prompt: tuple[int, ...]) -> Tensor:
    return model.score_prompted(pixels, PromptTokens(*prompt, MIXED_BLANK)).raw_score


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


def test_gradients_of_a_mixed_batch_are_those_of_two_full_passes() -> None:
    gradients = []
    for scored in (one_pass, two_full_passes):
        model, pixels, prefix, suffix = mixed_case()
        pixels = pixels.clone().requires_grad_()
        scored(model, pixels, prefix, suffix).sum().backward()
        own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        gradients.append({"pixels": pixels.grad, **own})
    ours, reference = gradients
    # The last layer computes only the states that are read; what is not there had no influence.
    for name in reference.keys() - ours.keys():
        assert not reference.pop(name).any(), name
    assert ours.keys() == reference.keys() and (ours["pixels"].flatten(1).norm(dim=1) > 1e-2).all()
    for name, gradient in reference.items():
        scale = gradient.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_rows_equal_rows_alone(attention: str) -> None:
    """Rows of different length before the image are padded on the left, which aligns the images."""
    model, (ids, pixels) = build("S", attention), small_inputs()
    prefix, suffix = prompt_sides(ids[0].tolist())
    rows = [[*prefix[skip:], IMAGE_TOKEN_ID, *suffix[: len(suffix) - skip]] for skip in (0, 2, 3)]
    width = max(len(row) for row in rows) + 2
    left = [len(prefix) - row.index(IMAGE_TOKEN_ID) for row in rows]
    padded, mask = torch.full((3, width), 7), torch.zeros((3, width), dtype=torch.long)
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
    with pytest.raises(ValueError, match="got 2 images and 3 rows"):
        model(small_inputs()[0], pixels[:2])
