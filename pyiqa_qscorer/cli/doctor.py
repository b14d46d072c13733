"""What `pyiqa-qscorer doctor` prints, on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..files import readable_size
from .console import count, out

if TYPE_CHECKING:
    from .doctor_facts import Report
    from .machine_facts import Cache

_STYLES = {"ready": "green", "after download": "yellow", "cannot run": "red"}


def print_report(report: Report) -> None:
    """The report of `doctor`, on stdout."""
    machine, cache = report.machine, report.cache
    packages = [(name, version or "not installed") for name, version in report.packages.items()]
    _section("Installation", [("python", report.python), *packages])
    _section("pyiqa", [("metrics", _registration(report)), ("Llama classes", _llama(report))])
    gpus = [
        (
            gpu.name,
            f"{gpu.description}, {_memory(gpu.memory)}, {_memory(gpu.free_memory)} free",
        )
        for gpu in machine.devices
    ]
    _section(
        "Machine",
        [
            ("system", f"{machine.system}, {count(machine.cpu_cores, 'core')}"),
            ("memory", f"{_memory(machine.memory)}, {_memory(machine.free_memory)} free"),
            *(gpus or [("GPU", "none that torch can use")]),
        ],
    )
    if cache is not None:
        _section(
            "Hub cache",
            [
                ("folder", f"{cache.folder}, {readable_size(cache.free)} of disk free"),
                *((name, _stored(name, cache)) for name in cache.complete),
            ],
        )
    verdicts = [
        (
            verdict.metric,
            Text.assemble((verdict.state, _STYLES[verdict.state]), ": ", verdict.reason),
        )
        for verdict in report.verdicts
    ]
    _section("Metrics", verdicts)
    for problem in report.problems:
        out.print(Text.assemble(("problem: ", "bold red"), problem))
    if not report.problems:
        out.print(Text("The installation is sound.", style="green"))


def _section(title: str, facts: Sequence[tuple[str, str | Text]]) -> None:
    if not facts:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=16)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(f"  {name}", value)
    out.print(Text(title, style="bold"))
    out.print(grid)
    out.print()


def _registration(report: Report) -> str | Text:
    state = report.registration
    if state.registered:
        return f"known to pyiqa, by {state.started_by}"
    if state.hook_installed:
        return f"added as soon as pyiqa is imported, by {state.started_by}"
    return Text("pyiqa does not know them", style="red")


def _llama(report: Report) -> str | Text:
    llama = report.llama
    if llama.replaced:
        state = f"replaced in this process: {', '.join(llama.replaced)}"
    elif llama.loaded:
        state = "transformers' own in this process"
    else:
        state = "not imported in this process"
    if llama.pyiqa_replaces:
        state += (
            f". pyiqa replaces {count(len(llama.pyiqa_replaces), 'part')} of them for the whole "
            "process once one of its qalign, compare2score or some other metrics is created; "
            "Q-Scorer does not use them, its scores stay the same"
        )
    return state


def _memory(size: int | None) -> str:
    return "unknown" if size is None else readable_size(size)


def _stored(repo_id: str, cache: Cache) -> str:
    size = cache.stored[repo_id]
    if cache.complete[repo_id]:
        return f"complete, {readable_size(size)}"
    return f"incomplete, {readable_size(size)} so far" if size else "not there"
