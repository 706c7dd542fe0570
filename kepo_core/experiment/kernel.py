"""Cells of a live notebook can be executed twice and in any order: what would make the run's record untrue is refused.

A kernel keeps what it has trained. A run that is resumed is another process, which loads the student anew.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn

from kepo_core.errors import ParamError
from kepo_core.method.resume import last_checkpoint
from kepo_core.params import PLACES, Params
from kepo_core.runs.run import Run

#: Students whose training has begun in this process.
_begun: "WeakSet[nn.Module]" = WeakSet()
_AGAIN = "execute the cells from the one that loads the models on: they make a new run"


def begin_training(params: Params, run: Run, data: Mapping[str, Any], student: nn.Module) -> None:
    """Note that ``student`` is trained now. ``data`` is `StudyData.identity`.

    Raises:
        ParamError: it was trained before and no checkpoint says how far, or parameters or data are no longer those of
            the run, or the run has completed.
    """
    if run.status["state"] == "completed":
        raise ParamError(f"{run.path.name} has completed, and no run is ever overwritten: {_AGAIN}")
    if params.hash != run.params.hash:
        recorded, now = run.params.to_dict(), params.to_dict()
        name = next(n for n in recorded | now if n not in PLACES and recorded.get(n) != now.get(n))
        raise ParamError(f"{name} is {now.get(name)!r} but {recorded.get(name)!r} in {run.path.name}: {_AGAIN}")
    if run.provenance.get("data", data) != data:
        raise ParamError(f"the data are no longer those that {run.path.name} has recorded: {_AGAIN}")
    if student in _begun and (params.lora_rank or last_checkpoint(run.training_dir) is None):
        raise ParamError(f"the student has been trained in this kernel already, and would be once more: {_AGAIN}")
    _begun.add(student)


def check_untrained(student: nn.Module, kept: Path | None, asked: int) -> None:
    """Raise `ParamError` where a trained student would give the ``asked`` answers of ``untrained.jsonl``."""
    if student not in _begun or kept is None or kept.stem != "untrained":
        return
    if not kept.is_file() or kept.read_bytes().count(b"\n") <= asked:  # a line of its own comes first
        raise ParamError(f"the student has been trained already, and was not asked all questions before: {_AGAIN}")
