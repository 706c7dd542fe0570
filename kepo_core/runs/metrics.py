"""The trainer's log as files: ``metrics.jsonl`` has computed values, ``timings.jsonl`` has times."""

import json
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kepo_core.files import json_line, write_atomically
from kepo_core.runs.run import Run


def is_timing(name: str) -> bool:
    """Whether a logged value depends on the clock; all other values are identical between identical runs."""
    return name.startswith("profiling/") or name.rsplit("/", 1)[-1] == "step_time"


_FILES = ("metrics.jsonl", "timings.jsonl")


def forget_after(run: Run, step: int) -> None:
    """Delete the log lines of optimiser steps after ``step``: a resumed run computes them again.

    An unfinished last line of a killed process is deleted, too.
    """
    for name in _FILES:
        path = run.path / name
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(path, "".join(kept))


class MetricsWriter(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Writes each dictionary of logged numbers as one line with its step; only the main process writes."""

    def __init__(self, run: Run) -> None:
        self._metrics, self._timings = (run.path / name for name in _FILES)
        self._start = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continue the clock of a resumed run where it stopped."""
        lines = self._timings.read_text(encoding="utf-8").splitlines() if self._timings.exists() else []
        self._start = time.perf_counter() - (json.loads(lines[-1])["seconds"] if lines else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line to each file that has new values; a number that is not finite becomes null.

        The trainer's summary at the end is skipped: it covers only this process's steps, so a resumed run would differ.
        """
        if not state.is_world_process_zero or not logs or "train_loss" in logs:
            return
        step = {"step": state.global_step}
        metrics = {name: value for name, value in logs.items() if not is_timing(name)}
        timings = {name: value for name, value in logs.items() if is_timing(name)}
        for path, row in (
            (self._metrics, step | metrics),
            (self._timings, step | timings | {"seconds": round(time.perf_counter() - self._start, 3)}),
        ):
            if len(row) > 1:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json_line(row))
