"""How good `qscorer-mini` is: agreement with people and with calibrated labels, robustness, size, speed; one picture.

    python benchmarks/mini.py --shared ../shared --biq2021 BIQ2021

Kodak's photos were never trained on; other distortions of them chose the best epoch. Prints tables, and writes
`mini.json` and `mini.png` into `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from biq2021 import Photos, read_photos
from kadid_kodak import distort
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.table import Table
from scipy import ndimage, stats
from source_commit import source_commit

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.evaluation.bootstrap import intervals
from pyiqa_qscorer.evaluation.correlation import correlations
from pyiqa_qscorer.files import write_bytes, write_text
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.registry import METRICS, MINI_CHECKPOINT
from pyiqa_qscorer.synthetic.distortions import CHAIN_STEPS, KADID_TYPES, apply_chain, single_step
from pyiqa_qscorer.synthetic.kadid_opinions import kadid_opinion
from pyiqa_qscorer.synthetic.recipe import Recipe
from pyiqa_qscorer.synthetic.rendering import CALIBRATION_FILE, find_photos, render, tone_of

RESULTS = Path(__file__).with_name("results")
CHAINS, CHAIN_SEED = 480, 17  # another seed than that of the pictures that chose the best epoch
RESAMPLES = 2000
SUBSETS = ("ss01", "ss02", "ss03")  # of BIQ2021
NOT_MONOTONIC = (18, 25)  # levels of these types do not go from good to bad
CLEAR_STEP = 0.15  # smallest difference of human means that must show in the order
out = Console()


@dataclass
class TestSet:
    """Pictures with opinions, higher is better; undistorted ones and (KADID type, level) where there are any."""

    name: str
    files: list[Path]
    opinions: np.ndarray
    references: list[Path] = field(default_factory=list)
    cells: list[tuple[int, int]] = field(default_factory=list)
    groups: np.ndarray | None = None  # of near-duplicates


def live(shared: Path) -> TestSet:
    """Real opinions of 43 JPEG pictures of LIVE (DMOS, so negated)."""
    with (shared / "data/live_jpeg/meta_info_LIVEJPEG.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    folder = shared / "data/live_jpeg/images"
    return TestSet(
        "LIVE JPEG (people)", [folder / row["img_name"] for row in rows], -np.array([float(row["mos"]) for row in rows])
    )


def kodak_chains(photos: Sequence[Path], work: Path) -> TestSet:
    """Realistic chains on Kodak, labelled by the calibration that the training labels came from."""
    table = render(
        Recipe(kind="chains", count=CHAINS, seed=CHAIN_SEED),
        photos,
        work / "chains",
        MINI_CHECKPOINT / CALIBRATION_FILE,
    )
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return TestSet(
        "Kodak, realistic chains",
        [table.parent / row["file"] for row in rows],
        np.array([float(row["mos"]) for row in rows]),
    )


def kodak_kadid(photos: Sequence[Path], work: Path) -> TestSet:
    """Every type and level of KADID-10k on Kodak, labelled by the human mean of the cell."""
    pictures = distort(photos, work / "kadid")
    return TestSet(
        "Kodak, KADID distortions",
        [picture.file for picture in pictures],
        np.array([kadid_opinion(picture.kind, picture.level)[0] for picture in pictures]),
        [picture.reference for picture in pictures],
        [(picture.kind, picture.level) for picture in pictures],
    )


def biq2021(folder: Path, photos: Photos) -> list[TestSet]:
    """BIQ2021's official test photos: all, those without a near-duplicate in its training table, each subset; and the
    photos that the committed rule held out of the training table."""

    def chosen(name: str, rows: np.ndarray) -> TestSet:
        files = [folder / "Images" / file for file in photos.names[rows]]
        return TestSet(name, files, photos.mos[rows], groups=photos.group[rows])

    test = photos.is_test
    return [
        chosen("BIQ2021 test (people)", test),
        chosen("BIQ2021 test without near-duplicates (people)", test & ~photos.has_twin),
        *(
            chosen(f"BIQ2021 test, {part} (people)", test & (photos.subset == part))
            for part in ("ss01", "ss02", "ss03")
        ),
        chosen("BIQ2021 validation, other groups than training (people)", photos.is_validation),
    ]


# --- what is compared -----------------------------------------------------------------------------


def flat_pixels(image: np.ndarray) -> float:
    """Minus the share of pixels that equal both neighbours to the right and below: blocking and blur make them many."""
    gray = image.astype(np.int16).sum(2)
    flat = (np.abs(np.diff(gray, axis=1))[:-1] <= 3) & (np.abs(np.diff(gray, axis=0))[:, :-1] <= 3)
    return -float(flat.mean())


def scene_statistics(image: np.ndarray) -> np.ndarray:
    """Moments of locally normalised luminance and of its neighbours' products, at two scales (idea of BRISQUE).

    Zeros stand for moments of what a picture has none of: a flat one has no negative normals.
    """
    gray = image @ np.array([0.299, 0.587, 0.114])
    values: list[float] = []
    for _ in range(2):
        mean = ndimage.gaussian_filter(gray, 7 / 6)
        spread = np.sqrt(np.maximum(ndimage.gaussian_filter(gray**2, 7 / 6) - mean**2, 0))
        normal = (gray - mean) / (spread + 1)
        products = [normal[:, 1:] * normal[:, :-1], normal[1:] * normal[:-1], normal[1:, 1:] * normal[:-1, :-1]]
        for part in (normal, *products):
            left, right = part[part < 0], part[part >= 0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of moments that are not defined
                values += [np.abs(part).mean(), part.std(), stats.kurtosis(part, axis=None), left.std(), right.std()]
        gray = ndimage.zoom(gray, 0.5, order=1)
    return np.nan_to_num(values, posinf=0, neginf=0)


def ridge(photos: Sequence[Path], work: Path) -> Callable[[np.ndarray], float]:
    """Ridge regression on `scene_statistics`, fitted on pictures of the training photos."""
    rows: list[tuple[Path, float]] = []
    kinds: tuple[Literal["kadid", "chains"], ...] = ("kadid", "chains")
    for kind in kinds:
        recipe = Recipe(kind=kind, count=400, seed=11)
        table = render(recipe, photos, work / f"ridge_{kind}", MINI_CHECKPOINT / CALIBRATION_FILE)
        with table.open(newline="") as file:
            rows += [(table.parent / row["file"], float(row["mos"])) for row in csv.DictReader(file)]
    predict = fitted_ridge(np.stack([statistics_of_file(file) for file, _ in rows]), np.array([mos for _, mos in rows]))
    return lambda image: predict(scene_statistics(image))


def fitted_ridge(values: np.ndarray, target: np.ndarray) -> Callable[[np.ndarray], float]:
    mean, scale = values.mean(0), values.std(0)
    normal = (values - mean) / scale
    weights = np.linalg.solve(normal.T @ normal + 10 * np.eye(normal.shape[1]), normal.T @ (target - target.mean()))
    return lambda row: float((row - mean) / scale @ weights)


def statistics_of_file(file: Path) -> np.ndarray:
    return scene_statistics(read(file))


def read(file: Path) -> np.ndarray:
    return np.asarray(open_image(file))


def pyiqa_scores(name: str, files: Iterable[Path], references: Sequence[Path] = ()) -> np.ndarray:
    import pyiqa

    metric = pyiqa.create_metric(name, device="cpu")
    sign = -1 if metric.lower_better else 1
    pairs = zip(files, references, strict=True) if references else ((file,) for file in files)
    return sign * np.array([float(metric(*(str(file) for file in pair))) for pair in pairs])


def agreement(scores: np.ndarray, opinions: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    """SRCC with its bootstrap 95 % interval, over pictures or over groups of near-duplicates, and PLCC."""
    found = correlations(scores, opinions, fit=False)
    return {
        "srcc": found.srcc,
        "interval": intervals(scores, opinions, resamples=RESAMPLES)["srcc"]
        if groups is None
        else interval_over_groups(scores, opinions, groups),
        "plcc": found.plcc,
        "images": len(scores),
    }


def interval_over_groups(scores: np.ndarray, opinions: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of SRCC where whole groups are drawn: near-duplicates are not independent observations."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES // 2):
        rows = np.concatenate([members[index] for index in rng.integers(len(members), size=len(members))])
        found.append(stats.spearmanr(scores[rows], opinions[rows]).statistic)
    return float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))


def photo_baselines(folder: Path, photos: Photos, tests: Sequence[TestSet]) -> dict[str, dict[str, Any]]:
    """piqe, entropy, and ridge regression on scene statistics of the photos that the mini's last steps train on."""
    files = sorted({file for test in tests for file in test.files})
    trained = [folder / "Images" / file for file in photos.names[photos.is_training]]
    with ProcessPoolExecutor() as pool:
        values = np.stack(list(pool.map(statistics_of_file, trained, chunksize=50)))
        features = dict(zip(files, pool.map(statistics_of_file, files, chunksize=50), strict=True))
    predict = fitted_ridge(values, photos.mos[photos.is_training])
    scores = {
        "scene statistics + ridge (same photos)": {file: predict(features[file]) for file in files},
        **{name: dict(zip(files, pyiqa_scores(name, files), strict=True)) for name in ("piqe", "entropy")},
    }
    return {
        test.name: {
            name: agreement(np.array([of_file[file] for file in test.files]), test.opinions, test.groups)
            for name, of_file in scores.items()
        }
        for test in tests
    }


# --- what else must hold --------------------------------------------------------------------------


def monotonic(scores: np.ndarray, kadid: TestSet) -> dict[str, Any]:
    """Share of neighbouring levels whose mean score over the photos falls where people's clearly does."""
    means: dict[tuple[int, int], list[float]] = {}
    for score, cell in zip(scores, kadid.cells, strict=True):
        means.setdefault(cell, []).append(float(score))
    wrong, pairs = [], 0
    for kind in KADID_TYPES:
        for level in range(1, 5):
            clear = kadid_opinion(kind, level)[0] - kadid_opinion(kind, level + 1)[0] >= CLEAR_STEP
            if clear and kind not in NOT_MONOTONIC:
                pairs += 1
                if np.mean(means[kind, level]) <= np.mean(means[kind, level + 1]):
                    wrong.append(f"{kind} {KADID_TYPES[kind]}: {level} -> {level + 1}")
    return {"pairs": pairs, "share": 1 - len(wrong) / pairs, "wrong": wrong}


def robustness(scorer: Scorer, photos: Sequence[Path], files: Sequence[Path]) -> dict[str, Any]:
    """Mean change of score by mirroring and by a crop of 2 %, largest of file against tensor, fall under each step."""
    pictures = [open_image(file) for file in files]
    crops = [picture.crop(_inner(picture.size, 0.02)) for picture in pictures]
    plain = scorer.score(pictures)
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures]
    perfect = [read(photo) for photo in photos]
    base = scorer.score(perfect)
    falls = {}
    for kind in CHAIN_STEPS:
        step = single_step(kind, 0.7)
        if tone_of([step]) == [step]:
            continue  # a change of tone alone is not blamed
        falls[kind] = float(np.mean(base - scorer.score([apply_chain(image, [step], 1) for image in perfect])))
    return {
        "mirrored": float(np.abs(scorer.score([ImageOps.mirror(p) for p in pictures]) - plain).mean()),
        "cropped_2_percent": float(np.abs(scorer.score(crops) - plain).mean()),
        "file_against_tensor": float(np.abs(scorer.score(tensors) - scorer.score(list(files))).max()),
        "fall_by_step_at_strength_0.7": falls,
    }


def _inner(size: tuple[int, int], share: float) -> tuple[int, int, int, int]:
    width, height = size
    left, top = max(1, round(share * width / 2)), max(1, round(share * height / 2))
    return left, top, width - left, height - top


def latency(scorer: Scorer) -> dict[str, float]:
    """Milliseconds per 448 x 448 picture of the network alone, after warm-up."""
    found = {}
    for batch in (1, 16):
        pixels = torch.rand(batch, 3, 448, 448)
        with torch.no_grad():
            for _ in range(5):
                scorer.metric.score_pixels(pixels)
            times = []
            for _ in range(30 if batch == 1 else 8):
                started = time.perf_counter()
                scorer.metric.score_pixels(pixels)
                times.append(1000 * (time.perf_counter() - started) / batch)
        quarters = statistics.quantiles(times, n=4)
        found[f"batch {batch}"] = round(quarters[1], 2)
        found[f"batch {batch}, quartiles"] = [round(quarters[0], 2), round(quarters[2], 2)]
    return found


def crops_and_parts(scorer: Scorer, kodak: Sequence[Path]) -> dict[str, Any]:
    """Kodak: centre crops, clean against blurred (Gaussian, sd 1.5); right half blurred (sd 3); enlarged by four."""

    def blurred(picture: np.ndarray, sd: float) -> np.ndarray:
        return np.rint(ndimage.gaussian_filter(picture.astype(np.float32), (sd, sd, 0), mode="nearest")).astype(
            np.uint8
        )

    def scores(pictures: Iterable[np.ndarray]) -> np.ndarray:
        return scorer.score([Image.fromarray(picture) for picture in pictures])

    photos = [np.asarray(open_image(file)) for file in kodak]
    whole = scores(photos)
    found: dict[str, Any] = {"whole": round(float(whole.mean()), 3)}
    for side in (64, 128, 256):
        centres = [
            photo[(photo.shape[0] - side) // 2 :][:side, (photo.shape[1] - side) // 2 :][:, :side] for photo in photos
        ]
        clean, soft = scores(centres), scores(blurred(centre, 1.5) for centre in centres)
        found[f"{side} px"] = {
            "clean": round(float(clean.mean()), 3),
            "blurred": round(float(soft.mean()), 3),
            "clean above blurred": round(float((clean > soft).mean()), 3),
        }
    halves = []
    for photo in photos:
        half = photo.copy()
        half[:, photo.shape[1] // 2 :] = blurred(photo, 3)[:, photo.shape[1] // 2 :]
        halves.append(half)
    found["fall by a blurred right half"] = round(float((whole - scores(halves)).mean()), 3)
    enlarged = [
        np.asarray(
            Image.fromarray(photo[: photo.shape[0] // 4, : photo.shape[1] // 4]).resize(
                (photo.shape[1], photo.shape[0]), Image.Resampling.BICUBIC
            )
        )
        for photo in photos
    ]
    found["enlarged four times"] = round(float(scores(enlarged).mean()), 3)
    return found


def album(scorer: Scorer, test: TestSet, file: Path) -> dict[str, float]:
    """The ten best and ten worst of 200 photos as one picture; spread of the scores."""
    files = test.files[:200]
    scores = scorer.score(files)
    order = np.argsort(scores)
    side = 160
    sheet = Image.new("RGB", (10 * side, 2 * (side + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, chosen in enumerate((order[::-1][:10], order[:10])):
        for column, index in enumerate(chosen):
            place = (column * side, row * (side + 16))
            sheet.paste(open_image(files[index]).resize((side, side)), place)
            draw.text((place[0] + 4, place[1] + side + 2), f"{scores[index]:.2f}", fill="black")
    sheet.save(file)
    names = ("1 %", "10 %", "50 %", "90 %", "99 %")
    return {name: round(float(np.percentile(scores, float(name[:-2]))), 2) for name in names}


# --- report ---------------------------------------------------------------------------------------


def plot(sets: Sequence[TestSet], scores: Sequence[np.ndarray], results: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(sets), figsize=(5 * len(sets), 4.6))
    for axis, test, values in zip(axes, sets, scores, strict=True):
        found = results[test.name]["qscorer-mini"]
        people = test.opinions if test.opinions.min() > 0 else -test.opinions
        axis.scatter(people, values, s=22 if len(values) < 100 else 5, alpha=0.7 if len(values) < 1000 else 0.25)
        axis.set_title(
            f"{test.name}\nSRCC {found['srcc']:.3f}  [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]"
        )
        axis.set_xlabel("DMOS of people (lower is better)" if test.opinions.min() < 0 else "label, 1 to 5")
        axis.set_ylabel("score of qscorer-mini")
        axis.grid(alpha=0.3)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    write_bytes(file, drawn.getvalue())


def show(results: dict[str, Any]) -> None:
    for name, methods in results.items():
        table = Table(title=name)
        for column in ("metric", "SRCC", "95 % interval", "PLCC", "pictures"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for method, found in sorted(methods.items(), key=lambda item: -item[1]["srcc"]):
            low, high = found["interval"]
            table.add_row(
                method, f"{found['srcc']:.3f}", f"{low:.3f} .. {high:.3f}", f"{found['plcc']:.3f}", str(found["images"])
            )
        out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="folder with data/photos, data/live_jpeg"
    )
    parser.add_argument("--biq2021", type=Path, help="folder of BIQ2021 (see biq2021.py); left out without")
    parser.add_argument("--work", type=Path, help="where pictures are rendered; default: a temporary folder")
    parser.add_argument(
        "--photos", type=int, default=4, help="Kodak photos that the other metrics see of the KADID set"
    )
    parser.add_argument("--only-mini", action="store_true", help="take the other metrics' rows from the last results")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    kodak = find_photos([arguments.shared / "data/photos/kodak"])
    sets = [live(arguments.shared), kodak_chains(kodak, work), kodak_kadid(kodak, work)]
    scorer = Scorer("qscorer-mini", device="cpu")
    scores = [scorer.score(test.files) for test in sets]
    results: dict[str, Any] = {
        test.name: {"qscorer-mini": agreement(values, test.opinions)} for test, values in zip(sets, scores, strict=True)
    }
    if arguments.biq2021:
        photos = read_photos(arguments.biq2021)
        of_people = biq2021(arguments.biq2021, photos)
        files = sorted({file for test in of_people for file in test.files})
        of_file = dict(zip(files, scorer.score(files), strict=True))
        for test in of_people:
            found = np.array([of_file[file] for file in test.files])
            results[test.name] = {"qscorer-mini": agreement(found, test.opinions, test.groups)}
        show(results)  # the rest takes longer than this
        if not arguments.only_mini:
            for name, methods in photo_baselines(arguments.biq2021, photos, of_people).items():
                results[name] |= methods
    if not arguments.only_mini:
        known = find_photos([arguments.shared / "data/photos/bsds500", arguments.shared / "data/photos/cid22"])
        simple = {"flat pixels": flat_pixels, "scene statistics + ridge": ridge(known, work)}
        kadid = sets[-1]
        count = len(kadid.files) // len(kodak) * arguments.photos
        part = TestSet(
            f"{kadid.name}, {arguments.photos} of 24 photos",
            kadid.files[:count],
            kadid.opinions[:count],
            kadid.references[:count],
        )
        results[part.name] = {"qscorer-mini": agreement(scores[-1][:count], part.opinions)}
        for test in (*sets[:-1], part):
            for name in ("piqe", "entropy"):
                results[test.name][name] = agreement(pyiqa_scores(name, test.files), test.opinions)
            for name, measure in simple.items():
                found = np.array([measure(read(file)) for file in test.files])
                results[test.name][name] = agreement(found, test.opinions)
        for name in ("ssim", "fsim", "vif"):
            found = pyiqa_scores(name, part.files, part.references)
            results[part.name][f"{name} (full-reference)"] = agreement(found, part.opinions)
    sample = sets[1].files[:100]
    facts = {
        "agreement": results,
        "monotonic": monotonic(scores[2], sets[2]),
        "robustness": robustness(scorer, kodak, sample),
        "crops": crops_and_parts(scorer, kodak),
        "latency_ms": latency(scorer),
        "megabytes": sum(file.stat().st_size for file in MINI_CHECKPOINT.iterdir()) / 1e6,
        "parameters": sum(p.numel() for p in scorer.metric.parameters()),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "versions": {name: version(name) for name in ("pyiqa-qscorer", "pyiqa", "torch", "timm", "pillow", "numpy")},
        "commit": source_commit(),
    }
    if arguments.biq2021:
        own_album = next(test for test in of_people if "ss01" in test.name)
        facts["album"] = album(scorer, own_album, work / "album.png")
    if arguments.only_mini:
        last = json.loads((RESULTS / "mini.json").read_text())
        facts["others"] = last.get("others") or f"as of commit {last['commit']}"
        for name, methods in last["agreement"].items():
            results.setdefault(name, {}).update({other: row for other, row in methods.items() if other not in METRICS})
        results = facts["agreement"] = {name: methods for name, methods in results.items() if "qscorer-mini" in methods}
    show(results)
    out.print(
        {name: facts[name] for name in ("monotonic", "robustness", "crops", "latency_ms", "megabytes", "parameters")}
    )
    plot(sets, scores, results, RESULTS / "mini.png")
    write_text(RESULTS / "mini.json", json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
