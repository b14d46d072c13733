"""A page to drop photos on: scores in order, where a picture is bad, and two pictures side by side."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; the page must work offline

import gradio as gr
from PIL import Image

from ..errors import ImageError
from ..images.reading import open_image
from ..images.thumbnails import small_jpeg
from ..scorer import ScoredImage, Scorer

THUMBNAIL_SIDE, SHOWN_SIDE = 384, 1024
KEPT_SECONDS = 3600  # that an upload stays on disk after the last use of the page
ORDERS = ("worst first", "best first", "as dropped")
COLUMNS = ["file", "score", "size", "error"]


def create_page(scorer: Scorer) -> gr.Blocks:
    """The page, not yet served, which alone uses the scorer; `gr.Blocks.launch` takes `offline_settings`.

    One picture or batch at a time goes through the model, however many browsers are open.
    """

    def score(files: Sequence[str] | None, order: str, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        files = list(files or [])
        scored = list(progress.tqdm(scorer.score_iter(files), total=len(files), desc="Scoring"))
        return scored, *show(scored, order), None, ""

    def explain(scored: Sequence[ScoredImage], order: str, chosen: gr.SelectData) -> tuple[Any, str]:
        return _map_of(scorer, in_order(scored, order)[chosen.index].source)

    def compare(left: str | None, right: str | None) -> tuple[Any, ...]:
        pictures = [None if file is None else _small(file, SHOWN_SIDE) for file in (left, right)]
        maps = [None if file is None else _map_of(scorer, file)[0] for file in (left, right)]
        return *pictures, *maps, comparison(scorer, [left, right])

    picture = functools.partial(gr.Image, interactive=False, buttons=["fullscreen"])
    with gr.Blocks(analytics_enabled=False, title="Picture quality", delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            f"# Picture quality\n`{scorer.name}`: 1 is bad, 5 is excellent. Pictures stay where this page is served."
        )
        with gr.Tab("Many pictures"):
            scored = gr.State([])
            with gr.Row():
                files = gr.File(
                    file_count="multiple", file_types=["image"], label="Drop pictures here", height=200, scale=3
                )
                order = gr.Radio(list(ORDERS), value=ORDERS[0], label="Order", scale=1)
            summary = gr.Markdown()
            with gr.Row():
                gallery = gr.Gallery(show_label=False, elem_id="scored", height=520, allow_preview=False, scale=3)
                with gr.Column(scale=2):
                    region_map = picture(label="Orange: low quality")
                    about = gr.Markdown()
            table = gr.Dataframe(headers=COLUMNS, datatype=["str", "number", "str", "str"], interactive=False)
            shown = [summary, gallery, table]
            # The model is one: its callbacks take turns, so that two browsers do not share its memory.
            changed = [scored, *shown, region_map, about]
            files.change(score, [files, order], changed, concurrency_id="model", api_name="score")
            order.change(show, [scored, order], shown, api_visibility="private")
            gallery.select(
                explain, [scored, order], [region_map, about], concurrency_id="model", api_visibility="private"
            )
        with gr.Tab("Two pictures"):
            with gr.Row():
                left, right = (gr.File(file_types=["image"], label=side) for side in ("Left", "Right"))
            verdict = gr.Markdown()
            with gr.Row():
                pictures = [picture(label=side) for side in ("Left", "Right")]
            with gr.Row():
                maps = [picture(label=f"{side}, orange: low quality") for side in ("Left", "Right")]
            outputs = [*pictures, *maps, verdict]
            settings: dict[str, Any] = {"concurrency_id": "model", "trigger_mode": "always_last", "api_name": "compare"}
            gr.on([left.change, right.change], compare, [left, right], outputs, **settings)
    page.queue(default_concurrency_limit=1)
    return page


def offline_settings(max_bytes: int) -> dict[str, Any]:
    """Keywords of `gr.Blocks.launch`: no file but uploads is read, nothing is fetched from or sent to elsewhere."""
    system = ["system-ui", "sans-serif"]
    return {
        "theme": gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"]),  # its own come from the web
        "css": "#scored .grid-container { grid-template-columns: repeat(auto-fill, minmax(8em, 1fr)) }",
        "max_file_size": max_bytes,
        "share": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "pwa": False,
        "ssr_mode": False,
        "footer_links": [],
        "quiet": True,
    }


def in_order(scored: Sequence[ScoredImage], order: str) -> list[ScoredImage]:
    """Those with a score, in one of `ORDERS`.

    >>> [image.source for image in in_order([ScoredImage(0, "a", 3.0), ScoredImage(1, "b", 2.0)], "worst first")]
    ['b', 'a']
    """
    known = [image for image in scored if image.score is not None]
    if order == ORDERS[2]:
        return known
    return sorted(known, key=lambda image: image.score or 0.0, reverse=order == ORDERS[1])


def show(scored: Sequence[ScoredImage], order: str) -> tuple[str, list[tuple[Image.Image, str]], list[list[Any]]]:
    """Summary, gallery and table of scored pictures."""
    good, failed = in_order(scored, order), [image for image in scored if image.score is None]
    if not scored:
        return "", [], []
    mean = f", mean {sum(image.score or 0.0 for image in good) / len(good):.2f}" if good else ""
    lost = f", {len(failed)} could not be read: see the end of the table" if failed else ""
    gallery = [(_small(image.source, THUMBNAIL_SIDE), f"{image.score:.2f}  {_name(image)}") for image in good]
    table = [
        [_name(image), image.score and round(image.score, 4), f"{image.width} x {image.height}", image.error or ""]
        for image in [*good, *failed]
    ]
    return f"{len(good)} scored{mean}{lost}. Click a picture to see where it is bad.", gallery, table


def comparison(scorer: Scorer, files: Sequence[str | None]) -> str:
    """Which of two pictures is better, in one line; what is wrong where one has no score."""
    results = [None if file is None else next(iter(scorer.score_iter([file]))) for file in files]
    parts = [
        f"{side}: {result.error or f'{result.score:.2f}'}"
        for side, result in zip(("left", "right"), results, strict=True)
        if result is not None
    ]
    scores = [result.score for result in results if result is not None and result.score is not None]
    if len(scores) == 2:
        gap = scores[0] - scores[1]
        parts.append(f"the {'left' if gap > 0 else 'right'} one is better by {abs(gap):.2f}" if gap else "equal")
    return ", ".join(parts)


def _map_of(scorer: Scorer, file: str) -> tuple[Image.Image | None, str]:
    """The veiled picture and its score; without a map, why there is none."""
    try:
        found = scorer.explain(file)
        return found.overlay(open_image(Path(file))), f"Score {found.score:.2f}"
    except ImageError as error:
        return None, f"No map: {error}".replace(file, Path(file).name)


def _small(file: str, side: int) -> Image.Image:
    encoded = small_jpeg(file, side)
    if encoded is None:  # deleted since it was scored
        return Image.new("RGB", (8, 8), "white")
    return Image.open(io.BytesIO(encoded))


def _name(image: ScoredImage) -> str:
    return Path(image.source).name
