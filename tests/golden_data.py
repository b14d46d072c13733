"""Golden numbers of the published code (`golden/README.md`) as tensors, and our network with the golden weights."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring
from pyiqa_qscorer.model.fast_linear import use_fast_linear

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))

import golden_io  # noqa: E402  (lies in the golden folder)

# Absolute, in float32, for any other implementation or BLAS: see golden/README.md.
HIDDEN_TOLERANCE = LOGIT_TOLERANCE = SCORE_TOLERANCE = 1e-4
# Relative L2 error. Ours is 3e-6 at most, the mildest of the golden mistakes 1e-3 (in model_E).
RELATIVE_TOLERANCE = 2e-5
IMAGE_NAMES = tuple(json.loads((GOLDEN / "model_T" / "summary.json").read_text())["images_in_order"])
SMALL = ("S", "E")  # models on 56 x 56 pixels; E has small activations, which shows a wrong norm eps
BLANK = 29871


@functools.lru_cache
def tensors(name: str) -> dict[str, Tensor]:
    """Tensors of `golden/<name>.safetensors`."""
    return load_file(GOLDEN / f"{name}.safetensors")


@functools.lru_cache
def table(name: str) -> Any:
    """Content of `golden/<name>.json`; do not change it."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def positions(shape: tuple[int, ...], count: int, key: str) -> Tensor:
    """Flat positions of a golden subsample."""
    return torch.from_numpy(golden_io.positions(shape, count, key))


def published_config(name: str) -> QScorerConfig:
    """Our configuration of model S, E or T."""
    stored = table(f"model_{name}/config" if name in SMALL else f"model_{name}/config_and_weights")
    return QScorerConfig.from_published(stored["config"])


@functools.lru_cache
def weights(name: str) -> dict[str, Tensor]:
    """Published weights of model S, E or T: parameters float16, position tables float32."""
    if name in SMALL:
        return tensors(f"model_{name}/model_fp16")
    state = dict(tensors("model_T/core_fp16"))
    positions_of = tensors("model_T/abstractor_pos_embed_fp32")
    stored = table("model_T/config_and_weights")
    for key, entry in stored["weights"].items():
        if key in state:
            continue
        table_name = next((own for own in positions_of if key.endswith(own)), None)
        if table_name is not None:
            state[key] = positions_of[table_name]
        else:
            state[key] = torch.from_numpy(golden_io.weight("T", key, tuple(entry["shape"])))
    return state


def build(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> QScorerForScoring:
    """A fresh model S, E or T, in evaluation mode, with the published weights."""
    config = published_config(name)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = QScorerForScoring(config)
    state = {
        key: value.to(dtype if key not in buffer_names(model) else torch.float32, copy=True)
        for key, value in weights(name).items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    use_fast_linear(model)
    return model.eval()


def buffer_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()}


@functools.lru_cache
def pixel_values() -> Tensor:
    """(11, 3, 448, 448) pixel values of the golden images, in golden order."""
    return torch.stack([pixels_from_pil(open_image(GOLDEN / "images" / f"{name}.png")) for name in IMAGE_NAMES])


@functools.lru_cache
def small_inputs() -> tuple[Tensor, Tensor]:
    """Token ids (3, 15) and pixel values (3, 3, 56, 56) of the golden forward pass of models S and E."""
    inputs = tensors("model_S/inputs")
    return inputs["fwd.input_ids"], inputs["pixel_values"][:3]


@contextlib.contextmanager
def recorded(model: nn.Module, paths: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """What named modules return: `with recorded(model, {"name": "path.to.module"}) as seen: ...`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({name: output.detach()})

    handles = [model.get_submodule(path).register_forward_hook(keep(name)) for name, path in paths.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_small(model: QScorerForScoring, paths: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Outputs of the named modules, and of the whole network, in the golden forward pass of models S and E."""
    with torch.no_grad(), recorded(model, paths or {}) as seen:
        output = model(*small_inputs())
        scores = model.deepmlp(output.last_hidden_state)
    return {
        **seen,
        "llm.final_hidden": output.last_hidden_state,
        "logits": output.logits,
        "deepmlp_all_positions": scores,
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, the measure of `mutation_sensitivity.json`."""
    return ((actual - expected).norm() / expected.norm()).item()


def check(
    actual: Tensor,
    expected: Tensor,
    tolerance: float = HIDDEN_TOLERANCE,
    what: str = "",
    relative_tolerance: float | None = RELATIVE_TOLERANCE,
) -> None:
    """Shapes equal, largest difference within `tolerance`, relative L2 error within `relative_tolerance`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, golden {tuple(expected.shape)}"
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= tolerance, f"{what}: differs by {difference:.2e} from the golden numbers"
    if relative_tolerance is not None:
        relative = relative_error(actual.float(), expected.float())
        assert relative <= relative_tolerance, f"{what}: relative error {relative:.2e} to the golden numbers"


def check_scores(actual: Tensor, expected: Tensor, what: str, tolerance: float = SCORE_TOLERANCE) -> None:
    """As `check`, for single numbers, which may be near zero: absolute error only."""
    check(actual, expected, tolerance, what, relative_tolerance=None)


def check_small(name: str, actual: dict[str, Tensor], what: list[str]) -> None:
    """Check outputs of `run_small` against the golden ones of model S or E."""
    golden = tensors(f"model_{name}/golden")
    for key in what:
        check(actual[key], golden[f"fwd.{key}"], what=f"model_{name} {key}")


STAGES = ("vision.last_hidden_state", "abstractor.last_hidden_state", "llm.final_hidden", "deepmlp_all_positions")
STAGE_PATHS = dict(zip(STAGES, ("model.vision_model", "model.visual_abstractor"), strict=False))


def check_mistake(mistake: str, make: Callable[[QScorerForScoring], None]) -> None:
    """A mistake made on purpose must move the goldens as far as it moved them in the published code.

    So a test that compares with the goldens would see it, and our network computes the same there and only there.

    Args:
        mistake: its name in `golden/mutation_sensitivity.json`.
        make: changes a model, in place.
    """
    known = next(entry for entry in table("mutation_sensitivity") if entry["mutation"] == mistake)
    seen = []
    for name, key in (("S", "S_rel(vision,abstractor,hidden,deepmlp)"), ("E", "E_rel")):
        model = build(name)
        make(model)
        outputs = run_small(model, STAGE_PATHS)
        golden = tensors(f"model_{name}/golden")
        for stage, published in zip(STAGES, known[key], strict=True):
            error = relative_error(outputs[stage], golden[f"fwd.{stage}"])
            seen.append(error)
            assert abs(error - published) <= 0.05 * published + 5e-6, (mistake, name, stage, error, published)
    assert max(seen) > 5 * RELATIVE_TOLERANCE
