"""What the trainer logs, as files: ``metrics.jsonl`` for what is computed, ``timings.jsonl`` for how long it took."""

import json
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kepo_core.files import json_line, write_atomically
from kepo_core.runs.run import Run


def is_timing(name: str) -> bool:
    """Whether a logged value depends on the clock; all others are identical between identical runs."""
    return name.startswith("profiling/") or name.rsplit("/", 1)[-1] == "step_time"


_FILES = ("metrics.jsonl", "timings.jsonl")


def forget_after(run: Run, step: int) -> None:
    """Drop what was logged behind optimiser step ``step``: a resumed run computes it again.

    A last line that a killed process left unfinished goes as well.
    """
    for name in _FILES:
        path = run.path / name
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(path, "".join(kept))


class MetricsWriter(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Writes each dictionary of logged numbers as one line with its step; the main process alone writes."""

    def __init__(self, run: Run) -> None:
        self._metrics, self._timings = (run.path / name for name in _FILES)
        self._start = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let the clock of a resumed run go on where it stopped."""
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
        """Append one line to each file, if there is anything to write; a number that is not finite becomes null.

        The trainer's summary at the end is passed over: it is about this process's steps alone, so that of a resumed
        run it would say something else.
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
