"""Gains by starting point: questions that the untrained student always, sometimes or never answers right."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kepo_core.analysis.aggregate import over_runs
from kepo_core.analysis.answers import correctness
from kepo_core.analysis.claims import Outcome
from kepo_core.data.records import Answer

STARTS = ("all wrong", "mixed", "all right")


def starts_of(samples: Sequence[Answer]) -> dict[str, str]:
    """Question id → one of STARTS, from several sampled answers of the untrained student to each question."""
    right: dict[str, list[bool]] = {}
    for answer in samples:
        right.setdefault(answer.question_id, []).append(answer.correct)
    return {q: STARTS[2 if all(flags) else 1 if any(flags) else 0] for q, flags in right.items()}


def gain_by_start(
    starts: Mapping[str, str], outcomes: Mapping[str, Sequence[Outcome]], images: Mapping[str, str]
) -> pd.DataFrame:
    """A row per method and start: number of questions, and their contribution to the method's gain, in points.

    ``starts``: from `starts_of`, for the questions to include. ``outcomes``: method → results of its runs, all from the
    student of ``starts``; methods without training are skipped. A contribution is the average over modalities of the
    change in correctness, with 0 for questions of other starts: the three add up to the gain. Intervals are from
    ``aggregate.over_runs``.
    """
    rows = []
    for method, runs in outcomes.items():
        if not all(run.before for run in runs):
            continue
        order = [answer for answer in runs[0].before if answer.question_id in starts]
        change = np.stack([correctness(run.answers, order) - correctness(run.before, order) for run in runs])
        for start in (*STARTS, "together"):
            own = np.array([start in (starts[a.question_id], "together") for a in order])
            gain = over_runs(change * own, order, images)
            rows.append({"method": method, "began": start, "questions": int(own.sum()), "gain": str(gain)})
    return pd.DataFrame(rows, columns=["method", "began", "questions", "gain"]).set_index(["method", "began"])
