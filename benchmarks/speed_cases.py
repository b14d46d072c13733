"""What `speed.py` measures: the models, the ways of scoring with them, and the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from published_procedure import PublishedProcedure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyiqa_qscorer.checkpoints.load import quantise
from pyiqa_qscorer.metric import QScorer
from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring, language
from pyiqa_qscorer.model import fast_linear as linear
from pyiqa_qscorer.model.compiled import CompiledBackbone
from pyiqa_qscorer.model.language import Prefix
from pyiqa_qscorer.prompt import _LLAMA_BLANK, _LLAMA_IDS, PromptTokens
from pyiqa_qscorer.registry import METRICS, resolve_metric_options

MINI = "qscorer-mini"
MODELS = ("mini", "medium", "7b")
DTYPES = ("float32", "float16", "bfloat16", "8bit", "4bit")


@dataclass(frozen=True)
class Case:
    """A model in one precision on one device, and its prompt."""

    model: QScorerForScoring
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    blank: int

    @property
    def prompt(self) -> PromptTokens:
        return PromptTokens(self.prefix, self.suffix, self.blank)

    @cached_property
    def read(self) -> Prefix | None:
        """The prefix, read once for many batches, as a run of `Scorer` does."""
        return self.model.read_prefix(self.prompt)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def image_size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    def pixels(self, batch: int) -> Tensor:
        """Normalised noise, which costs what photos cost."""
        size = (batch, 3, self.image_size, self.image_size)
        return torch.randn(size, generator=torch.Generator().manual_seed(batch)).to(self.device)

    def score(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.score_prompted(pixels, self.prompt, self.read).raw_score


def make_case(name: str, dtype: str, device: str, formulation: str) -> Case:
    """Build a model. `mini` is the shipped one; the others have random weights, of which every image chooses `▁`."""
    if name == "mini":
        if MINI not in METRICS:
            raise ValueError(f"model mini needs the metric {MINI}, this version has {', '.join(METRICS)}")
        metric = QScorer(**resolve_metric_options(MINI, {"dtype": dtype}), device=device).to(device)
        return Case(metric.network, metric.prompt.prefix, metric.prompt.suffix, metric.prompt.blank)
    config = _config(name, formulation)
    kind = getattr(torch, dtype) if hasattr(torch, dtype) else torch.float16
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(kind)
        with torch.device("cpu" if dtype in ("8bit", "4bit") else device):
            model = QScorerForScoring(config)
    finally:
        torch.set_default_dtype(before)
    config.dtype = kind
    prefix, suffix = _LLAMA_IDS["score"]
    if dtype in ("8bit", "4bit"):
        model = quantise(model, dtype, device)  # type: ignore[arg-type]
    linear.use_fast_linear(model)
    case = Case(model.eval().requires_grad_(False), prefix, suffix, _LLAMA_BLANK)
    _choose_the_blank(case)
    return case


def _config(name: str, formulation: str) -> QScorerConfig:
    tokens = range(32000, 32005)
    common: dict[str, Any] = {
        "formulation": formulation,
        "score_tokens": [f"<score{index + 1}>" for index in range(5)],
        "score_token_ids": list(tokens),
        "level_tokens": [f"level{index}" for index in range(5)],
        "level_token_ids": list(tokens),
    }
    if name == "7b":
        config = QScorerConfig(**common)
    else:
        width: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 8}
        config = QScorerConfig(
            **(
                common
                | width
                | {"intermediate_size": 1376, "num_hidden_layers": 8, "regressor_hidden_sizes": [256, 128]}
            ),
            vision_config=width | {"intermediate_size": 2048, "num_hidden_layers": 6},
            abstractor_config=width | {"intermediate_size": 1408, "num_hidden_layers": 3},
        )
    config.initializer_range = config.hidden_size**-0.5  # so that the score depends on the image
    config._attn_implementation = "sdpa"
    return config


def _choose_the_blank(case: Case) -> None:
    """Turn the blank's row of the LM head towards the states at the end of the prompt.

    Trained models choose the blank and need one pass; random ones would choose anything and take a second step.
    """
    weight = case.model.lm_head.weight
    with torch.no_grad():
        output = case.model.score_prompted(case.pixels(2), case.prompt)
        if case.model.config.formulation != "score_token":
            return
        largest = output.first_logits.abs().max()
        visual = case.model.model.encode_images(case.pixels(2))
        states = case.model._read(case.prompt, None, visual, wanted=1)[:, 0]
        mean = states.float().mean(dim=0)
        weight[case.blank] = (mean * 4 * largest / mean.square().sum()).to(weight.dtype)


# --- ways of scoring -------------------------------------------------------------------------------------------------


@contextmanager
def kernel(case: Case, name: str) -> Iterator[None]:
    parts = (case.model.config, case.model.config.vision_config, case.model.config.abstractor_config)
    before = [part._attn_implementation for part in parts]
    for part in parts:
        part._attn_implementation = name
    try:
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part._attn_implementation = old


def ways(case: Case, batch: int, *, compiled: bool, steps: bool) -> dict[str, Callable[[], Tensor]]:
    """Names of ways to score one batch, and what scores it; `steps`: also with each saving taken away."""
    pixels = case.pixels(batch)
    published = PublishedProcedure(case.model)
    found: dict[str, Callable[[], Tensor]] = {}
    if case.model.config.formulation == "score_token":
        found["published"] = lambda: published.score(pixels, case.prefix, case.suffix)[0]
    found["ours"] = lambda: case.score(pixels)
    if compiled:
        compiled_backbone = CompiledBackbone(case.model.model)

        def run_compiled() -> Tensor:
            with patch.object(case.model, "compiled", compiled_backbone):
                return case.score(pixels)

        found["compiled"] = run_compiled
    if steps:
        plain: dict[str, list[Any]] = {
            "with the prefix read per batch": [lambda: patch.dict(case.__dict__, read=None)],
            "without shared prefix": [
                lambda: patch.dict(case.__dict__, read=None),
                lambda: patch.object(case.model, "_prefix", lambda *_: None),
            ],
            "with last layer in full": [lambda: patch.object(language, "KERNELS_FOR_LAST", ())],
            "with eager attention": [lambda: kernel(case, "eager")],
        }
        if case.device.type == "cpu" and case.model.lm_head.weight.dtype == torch.float32:
            plain["without oneDNN"] = [lambda: patch.object(linear, "_onednn", None)]
        for name, contexts in plain.items():
            found[name] = _within(contexts, lambda: case.score(pixels))

        def twice() -> Tensor:
            case.score(pixels)
            return case.score(pixels)

        found["with two passes"] = twice
    return found


def _within(contexts: Sequence[Callable[[], Any]], function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return function()

    return run


# --- measuring -------------------------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int, warm_up: int = 2
) -> dict[str, dict[str, float]]:
    """Seconds of each function: every repeat runs all of them, so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    memory: dict[str, int] = {}
    for repeat in range(warm_up + repeats):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            wait_for(device)
            started = time.perf_counter()
            function()
            wait_for(device)
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - started)
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated(device)
    return {name: summary(values) | ({"peak_bytes": memory[name]} if memory else {}) for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1], "repeats": len(ordered)}


def matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the best large matrix product that this machine gives in this type, by either library on the CPU."""
    size = size or (8192 if device.type == "cuda" else 1024)
    states, weight = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products: dict[str, Callable[[], Any]] = {"default": lambda: torch.nn.functional.linear(states, weight)}
    if device.type == "cpu" and dtype == torch.float32 and linear._onednn is not None:
        products["onednn"] = lambda: linear.onednn_linear(states, weight)
    with torch.no_grad():
        seconds = interleaved(products, device, repeats=25)
    return 2 * size**3 / min(times["min"] for times in seconds.values())


def flop_count(case: Case) -> int:
    """Floating point operations of one image, as PyTorch counts them in our pass (eager, so that it sees all)."""
    pixels = case.pixels(1)
    with kernel(case, "eager"), patch.object(linear, "_onednn", None), FlopCounterMode(display=False) as counter:
        case.score(pixels)
    return int(counter.get_total_flops())
