"""How fast scoring is, against the published procedure on the same weights in the same run.

    python benchmarks/speed.py model --model medium --device cpu --dtype float32 --batch 1 --batch 4 --steps
    python benchmarks/speed.py model --model 7b --device cuda --dtype bfloat16 --batch 1 --batch 16 --compiled --steps
    python benchmarks/speed.py presence
    python benchmarks/speed.py folder photos/

`model` prints for every way of scoring the time, the rate, the ratio to the published procedure, the peak memory, and
what part of the measured matrix product rate is used; `--steps` adds what each saving is worth, by taking one away at a
time. Ratios are of medians of interleaved repeats. Random weights, unless the model is `mini`. Results go to
`benchmarks/results/` as JSON. For figures of record the machine must be otherwise idle.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
METRIC = "qscorer-mini"
console = Console(width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of PyTorch.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed repeats, after two to warm up.")]
Output = Annotated[Path | None, typer.Option(help="JSON file. [default: in benchmarks/results/, named after the run]")]


def photo(folder: Path, number: int, width: int = 768, height: int = 512) -> Path:
    """A smooth random JPEG, which decodes at about the speed of a photo."""
    noise = np.random.default_rng(number).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    path = folder / f"{number}.jpg"
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def describe_run() -> dict[str, Any]:
    import torch

    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    flags = Path("/proc/cpuinfo").read_text().split()
    return {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average_before": os.getloadavg()[0],
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cpu_has_avx512": "avx512f" in flags,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "pillow", "pyiqa")},
    }


def write(report: dict[str, Any], output: Path | None, name: str) -> None:
    path = output or HERE / "results" / f"speed_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    whole.replace(path)
    console.print(f"written to {path}", style="dim")


@app.command()
def model(
    model: Annotated[str, typer.Option(help="mini, medium or 7b")] = "medium",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, 8bit or 4bit")] = "float32",
    formulation: Annotated[str, typer.Option(help="score_token, level_onehot or level_soft")] = "score_token",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeatable. [default: 1 and 4]")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also compiled; CUDA graphs on CUDA.")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="Also with each saving taken away.")] = False,
    repeats: Repeats = 9,
    threads: Threads = 2,
    output: Output = None,
) -> None:
    """Time the network on pixel values, and the preparation of photos."""
    import torch
    from speed_cases import DTYPES, MODELS, flop_count, interleaved, make_case, matmul_ceiling, ways

    from pyiqa_qscorer.model.configuration import FORMULATIONS

    choices = {"model": (model, MODELS), "dtype": (dtype, DTYPES), "formulation": (formulation, FORMULATIONS)}
    for option, (given, known) in choices.items():
        if given not in known:
            raise typer.BadParameter(f"--{option} must be one of {', '.join(known)}, got {given}")
    torch.set_num_threads(threads)
    facts = describe_run()
    case = make_case(model, dtype, device, formulation)
    quantised = dtype in ("8bit", "4bit")
    report: dict[str, Any] = {
        "benchmark": "speed model",
        "run": facts,
        "model": model,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "weight_bytes": sum(t.numel() * t.element_size() for t in (*case.model.parameters(), *case.model.buffers())),
        "flop_per_image": None if quantised else flop_count(case),
        "matmul_flop_per_second": None if quantised else matmul_ceiling(case.device, case.model.lm_head.weight.dtype),
        "preparation": preparation(case.image_size, repeats),
        "batches": [],
    }
    for size in batch or [1, 4]:
        functions = ways(case, size, compiled=compiled, steps=steps)
        scores = {name: function().float().cpu() for name, function in functions.items()}
        times = interleaved(functions, case.device, repeats)
        reference = scores.get("published", scores["ours"])
        report["batches"].append(
            {
                "batch": size,
                "ways": times,
                "score_difference": {name: (own - reference).abs().max().item() for name, own in scores.items()},
                "score_spread": (reference.max() - reference.min()).item(),
            }
        )
        show_batch(report, report["batches"][-1])
    report["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if case.device.type == "cpu":
        console.print(f"peak resident memory of all of this: {report['peak_resident_bytes'] / 2**30:.2f} GiB")
    write(report, output, f"{model}_{device}_{dtype}" + ("" if formulation == "score_token" else f"_{formulation}"))


def preparation(size: int, repeats: int) -> dict[str, Any]:
    """Milliseconds to get pixel values from one photo of 768 x 512, in one thread."""
    from published_procedure import prepared

    from pyiqa_qscorer.images.preprocessing import levels_from_pil, normalise

    with tempfile.TemporaryDirectory() as folder:
        path = photo(Path(folder), 0)
        functions = {
            "published": lambda: prepared(path, size),
            "ours": lambda: normalise(levels_from_pil(Image.open(path), size)),
        }
        assert (functions["published"]() == functions["ours"]()).all(), "prepared pixels differ"
        import torch
        from speed_cases import interleaved

        times = interleaved(functions, torch.device("cpu"), repeats)
    console.print(", ".join(f"{name}: {1e3 * t['median']:.1f} ms to prepare a photo" for name, t in times.items()))
    return times


def show_batch(report: dict[str, Any], entry: dict[str, Any]) -> None:
    size, times = entry["batch"], entry["ways"]
    title = f"{report['model']}, {report['dtype']}, {report['run']['gpu'] or report['run']['cpu']}, batch {size}"
    table = Table("", "ms", "min..max", "images/s", "ratio", "of matmul rate", "score", title=title)
    has_memory = "peak_bytes" in times["ours"]
    if has_memory:
        table.add_column("peak memory")
    published = times.get("published", {}).get("median")
    rate, flop = report["matmul_flop_per_second"], report["flop_per_image"]
    for name, seconds in times.items():
        median = seconds["median"]
        row = [
            name,
            f"{1e3 * median:.1f}",
            f"{1e3 * seconds['min']:.1f}..{1e3 * seconds['max']:.1f}",
            f"{size / median:.1f}",
            f"{published / median:.2f}x" if published else "-",
            f"{flop * size / median / rate:.0%}" if rate and name in ("ours", "compiled") else "",
            f"{entry['score_difference'][name]:.0e}",
        ]
        if has_memory:
            row.append(f"{seconds['peak_bytes'] / 2**30:.2f} GiB")
        table.add_row(*row, end_section=name in ("ours", "compiled"))
    console.print(table)
    if report["flop_per_image"]:
        console.print(f"{flop / 1e9:.1f} GFLOP per image, matrix products run at {rate / 1e9:.0f} GFLOP/s", style="dim")


@app.command()
def presence(
    metric: Annotated[str, typer.Option(help="Metric to create.")] = METRIC,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Repeats = 9,
    output: Output = None,
) -> None:
    """Time what being installed costs: interpreter start, `import pyiqa`, and up to the first score."""
    report: dict[str, Any] = {"benchmark": "speed presence", "run": describe_run(), "metric": metric}
    with tempfile.TemporaryDirectory() as folder:
        path = photo(Path(folder), 0)
        first = (
            f"import pyiqa; t1 = clock(); metric = pyiqa.create_metric({metric!r}, device={device!r}); t2 = clock(); "
            f"score = metric({str(path)!r}).item(); t3 = clock(); score = metric({str(path)!r}).item(); t4 = clock()"
        )
        scripts = {"interpreter start": "pass", "import pyiqa": "import pyiqa", "create_metric to score": first}
        for name, script in scripts.items():
            times: dict[str, list[float]] = {"with": [], "without": []}
            parts: list[list[float]] = []
            for _ in range(repeats):
                for state in ("with", "without") if name != "create_metric to score" else ("with",):
                    seconds, printed = run_python(script, autoload=state == "with")
                    times[state].append(seconds)
                    parts.append(printed)
            report[name] = {state: statistics.median(values) for state, values in times.items() if values}
            if name == "create_metric to score":
                steps = zip(*parts, strict=True)
                labels = ("import pyiqa", "create_metric", "first score", "second score")
                report[name] |= {label: statistics.median(own) for label, own in zip(labels, steps, strict=True)}
    table = Table("", "seconds, median", title="Cost of presence")
    for name in scripts:
        for label, seconds in report[name].items():
            table.add_row(f"{name}: {label}", f"{seconds:.4f}")
    console.print(table)
    write(report, output, "presence")


def run_python(script: str, autoload: bool) -> tuple[float, list[float]]:
    """Seconds of a fresh interpreter, and those between the clock readings t0, t1, ... of the script."""
    code = (
        f"from time import perf_counter as clock; t0 = clock(); {script}\n"
        "marks = [value for name, value in sorted(globals().items()) if name[0] == 't' and name[1:].isdigit()]\n"
        "print(*[later - before for before, later in zip(marks, marks[1:])])"
    )
    environment = {**os.environ, "PYIQA_QSCORER_AUTOLOAD": "1" if autoload else "0"}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        console.print(done.stderr, style="red")
        raise typer.Exit(1)
    return seconds, [float(word) for word in done.stdout.splitlines()[-1].split()] if done.stdout.strip() else []


@app.command()
def folder(
    photos: Annotated[Path, typer.Argument(help="Folder of photos.", exists=True, file_okay=False)],
    metric: Annotated[str, typer.Option(help="Metric to score with.")] = METRIC,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint, instead of the metric's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 16,
    limit: Annotated[int, typer.Option(min=1, help="Photos at most.")] = 500,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the model.")] = False,
    repeats: Repeats = 3,
    threads: Threads = 2,
    output: Output = None,
) -> None:
    """Compare the rate from files to scores with that of the model alone."""
    import torch
    from speed_cases import interleaved

    from pyiqa_qscorer import Scorer
    from pyiqa_qscorer.data.find_images import find_images

    torch.set_num_threads(threads)
    facts = describe_run()
    paths = find_images([photos]).paths[:limit]
    scorer = Scorer(metric, device, batch, compile=compiled, **({"checkpoint": checkpoint} if checkpoint else {}))
    pixels = torch.randn(batch, 3, scorer.metric.image_size, scorer.metric.image_size, device=scorer.device)

    def model_only() -> None:
        with torch.no_grad():
            for _ in range(max(1, len(paths) // batch)):
                scorer.metric.score_pixels(pixels)

    functions = {"files to scores": lambda: scorer.score(paths), "model alone": model_only}
    times = interleaved(functions, scorer.device, repeats, warm_up=1)
    rates = {
        "files to scores": len(paths) / times["files to scores"]["median"],
        "model alone": max(1, len(paths) // batch) * batch / times["model alone"]["median"],
    }
    share = rates["files to scores"] / rates["model alone"]
    console.print(", ".join(f"{name}: {rate:.1f} images/s" for name, rate in rates.items()) + f", {share:.0%}")
    report = {"benchmark": "speed folder", "run": facts, "metric": metric, "photos": len(paths), "batch": batch}
    write({**report, "seconds": times, "images_per_second": rates, "share": share}, output, f"folder_{metric}_{device}")


if __name__ == "__main__":
    app()
