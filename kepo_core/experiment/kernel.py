"""Cells of a live notebook can run twice and in any order: refuse those that would make the run's record wrong.

A kernel keeps its trained student. A resumed run is another process, which loads the student again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kepo_core.errors import ParamError
from kepo_core.method.resume import last_checkpoint
from kepo_core.params import PLACES, Params
from kepo_core.runs.run import Run

#: Students whose weights have changed since they were loaded: `NotesTraining`.
_begun: "WeakSet[nn.Module]" = WeakSet()
_AGAIN = "execute the cell that loads the models and all cells after it; they make a new run"


class NotesTraining(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Notes that ``student`` is trained, once its weights change; errors before that leave it untrained."""

    def __init__(self, student: nn.Module) -> None:
        self._student = student

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note a student with a checkpoint's weights."""
        if state.global_step:
            note_trained(self._student)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note a student before its first step."""
        note_trained(self._student)


def note_trained(student: nn.Module) -> None:
    """Note that the weights of ``student`` have changed since it was loaded."""
    _begun.add(student)


def check_record(params: Params, run: Run, data: Mapping[str, Any]) -> None:
    """Raise `ParamError` if parameters or data are not those of ``run``; ``data`` is `StudyData.identity`."""
    if params.hash != run.params.hash:
        recorded, now = run.params.to_dict(), params.to_dict()
        name = next(n for n in recorded | now if n not in PLACES and recorded.get(n) != now.get(n))
        raise ParamError(f"{name} is {now.get(name)!r} but {recorded.get(name)!r} in {run.path.name}: {_AGAIN}")
    if run.provenance.get("data", data) != data:
        raise ParamError(f"the data differ from those of {run.path.name}: {_AGAIN}")


def check_trainable(params: Params, run: Run, student: nn.Module) -> None:
    """Raise `ParamError` if training would start from another student than that of ``run``, or overwrite the run.

    That is: the student is trained already without a checkpoint, it has adapters already, or the run has completed.
    """
    if run.status["state"] == "completed":
        raise ParamError(f"{run.path.name} has completed, and no run is ever overwritten: {_AGAIN}")
    if hasattr(student, "peft_config") or (student in _begun and last_checkpoint(run.training_dir) is None):
        done = "trained" if student in _begun else "given adapters"
        raise ParamError(f"the student has been {done} in this kernel already: {_AGAIN}")


def check_untrained(student: nn.Module, kept: Path | None, asked: int) -> None:
    """Raise `ParamError` if a trained student would give some of the ``asked`` answers of ``untrained.jsonl``."""
    if student not in _begun or kept is None or kept.stem != "untrained":
        return
    if not kept.is_file() or kept.read_bytes().count(b"\n") <= asked:  # a line of its own comes first
        raise ParamError(f"the student was trained before it had answered all questions: {_AGAIN}")


def check_trained(run: Run) -> None:
    """Raise `ParamError` if ``run`` has not trained its student, or not evaluated it before: cells were skipped."""
    if not (run.path / "model").is_dir():
        raise ParamError(f"{run.path.name} has trained no student yet: execute the cell that trains it")
    if run.status["state"] != "completed" and not (run.evaluation_dir / "untrained.jsonl").is_file():
        raise ParamError(f"{run.path.name} has not evaluated the untrained student: {_AGAIN}")
