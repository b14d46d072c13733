"""pyiqa's metrics, ours among them, as the leaderboard uses them."""

from __future__ import annotations

import hashlib
import platform
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import __version__
from ..checkpoints import CheckpointSource
from ..errors import QScorerError
from ..metric import QScorer
from ..registry import METRICS, nearest, resolve_metric_options

SEED = 123


@dataclass(frozen=True)
class MetricDescription:
    """What is known of a metric before it is built."""

    mode: Literal["NR", "FR"]  # FR: an image beside its reference
    lower_better: bool


@dataclass(frozen=True)
class MetricFacts:
    """What a built metric is made of."""

    identity: str  # fingerprint of weights and options: equal ones give equal scores up to rounding
    parameters: int
    weight_bytes: int  # parameters and buffers in memory
    download_bytes: int | None  # files of the checkpoint; 0 without one, None where that is not known
    versions: dict[str, str]  # of the libraries that make the score


def describe_metric(name: str) -> MetricDescription:
    """Mode and direction of a metric. Raises `QScorerError`: unknown, or of whole sets of images."""
    config = _config(name)
    if "fid" in name or name == "inception_score":
        raise QScorerError(f"metric {name!r} gives one number to a set of images, not a score to each")
    return MetricDescription(config["metric_mode"], bool(config.get("lower_better", False)))


class PyiqaMetric:
    """A metric of pyiqa with its input and output as plain tensors and numbers.

    Made by `pyiqa.create_metric`, which takes the options, may download weights and raises whatever it raises.

    Attributes:
        takes_batches: whether images share a batch without changing each other's score; of ours only.
    """

    def __init__(self, name: str, device: torch.device, options: dict[str, Any]) -> None:
        import pyiqa

        if name in METRICS:
            resolve_metric_options(name, options)  # names what an option is called, before anything is loaded
        with redirect_stdout(sys.stderr):  # pyiqa and what it loads print there
            self._metric = pyiqa.create_metric(name, device=device, **options).eval()
        net = self._metric.net
        self._ours = net if isinstance(net, QScorer) else None
        self.takes_batches = self._ours is not None
        tensors = [*net.parameters(), *net.buffers()]
        self.facts = MetricFacts(
            identity=net.identity[:16] if isinstance(net, QScorer) else _identity(name, net, options),
            parameters=sum(parameter.numel() for parameter in net.parameters()),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            download_bytes=_download_bytes(name, options, tensors),
            versions={
                "python": platform.python_version(),
                "pyiqa-qscorer": __version__,
                **{library: version(library) for library in ("pyiqa", "torch", "transformers", "pillow", "numpy")},
            },
        )

    def prepare(self, picture: Image.Image) -> Tensor:
        """(3, H, W) float32 in [0, 1], as pyiqa's loaders make it; for our metrics their own 8-bit levels, which are
        the same for a file, a picture and a tensor, so that images of all sizes share a batch."""
        if self._ours is not None:
            return self._ours.images.levels_from_pil(picture)
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)

    def score(self, images: Sequence[Tensor], references: Sequence[Tensor]) -> list[float]:
        """Score of each of the images that `prepare` made, as the metric gives it; no references, or as many.

        Random numbers that a metric draws (some score random crops) start from the same seed each time.

        Raises:
            QScorerError: not one number per image came back.
        """
        with torch.no_grad(), _same_random_numbers(), redirect_stdout(sys.stderr):
            if self._ours is not None:
                output = self._ours.score_pixels(self._ours.images.inputs(images))
            else:
                output = self._metric(*(torch.stack(list(same)) for same in (images, references) if same))
        if not isinstance(output, Tensor) or output.numel() != len(images):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise QScorerError(f"it gave {shape} for {len(images)} images, not one number each")
        values = output.detach().reshape(-1).cpu()
        if values.dtype == torch.float64:
            return [float(value) for value in values]
        # The shortest decimal of a float32: 3.302386, not 3.30238604545593.
        return [float(str(np.float32(value))) for value in values.float().numpy()]


def _config(name: str) -> dict[str, Any]:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    if name not in DEFAULT_CONFIGS:
        hint = nearest(name, DEFAULT_CONFIGS, f"`pyiqa --list_models` shows all {len(DEFAULT_CONFIGS)}")
        raise QScorerError(f"pyiqa has no metric {name!r}; {hint}")
    config: dict[str, Any] = DEFAULT_CONFIGS[name]
    return config


def _identity(name: str, net: nn.Module, options: dict[str, Any]) -> str:
    """Fingerprint of what pyiqa computes: its version, the metric's settings, every weight."""
    settings = {**_config(name)["metric_opts"], **options}
    digest = hashlib.sha256(repr((version("pyiqa"), name, sorted(settings.items(), key=str))).encode())
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _download_bytes(name: str, options: dict[str, Any], tensors: list[Tensor]) -> int | None:
    if name in METRICS:
        given = resolve_metric_options(name, options)
        where = ("checkpoint", "base", "revision", "base_revision", "cache_dir")
        source = CheckpointSource(**{key: given[key] for key in where if key in given}, local_files_only=True)
        files: list[Path] = []
        for part in source.plan():
            if isinstance(part, Path):
                files += [file for file in part.rglob("*") if file.is_file()]
            else:
                files += [part.folder / file.name for file in part.files]
        return sum(file.stat().st_size for file in files)
    # pyiqa keeps no record of what a metric fetched; without weights it fetched nothing.
    return None if tensors else 0


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
