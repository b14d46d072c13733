"""Bytes as people write them."""

from __future__ import annotations


def readable_size(size: float) -> str:
    """`size` bytes in powers of ten, as disks and memory are sold: "16.4 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"
