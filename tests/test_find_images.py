"""Finding images: files, folders, patterns, links."""

import os
from pathlib import Path

import pytest

from pyiqa_qscorer.data.find_images import find_images
from pyiqa_qscorer.errors import InputError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of all kinds; the working folder, so that paths in tests are short."""
    names = ["b.png", "a.JPG", "notes.txt", "scan.pdf", "deep/er/c.webp", "deep/d.tif", "Z/e.bmp", "x[1].png"]
    for name in [*names, ".hidden.png", ".git/f.png", "data.h5", "film.mpg", "plot.eps"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["Z/e.bmp", "a.JPG", "b.png", "deep/d.tif", "deep/er/c.webp", "x[1].png"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["."], [f"./{path}" for path in ALL]),
        (["*.png"], ["b.png", "x[1].png"]),
        (["*"], ALL),
        (["**"], ALL),
        (["**/*.tif"], ["deep/d.tif"]),
        (["deep/**/*.webp"], ["deep/er/c.webp"]),
        (["**/er"], ["deep/er/c.webp"]),
        (["./de*/d.???"], ["./deep/d.tif"]),
        (["[ab].*"], ["a.JPG", "b.png"]),
        (["x[1].png"], ["x[1].png"]),  # a file of that very name wins
        ([".git/*.png"], [".git/f.png"]),
        # A named file is taken whatever its name; each file once.
        (["notes.txt", ".hidden.png", "missing.png"], ["notes.txt", ".hidden.png", "missing.png"]),
        (["b.png", "./b.png", "*.png", Path("deep")], ["b.png", "x[1].png", "deep/d.tif", "deep/er/c.webp"]),
    ],
)
def test_files_folders_and_patterns(tree: Path, given: list[str | Path], expected: list[str]) -> None:
    found = find_images(given)
    assert found.paths == expected and found.repeated == 2 * ("./b.png" in given)
    if "**" in str(given[0]):
        assert find_images([f"{tree}/{given[0]}"]).paths == [f"{tree}/{path}" for path in expected]


def test_links(tree: Path) -> None:
    (tree / "deep/er/up").symlink_to(tree / "deep")
    (tree / "deep/other").symlink_to(tree / "Z")
    (tree / "deep/broken.png").symlink_to(tree / "gone.png")
    (tree / "deep/loop.png").symlink_to(tree / "deep/loop.png")
    os.mkfifo(tree / "deep/pipe.png")  # reading it would wait for ever
    expected = ["deep/broken.png", "deep/d.tif", "deep/er/c.webp", "deep/loop.png", "deep/other/e.bmp"]
    assert find_images(["deep"]).paths == expected and find_images(["deep/**"]).paths == expected
    (tree / "Z/loop").symlink_to(".")  # and back
    for pattern in ("Z/*", "Z/**", "Z"):
        assert find_images([pattern]).paths == ["Z/e.bmp"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("https://example.org/a.png", r"URLs are not fetched: download .*https://example.org/a.png"),
        ("s3://bucket/a.png", "URLs are not fetched"),
        (".git/objects", "no image file in folder '.git/objects'"),
        ("*.gif", r"no image file matches the pattern '\*.gif'"),
        ("nowhere/**/*.gif", "no image file matches the pattern"),
    ],
)
def test_inputs_that_cannot_be_meant(tree: Path, given: str, words: str) -> None:
    (tree / ".git/objects").mkdir()
    with pytest.raises(InputError, match=words):
        find_images(["b.png", given])
    with pytest.raises(InputError, match="nothing to score"):
        find_images([])
