"""Progress while it happens: bars and curves that renew themselves in Jupyter, a few lines of text elsewhere.

A headless run (papermill, a terminal) keeps every output it is given, so there each task writes at most
``LINES`` lines; somebody at a notebook gets one display that is updated in place.
"""

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from IPython import get_ipython  # type: ignore[attr-defined]
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kepo_core.analysis.diagnosis import training_table
from kepo_core.pages import figures

LINES = 15
_BAR = 24  # characters
#: How a line of `Relay` begins.
_STEP = "kepo-step "
#: A line of `ProgressBar`, for `read_progress`.
_LINE = re.compile(r"(\S.*?) +[█░]+ (\d+)/(\d+)  \d+:\d\d(?:, (\d+:\d\d) left)?")


def watched() -> bool:
    """Whether somebody looks at a live notebook: a kernel that Jupyter or VS Code opened for a document.

    Both leave their mark on such kernels; papermill's have none, nor has a plain interpreter.
    """
    shell = get_ipython()  # type: ignore[no-untyped-call]
    if shell is None or "zmqshell" not in type(shell).__module__:
        return False
    return "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in shell.user_ns


class ProgressBar:
    """How far a task is, with the time left; call it with (done, total) after each piece of work.

    Args:
        label: what is being done.
        live: one display updated in place, or lines of text; by default as ``watched()`` says.
        write: where lines go; by default standard output.
        clock: seconds; only differences count.
    """

    def __init__(
        self,
        label: str,
        live: bool | None = None,
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._clock, self._start = label, clock, clock()
        self._live = watched() if live is None else live
        self._write = write if write is not None else _print_line
        self._handle: Any = None
        self._shown = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` pieces are finished; ``note`` stands behind."""
        if self._live:
            page = HTML(
                f"<div>{escape(self._label)} <progress value='{done}' max='{total}'></progress> "
                f"{escape(self._state(done, total, note))}</div>"
            )
            if self._handle is None:
                self._handle = display(page, display_id=True)  # type: ignore[no-untyped-call]
            else:
                self._handle.update(page)
        elif done * LINES // total > self._shown:
            self._shown = done * LINES // total
            full = round(_BAR * done / total)
            bar = "█" * full + "░" * (_BAR - full)
            self._write(f"{self._label:<10} {bar} {self._state(done, total, note)}")

    def _state(self, done: int, total: int, note: str) -> str:
        passed = self._clock() - self._start
        left = f", {minutes(passed * (total - done) / done)} left" if 0 < done < total else ""
        return f"{done}/{total}  {minutes(passed)}{left}" + (f"  {note}" if note else "")


@dataclass(frozen=True)
class Progress:
    """How far a task is: ``done`` of ``total`` pieces; ``left`` as minutes and seconds, "" where that is not known."""

    label: str
    done: int
    total: int
    left: str


def read_progress(output: str) -> Progress | None:
    """What the last line of a `ProgressBar` in ``output`` says; ``None`` before the first."""
    for line in reversed(output.splitlines()):
        if found := _LINE.match(line):
            label, done, total, left = found.groups(default="")
            return Progress(label, int(done), int(total), left)
    return None


class _Steps(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Takes in every logged step, on the first process; TRL's summary at the end, which has no loss, is passed over."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Hand one step on to `show`."""
        if state.is_world_process_zero and logs and "loss" in logs:
            self.show(state.global_step, state.max_steps, logs)

    def show(self, step: int, total: int, logs: dict[str, Any]) -> None:
        """Take in what optimiser step ``step`` of ``total`` logged."""
        raise NotImplementedError


class LiveTraining(_Steps):
    """Shows training as it goes: a bar with the last numbers and, in a live notebook, the curves so far.

    Args:
        live: as for `ProgressBar`.
        every_seconds: the least time between two drawings of the curves, which take a quarter of a second each.
        bar: the progress bar, by default one labelled "training".
    """

    def __init__(self, live: bool | None = None, every_seconds: float = 3.0, bar: ProgressBar | None = None) -> None:
        self._live = watched() if live is None else live
        self._bar = bar if bar is not None else ProgressBar("training", self._live)
        self._every, self._drawn = every_seconds, -float("inf")
        self._rows: list[dict[str, Any]] = []
        self._handle: Any = None

    def show(self, step: int, total: int, logs: dict[str, Any]) -> None:
        """Take in what optimiser step ``step`` of ``total`` logged and show it."""
        self._rows.append({**logs, "step": step})
        self._bar(step, total, headline(logs))
        if self._live and time.monotonic() - self._drawn > self._every:
            self._draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the curves to their end."""
        if state.is_world_process_zero:
            self.finish()

    def finish(self) -> None:
        """Draw the curves to their end."""
        if self._live and self._rows:
            self._draw()

    def _draw(self) -> None:
        figure = Figure(figsize=(11, 6), layout="constrained")
        figures.training_panels(training_table(self._rows), figure.subplots(2, 2))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        picture = Image(data=buffer.getvalue())  # type: ignore[no-untyped-call]
        if self._handle is None:
            self._handle = display(picture, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(picture)
        self._drawn = time.monotonic()


class Relay(_Steps):
    """In a process that trains for another one: writes each logged step as a line, for `read_step` there."""

    def show(self, step: int, total: int, logs: dict[str, Any]) -> None:
        """Write one step."""
        _print_line(_STEP + json.dumps([step, total, logs]))


def read_step(line: str) -> tuple[int, int, dict[str, Any]] | None:
    """(step, steps in all, what it logged) of a line that `Relay` wrote; ``None`` for any other, or a torn one."""
    if not line.startswith(_STEP):
        return None
    try:
        step, total, logs = json.loads(line.removeprefix(_STEP))
    except ValueError:  # another process wrote into it
        return None
    return step, total, logs


def headline(logs: dict[str, Any]) -> str:
    """The few numbers of a logged step that tell how training fares, as far as the method logs them."""
    parts = {"accuracy": "kepo/accuracy", "format": "kepo/format", "all-fail": "kepo/all_fail_rate",
             "gate": "kepo/gate_rate"}  # fmt: skip
    return "  ".join(f"{label} {float(logs[name]):.2f}" for label, name in parts.items() if name in logs)


def minutes(seconds: float) -> str:
    """Seconds as minutes and seconds: ``3:07``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # at once, so that lines of several processes do not mix
    sys.stdout.flush()
