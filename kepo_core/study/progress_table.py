"""The progress of many runs: in a terminal or a live notebook one table, redrawn; elsewhere a line for each change.

Names come from study files and reasons from failed runs, so control characters are removed from both.
"""

import sys
import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from kepo_core.experiment.evaluation import answered, parts
from kepo_core.experiment.live import read_rows, total_steps, watched
from kepo_core.runs.run import Run
from kepo_core.study.jobs import Job, State

#: Each state's style, in the order of the table's rows: a short terminal shows only the first ones.
_STYLES: dict[State, str] = {
    "running": "bold",
    "elsewhere": "yellow",
    "failed": "red",
    "waiting": "",
    "completed": "green",
    "reused": "green",
}
_WORDS = {"running": "started", "elsewhere": "waiting: ", "failed": "failed: "}
_EVERY = 1.0  # seconds between two drawings


def progress(run: Run) -> str:
    """How far a run is, from its files: the number of answers, or the last step with its reward or loss."""
    before, after = (run.evaluation_dir / f"{name}.jsonl" for name in ("untrained", "trained"))
    rows = read_rows(run.path / "metrics.jsonl")
    for which in (after, before):
        if parts(which) and (which is after or not rows):
            return f"{which.stem} student: {answered(which)} answers"
    if not rows:
        return "starting"
    last = rows[-1]
    measured = next((f", {name} {last[name]:.2f}" for name in ("reward", "loss") if last.get(name) is not None), "")
    return f"step {last['step']}/{total_steps(run.params, last)}{measured}"


def row(job: Job) -> tuple[str, str, str, str]:
    """A job's cells: name, state, progress or the reason of its state, and time."""
    told = job.note
    if job.state == "running":
        told = progress(job.run) if job.run else "starting"
    return plain(job.name), job.state, plain(told), tqdm.format_interval(job.passed) if job.passed else ""


def summary(jobs: Sequence[Job], slots: int) -> str:
    """How many runs have ended and, once one has completed here, an estimate of the time left.

    The estimate takes the mean time of the runs completed in this call for each run that is running or waiting here,
    less the time that it has run, and divides the sum by the slots that they fill.
    """
    of = {state: [job for job in jobs if job.state == state] for state in ("reused", "completed", "failed")}
    counts = ", ".join(f"{len(some)} {state}" for state, some in of.items() if some)
    line = f"{sum(map(len, of.values()))} of {len(jobs)} runs ended" + (f" ({counts})" if counts else "")
    ahead = [job for job in jobs if job.state in ("running", "waiting")]
    if not of["completed"] or not ahead:
        return line
    mean = sum(job.seconds for job in of["completed"]) / len(of["completed"])
    work = sum(max(mean - job.passed, 0.0) for job in ahead)
    return f"{line}, about {tqdm.format_interval(work / min(slots, len(ahead)))} left"


def plain(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


class ProgressTable:
    """Shows the jobs that it is called with; a context manager that leaves the last state on screen.

    Args:
        slots: runs at a time.
        redrawn: True: one table; False: a line for each change; None: the one that fits standard output.
        console: for the table; by default standard output.
    """

    def __init__(self, slots: int, redrawn: bool | None = None, console: Console | None = None) -> None:
        self._redrawn = (watched() or sys.stdout.isatty()) if redrawn is None else redrawn
        self._slots, self._console = slots, console or Console()
        self._shown: dict[str, tuple[str, str]] = {}
        self._drawn = -float("inf")
        self._screen = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._redrawn:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.stop()

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Show changes: states at once, progress every second."""
        changed = [job for job in jobs if self._shown.get(job.name, ("waiting", "")) != (job.state, job.note)]
        self._shown |= {job.name: (job.state, job.note) for job in changed}
        if not self._redrawn:
            for job in changed:
                print(_line(job), flush=True)  # not with rich, which writes HTML under papermill
        elif changed or time.monotonic() - self._drawn > _EVERY:
            self._drawn = time.monotonic()
            self._screen.update(self._table(jobs), refresh=True)

    def _table(self, jobs: Sequence[Job]) -> Table:
        """The table, running jobs first: rich cuts a live table off at the terminal's height."""
        table = Table(title=summary(jobs, self._slots), title_justify="left", box=None, pad_edge=False)
        for column in ("run", "state", "progress", "time"):
            table.add_column(column, justify="right" if column == "time" else "left", overflow="fold")
        for job in sorted(jobs, key=lambda job: list(_STYLES).index(job.state)):
            table.add_row(*(Text(cell, style=_STYLES[job.state]) for cell in row(job)))
        return table


def _line(job: Job) -> str:
    what = plain(_WORDS.get(job.state, job.state) + job.note)
    after = f" after {tqdm.format_interval(job.seconds)}" if job.seconds else ""
    return f"{time.strftime('%H:%M:%S')}  {plain(job.name):<24} {what}{after}"
