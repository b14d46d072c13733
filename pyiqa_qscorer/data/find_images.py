"""Image files from what a user types: files, folders and patterns."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from ..errors import InputError
from ..files import file_key

# Formats that Pillow recognises but cannot decode by itself (EPS would start Ghostscript).
UNDECODABLE_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})


@dataclass(frozen=True)
class FoundImages:
    """Paths as they follow from the inputs, each file once, and how often one was named again."""

    paths: list[str]
    repeated: int


def find_images(inputs: Iterable[str | os.PathLike[str]]) -> FoundImages:
    """Image files of files, folders and patterns, in the order given.

    A file is taken whatever its name. A folder is searched in all depths for files with an image extension, by name;
    hidden ones are left out, links are followed, each folder is entered once. A pattern (`*`, `?`, `[...]`, and `**`
    for any number of folders) stands for the image files and folders that match it. A path that does not exist is
    kept: scoring reports it as failed. What links of folders lead to twice is taken once; a link of a file is a file.

    Raises:
        InputError: A URL, a folder that cannot be read, or a folder or pattern without any image.
    """
    paths: list[str] = []
    seen: set[str] = set()
    repeated = 0
    real_folder = cache(os.path.realpath)
    for given in inputs:
        for path in dict.fromkeys(_expand(os.fsdecode(given))):
            folder, name = os.path.split(path)
            key = file_key(os.path.join(real_folder(folder), name))
            if key in seen:
                repeated += 1
            else:
                seen.add(key)
                paths.append(path)
    if not paths:
        raise InputError("nothing to score: give image files, folders or patterns")
    return FoundImages(paths, repeated)


@cache
def image_extensions() -> frozenset[str]:
    """Lower-case file extensions, with the dot, of the formats that Pillow decodes."""
    from PIL import Image

    Image.init()
    formats = set(Image.OPEN) - UNDECODABLE_FORMATS | {"MPO"}  # MPO: opened by the JPEG reader
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats)


def _expand(given: str) -> list[str]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", given):
        raise InputError(f"URLs are not fetched: download the file and give its path ({given})")
    if os.path.isdir(given):
        found, where = list(_walk(given, set())), "in folder"
    elif glob.has_magic(given) and not os.path.lexists(given):
        found, where = list(_match(given)), "matches the pattern"
    else:
        return [given]
    if not found:
        raise InputError(f"no image file {where} {given!r}")
    return found


def _walk(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Image files below `folder`, by name; `visited` (device, inode) stops circles of links."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in visited:
        return
    visited.add(here)
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except PermissionError as error:
        raise InputError(f"cannot read folder {folder!r}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # entry.is_dir() raises for a link to itself; os.path.isdir() says no.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(entry.path, visited)
        # Pipes and sockets are left out; a broken link is kept, to be reported as failed.
        elif _is_image_name(entry.name) and (entry.is_symlink() or entry.is_file()):
            yield entry.path


def _match(pattern: str) -> Iterator[str]:
    """Image files that match `pattern` or lie in a folder that does, by name."""
    parts = pattern.replace(os.sep, "/").split("/")
    if "**" not in parts:
        visited: set[tuple[int, int]] = set()
        for match in sorted(glob.iglob(pattern)):
            if os.path.isdir(match):
                yield from _walk(match, visited)
            elif _is_image_name(match):
                yield match
        return
    # The ** of the glob module runs in circles of links; our walk enters each folder once.
    fixed = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:fixed]) + ("/" if fixed else "")
    if os.path.isdir(root or "."):
        for path in _walk(root or ".", set()):
            relative = os.path.relpath(path, root or ".")
            if _matches(relative.split(os.sep), parts[fixed:]):
                yield root + relative


def _matches(names: list[str], pattern: list[str]) -> bool:
    """Whether the path of `names`, or a folder on it, matches; `**` is any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(names[skip:], pattern[1:]) for skip in range(len(names) + 1))
    if not names or not fnmatch.fnmatch(names[0], pattern[0]):
        return False
    return _matches(names[1:], pattern[1:])


def _is_image_name(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in image_extensions()
