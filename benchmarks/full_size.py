"""Full-size rehearsal: the real 7B shapes, written, loaded and scored on a CPU in 24 GB of RAM.

    python benchmarks/full_size.py --folder /some/disk

Writes a random checkpoint in the published layout (base in half-gigabyte `.bin` shards, LoRA folder beside it), loads
it in a fresh process through `pyiqa.create_metric`, scores two photos, and deletes it again, also after a failure or
Ctrl-C. Nothing is downloaded. The weights are random, so the scores mean nothing; times and memory are those of the
published checkpoint, whose files have the same names, shapes and types.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

# torch, pyiqa and this package are imported inside functions: a measured process must start without them.
if TYPE_CHECKING:
    import torch

    from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring

HERE = Path(__file__).resolve().parent
PARAMETERS = 8_208_390_145  # of the published model, regressor and score tokens included
DECODER_LAYERS = 32
BASE_VOCABULARY = 32000  # the score tokens come with the LoRA folder
LORA_RANK, LORA_ALPHA = 128, 256
SHARD_BYTES = 500_000_000  # about what the shards of the published base have
TRAINED = ("model.embed_tokens.", "model.vision_model.", "model.visual_abstractor.", "lm_head.", "deepmlp.")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
GIB, GB = 2**30, 10**9
ALLOWANCE = 2 * GIB  # host memory that loading may take beside the weights
DISK_MARGIN = 2 * GIB
SAMPLE_SECONDS = 0.02

console = Console()


class Normals:
    """Endless N(0, 0.02) numbers from one block: 8 billion fresh ones would take minutes.

    The block's length is prime, so that no two rows of a matrix, and no two tensors, start at the same place in it.
    """

    def __init__(self, seed: int, length: int = 16_777_259) -> None:
        import torch

        block = torch.randn(length, generator=torch.Generator().manual_seed(seed)) * 0.02
        self._blocks = {torch.float32: block}
        self._position = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        if dtype not in self._blocks:
            self._blocks[dtype] = self._blocks[torch.float32].to(dtype)
        block = self._blocks[dtype]
        values = torch.empty(math.prod(shape), dtype=dtype)
        filled = 0
        while filled < len(values):
            piece = block[self._position : self._position + len(values) - filled]
            values[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._position = (self._position + len(piece)) % len(block)
        return values.view(shape)


class RandomCheckpoint:
    """The published LoRA + base layout, with random weights."""

    def __init__(self, decoder_layers: int) -> None:
        import torch

        from pyiqa_qscorer.model import QScorerConfig, QScorerForScoring

        self.config: QScorerConfig = QScorerConfig(num_hidden_layers=decoder_layers, bos_token_id=1, eos_token_id=2)
        with torch.device("meta"):
            self.model: QScorerForScoring = QScorerForScoring(self.config)
        parameters = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.parameter_count = sum(map(math.prod, parameters.values()))
        if decoder_layers == DECODER_LAYERS and self.parameter_count != PARAMETERS:
            raise RuntimeError(
                f"the default QScorerConfig must have {PARAMETERS:,} parameters, "
                f"got {self.parameter_count:,}: its sizes are no longer the published ones"
            )
        self.trained = {n: s for n, s in parameters.items() if n.startswith(TRAINED)}
        self.base = {
            name: (BASE_VOCABULARY, *shape[1:]) if shape[0] == self.config.vocab_size else shape
            for name, shape in parameters.items()
            if not name.startswith("deepmlp.")
        }
        self.adapted = [
            f"model.layers.{layer}.self_attn.{projection}"
            for layer in range(decoder_layers)
            for projection in ("q_proj", "v_proj.multiway.1")
        ]
        width = self.config.hidden_size
        self.adapter = {
            f"base_model.model.{module}.lora_{factor}.weight": shape
            for module in self.adapted
            for factor, shape in (("A", (LORA_RANK, width)), ("B", (width, LORA_RANK)))
        }
        self.normals = Normals(seed=2026)

    @property
    def bytes(self) -> int:
        shapes = ((2, self.base), (2, self.trained), (4, self.adapter))
        return sum(size * math.prod(s) for size, group in shapes for s in group.values())

    def write(self, base: Path, lora: Path, tokenizer: Path) -> None:
        """Write both folders, and have every byte on the disk on return."""
        from pyiqa_qscorer.checkpoints.published_layout import image_settings

        base.mkdir()
        lora.mkdir()
        self._write_base_weights(base)
        published = self.config.to_published() | {"torch_dtype": "float16", "use_cache": True}
        for absent in ("auto_map", "deepmlp_hidden_dims", "score_tokens", "score_token_id"):
            del published[absent]
        _write_json(base / "config.json", published | {"vocab_size": BASE_VOCABULARY})
        _write_json(base / "preprocessor_config.json", image_settings(self.config.vision_config.image_size))
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, base / name)
        self._write_lora(lora, published)

    def _write_base_weights(self, folder: Path) -> None:
        import torch

        from pyiqa_qscorer.model.abstractor import CrossAttention

        tables = {
            f"{name}.{table}": value
            for name, module in self.model.named_modules()
            if isinstance(module, CrossAttention)
            for table, value in zip(("q_pos_embed", "k_pos_embed"), module.position_tables(), strict=True)
        }
        shards = list(_split(self.base | {name: tuple(t.shape) for name, t in tables.items()}))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(track(shards, "writing the base", console=console), 1):
            file = folder / f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
            weights = {
                name: tables[name].half() if name in tables else self._random(name, self.base[name], torch.float16)
                for name in names
            }
            _save(weights, file)
            weight_map |= dict.fromkeys(names, file.name)
        size = sum((folder / name).stat().st_size for name in set(weight_map.values()))
        _write_json(
            folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )

    def _write_lora(self, folder: Path, published: dict[str, Any]) -> None:
        import torch

        def random(shapes: Mapping[str, tuple[int, ...]], prefix: str, dtype: torch.dtype) -> Any:
            return {prefix + n: self._random(n, shape, dtype) for n, shape in shapes.items()}

        with console.status("writing the LoRA folder"):
            trained = random(self.trained, "base_model.model.", torch.bfloat16)
            _save(trained, folder / "non_lora_trainables.bin")
            _save(random(self.adapter, "", torch.float32), folder / "adapter_model.bin")
        settings = {
            "base_model_name_or_path": "checkpoints/mplug-owl2-llama2-7b",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": LORA_ALPHA,
            "lora_dropout": 0.05,
            "peft_type": "LORA",
            "r": LORA_RANK,
            "target_modules": self.adapted,
            "task_type": "CAUSAL_LM",
        }
        _write_json(folder / "adapter_config.json", settings)
        # As published: the vocabulary is extended, the score tokens are not named.
        own = {
            "vocab_size": self.config.vocab_size,
            "deepmlp_hidden_dims": self.config.regressor_hidden_sizes,
            "score_tokens": [],
            "score_token_id": [],
        }
        _write_json(folder / "config.json", published | own)

    def _random(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        if len(shape) == 1 and name.endswith(".weight"):  # a norm, the only kind of 1-D weight
            return torch.ones(shape, dtype=dtype)
        return self.normals.tensor(shape, dtype)


def _split(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of each fp16 shard, in order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        added = 2 * math.prod(shape)
        if names and size + added > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += added
    yield names


def _save(weights: dict[str, torch.Tensor], file: Path) -> None:
    import torch

    with file.open("wb") as stream:
        torch.save(weights, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def drop_from_page_cache(folders: Iterable[Path]) -> None:
    """Have the next load read from the disk, as the first load after a start of the machine does."""
    for folder in folders:
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_photos(folder: Path) -> list[Path]:
    """Two 1024 x 768 pictures with flat areas, edges, fine texture and noise."""
    generator = np.random.default_rng(7)
    y, x = np.mgrid[0:768, 0:1024] / 768
    texture = 0.1 * np.sin(90 * x * (1 + y)) * (y > 0.5)
    disc = 0.4 * ((x - 0.7) ** 2 + (y - 0.4) ** 2 < 0.05)
    picture = np.stack([0.3 + 0.4 * y + texture, 0.2 + 0.3 * x + disc, 0.6 - 0.4 * y], axis=-1)
    picture = picture + generator.normal(0, 0.02, picture.shape)
    photo = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
    paths = [folder / "photo_1.png", folder / "photo_2.png"]
    photo.save(paths[0])
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(paths[1])
    return paths


class MemoryWatch:
    """Peak anonymous memory of this process, sampled by a thread.

    Beside it there are pages of mapped files, which the system drops when memory runs short.
    """

    def __init__(self) -> None:
        self._peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, memory("RssAnon"))
            time.sleep(SAMPLE_SECONDS)

    def peak(self) -> int:
        """Bytes, since the last call."""
        peak, self._peak = max(self._peak, memory("RssAnon")), 0
        return peak


class Stopwatch:
    """What a `with` block took. CPU time tells a slow machine from one that is busy with something else."""

    def __enter__(self) -> Stopwatch:
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu, disk = (after - before for after, before in zip(self._now(), self._before, strict=True))
        self.times = {"seconds": wall, "cpu_seconds": cpu, "disk_bytes_read": 512 * disk}

    @staticmethod
    def _now() -> tuple[float, float, int]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), usage.ru_utime + usage.ru_stime, usage.ru_inblock


def memory(field: str, file: str = "/proc/self/status") -> int:
    """A size of `/proc/<pid>/status` or `/proc/meminfo`, in bytes."""
    for line in Path(file).read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{file} has no {field}; this benchmark needs Linux")


def measure_write(send: Connection, decoder_layers: int, base: Path, lora: Path, tokenizer: Path) -> None:
    """Runs in a process of its own, so that the memory it took is free again."""
    started = time.perf_counter()
    RandomCheckpoint(decoder_layers).write(base, lora, tokenizer)
    files = [file for folder in (base, lora) for file in folder.iterdir()]
    send.send(
        {
            "seconds": time.perf_counter() - started,
            "bytes": sum(file.stat().st_size for file in files),
            "shards": len(list(base.glob("*.bin"))),
        }
    )


def measure_load(send: Connection, options: dict[str, Any], photos: list[Path]) -> None:
    """Runs in a process of its own. Loads, scores, sends what it took."""
    load_average = os.getloadavg()[0]
    watch = MemoryWatch()
    with Stopwatch() as importing:
        import pyiqa
        import torch
    imported_bytes = watch.peak()
    with Stopwatch() as loading:
        metric = pyiqa.create_metric("qscorer", device="cpu", **options)
    network = metric.net.network
    result: dict[str, Any] = {
        "load_average_before": load_average,
        "threads": torch.get_num_threads(),
        "dtype": str(metric.net.dtype),
        "import": importing.times,
        "load": loading.times,
        "import_anonymous_bytes": imported_bytes,
        "weight_bytes": sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())),
        "load_anonymous_bytes": watch.peak(),
        "load_resident_bytes": memory("VmHWM"),
        "images": score_photos(metric, photos),
        "score_anonymous_bytes": watch.peak(),
        "peak_resident_bytes": memory("VmHWM"),
    }
    send.send(result)


def score_photos(metric: Any, photos: list[Path]) -> list[dict[str, Any]]:
    """Score the first photo, the second, and the second with its own first token expected.

    Random weights choose an arbitrary first token, which costs a second step through the 7B decoder. Trained weights
    choose the blank and need one pass. The third scoring takes that one pass, by putting the token that was chosen in
    the place of the blank; its score is that of the two steps up to rounding.
    """
    network = metric.net.network
    outputs: list[Any] = []
    score = network.score_prompted

    def recording(*arguments: Any) -> Any:
        outputs.append(score(*arguments))
        return outputs[-1]

    network.score_prompted = recording
    images = []
    for label, photo in zip(("first", "second", "second, one pass"), (*photos, photos[-1]), strict=True):
        if label.endswith("one pass"):
            metric.net.prompt = replace(metric.net.prompt, blank=int(outputs[-1].first_token))
        with Stopwatch() as scoring:
            value = metric(str(photo)).item()
        output = outputs[-1]
        images.append(
            {
                "image": label,
                "score": value,
                "raw_score": output.raw_score.item(),
                "first_token": int(output.first_token),
                "finite": math.isfinite(value) and bool(output.first_logits.isfinite().all()),
                "passes": 1 if int(output.first_token) == metric.net.prompt.blank else 2,
                **scoring.times,
            }
        )
    return images


def measure_merge(send: Connection, output: Path, options: dict[str, Any]) -> None:
    """Runs in a process of its own. Merges to one folder of our layout, sends what it took."""
    watch = MemoryWatch()
    from transformers.utils.logging import disable_progress_bar

    from pyiqa_qscorer.checkpoints import CheckpointSource, merge_checkpoint

    disable_progress_bar()
    with Stopwatch() as merging:
        merge_checkpoint(output, CheckpointSource(**options))
    send.send(
        {
            **merging.times,
            "anonymous_bytes": watch.peak(),
            "resident_bytes": memory("VmHWM"),
            "folder_bytes": sum(file.stat().st_size for file in output.iterdir()),
        }
    )


def in_fresh_process(function: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """What `function(connection, *arguments)` sends, run by a new interpreter."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        console.print(
            f"{function.__name__} ended with exit code {process.exitcode} and no result (-9: the system ran out of "
            "memory; otherwise see the traceback above)",
            style="red",
        )
        raise typer.Exit(1) from None
    finally:
        process.kill()
        process.join()
    return result


def describe_machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    matrix_flags = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cpu_flags": sorted(matrix_flags & set(facts.get("flags", "").split())),
        "cores": os.cpu_count(),
        "memory_gib": round(memory("MemTotal", "/proc/meminfo") / GIB, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def describe_versions() -> dict[str, str]:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    packages = ("pyiqa-qscorer", "pyiqa", "torch", "transformers", "numpy", "safetensors")
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def show(report: dict[str, Any]) -> None:
    """The figures as a table, one column per load."""
    runs: list[dict[str, Any]] = report["runs"]
    table = Table("", *(run["checkpoint"] for run in runs), title="Full-size rehearsal on the CPU")

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, *map(cell, runs))

    def gib(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda run: f"{run[name] / GIB:.2f} GiB"

    def seconds(times: dict[str, Any]) -> str:
        return f"{times['seconds']:.1f} s ({times['cpu_seconds']:.0f} s CPU)"

    def image_row(index: int, label: str) -> None:
        row(f"{label} image", lambda run: seconds(run["images"][index]))
        row("  score", lambda run: "{score:.4f} (raw {raw_score:.4f})".format(**run["images"][index]))
        row("  finite, passes", lambda run: "{finite}, {passes}".format(**run["images"][index]))

    row("load average before", lambda run: f"{run['load_average_before']:.1f}")
    row("weights", gib("weight_bytes"))
    row("load", lambda run: seconds(run["load"]))
    row("  read from the disk", lambda run: f"{run['load']['disk_bytes_read'] / GB:.1f} GB")
    row("peak anonymous memory, loading", gib("load_anonymous_bytes"))
    row("  beyond the weights", lambda run: f"{(run['load_anonymous_bytes'] - run['weight_bytes']) / GIB:+.2f} GiB")
    row("peak resident memory, loading (VmHWM)", gib("load_resident_bytes"))
    row("  beyond the weights", lambda run: f"{(run['load_resident_bytes'] - run['weight_bytes']) / GIB:+.2f} GiB")
    row("peak anonymous memory, scoring", gib("score_anonymous_bytes"))
    row("peak resident memory (VmHWM)", gib("peak_resident_bytes"))
    for index, image in enumerate(runs[0]["images"]):
        image_row(index, image["image"])
    console.print(table)
    wrote = report["write"]
    console.print(
        f"Wrote {wrote['bytes'] / GB:.1f} GB in {wrote['shards']} shards and a LoRA folder: {wrote['seconds']:.0f} s "
        f"({wrote['bytes'] / GB / wrote['seconds']:.2f} GB/s)"
    )
    if "merge" in report:
        merge = report["merge"]
        console.print(
            f"Merged to one folder of {merge['folder_bytes'] / GB:.1f} GB: {merge['seconds']:.0f} s, peak "
            f"{merge['anonymous_bytes'] / GIB:.2f} GiB anonymous, {merge['resident_bytes'] / GIB:.2f} GiB resident"
        )
    console.print(f"{report['machine']}\n{report['versions']}", style="dim")


def _check_room(folder: Path, needed: int, weights: int) -> None:
    """Refuse before the first byte what the disk or the memory cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < needed + DISK_MARGIN:
        raise typer.BadParameter(
            f"--folder must be on a disk with {(needed + DISK_MARGIN) / GB:.1f} GB free "
            f"({needed / GB:.1f} GB of weights and a margin), {folder} has {free / GB:.1f} GB; "
            "choose another disk or leave out --merged"
        )
    if (kind := _file_system(folder)) in ("tmpfs", "ramfs"):
        raise typer.BadParameter(
            f"--folder must be on a disk, {folder} is in memory ({kind}), which the loaded model needs; "
            "choose a folder on a disk"
        )
    _check_memory(weights)


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, as the kernel calls it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    parents = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    # The longest mount point is the nearest; of those on the same point the last covers the others.
    return max(
        ((len(fields[1]), order, fields[2]) for order, fields in enumerate(mounts) if fields[1] in parents),
        default=(0, 0, "unknown"),
    )[2]


def _check_memory(weights: int) -> None:
    available = memory("MemAvailable", "/proc/meminfo")
    if available < weights + ALLOWANCE:
        raise typer.BadParameter(
            f"loading needs {(weights + ALLOWANCE) / GIB:.1f} GiB of free memory, "
            f"there are {available / GIB:.1f} GiB; close other programs or use a larger machine"
        )


def _tokenizer_folder(folder: Path | None) -> Path:
    chosen = folder or HERE.parent.parent / "shared" / "golden" / "base"
    if any((chosen / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        return chosen
    raise typer.BadParameter(
        "--tokenizer must be a folder with LLaMA-2's tokenizer.model or tokenizer.json, "
        + (f"got {folder}" if folder else "and the default one is not there")
        + "; any LLaMA-2 or mPLUG-Owl2 checkpoint folder has it"
    )


def rehearse(
    folder: Annotated[
        Path,
        typer.Option(
            help="Where a temporary folder may be made: a real disk with about 21 GB free (38 GB with --merged), not a "
            "file system in memory.",
            exists=True,
            file_okay=False,
            writable=True,
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with LLaMA-2's tokenizer. [default: ../shared/golden/base]")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Photo to score; without it one is made.", exists=True, dir_okay=False)
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Loads, each in a fresh process.")] = 1,
    merged: Annotated[bool, typer.Option("--merged", help="Also merge to one folder and load that.")] = False,
    decoder_layers: Annotated[
        int, typer.Option(min=1, max=DECODER_LAYERS, help="Fewer for a quick trial of this script.")
    ] = DECODER_LAYERS,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file of the figures. [default: benchmarks/results/full_size.json, none for a trial]"),
    ] = None,
) -> None:
    """Write a random checkpoint of the published size, load it, score with it, delete it."""
    # Ended by `kill` or a scheduler, the folder must go too: SystemExit runs the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["HF_HUB_OFFLINE"] = "1"  # inherited: what only looks like a local load would fail
    tokenizer = _tokenizer_folder(tokenizer)
    checkpoint = RandomCheckpoint(decoder_layers)
    weights = 2 * checkpoint.parameter_count
    _check_room(folder, checkpoint.bytes + (weights if merged else 0), weights)
    report: dict[str, Any] = {
        "benchmark": "full_size",
        "command": shlex.join(["python", "benchmarks/full_size.py", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "decoder_layers": decoder_layers,
        "parameters": checkpoint.parameter_count,
        "page_cache": "dropped before every load",
    }
    with tempfile.TemporaryDirectory(prefix="qscorer-full-size-", dir=folder) as temporary:
        report |= _rehearse(Path(temporary), decoder_layers, weights, tokenizer, image, repeat, merged)
    show(report)
    if output is None and decoder_layers == DECODER_LAYERS:
        output = HERE / "results" / "full_size.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_json(output, report)
    runs = report["runs"]
    if any(run["load_anonymous_bytes"] > run["weight_bytes"] + ALLOWANCE for run in runs):
        console.print("loading took more anonymous memory than the weights + 2 GiB", style="red")
        raise typer.Exit(1)


def _rehearse(
    work: Path, decoder_layers: int, weights: int, tokenizer: Path, image: Path | None, repeat: int, merged: bool
) -> dict[str, Any]:
    base, lora, single = work / "base", work / "lora", work / "merged"
    report: dict[str, Any] = {
        "write": in_fresh_process(measure_write, decoder_layers, base, lora, tokenizer),
        "runs": [],
    }
    photos = make_photos(work)
    if image is not None:
        photos[0] = image.resolve()
    options = {"checkpoint": str(lora), "base": str(base)}
    loads = [("LoRA + base", options)] * repeat
    if merged:
        loads += [("merged", {"checkpoint": str(single)})] * repeat
    for name, chosen in loads:
        if name == "merged" and not single.exists():
            drop_from_page_cache([base, lora])
            with console.status("merging"):
                report["merge"] = in_fresh_process(measure_merge, single, options)
        _check_memory(weights)  # again: what else runs may have grown since, and the kernel kills without asking
        drop_from_page_cache(Path(path) for path in chosen.values())
        with console.status(f"loading and scoring: {name}"):
            run = in_fresh_process(measure_load, chosen, photos)
        report["runs"].append({"checkpoint": name, **run})
    return report


if __name__ == "__main__":
    typer.run(rehearse)
