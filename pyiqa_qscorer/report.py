"""Reports: one description of tables, pictures and text, shown in a terminal, as Markdown, or as one HTML page.

The page needs nothing from elsewhere: style, script and pictures are inside it, and everything is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import __version__
from .errors import OutputError
from .files import readable_size, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NONE = "–"  # noqa: RUF001  (an en dash)
WIDE = 10_000
"""Columns of a console that is no terminal: nothing is cut or wrapped in a file or pipe."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: As shown.
        value: What the page sorts by; None: the text. Empty: last in either order.
        strong: Stands out: bold, in the page blue as well.
    """

    text: str
    value: float | str | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    Attributes:
        title: Above the table; may be empty.
        words: The first so many columns hold words, the others numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: int = 1

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Picture:
    """A picture in a page.

    Attributes:
        uri: Data URI; None: only the caption is shown.
        link: Where a click leads; None: nowhere.
        groups: Smaller pictures below it, by heading.
    """

    uri: str | None
    alt: str
    caption: str = ""
    link: str | None = None
    groups: dict[str, list[Picture]] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of a report: text, tables and pictures in this order, then parts of its own.

    Attributes:
        alarms: Sentences that must not be overlooked.
        items: A list.
        folded: The page shows it on demand; Markdown leaves it out.
    """

    title: str
    alarms: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    parts: Sequence[Section] = ()
    folded: bool = False


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Print tables to a console; in a file or pipe with all digits, whatever the width of the terminal."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDE, highlight=False)
    for table in tables:
        shown = RichTable(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for place, name in enumerate(table.columns):
            words = place < table.words  # which give way where the terminal is narrow; numbers are never cut
            heading = Text(printable(name))
            shown.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=not words)
        for row in table.cells:
            shown.add_row(*(Text(printable(cell.text), style="bold" if cell.strong else "") for cell in row))
        if table.title:
            console.print(Text(printable(table.title), style="bold"))
        console.print(shown)
        console.print()


def markdown(title: str, sections: Sequence[Section]) -> str:
    """A report as Markdown, without its pictures and what is folded.

    >>> print(markdown("A", [Section("B", ["Stop."], ["Text."], [Table("", ["name", "x"], [[Cell("a|b"), "1"]])])]))
    # A
    <BLANKLINE>
    ## B
    <BLANKLINE>
    **Stop.**
    <BLANKLINE>
    Text.
    <BLANKLINE>
    | name | x |
    | --- | ---: |
    | a\\|b | 1 |
    <BLANKLINE>
    """
    return "\n\n".join([f"# {title}", *(block for section in sections for block in _blocks(section, 2))]) + "\n"


def _blocks(section: Section, level: int) -> list[str]:
    if section.folded or not (section.alarms or section.paragraphs or section.tables or section.items or section.parts):
        return []
    blocks = [f"{'#' * level} {section.title}"] if section.title else []
    blocks += [f"**{sentence}**" for sentence in section.alarms]
    blocks += section.paragraphs
    for table in section.tables:
        blocks += [f"{'#' * (level + 1)} {table.title}"] if table.title else []
        lines = [table.columns, ["---" if place < table.words else "---:" for place in range(len(table.columns))]]
        lines += [[f"**{_escaped(c.text)}**" if c.strong else _escaped(c.text) for c in row] for row in table.cells]
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    if section.items:
        blocks.append("\n".join(f"- {item}" for item in section.items))
    return blocks + [block for part in section.parts for block in _blocks(part, level + 1)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def html_page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """A report as one HTML page, with the paragraphs `lead` under its title."""
    return render_template("page.html.j2", title=title, lead=lead, sections=sections)


def render_template(name: str, **values: Any) -> str:
    """A page from one of our templates; everything in `values` is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pyiqa_qscorer", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC")
    return environment.get_template(name).render(**values, made=made, version=__version__)


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all. Raises `OutputError`; the old file then stays."""
    try:
        write_bytes(path, content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; put it right and repeat the command") from error


def new_axes(rows: int = 1, size: tuple[float, float] = (5.0, 3.6), **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of plots below each other, about 5 inches wide: its text can be read on a page of 390 pixels, too.

    Without pyplot: nothing global is touched and no display is needed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = list(figure.subplots(rows, 1, squeeze=False, **options).flat)
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axis: Axes, columns: int = 2) -> None:
    """The legend of one of the plots under all of them, where it hides nothing and has room for its text."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=9, frameon=False)


def png(figure: Figure) -> bytes:
    """A figure as PNG with 64 colours: enough for dots and lines, and a third of the size."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    """A picture's bytes as the address of an `img`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


# --- numbers and names ------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` without what could drive the terminal; a file name may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash for None; small ones with one digit, and no minus zero.

    >>> number(0.12345), number(-1e-14), number(2e-5)
    ('0.123', '0.000', '2e-05')
    """
    if value is None:
        return NONE
    if 1e-12 < abs(value) < 0.5 * 10.0**-digits:  # what is smaller is 0 but for rounding
        return f"{value:.0e}"
    return f"{round(value, digits) + 0.0:.{digits}f}"


def size(value: int | None) -> str:
    """Bytes in words."""
    return NONE if value is None else readable_size(value)
