"""Accuracy while it trains: some test questions are put to the student every ``curve_steps`` optimiser steps.

The answers of a step are written when the step ends, whole or not at all, before the step's checkpoint; a run that goes
on from a checkpoint has all steps up to it and makes the later ones again. Asking draws nothing from the random states
that training draws from, and so changes no bit of it.
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
    """The first ``n`` test questions of every modality, a random sample, as their order is drawn."""
    return [question for questions in tests.values() for question in questions[:n]]


class CurveWriter(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Asks every ``every`` steps, but not at the last, after which all test questions are asked anyway."""

    def __init__(self, ask: Callable[[], list[Answer]], folder: Path, every: int) -> None:
        self._ask, self._folder, self._every = ask, folder, every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the student as it is after this optimiser step.

        Of several processes all ask, for each may hold but a part of the student, and the first writes.
        """
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            answers = to_table({state.global_step: self._ask()}, "step")
            if not state.is_world_process_zero:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with in_place_of(self._folder / f"step-{state.global_step}.parquet") as partial:
                answers.to_parquet(partial, index=False)


def forget_after(folder: Path, step: int) -> None:
    """Drop what was asked behind optimiser step ``step``."""
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
    """Step → answers to ``questions``: the untrained student's at 0, those on the way, the trained one's at ``steps``.

    ``before`` and ``after`` may answer more questions. Raises ``ValueError`` if a step on the way is missing.
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
