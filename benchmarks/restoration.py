"""Does `QScorerLoss` restore a picture, or does optimising it fool the metric? And what does a step cost?

    python benchmarks/restoration.py [PHOTO] [--metric qscorer-mini] [--checkpoint DIR] [--training-photos DIR]

A photo is blurred, made noisy and compressed. Then two things are optimised with

    QScorerLoss + anchor * L1

for several anchor weights: the pixels themselves (L1 to the distorted picture, since nothing else is known of it), and
the weights of a small denoising network (L1 to the clean training photos, beside training with L1 alone). The pristine
photo, which no optimisation sees, judges by PSNR and SSIM. "fooled" means: the score rose while SSIM fell.

Writes `results/restoration_METRIC.json` and `.png`, and prints both tables.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pyiqa
import torch
import typer
from PIL import Image, ImageFilter
from rich import box
from rich.console import Console
from rich.table import Table
from source_commit import source_commit
from torch import Tensor, nn

from pyiqa_qscorer import QScorerLoss
from pyiqa_qscorer.data.find_images import find_images
from pyiqa_qscorer.files import write_bytes
from pyiqa_qscorer.images.reading import open_image

RESULTS = Path(__file__).resolve().parent / "results"
PHOTOS = Path(__file__).resolve().parent.parent / "tests" / "photos"
NOISE = 20 / 255  # standard deviation
BLUR, JPEG_QUALITY = 2.0, 10
ANCHORS = (0.0, 30.0, 100.0, 300.0, 1000.0)
SSIM_MARGIN = 0.005  # a smaller change of SSIM counts as none
COST_STEPS = 7
JUDGES = ("score", "psnr", "ssim")


@dataclass
class Run:
    """One optimisation: what it read off the picture at each recorded step, and the pictures."""

    distortion: str
    anchor: float | None  # None: L1 alone
    curve: dict[str, list[float]]
    before: Tensor
    after: Tensor

    @property
    def verdict(self) -> str:
        score, ssim = (self.curve[name][-1] - self.curve[name][0] for name in ("score", "ssim"))
        if abs(ssim) < SSIM_MARGIN:
            return "same"
        return "better" if ssim > 0 else "fooled" if score > 0 else "worse"

    def facts(self) -> dict[str, Any]:
        return {"distortion": self.distortion, "anchor": self.anchor, "verdict": self.verdict, "curve": self.curve}


class Judge:
    """Score, PSNR and SSIM of pictures as they would be saved, in 8 bits."""

    def __init__(self, loss: QScorerLoss, device: torch.device) -> None:
        self.loss = loss
        self.full_reference = {name: pyiqa.create_metric(name, device=device) for name in ("psnr", "ssim")}

    @torch.no_grad()
    def __call__(self, images: Tensor, pristine: Tensor) -> list[dict[str, float]]:
        images = eight_bits(images)
        columns = {"score": self.loss.rewards(images).tolist()}
        for name, metric in self.full_reference.items():
            columns[name] = metric(images, pristine.expand_as(images)).flatten().tolist()
        return [{name: columns[name][row] for name in JUDGES} for row in range(len(images))]


class SmallDenoiser(nn.Module):
    """Four 3x3 convolutions that predict the noise (as DnCNN, Zhang et al., 2017, without its batch norms)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        last = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        return images - self.layers(images)


def main(
    photo: Annotated[Path, typer.Argument(help="pristine photo, which is distorted and restored")] = PHOTOS
    / "coffee.jpg",
    metric: Annotated[str, typer.Option(help="metric name")] = "qscorer-mini",
    checkpoint: Annotated[Path | None, typer.Option(help="checkpoint instead of the metric's own")] = None,
    training_photos: Annotated[
        Path | None, typer.Option(help="folder of pristine photos for the denoiser [default: two sample photos]")
    ] = None,
    anchors: Annotated[str, typer.Option(help="weights of L1, with commas")] = ",".join(f"{a:g}" for a in ANCHORS),
    steps: Annotated[int, typer.Option(min=1, help="of pixel optimisation")] = 150,
    network_steps: Annotated[int, typer.Option(min=1, help="of training the denoiser")] = 200,
    records: Annotated[int, typer.Option(min=1, help="points of a curve")] = 15,
    side: Annotated[int, typer.Option(min=32, help="larger photos are cropped to this, in the middle")] = 480,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Run the benchmark."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    started = time.monotonic()
    weights = tuple(float(anchor) for anchor in anchors.split(","))
    options = {} if checkpoint is None else {"checkpoint": str(checkpoint)}
    loss = QScorerLoss(metric, reduction="none", device=device, **options)
    where = loss.metric.device
    pristine = load(photo, side).to(where)
    judge = Judge(loss, where)
    runs = []
    for distortion in ("blur", "noise", "jpeg"):
        runs += optimise_pixels(loss, judge, pristine, distortion, weights, steps, records)
        Console().print(f"pixels, {distortion}: done after {time.monotonic() - started:.0f} s", highlight=False)
    default = [PHOTOS / "astronaut.jpg", PHOTOS / "cat.jpg"]
    paths = default if training_photos is None else [Path(p) for p in find_images([str(training_photos)]).paths]
    clean = [load(path, side).to(where) for path in paths]
    trained = []
    for anchor in (*weights, None):
        trained.append(train_denoiser(loss, judge, pristine, clean, anchor, network_steps, records))
        Console().print(f"denoiser, anchor {name_of(anchor)}: {time.monotonic() - started:.0f} s", highlight=False)
    costs = [measure_alone(name, metric, options, device, threads, side) for name in COSTS]

    show(runs, trained, costs)
    facts = {
        "command": command(),
        "metric": {"name": metric, "identity": loss.metric.identity, "dtype": str(loss.metric.dtype)},
        "settings": {
            "photo": photo.name,
            "training_photos": len(clean),
            "size": list(pristine.shape[2:]),
            "noise_std": NOISE,
            "blur_radius": BLUR,
            "jpeg_quality": JPEG_QUALITY,
            "steps": steps,
            "network_steps": network_steps,
            "ssim_margin": SSIM_MARGIN,
        },
        "pixels": [run.facts() for run in runs],
        "denoiser": [run.facts() for run in trained],
        "cost_per_step": costs,
        "seconds": round(time.monotonic() - started),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": threads,
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "pyiqa", "pyiqa-qscorer")},
        },
        "commit": source_commit(),
    }
    output.mkdir(parents=True, exist_ok=True)
    stem = "restoration_" + re.sub(r"\W+", "_", metric)
    write_bytes(output / f"{stem}.json", (json.dumps(facts, indent=2) + "\n").encode())
    write_bytes(output / f"{stem}.png", figure(pristine, runs, trained, metric))


def load(path: Path, side: int) -> Tensor:
    """(1, 3, H, W) in [0, 1], the middle of the photo, neither side longer than `side`."""
    levels = torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)[None]
    height, width = levels.shape[2:]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return levels[..., top : top + side, left : left + side].float() / 255


def eight_bits(images: Tensor) -> Tensor:
    return images.clamp(0, 1).mul(255).round().div(255)


def distort(pristine: Tensor, kind: str, seed: int = 0) -> Tensor:
    """The photo blurred (Gaussian), with white Gaussian noise, or through JPEG; in 8 bits."""
    if kind == "noise":
        noise = torch.randn(pristine.shape, generator=torch.Generator().manual_seed(seed)).to(pristine.device)
        return eight_bits(pristine + NOISE * noise)
    levels = pristine[0].mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(levels)
    if kind == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(BLUR))
    else:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        picture = Image.open(buffer)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float().div(255).to(pristine.device)


def recorded(steps: int, records: int) -> set[int]:
    return {round(steps * index / records) for index in range(records + 1)}


def optimise_pixels(
    loss: QScorerLoss,
    judge: Judge,
    pristine: Tensor,
    distortion: str,
    anchors: tuple[float, ...],
    steps: int,
    records: int,
) -> list[Run]:
    """Adam on the pixels, step size 1.3 levels falling to none; the anchors side by side in one batch."""
    distorted = distort(pristine, distortion)
    images = distorted.repeat(len(anchors), 1, 1, 1).requires_grad_()
    weights = torch.tensor(anchors, device=images.device)
    optimiser = torch.optim.Adam([images], lr=0.005)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    when = recorded(steps, records)
    curves: list[dict[str, list[float]]] = [{name: [] for name in ("step", *JUDGES)} for _ in anchors]
    for step in range(steps + 1):
        if step in when:
            for curve, values in zip(curves, judge(images.detach(), pristine), strict=True):
                for name, value in {"step": step, **values}.items():
                    curve[name].append(value)
        if step < steps:
            optimiser.zero_grad()
            anchored = (images - distorted).abs().flatten(1).mean(1)
            (loss(images) + weights * anchored).sum().backward()
            optimiser.step()
            schedule.step()
    after = eight_bits(images.detach())
    return [
        Run(distortion, anchor, curve, distorted, after[row : row + 1])
        for row, (anchor, curve) in enumerate(zip(anchors, curves, strict=True))
    ]


def train_denoiser(
    loss: QScorerLoss,
    judge: Judge,
    pristine: Tensor,
    clean: list[Tensor],
    anchor: float | None,
    steps: int,
    records: int,
) -> Run:
    """Train on fresh noise over the clean photos, judge on the noisy photo that is not among them.

    `anchor=None`: L1 alone. Every anchor sees the same photos, noise and starting weights.
    """
    torch.manual_seed(0)
    network = SmallDenoiser().to(pristine.device)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    noisy, when = distort(pristine, "noise"), recorded(steps, records)
    curve: dict[str, list[float]] = {name: [] for name in ("step", *JUDGES)}
    for step in range(steps + 1):
        if step in when:
            with torch.no_grad():
                restored = network(noisy)
            for name, value in {"step": step, **judge(restored, pristine)[0]}.items():
                curve[name].append(value)
        if step < steps:
            target = clean[step % len(clean)]
            output = network(distort(target, "noise", seed=step + 1))
            total = (output - target).abs().mean() * (1 if anchor is None else anchor)
            if anchor is not None:
                total = total + loss(output).mean()
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            schedule.step()
    return Run("noise", anchor, curve, noisy, eight_bits(restored))


# --- time and memory of a step ---------------------------------------------------------------

COSTS = ("QScorerLoss", "QScorerLoss, gradient checkpointing", "ssim", "fsim")


def measure_alone(name: str, metric: str, options: dict[str, str], device: str, threads: int, side: int) -> dict:
    """`measure` in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, name, metric, options, device, threads, side).result()


def measure(name: str, metric: str, options: dict[str, str], device: str, threads: int, side: int) -> dict[str, Any]:
    """Median time of loss and gradient of one picture, and the memory that a step takes at most."""
    torch.set_num_threads(threads)
    if name.startswith("QScorerLoss"):
        loss: nn.Module = QScorerLoss(metric, device=device, gradient_checkpointing="," in name, **options)
    else:
        loss = pyiqa.create_metric(name, as_loss=True, device=device)
    where = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(1, 3, side * 3 // 4, side, generator=generator).to(where)
    images = (reference + 0.05).clamp(0, 1).requires_grad_()
    seconds = []
    before = begin_peak(where)
    for _ in range(COST_STEPS):
        images.grad = None
        start = time.perf_counter()
        loss(images, reference).backward()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        seconds.append(time.perf_counter() - start)
    return {
        "loss": name,
        "size": list(images.shape),
        "seconds_median": statistics.median(seconds[2:]),
        "seconds_range": [min(seconds[2:]), max(seconds[2:])],
        "peak_memory_mb": None if before is None else (peak(where) - before) / 2**20,
    }


def begin_peak(device: torch.device) -> int | None:
    """Bytes in use now, from which on the peak is taken; None where this system does not tell (CPU, not Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    return peak(device)


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


# --- report ----------------------------------------------------------------------------------


def name_of(anchor: float | None) -> str:
    return "L1 alone" if anchor is None else f"{anchor:g}"


def show(runs: list[Run], trained: list[Run], costs: list[dict[str, Any]]) -> None:
    table = Table(title="QScorerLoss + anchor x L1: before -> after", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("optimised", "anchor", "score", "PSNR", "SSIM", "verdict"):
        table.add_column(column, justify="left" if column in ("optimised", "verdict") else "right")
    for what, group in (("pixels", runs), ("denoiser", trained)):
        for run in group:
            cells = [
                f"{run.curve[name][0]:.{digits}f}->{run.curve[name][-1]:.{digits}f}"
                for name, digits in (("score", 2), ("psnr", 1), ("ssim", 3))
            ]
            table.add_row(f"{what}, {run.distortion}", name_of(run.anchor), *cells, run.verdict)
    Console().print(table)
    table = Table(title="Loss and gradient of one picture")
    for column in ("loss", "seconds", "range", "peak memory"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for cost in costs:
        memory = cost["peak_memory_mb"]
        table.add_row(
            cost["loss"],
            f"{cost['seconds_median']:.3f}",
            "{:.3f}..{:.3f}".format(*cost["seconds_range"]),
            "not measured" if memory is None else f"{memory:.0f} MB",
        )
    Console().print(table)


def figure(pristine: Tensor, runs: list[Run], trained: list[Run], metric: str) -> bytes:
    """For each distortion, and for the denoiser, a row of pictures and under it a row of curves; PNG."""
    kinds = list(dict.fromkeys(run.distortion for run in runs))
    blocks = [(f"pixels, {kind}", [run for run in runs if run.distortion == kind]) for kind in kinds]
    blocks.append(("denoiser", trained))
    columns = 2 + max(len(block) for _, block in blocks)
    drawn = plt.figure(figsize=(2.3 * columns, 5 * len(blocks)), layout="constrained")
    parts = drawn.subfigures(len(blocks), 1)
    for part, (title, block) in zip(parts, blocks, strict=True):
        part.suptitle(f"{title}: {metric} + anchor x L1", fontsize=12)
        upper, lower = part.subfigures(2, 1, height_ratios=(1, 0.9))
        axes = upper.subplots(1, columns)
        first = block[0].curve
        pictures = [("pristine", pristine), (caption("distorted", first, 0), block[0].before)]
        pictures += [(caption(f"{name_of(r.anchor)}: {r.verdict}", r.curve, -1), r.after) for r in block]
        for axis in axes:
            axis.set_axis_off()
        for axis, (text, picture) in zip(axes, pictures, strict=False):
            axis.imshow(middle(picture)[0].permute(1, 2, 0).cpu().numpy())
            axis.set_title(text, fontsize=8)
        for axis, name in zip(lower.subplots(1, 3), JUDGES, strict=True):
            for run in block:
                colour = "black" if run.anchor is None else plt.cm.viridis(block.index(run) / len(block))
                axis.plot(run.curve["step"], run.curve[name], color=colour, label=f"anchor {name_of(run.anchor)}")
            axis.set_xlabel("step")
            axis.set_ylabel({"score": "score (optimised)", "psnr": "PSNR, dB", "ssim": "SSIM"}[name])
            axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=80)
    plt.close(drawn)
    return buffer.getvalue()


def caption(title: str, curve: dict[str, list[float]], at: int) -> str:
    return f"{title}\nscore {curve['score'][at]:.2f}, {curve['psnr'][at]:.1f} dB, SSIM {curve['ssim'][at]:.3f}"


def middle(images: Tensor, side: int = 200) -> Tensor:
    """What the figure shows of a picture: a part of it, so that pixels can be seen."""
    height, width = images.shape[2:]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return images[..., top : top + side, left : left + side]


def command() -> str:
    """As typed, with the last part only of absolute paths."""
    return " ".join(["python benchmarks/restoration.py", *(Path(a).name if a[:1] == "/" else a for a in sys.argv[1:])])


if __name__ == "__main__":
    typer.run(main)
