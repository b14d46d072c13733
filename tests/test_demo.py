"""`pyiqa-qscorer demo`: its scores, what it will not read, and the page itself in a browser without a network."""

import importlib.util
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from commands import server_of
from environments import REPOSITORY

from pyiqa_qscorer.data.score_page import write_score_page
from pyiqa_qscorer.data.score_rows import ScoreRow
from pyiqa_qscorer.scorer import Scorer

gradio_client = pytest.importorskip("gradio_client", reason='not installed: pip install "pyiqa-qscorer[demo]"')
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium and the package playwright",
)
PHOTOS = sorted((REPOSITORY / "tests" / "photos").glob("*.jpg"))
MAX_BYTES = 400_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("where it is started")
    (folder / "secret.jpg").write_bytes(PHOTOS[0].read_bytes())
    with server_of("demo", "--max-bytes", str(MAX_BYTES), folder=folder) as (process, address):
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.slow
def test_the_scores_are_those_of_the_scorer(address: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(PHOTOS[1].read_bytes()[:900])
    client = gradio_client.Client(address, verbose=False)
    files = [gradio_client.handle_file(str(path)) for path in (PHOTOS[0], broken, PHOTOS[1])]
    summary, gallery, table, *_ = client.predict(files, "best first", api_name="/score")
    scores = dict(
        zip((path.name for path in PHOTOS), Scorer("qscorer-mini", "cpu").score(PHOTOS).tolist(), strict=True)
    )
    rows = [(row[0], row[1]) for row in table["data"]]
    good = sorted(((path.name, scores[path.name]) for path in PHOTOS[:2]), key=lambda pair: -pair[1])
    assert [name for name, _ in rows] == [*(name for name, _ in good), "broken.jpg"]
    assert [score for _, score in rows] == [*(pytest.approx(score, abs=1e-4) for _, score in good), None]
    assert "2 scored" in summary and "1 could not be read" in summary and len(gallery) == 2
    assert table["data"][2][3]
    left, right = (scores[path.name] for path in PHOTOS[:2])
    verdict = client.predict(*files[::2], api_name="/compare")[-1]
    side = "left" if left > right else "right"
    assert verdict == f"left: {left:.2f}, right: {right:.2f}, the {side} one is better by {abs(left - right):.2f}"


@pytest.mark.slow
def test_nothing_but_uploads_is_read(address: str, tmp_path: Path) -> None:
    secret = {"path": "secret.jpg", "meta": {"_type": "gradio.FileData"}}
    with httpx.Client(base_url=address, timeout=30) as client:
        for path in ("/etc/passwd", "secret.jpg", str(REPOSITORY / "README.md")):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path
        for path in ("secret.jpg", str(PHOTOS[0]), "/etc/passwd"):  # as if it had been uploaded
            sent = {"data": [[{**secret, "path": path}], "worst first"]}
            event = client.post("/gradio_api/call/score", json=sent).json().get("event_id")
            answer = client.get(f"/gradio_api/call/score/{event}").text
            assert "event: error" in answer and "astronaut" not in answer, (path, answer)
        large = client.post("/gradio_api/upload", files={"files": ("large.jpg", bytes(MAX_BYTES + 1))})
        assert large.status_code == 413, large.text
        assert client.post("/gradio_api/upload", files={"files": ("small.jpg", bytes(9))}).status_code == 200


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(address: str, width: int) -> None:
    from playwright.sync_api import sync_playwright

    elsewhere: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files([str(path) for path in PHOTOS])
        page.get_by_text(f"{len(PHOTOS)} scored").wait_for(timeout=120_000)
        captions = page.locator("#scored .caption-label")
        assert captions.first.inner_text().split()[0] == min(
            caption.split()[0] for caption in captions.all_inner_texts()
        )
        page.get_by_text("best first").click()
        page.wait_for_function(
            "best => document.querySelector('#scored .caption-label').innerText.startsWith(best)",
            arg=max(caption.split()[0] for caption in captions.all_inner_texts()),
        )
        page.locator("#scored .gallery-item").first.click()
        page.get_by_text(re.compile(r"^Score \d\.\d\d$")).wait_for(timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert not errors and all(url.startswith((address, "data:", "blob:")) for url in elsewhere), (errors, elsewhere)


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_score_page_of_ten_thousand_pictures(tmp_path: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright

    names = [f"{folder}/{number:05d}.jpg" for folder in ("a", "b") for number in range(5000)]
    rows = [
        ScoreRow(name, 1 + 4 * (index * 7919 % 10000) / 10000, width=64, height=64) for index, name in enumerate(names)
    ]
    write_score_page(tmp_path / "page.html", [*rows, ScoreRow("c.jpg", error="torn")], thumbnails=False)
    worst = min(rows, key=lambda row: row.score or 0).path
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto((tmp_path / "page.html").as_uri())
        page.get_by_text(Path(worst).name).first.wait_for()
        assert page.evaluate("document.querySelectorAll('*').length") < 2000  # a page of the grid, not all of it
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("input[type=search], input[type=text]").first.fill("b/")
        page.get_by_text("5,000").first.wait_for()
        browser.close()
