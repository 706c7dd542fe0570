"""Answers as a table and back: ``predictions.parquet`` (by model) and ``curve.parquet`` (by step)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kepo_core.data.records import Answer, AnswerOutcome

#: An accuracy curve: optimiser step → the answers after it, to the same questions each time.
Curve = Mapping[int, Sequence[Answer]]


def to_table(answers: Mapping[Any, Sequence[Answer]], by: str = "model") -> pd.DataFrame:
    """One row per answer, in order; the column ``by`` holds its key, for example the model."""
    rows = [{by: key, **asdict(answer)} for key, given in answers.items() for answer in given]
    return pd.DataFrame(rows).astype({"outcome": str})


def from_table(table: pd.DataFrame, by: str = "model") -> dict[Any, list[Answer]]:
    """The inverse of `to_table`: key → answers, in the order of the rows."""
    names = [field.name for field in fields(Answer)]
    answers: dict[Any, list[Answer]] = {}
    for row in table.to_dict("records"):
        row["outcome"] = AnswerOutcome(row["outcome"])
        answers.setdefault(row[by], []).append(Answer(**{str(name): row[name] for name in names}))
    return answers


def correctness(answers: Sequence[Answer], order: Sequence[Answer]) -> NDArray[np.float64]:
    """Right (1) or wrong (0) for every question and sample of ``order``, (items,); ``ValueError`` if one is missing."""
    right = {(answer.question_id, answer.sample): float(answer.correct) for answer in answers}
    keys = [(answer.question_id, answer.sample) for answer in order]
    if missing := [key for key in keys if key not in right]:
        raise ValueError(f"answers: {missing[0][0]} is not answered, expected the same questions in all runs.")
    return np.array([right[key] for key in keys])
