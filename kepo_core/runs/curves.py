"""Accuracy during training: every ``curve_steps`` optimiser steps, the student answers some of the test questions.

The answers of a step are written at its end, whole or not at all, before the step's checkpoint. A run that is resumed
from a checkpoint has all answers up to it and makes the later ones again. Asking leaves the random states of training
unchanged, so training is identical to the bit.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kepo_core.analysis.answers import from_table, to_table
from kepo_core.data.records import Answer, Question
from kepo_core.files import in_place_of


def asked(tests: Mapping[str, Sequence[Question]], n: int) -> list[Question]:
    """The first ``n`` test questions of every modality: a random sample, because their order is random."""
    return [question for questions in tests.values() for question in questions[:n]]


class CurveWriter(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Asks every ``every`` steps, but not after the last step: all test questions are asked then."""

    def __init__(self, ask: Callable[[], list[Answer]], folder: Path, every: int) -> None:
        self._ask, self._folder, self._every = ask, folder, every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the student after this optimiser step.

        All processes ask, because each may hold only a part of the student; the first process writes.
        """
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            answers = to_table({state.global_step: self._ask()}, "step")
            if not state.is_world_process_zero:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with in_place_of(self._folder / f"step-{state.global_step}.parquet") as partial:
                answers.to_parquet(partial, index=False)


def forget_after(folder: Path, step: int) -> None:
    """Delete the answers of optimiser steps after ``step``."""
    for number, path in _written(folder).items():
        if number > step:
            path.unlink()


def collect(
    folder: Path,
    every: int,
    steps: int,
    questions: Sequence[Question],
    before: Sequence[Answer],
    after: Sequence[Answer],
) -> dict[int, list[Answer]]:
    """Step → answers to ``questions``: the untrained student's at 0, the trained one's at ``steps``, others in between.

    ``before`` and ``after`` may answer more questions. Raises ``ValueError`` if the answers of a step are missing.
    """
    found, expected = _written(folder), list(range(every, steps, every))
    if missing := [step for step in expected if step not in found]:
        raise ValueError(f"{folder}: the answers of step {missing[0]} are missing, expected those of {expected}.")
    known = {question.id for question in questions}
    curve = {0: [answer for answer in before if answer.question_id in known]}
    for step in expected:
        curve |= from_table(pd.read_parquet(found[step]), "step")
    return {**curve, steps: [answer for answer in after if answer.question_id in known]}


def _written(folder: Path) -> dict[int, Path]:
    numbers = {path: re.fullmatch(r"step-(\d+)", path.stem) for path in folder.glob("step-*.parquet")}
    return {int(number[1]): path for path, number in numbers.items() if number}
