"""The board of many runs: one table, renewed, in a terminal or a live notebook; a line for each change elsewhere.

Names come from study files and reasons from failing runs, so nothing that is shown is trusted: control characters are
taken out, markup is escaped.
"""

import sys
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Literal, Self

from IPython.display import HTML, display
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kepo_core.experiment.live import minutes, read_progress, watched
from kepo_core.study.jobs import Job

_COLUMNS = ("run", "state", "progress", "passed", "left")
_STYLES = {"running": "bold", "completed": "green", "found": "green", "failed": "red", "elsewhere": "yellow"}
_WORDS = {"running": "started", "elsewhere": "waits: ", "failed": "failed: "}
_EVERY = 1.0  # seconds between two drawings
_FRAME = 6  # lines of a table that are no rows


def row(job: Job) -> tuple[str, str, str, str, str]:
    """A job's cells: name, state, how far it is (or why not), time passed, and time left of its present phase."""
    told, left = job.note, ""
    if job.state == "running" and job.process is not None:
        found = read_progress(job.process.output())
        told, left = (f"{found.label} {found.done}/{found.total}", found.left) if found else ("starting", "")
    return plain(job.name), job.state, plain(told), minutes(job.passed) if job.passed else "", left


def summary(jobs: Sequence[Job], places: int) -> str:
    """How many have ended and, once a run has completed here, about how long all others will take.

    The estimate is the mean time of the runs completed in this call, times what remains of those that run or wait
    here, over as many places as they can fill.
    """
    of = {state: [job for job in jobs if job.state == state] for state in ("found", "completed", "failed")}
    counts = ", ".join(f"{len(some)} {state}" for state, some in of.items() if some)
    line = f"{sum(map(len, of.values()))} of {len(jobs)} runs ended" + (f" ({counts})" if counts else "")
    ahead = [job for job in jobs if job.state in ("running", "waiting")]
    if not of["completed"] or not ahead:
        return line
    mean = sum(job.seconds for job in of["completed"]) / len(of["completed"])
    work = sum(max(mean - job.passed, 0.0) for job in ahead)
    return f"{line}, about {minutes(work / min(places, len(ahead)))} left"


def plain(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


class Board:
    """Shows jobs each time it is called with them; used as a context, which leaves the last state on screen.

    Args:
        places: runs at a time.
        kind: "terminal" and "notebook" renew one table, "lines" writes a line for each change; by default whatever
            fits standard output.
        write: where lines go; by default standard output.
        console: the terminal; by default the one at standard output.
    """

    def __init__(
        self,
        places: int,
        kind: Literal["terminal", "notebook", "lines"] | None = None,
        write: Callable[[str], object] | None = None,
        console: Console | None = None,
    ) -> None:
        self._places, self._write = places, write or (lambda line: print(line, flush=True))
        self._kind = kind or ("notebook" if watched() else "terminal" if sys.stdout.isatty() else "lines")
        self._told: dict[str, tuple[str, str]] = {}
        self._drawn, self._jobs = -float("inf"), list[Job]()
        self._handle: Any = None
        self._console = console or Console()
        self._screen = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> Self:
        if self._kind == "terminal":
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._kind == "terminal":
            self._screen.update(self._table(self._jobs, wrapped=True), refresh=True)
            self._screen.stop()

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Show what has changed: states at once, progress every second."""
        changed = [job for job in jobs if self._told.get(job.name, ("waiting", "")) != (job.state, job.note)]
        self._told |= {job.name: (job.state, job.note) for job in changed}
        if self._kind == "lines":
            for job in changed:
                self._write(_line(job))
        elif changed or time.monotonic() - self._drawn > _EVERY:
            self._drawn, self._jobs = time.monotonic(), list(jobs)
            self._draw(jobs)

    def _draw(self, jobs: Sequence[Job]) -> None:
        if self._kind == "terminal":
            self._screen.update(self._table(fitting(jobs, self._console.height - _FRAME)), refresh=True)
        elif self._handle is None:
            self._handle = display(HTML(self._page(jobs)), display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(HTML(self._page(jobs)))

    def _table(self, shown: Sequence[Job], wrapped: bool = False) -> Table:
        """A row is one line while the table is renewed; ``wrapped``: as many as its texts need."""
        table = Table(caption=summary(self._jobs, self._places), caption_justify="left", box=None, pad_edge=False)
        room = self._console.width - 2 * (len(_COLUMNS) - 1)
        state, passed, left, progress = 9, 7, 6, 14  # the last at least: "training 30/75"
        name = min(max((len(job.name) for job in shown), default=0), max(room - state - passed - left - progress, 10))
        widths = (name, state, max(room - name - state - passed - left, progress), passed, left)
        for column, width in zip(_COLUMNS, widths, strict=True):
            side: Literal["left", "right"] = "right" if column in ("passed", "left") else "left"
            cut: Literal["fold", "ellipsis"] = "fold" if wrapped else "ellipsis"
            table.add_column(column, justify=side, width=width, no_wrap=not wrapped, overflow=cut)
        for job in shown:
            cells = [Text(cell, style=_STYLES.get(job.state, "")) for cell in row(job)]
            if not wrapped and len(job.name) > name:  # what tells runs apart stands at the end
                cells[0] = Text(f"{plain(job.name)[: name - 9]}…{plain(job.name)[-8:]}", style=cells[0].style)
            table.add_row(*cells)
        if hidden := len(self._jobs) - len(shown):
            table.add_row(Text(f"… and {hidden} more", style="dim"))
        return table

    def _page(self, jobs: Sequence[Job]) -> str:
        head = "".join(f"<th scope='col'>{name}</th>" for name in _COLUMNS)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row(job))}</tr>" for job in jobs)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{summary(jobs, self._places)}</p>"


def fitting(jobs: Sequence[Job], height: int) -> list[Job]:
    """As many as fit, in their order: those at work first, then failures, what waits, and what is done."""
    ranks = ("running", "elsewhere", "failed", "waiting", "completed", "found")
    best = sorted(range(len(jobs)), key=lambda i: ranks.index(jobs[i].state))[: max(height, 1)]
    return [jobs[i] for i in sorted(best)]


def _line(job: Job) -> str:
    what = plain(_WORDS.get(job.state, job.state) + job.note)
    after = f" after {minutes(job.seconds)}" if job.seconds else ""
    return f"{time.strftime('%H:%M:%S')}  {plain(job.name):<24} {what}{after}"
