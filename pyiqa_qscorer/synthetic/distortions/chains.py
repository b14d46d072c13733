"""Chains of steps as real pictures go through them: lens, sensor, camera software, resizing, codecs, and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .damage_kinds import STEP_KINDS, StepKind
from .pictures import Picture, check_picture

CHAIN_STEPS: tuple[str, ...] = tuple(STEP_KINDS)
"""Names of the kinds of steps."""

_STAGES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.35, {"gaussian_blur": 1, "defocus": 1, "motion_blur": 1, "tone": 1}),
    (0.30, {"sensor_noise": 3, "low_light": 1}),
    (0.35, {"denoise": 2, "sharpen": 2, "banding": 0.5, "tone": 0.5}),
    (0.40, {"resample": 4, "upscaler": 1}),
    (0.75, {"jpeg": 4, "webp": 2, "avif": 2, "jpeg2000": 1, "video": 2, "recompress": 1.5, "compress_small": 3}),
    (0.20, {"resample": 1, "compress_small": 1, "jpeg": 1, "webp": 0.5, "video": 0.5}),
)
"""In the order of a picture's life: how often the stage occurs, and the weights of the steps that it may be."""
_MOST_STEPS = 4
_RANDOM_ORDER = 0.15
_FIXED_SEED = 20


@dataclass(frozen=True)
class Step:
    """One step of a chain. `Step(**json.loads(json.dumps(dataclasses.asdict(step))))` does the same as `step`.

    Attributes:
        kind: one of `CHAIN_STEPS`.
        parameters: of that kind; numbers, strings, lists and dicts of them.
    """

    kind: str
    parameters: dict[str, Any]


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength!r}")


def _kind(name: str) -> StepKind:
    if name not in STEP_KINDS:
        raise ValueError(f"kind must be one of {', '.join(CHAIN_STEPS)}, got {name!r}")
    return STEP_KINDS[name]


def _random_kinds(rng: np.random.Generator) -> list[str]:
    """1..4 kinds of steps in the order of the stages, sometimes in any order."""
    while True:
        stages = [weights for share, weights in _STAGES if rng.random() < share]
        if 1 <= len(stages) <= _MOST_STEPS:
            break
    kinds = []
    for weights in stages:
        shares = np.array(list(weights.values()))
        kinds.append(str(rng.choice(list(weights), p=shares / shares.sum())))
    if rng.random() < _RANDOM_ORDER:
        rng.shuffle(kinds)
    return kinds


def random_chain(seed: int, strength: float | None = None) -> list[Step]:
    """A chain of 1..4 steps; the same seed and strength give the same chain.

    One step, drawn at random, has about the full strength; the others have random shares of it, the smaller the more
    steps there are.

    Args:
        seed: >= 0.
        strength: 0 (hardly visible) .. 1 (awful) of the whole chain; None: drawn evenly from [0, 1].

    Raises:
        ValueError: strength outside [0, 1].
    """
    rng = np.random.default_rng(seed)
    drawn = float(rng.random())
    strength = drawn if strength is None else strength
    _check_strength(strength)
    kinds = _random_kinds(rng)
    shares = rng.uniform(0, 1, len(kinds))
    shares[rng.integers(len(kinds))] = 1 if len(kinds) == 1 else rng.uniform(0.7, 1)
    drawn_strengths = zip(kinds, strength * shares, strict=True)
    return [Step(kind, STEP_KINDS[kind].draw(float(own), rng)) for kind, own in drawn_strengths]


def single_step(kind: str, strength: float) -> Step:
    """A step whose severity is set by `strength` in [0, 1] alone: kernels, codecs and directions stay the same.

    Raises:
        ValueError: no such kind, or strength outside [0, 1].
    """
    _check_strength(strength)
    return Step(kind, _kind(kind).draw(strength, np.random.default_rng(_FIXED_SEED)))


def apply_chain(image: Picture, steps: Sequence[Step], seed: int) -> Picture:
    """The picture after all steps.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        steps: any number; none gives a copy.
        seed: >= 0, of the noise. Same arguments, same picture.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: an unknown kind of step or value of a parameter, or another shape or dtype of the image.
    """
    check_picture(image)
    result = image.copy()
    for position, step in enumerate(steps):
        result = _kind(step.kind).apply(result, step.parameters, np.random.default_rng((seed, position)))
    return np.ascontiguousarray(result)
