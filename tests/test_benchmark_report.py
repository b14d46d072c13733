"""The reports: pyiqa's CSV, Markdown, JSON, and one HTML page that needs nothing from elsewhere."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark_world import FakeMetrics, write_dataset
from PIL import Image

from pyiqa_qscorer.evaluation.datasets import DatasetSpec, open_dataset
from pyiqa_qscorer.evaluation.leaderboard_report import write_reports
from pyiqa_qscorer.evaluation.published import check_published, published_results
from pyiqa_qscorer.evaluation.results import read_leaderboard
from pyiqa_qscorer.evaluation.runner import MetricSpec, run_benchmark

LEVELS = range(40, 220, 9)
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags with attributes, texts of table cells by row, and everything that a page could fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.strip()

    def fetched(self) -> list[str]:
        names = ("src", "href", "srcset", "data", "action", "poster")
        return [value or "" for _, attributes in self.tags for key, value in attributes.items() if key in names]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, one called like a published one; metrics that fail, and names that are not safe in HTML."""
    root = tmp_path_factory.mktemp("report")
    table = write_dataset(root / "data", LEVELS, references=True)
    broken = table.parent / "images" / "0004.png"
    broken.write_bytes(b"no image")
    datasets = [
        open_dataset(DatasetSpec(label, csv=table, images=table.parent / "images", lower_better=dmos))
        for label, dmos in (("koniq10k", False), ("a & b (DMOS)", True))
    ]
    names = ("brightness", "darkness", "distance", "picky", "broken")
    specs = [MetricSpec(name, name) for name in names]
    specs.append(MetricSpec("a & b", "constant"))
    with pytest.MonkeyPatch.context() as patch:
        FakeMetrics().install(patch.setattr)
        run_benchmark(specs, datasets[:1], root / "out", "cpu")
        run_benchmark(specs[:3], datasets[1:], root / "out", "cpu")
    facts = root / "out/scores/koniq10k/brightness.json"
    facts.write_text(facts.read_text().replace('"name": "brightness"', '"name": "qscorer"'))
    picky = root / "out/scores/koniq10k/picky.csv"
    picky.write_text(picky.read_text().replace("too bright for me", EVIL))
    write_reports(read_leaderboard(root / "out", resamples=50), root / "out")
    return root / "out"


def test_csv_markdown_and_json_hold_the_numbers(output: Path) -> None:
    lines = [line.split(",") for line in (output / "leaderboard.csv").read_text().splitlines()]
    assert lines[0][0] == "Metric name"  # the form of pyiqa's tables
    column = lines[0].index("koniq10k(PLCC/SRCC/KRCC)")
    cells = {line[0]: line[column] for line in lines[1:]}
    entry = next(e for e in read_leaderboard(output, resamples=2).of("koniq10k") if e.metric == "brightness")
    found = (entry.agreement.plcc, entry.agreement.srcc, entry.agreement.krcc)
    assert [float(part) for part in cells["brightness"].split("/")] == [round(value, 4) for value in found]
    assert cells["broken"] == cells["a & b"] == ""
    text = (output / "leaderboard.md").read_text()
    assert "| **brightness** | NR | 0.9" in text and "19 of 20" in text
    assert "broken: not run: cannot be built: OSError: the weights are gone" in text
    assert "Published, not run here" in text and "| Q-Scorer (5 tokens) | in-domain | 0.948 | 0.959 |" in text
    content = json.loads((output / "leaderboard.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    by_name = {one["metric"]: one for one in content["entries"] if one["dataset"] == "koniq10k"}
    assert by_name["brightness"]["scored"] == 19 and by_name["brightness"]["images"] == 20
    assert by_name["brightness"]["agreement"]["srcc"] > 0.9 and by_name["brightness"]["intervals"]["srcc"][0] < 1
    assert by_name["broken"]["problem"].startswith("cannot be built") and by_name["a & b"]["agreement"]["srcc"] is None
    assert len(content["published"]["results"]) == 6 and "README" in content["published"]["source"]


def test_reports_say_where_times_were_measured(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output / "scores", tmp_path / "scores")
    for metric, facts in (
        ("brightness", {"device": "GPU X", "processor": "P", "cores": 6, "threads": 3}),
        ("distance", {"device": "GPU <Y>"}),
        ("picky", {"device": None}),  # a run killed between its table and its facts
    ):
        path = tmp_path / f"scores/koniq10k/{metric}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    write_reports(read_leaderboard(tmp_path, resamples=2), tmp_path, thumbnails=False)
    stated = (
        "Time and memory of brightness measured on GPU X, processor P (cores: 6, torch threads: 3).",
        "Time and memory of distance measured on GPU <Y>, processor ",
        "Time and memory of picky measured on an unknown machine.",
    )
    text = (tmp_path / "leaderboard.md").read_text()
    assert all(sentence in text for sentence in stated) and text.count("\nTime and memory measured on cpu, ") == 1
    page = (tmp_path / "report.html").read_text()
    assert all(f"<p>{html.escape(sentence)}" in page for sentence in stated)
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    entries = {one["metric"]: one for one in content["entries"] if one["dataset"] == "koniq10k"}
    assert "machine" not in content and entries["brightness"]["cores"] == 6
    assert entries["darkness"]["cores"] == os.cpu_count()


def test_page_needs_nothing_from_elsewhere(output: Path) -> None:
    text = (output / "report.html").read_text()
    page = Page(text)
    inside = ("data:image/", "#section-", "../data/images/")
    assert page.fetched() and all(value.startswith(inside) for value in page.fetched())
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\(|XMLHttp", re.sub(r"data:image/[^\"]*", "", text))
    assert not [tag for tag, attributes in page.tags if tag in ("link", "iframe", "object", "base")]
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert any("default-src 'none'" in str(meta.get("content")) for meta in metas)


def test_page_shows_tables_plots_and_disagreements(output: Path, tmp_path: Path) -> None:
    text = (output / "report.html").read_text()
    page = Page(text)
    of_brightness = [row for row in page.rows if row and row[0] == "brightness" and len(row) == 9]
    assert [row[2][:3] for row in of_brightness] == ["-0.", "0.9"]  # DMOS, MOS
    assert of_brightness[1][1] == "NR" and of_brightness[1][8] == "19 of 20"
    published = [row for row in page.rows if row and row[1] in ("in-domain", "cross")]
    assert len(published) == 6 and "Published, not run here" in text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(str(uri).partition(",")[2]))).size for uri in images]
    plots = [size for size in sizes if size[0] > 400]
    # A scatter for each metric that has a correlation, and a cost plot per dataset; six thumbnails beside each scatter.
    assert len(plots) == 4 + 3 + 2 and len(sizes) - len(plots) == 6 * 7
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a" and "/" in str(attributes["href"])]
    assert len(links) == 6 * 7 and all((output / link).is_file() for link in links)
    assert "a &amp; b: no correlation: all 19 scores are 3" in text and text.count("<summary>") == 2
    assert EVIL not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "a &amp; b" in text
    write_reports(read_leaderboard(output, resamples=2), tmp_path, thumbnails=False)
    assert "data:image/jpeg" not in (tmp_path / "report.html").read_text() and "data:image/jpeg" in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(output: Path, tmp_path: Path, width: int) -> None:
    """The page does not overflow, its script runs, and a click sorts."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("looks at the page in a browser, and no Chromium is on the path")
    probe = """<script>
      const head = document.querySelectorAll("table.sortable thead")[1].rows[0].cells[2];
      head.querySelector("button").click(); head.querySelector("button").click();
      const first = document.querySelectorAll("table.sortable")[1].tBodies[0].rows[0].cells[2].textContent;
      const fits = document.documentElement.scrollWidth <= innerWidth;
      document.title = [fits, head.getAttribute("aria-sort"), first].join();
    </script>"""
    page = tmp_path / "probed.html"
    page.write_text((output / "report.html").read_text().replace("</body>", f"{probe}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    fits, sort, first = title[1].split(",")
    assert fits == "true" and sort == "ascending" and float(first) < 0.5


def test_published_figures_are_those_of_the_source_and_checked(shared: Path, output: Path) -> None:
    lines = (shared / "published_results.csv").read_text().splitlines()
    shown = [f"{r.method},{r.dataset},{r.setting},{r.plcc:.3f},{r.srcc:.3f}" for r in published_results()]
    assert lines[1:] == shown
    entries = read_leaderboard(output, resamples=2).entries
    srcc, plcc = check_published(entries)
    assert (srcc.metric, srcc.dataset, srcc.measure, srcc.published, srcc.images) == (
        "brightness", "koniq10k", "SRCC", 0.948, 19,
    )  # fmt: skip
    entry = next(one for one in entries if one.metric == "brightness" and one.dataset == "koniq10k")
    assert srcc.difference == entry.agreement.srcc - 0.948 and plcc.here == entry.agreement.plcc_fitted
    assert srcc.agrees == (abs(srcc.difference) <= 0.005)
