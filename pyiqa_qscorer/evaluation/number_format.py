"""Numbers as the reports show them; a dash where there is none."""

from __future__ import annotations

from typing import Any

from ..files import readable_size

NONE = "–"  # noqa: RUF001  (an en dash)


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def number_with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return number(value)
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def seconds_words(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def machine_words(facts: dict[str, Any]) -> str:
    """The machine that a facts file's times were measured on."""
    device = facts.get("device") or "an unknown device"
    if facts["processor"] is None:
        return f"{device}, processor unknown"
    return f"{device}, processor {facts['processor']} (cores: {facts['cores']}, torch threads: {facts['threads']})"


def bytes_words(value: int | None) -> str:
    return NONE if value is None else readable_size(value)
