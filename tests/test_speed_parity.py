"""What makes scoring fast changes no score: each saving against the plain way.

The plain way is the published procedure as `benchmarks/published_procedure.py` has it: two full passes, no cache.
"""

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import build, check_scores, pixel_values, small_inputs, table, tensors
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_checkpoint import own_folder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyiqa_qscorer.checkpoints import load_folder
from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.metric import QScorer
from pyiqa_qscorer.model import QScorerForScoring
from pyiqa_qscorer.model.attention import KERNELS_FOR_LAST
from pyiqa_qscorer.model.compiled import CompiledBackbone
from pyiqa_qscorer.model.multiway import NO_VISUAL, VisualSpan
from pyiqa_qscorer.model.qscorer import IMAGE_TOKEN_ID
from pyiqa_qscorer.prompt import PromptTokens
from pyiqa_qscorer.scorer import Scorer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from published_procedure import PublishedProcedure

BLANK = 139  # what model S chooses for half of its images, see test_model.py
# Model S multiplies rounding errors by a thousand, so in float64, where only a difference of method is left to see.
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def case(dtype: torch.dtype = torch.float64) -> tuple[QScorerForScoring, Tensor, tuple[int, ...], tuple[int, ...]]:
    ids = small_inputs()[0][0].tolist()
    column, model = ids.index(IMAGE_TOKEN_ID), build("S", "sdpa", dtype).requires_grad_(False)
    return model, tensors("model_S/inputs")["pixel_values"].to(dtype), tuple(ids[:column]), tuple(ids[column + 1 :])


def scores(model: QScorerForScoring, pixels: Tensor, *prompt: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return model.score_prompted(pixels, PromptTokens(*prompt, BLANK)).raw_score


def prefix_runs(model: QScorerForScoring) -> list[int]:
    """A list that grows by the length of the prefix whenever that is read in a pass of its own."""
    runs: list[int] = []
    read = model.model.read_prefix
    model.model.read_prefix = lambda text: (runs.append(text.shape[1]), read(text))[1]  # type: ignore[method-assign]
    return runs


def without_shared_prefix(model: QScorerForScoring) -> QScorerForScoring:
    plain = copy.deepcopy(model)
    plain._prefix = lambda *_: None  # type: ignore[method-assign]
    return plain


def test_the_plain_way_is_the_published_one() -> None:
    ids, golden = table("tokenizer/tokenizer")["prompt_ids"], tensors("model_T/golden")
    column = ids.index(IMAGE_TOKEN_ID)
    raw, tokens = PublishedProcedure(build("T")).score(pixel_values()[:2], ids[:column], ids[column + 1 :])
    check_scores(raw, golden["batch.raw"][:2], "raw")
    assert tokens.tolist() == golden["batch.tok1"][:2].tolist()


@pytest.mark.parametrize("rows", [[0], [1], [0, 2], [1, 3, 5], [1, 0, 2], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1, 0]])
def test_scores_are_those_of_the_plain_way_whatever_the_neighbours(rows: list[int]) -> None:
    """Batches of which all, none or some images choose the blank."""
    model, pixels, *prompt = case()
    raw, tokens = PublishedProcedure(model).score(pixels, *prompt)
    for scored in (model, without_shared_prefix(model)):
        with torch.no_grad():
            output = scored.score_prompted(pixels[rows], PromptTokens(*prompt, BLANK))
        torch.testing.assert_close(output.raw_score, raw[rows], **EXACT)
        assert output.first_token.tolist() == output.first_logits.argmax(-1).tolist() == tokens[rows].tolist()
        assert (output.first_token == BLANK).tolist() == [row in (0, 2, 4) for row in rows]
        assert output.first_logits.shape == (len(rows), 320) and output.hidden_state.shape == (len(rows), 32)


def check_compiled(rows: int) -> None:
    model, pixels, *prompt = case(torch.float32)
    expected, compiled = scores(model, pixels[:rows], *prompt), copy.deepcopy(model)
    compiled.compiled = CompiledBackbone(compiled.model)
    for _ in range(2):
        torch.testing.assert_close(scores(compiled, pixels[:rows], *prompt), expected, rtol=0, atol=1e-4)
    assert set(compiled.compiled._functions) == {"encode_images", "decode"}
    with torch.no_grad():
        for changed in (compiled, model):  # weights and prefix are inputs of what was compiled
            changed.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    after = scores(model, pixels[:rows], *prompt)
    assert (after - expected).abs().max() > 1e-3
    torch.testing.assert_close(scores(compiled, pixels[:rows], *prompt), after, rtol=0, atol=1e-4)


def test_traced_scores_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `compile=True` but the code generator, which takes minutes. Three rows: filled up to four."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check_compiled(3)


@pytest.mark.slow
@pytest.mark.long
def test_compiled_scores_are_the_plain_ones() -> None:
    check_compiled(1)


def test_the_prefix_is_read_once_for_a_batch_or_run(own: Path) -> None:
    model, pixels, *prompt = case()
    runs = prefix_runs(model)
    for rows in (1, 3, 6):
        scores(model, pixels[:rows], *prompt)
    assert runs == [len(prompt[0])] * 3
    scorer = Scorer(QScorer(own), batch_size=1)
    photos = [torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    runs, before = prefix_runs(scorer.metric.network), scorer.score(photos)
    assert len(runs) == 1
    results = scorer.score_iter(photos)
    assert next(results).score == pytest.approx(before[0])
    scorer.metric.network.model.embed_tokens.weight.data.mul_(2)
    after = [item.score for item in results]
    np.testing.assert_array_equal(np.float32(after), scorer.score(photos)[1:])
    assert len(runs) == 5 and np.abs(after - before[1:]).max() > 1e-3


@pytest.mark.parametrize("missing", ["prefix", "suffix"])
def test_a_prompt_may_begin_or_end_with_the_image(missing: str) -> None:
    model, pixels, prefix, suffix = case()
    prompt = ((), suffix) if missing == "prefix" else (prefix, ())
    raw, _ = PublishedProcedure(model).score(pixels, *prompt)
    torch.testing.assert_close(scores(model, pixels, *prompt), raw, **EXACT)


def load_state_dict(model: QScorerForScoring) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def one_embedding_row(model: QScorerForScoring) -> None:
    """Neither a version counter nor a sample of the elements shows it."""
    model.model.embed_tokens.weight.data[small_inputs()[0][0, 1]] += 1.0


def merged_adapter(model: QScorerForScoring) -> None:
    """As peft merges: into `.data`, leaving the same tensors in the same places."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*\.self_attn\.(q_proj|v_proj\.multiway\.0)"))
    assert isinstance(adapted, PeftModel)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.3)
    merged = adapted.merge_and_unload()
    assert merged is model
    model.requires_grad_(False)


CHANGES: dict[str, Callable[[QScorerForScoring], Any]] = {
    "in place": lambda model: model.model.layers[0].mlp.down_proj.weight.mul_(1.3),
    "load_state_dict": load_state_dict,
    ".data of one row": one_embedding_row,
    "numpy": lambda model: model.model.layers[0].mlp.down_proj.weight.numpy().__imul__(1.3),
    "peft merge": merged_adapter,
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_never_scored_with_an_old_prefix(change: str) -> None:
    model, pixels, *prompt = case()
    before = scores(model, pixels, *prompt)
    with torch.no_grad():
        CHANGES[change](model)
    after = scores(model, pixels, *prompt)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, PublishedProcedure(model).score(pixels, *prompt)[0], **EXACT)


def test_gradients_of_weights_and_images_go_through_the_prefix() -> None:
    model, pixels, *prompt = case()
    with torch.inference_mode():  # nothing of it may be left for what comes after
        model.score_prompted(pixels[:1], PromptTokens(*prompt, BLANK))
    gradients = []
    for used in (without_shared_prefix(model), model):
        image = pixels[:2].clone().requires_grad_()
        raw = used.score_prompted(image, PromptTokens(*prompt, BLANK)).raw_score
        gradients += torch.autograd.grad(raw.sum(), image)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)
    runs = prefix_runs(model)
    model.requires_grad_(True)
    model.score_prompted(pixels[:1], PromptTokens(*prompt, BLANK)).raw_score.sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None and (gradient[list(prompt[0])].norm(dim=1) > 0).all() and runs == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("mode", ["plain", "gradient"])
def test_no_score_where_the_first_token_is_chosen_from_logits_that_are_not_finite(own, value, rows, mode) -> None:
    metric, images = QScorer(own), torch.rand(2, 3, 56, 56, requires_grad=mode == "gradient")
    with torch.set_grad_enabled(mode == "gradient"):
        assert metric(images).isfinite().all()
        weight = metric.network.lm_head.weight.data
        weight[3 if rows == "one" else slice(None)] = value
        with pytest.raises(QScorerError, match="not finite"):
            metric(images)


@pytest.mark.parametrize("kernel", [name for name in KERNELS_FOR_LAST if name != "flash_attention_2"])
@pytest.mark.parametrize("last", [1, 2, 5, 12])
@pytest.mark.parametrize("span", [VisualSpan(2, 8), VisualSpan(8, 12), NO_VISUAL])
def test_last_states_are_those_of_all(kernel: str, last: int, span: VisualSpan) -> None:
    model = build("S", kernel, torch.float64)
    embeddings = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    widths: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    masked = torch.ones(2, 12, dtype=torch.bool)
    masked[1, :2] = False
    with torch.no_grad():
        for mask in (None, masked):
            full = model.model.decode(embeddings, span, mask)
            part = model.model.decode(embeddings, span, mask, last=last)
            torch.testing.assert_close(part, full[:, -last:], **EXACT)
    assert widths == [12, last, 12, last]


class Watch(TorchDispatchMode):
    """Names of what makes the CPU wait for a GPU."""

    WAITS = ("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if any(name in str(func) for name in self.WAITS):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_before_the_score_is_under_way() -> None:
    model, pixels, *prompt = case()
    chosen = [row for row in range(6) if row % 2 == 0]  # these choose the blank: no second step
    scores(model, pixels[chosen], *prompt)
    until_score: list[list[str]] = []
    with torch.no_grad(), Watch() as watch:
        handle = model.deepmlp.register_forward_hook(lambda *_: until_score.append(list(watch.waits)))
        model.score_prompted(pixels[chosen], PromptTokens(*prompt, BLANK))
        handle.remove()
    assert until_score == [[]] and watch.calls > 50
    assert len(watch.waits) == 1  # is the blank chosen everywhere?


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into Linux's table of mapped files")
def test_weights_of_the_right_type_stay_in_the_mapped_file(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    model = load_folder(folder, dtype="float32").model
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < stop for start, stop in ranges), name


def test_compiling_quantised_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compile must be False with dtype='8bit'"):
        QScorer(tmp_path, dtype="8bit", compile=True)
