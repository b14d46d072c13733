"""`score --report`: what the page holds, that nothing in it can run, and what the terminal says beside it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from commands import Result
from environments import REPOSITORY
from PIL import Image

from pyiqa_qscorer.data.score_page import write_score_page
from pyiqa_qscorer.data.score_rows import ScoreRow
from pyiqa_qscorer.images.thumbnails import thumbnail

HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;.png"


def data_of(page: Path) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_page_beside_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "tests" / "photos", "album/photos", ignore=shutil.ignore_patterns("*.md"))
    Path("album/broken.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (70, 90), "gray").save(f"album/{HOSTILE}")
    Path("pages").mkdir()
    result = Result("score", "album", "-o", "scores.jsonl", "--report", "pages/page.html")
    assert result.code == 1
    rows = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    scored = sorted((row["score"], row["path"]) for row in rows if row["score"] is not None)
    images = data_of(Path("pages/page.html"))
    assert [(one["score"], one["path"]) for one in images] == scored
    assert result.out.splitlines()[:2] == [f"{score:.6f}\t{path}" for score, path in scored[:2]]
    assert len(result.out.splitlines()) == 10
    for one in images:
        assert (Path("pages") / unquote(one["link"])).resolve() == Path(one["path"]).resolve()
        assert one["uri"].startswith("data:image/jpeg;base64,")
    text = Path("pages/page.html").read_text()
    assert "1 could not be scored" in text and "broken.png" in text
    assert HOSTILE not in text and "<img src=x" not in text
    assert "http://" not in text and "https://" not in text  # needs nothing from elsewhere


def test_page_of_nothing_and_thumbnails(tmp_path: Path) -> None:
    write_score_page(tmp_path / "a.html", [ScoreRow("a.png", 2.0, width=3, height=4)], thumbnails=False)
    assert data_of(tmp_path / "a.html")[0]["uri"] is None
    write_score_page(tmp_path / "b.html", [ScoreRow("</script><b>", error="<i>no</i>")])
    text = (tmp_path / "b.html").read_text()
    assert data_of(tmp_path / "b.html") == [] and "<i>no" not in text and "&lt;i&gt;no" in text
    Image.new("L", (4000, 1000), 90).save(tmp_path / "wide.jpg")
    assert thumbnail(str(tmp_path / "wide.jpg"), 144) is not None
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "wide.jpg").read_bytes()[:300])
    assert thumbnail(str(tmp_path / "torn.jpg"), 144) is None
    assert thumbnail(str(tmp_path / "gone.jpg"), 144) is None


@pytest.mark.parametrize("place", ["page.txt", "missing/page.html"])
def test_a_place_that_no_page_can_have_is_said_before_scoring(place: str) -> None:
    result = Result("score", str(REPOSITORY / "tests" / "photos"), "--report", place)
    assert result.code == 2 and "--report" in result.err and "Loading" not in result.err
