"""Live progress: a bar and curves that are redrawn in Jupyter, a few lines of text elsewhere.

A headless run (papermill, a terminal) keeps every output, so each task writes at most ``LINES`` lines there; a live
notebook has one display that is updated in place.
"""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

from IPython import get_ipython  # type: ignore[attr-defined]
from IPython.display import Image, Pretty, display
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kepo_core.analysis.diagnosis import signs_of, training_table
from kepo_core.pages import figures
from kepo_core.params import Params

LINES = 15
_BAR = "{l_bar}{bar:20}{r_bar}"  # tqdm's, 20 characters wide


def watched() -> bool:
    """Whether this is a live notebook: a kernel that Jupyter or VS Code opened for a document.

    Both set a variable in such kernels; papermill and a plain interpreter do not.
    """
    shell = get_ipython()  # type: ignore[no-untyped-call]
    if shell is None or "zmqshell" not in type(shell).__module__:
        return False
    return "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in shell.user_ns


class _Display:
    """One output of a live notebook, updated in place."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, content: object) -> None:
        if self._handle is None:
            self._handle = display(content, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(content)


class ProgressBar:
    """A task's progress and the time left, in tqdm's words; call it with (done, total) after each piece of work.

    Args:
        label: name of the task.
        live: True: one display updated in place; False: lines of text; None: as ``watched()`` says.
    """

    def __init__(self, label: str, live: bool | None = None) -> None:
        self._label, self._start = label, time.monotonic()
        self._display = _Display() if (watched() if live is None else live) else None
        self._lines = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` pieces are finished, followed by ``note``."""
        passed = time.monotonic() - self._start
        line = tqdm.format_meter(done, total, passed, prefix=self._label, postfix=note, bar_format=_BAR)
        if self._display:
            self._display.show(Pretty(line))  # type: ignore[no-untyped-call]
        elif done * LINES // total > self._lines:
            self._lines = done * LINES // total
            print(line, flush=True)


class LiveTraining(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Shows training progress: a bar with the latest numbers and, in a live notebook, the curves so far.

    After each quarter of training, new signs of failure (`diagnosis.signs_of`) are printed, each of them once.

    A trainer calls it in its own process; `launch.train` calls `show` for other processes.

    Args:
        live: as for `ProgressBar`.
        every_seconds: minimum seconds between two drawings of the curves; a drawing takes a quarter of a second.
    """

    def __init__(self, live: bool | None = None, every_seconds: float = 3.0) -> None:
        self._curves = _Display() if (watched() if live is None else live) else None
        self._bar = ProgressBar("training", self._curves is not None)
        self._every, self._drawn = every_seconds, -float("inf")
        self._rows: list[dict[str, Any]] = []
        self._quarters, self._signs = 0, set[str]()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """`show` one step, on the first process; TRL's summary at the end, which has no loss, is skipped."""
        if state.is_world_process_zero and logs and "loss" in logs:
            self.show(state.global_step, state.max_steps, logs)

    def show(self, step: int, total: int, logs: dict[str, Any]) -> None:
        """Show the ``logs`` of optimiser step ``step`` of ``total``."""
        self._rows.append({**logs, "step": step})
        self._bar(step, total, headline(logs))
        self._warn(4 * step // total)
        if time.monotonic() - self._drawn > self._every:
            self.finish()

    def _warn(self, quarters: int) -> None:
        """After each quarter of training, print new signs of failure."""
        if quarters == self._quarters:
            return
        self._quarters = quarters
        for sign in signs_of(training_table(self._rows)):
            if sign.cause not in self._signs:
                self._signs.add(sign.cause)
                print(f"warning: {sign}", flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the curves to their end."""
        if state.is_world_process_zero:
            self.finish()

    def finish(self) -> None:
        """Draw the curves to their end."""
        if not self._curves or not self._rows:
            return
        figure = Figure(figsize=(11, 6), layout="constrained")
        figures.training_panels(training_table(self._rows), figure.subplots(2, 2))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        self._curves.show(Image(data=buffer.getvalue()))  # type: ignore[no-untyped-call]
        self._drawn = time.monotonic()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that another process may be writing; none if the file does not exist."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def total_steps(params: Params, row: dict[str, Any]) -> int:
    """The optimiser steps of a training that logged ``row``, a line of ``metrics.jsonl``."""
    wanted = int(params.trl["max_steps"])
    return wanted if wanted > 0 else round(row["step"] * params.epochs / row["epoch"])


def headline(logs: dict[str, Any]) -> str:
    """The main numbers of a logged step, if the method logs them."""
    parts = {
        "accuracy": "kepo/accuracy",
        "format": "kepo/format",
        "all-fail": "kepo/all_fail_rate",
        "gate": "kepo/gate_rate",
    }
    known = {label: logs[name] for label, name in parts.items() if logs.get(name) is not None}
    return "  ".join(f"{label} {float(value):.2f}" for label, value in known.items())
