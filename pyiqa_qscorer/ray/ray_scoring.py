"""Rows with images -> the same rows with scores, by a pool of actors that each load the metric once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray.data
from ray.data.checkpoint import CheckpointConfig

from ..data.find_images import find_images, image_extensions
from ..errors import ImageError, InputError, QScorerError
from ..files import write_text
from ..registry import DEFAULT_METRIC, nearest, resolve_metric_options
from ..scorer import ScoredImage, Scorer

BYTES, PATH, KEY = "bytes", "path", "__key__"
RUN, LISTS, PARTS, DONE = "run.json", "inputs", "parts", "done"
ROWS_OF_A_BLOCK = 256  # of a list of files
BATCHES_OF_A_BLOCK = 4  # what one actor takes at a time
MADE = {
    "score": pa.float32(),
    "error": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "metric": pa.string(),
    "identity": pa.string(),
}


def score_dataset(
    dataset: ray.data.Dataset,
    metric: str = DEFAULT_METRIC,
    column: str = BYTES,
    *,
    metric_options: dict[str, Any] | None = None,
    concurrency: int | tuple[int, int] = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    batch_size: int = 16,
    keep_images: bool = False,
) -> ray.data.Dataset:
    """Add the columns score, error, width, height, metric and identity.

    Nothing runs before the result is consumed. Scores are those of `Scorer`, to the bit where the batches and the
    number of threads are the same (Ray gives an actor of one core one thread). A row without a score has an error
    instead; it costs no other row its score. Ray starts actors that died anew and gives their batches to others.

    Args:
        metric, metric_options: a name of `pyiqa_qscorer.METRICS` and options of `QScorer`.
        column: holds the images: bytes of image files, paths or addresses (`s3://...`, as pyarrow reads them), or
            arrays as `ray.data.read_images` makes them, uint8 (H, W, 3).
        concurrency: actors, each with the metric; (least, most) lets Ray choose.
        num_cpus, num_gpus: of each actor.
        batch_size: images per pass of the model.
        keep_images: keep `column`; paths stay anyway.

    Raises:
        InputError: no such column, or one of a name that is going to be made.
        QScorerError: unknown metric or option.
    """
    options = dict(metric_options or {})
    resolve_metric_options(metric, options)
    there = dataset.columns() or []
    if column not in there:
        raise InputError(f"dataset has no column {column!r}; {nearest(column, there)}")
    if taken := sorted(set(MADE) & set(there)):
        raise InputError(f"dataset has a column {taken[0]!r} already: rename it, this one is going to be made")
    dataset.context.execution_options.preserve_order = True  # of this dataset and those made of it
    # Ray reads small files as one block, and a block goes to one actor: without this the others would have nothing.
    return dataset.repartition(target_num_rows_per_block=BATCHES_OF_A_BLOCK * batch_size).map_batches(
        _BatchScorer,
        fn_constructor_kwargs={
            **{"metric": metric, "options": options, "column": column, "batch_size": batch_size},
            **{"on_gpu": num_gpus > 0, "keep_images": keep_images},
        },
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=concurrency)
        if isinstance(concurrency, int)
        else ray.data.ActorPoolStrategy(min_size=concurrency[0], max_size=concurrency[1]),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def read_images(inputs: Sequence[str], lists: Path, column: str | None = None) -> tuple[ray.data.Dataset, str, str]:
    """A dataset of images, the column that holds them, and the column that names a row.

    Args:
        inputs: all of one kind: image files, folders and patterns; addresses of a store (`s3://bucket/folder`); Parquet
            files (`.parquet`); shards of a webdataset (`.tar`).
        lists: empty folder for the list of files, which all machines must see and which must stay until all is read.
        column: of Parquet and shards, the one that holds the images; default: the only one that can.

    Raises:
        InputError: of unlike kinds, nothing found, or no such column.
    """
    kinds = {{".parquet": "parquet", ".tar": "shards"}.get(Path(one).suffix.lower(), "files") for one in inputs}
    if len(kinds) != 1:
        raise InputError(f"inputs must be of one kind, got {', '.join(sorted(kinds)) or 'none'}: score them one by one")
    (kind,) = kinds
    if kind == "files":
        local, stored = ([one for one in inputs if ("://" in one) == remote] for remote in (False, True))
        # Absolute, since actors may work in another folder.
        paths = [os.path.abspath(path) for path in find_images(local).paths] if local else []
        paths += [path for one in stored for path in _stored(one)]
        # The actors read the files: what is missing or broken is an error of its row, which a reader of Ray's is not.
        # The list goes through files, since Ray's checkpoints work on what is read only.
        blocks = -(-len(paths) // ROWS_OF_A_BLOCK)
        for block in range(blocks):
            part = pa.table({PATH: paths[block * ROWS_OF_A_BLOCK : (block + 1) * ROWS_OF_A_BLOCK]})
            pq.write_table(part, lists / f"{block:07d}.parquet")
        return ray.data.read_parquet(str(lists), override_num_blocks=blocks), PATH, PATH
    if kind == "parquet":
        dataset = ray.data.read_parquet(list(inputs))
    else:
        dataset = ray.data.read_webdataset(list(inputs), decoder=None)  # the actors decode
    there = dataset.columns() or []
    known = [name for name in there if name in (BYTES, PATH, "image") or f".{name.lower()}" in image_extensions()]
    if column is None and len(known) != 1:
        raise InputError(f"{inputs[0]}: which column holds the images must be said (--column), of {', '.join(there)}")
    chosen = column or known[0]
    if chosen not in there:
        raise InputError(f"{inputs[0]} has no column {chosen!r}; {nearest(chosen, there)}")
    return dataset, chosen, KEY if KEY in there else PATH if PATH in there else chosen


def _stored(address: str) -> list[str]:
    """Addresses of the images in a folder of a store, by name; of a file itself."""
    try:
        filesystem, root = pyarrow.fs.FileSystem.from_uri(address)
        if filesystem.get_file_info(root).type == pyarrow.fs.FileType.File:
            return [address]
        entries = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{address} cannot be read: {error}") from error
    found = sorted(one.path for one in entries if one.is_file and Path(one.path).suffix.lower() in image_extensions())
    if not found:
        raise InputError(f"no image file in {address}")
    scheme, query = address.split("://")[0], urlsplit(address).query  # which may name another store than the default
    return [f"{scheme}://{quote(path)}" + (f"?{query}" if query else "") for path in found]


def score_to_folder(
    inputs: Iterable[str],
    output: Path,
    metric: str = DEFAULT_METRIC,
    column: str | None = None,
    id_column: str | None = None,
    **scoring: Any,
) -> ray.data.Dataset:
    """Score images into Parquet files `output/parts/*.parquet`; a second call scores only what is missing.

    What is done is kept by Ray's own checkpoints, which are read by `id_column`, whose values must be unique.

    Args:
        inputs, column: as for `read_images`.
        output: a new folder, or that of an interrupted run of the same metric and options.
        id_column: default: `path` of files, `__key__` of shards.
        **scoring: of `score_dataset`.

    Returns:
        The scored rows, to be read.

    Raises:
        InputError: another run's folder, or an id that is not there; see `read_images`, `score_dataset`.
        QScorerError: reading, scoring or writing as a whole failed, such as a full disk.
    """
    inputs, output = list(inputs), output.absolute()
    asked = {"metric": metric, "options": {k: str(v) for k, v in (scoring.get("metric_options") or {}).items()}}
    _same_run(output, asked)
    lists = output / LISTS
    shutil.rmtree(lists, ignore_errors=True)
    lists.mkdir()
    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order
    context.execution_options.preserve_order = True
    try:
        dataset, chosen, named = read_images(inputs, lists, column)
    finally:
        context.execution_options.preserve_order = before
    named, there = id_column or named, dataset.columns() or []
    if named not in there:
        raise InputError(f"{inputs[0]} has no column {named!r} to tell rows by; {nearest(named, there)}")
    # A dataset has a context of its own, which those made of it share.
    done = CheckpointConfig(named, str(output / DONE), delete_checkpoint_on_success=False)
    dataset.context.checkpoint_config = done
    keep = named == chosen or bool(scoring.pop("keep_images", False))
    try:
        score_dataset(dataset, metric, chosen, keep_images=keep, **scoring).write_parquet(str(output / PARTS))
    except ray.exceptions.RayTaskError as error:  # whose text is the call stacks of all that took part
        reason = str(getattr(error, "cause", error)).strip().splitlines()[-1]
        raise QScorerError(
            f"scoring into {output} stopped: {reason}; what is written stays, and the same call scores the rest"
        ) from error
    return ray.data.read_parquet(str(output / PARTS))


def _same_run(output: Path, asked: dict[str, Any]) -> None:
    file = output / RUN
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != asked:
            raise InputError(f"{output} holds scores of {found}, this run is of {asked}: choose another folder")
    elif output.exists() and any(output.iterdir()):
        raise InputError(f"{output} must be a new or empty folder, or that of a run of this command")
    write_text(file, json.dumps(asked, indent=1) + "\n")


class _BatchScorer:
    """One actor: a `Scorer`, and Arrow tables in and out."""

    def __init__(
        self, metric: str, options: dict[str, Any], column: str, batch_size: int, on_gpu: bool, keep_images: bool
    ) -> None:
        self.scorer = Scorer(metric, "cuda" if on_gpu else "cpu", batch_size, **options)
        self.column, self.keep_images = column, keep_images

    def __call__(self, batch: pa.Table) -> pa.Table:
        images: list[Any] = []
        errors: list[str | None] = []
        for value in _values(batch.column(self.column)):
            try:
                images.append(_image(value))
                errors.append(None)
            except (ImageError, OSError, pa.ArrowException) as error:
                errors.append(" ".join(str(error).split()) or type(error).__name__)
        scored = self.scorer.score_iter(images)
        rows = [ScoredImage(0, "", error=error) if error else next(scored) for error in errors]
        if not self.keep_images and not pa.types.is_string(batch.schema.field(self.column).type):
            batch = batch.drop_columns([self.column])
        same = {"metric": self.scorer.name, "identity": self.scorer.identity}
        for name, kind in MADE.items():
            values = [same[name] if name in same else getattr(row, name) for row in rows]
            batch = batch.append_column(name, pa.array(values, kind))
        return batch


def _values(column: pa.ChunkedArray) -> Iterable[Any]:
    if isinstance(column.type, pa.ExtensionType):  # tensors of Ray
        return [row for chunk in column.chunks for row in chunk.to_numpy(zero_copy_only=False)]
    return column.to_pylist()


def _image(value: Any) -> Any:
    """What `Scorer` takes. Raises `ImageError` or what reading an address raises."""
    if value is None:
        raise ImageError("this row has no image")
    if isinstance(value, dict):  # as datasets stores images in Parquet
        return _image(value.get("bytes") or value.get("path"))
    if isinstance(value, str) and "://" in value:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(value)
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    return value
