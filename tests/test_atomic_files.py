"""Small files: whole or not at all, readable by others."""

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyiqa_qscorer.files import write_bytes, write_text


def test_bytes_and_text_are_written_whole_and_leave_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file.txt"
    for content in (b"\x00\xff\r\n", b"", b"second"):
        write_bytes(file, content)
        assert file.read_bytes() == content and list(file.parent.iterdir()) == [file]
    with pytest.raises(OSError, match="b"):
        write_bytes(file.parent, b"content")  # a folder in the way
    assert list((tmp_path / "a").iterdir()) == [file.parent]
    write_text(tmp_path / "file", "é\r\n\n")
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\r\n\n"
    odd_name = "\udcff.png"  # as Python reads a file name that is not UTF-8
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", odd_name)


class Interrupted(BaseException):
    """Like Ctrl+C, which is no Exception."""


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()])
def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch, step, error) -> None:
    file = tmp_path / "file"
    write_bytes(file, b"old")

    def fail(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2  # the temporary file is there
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a umask")
@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_who_may_read_it_is_what_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_threads_may_write_the_same_file(tmp_path: Path) -> None:
    contents = [bytes([number]) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_bytes(tmp_path / "file", content), contents * 5))
    assert (tmp_path / "file").read_bytes() in contents and list(tmp_path.iterdir()) == [tmp_path / "file"]
