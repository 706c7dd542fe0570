"""The results of a study's arms, pooled over their runs: tidy tables, and two tables for reading.

An *arm* is a method with one combination of the study's values; (student, seed) identifies a run. A *part* of the test
is a modality, "Avg." (the unweighted mean of all) or "Avg. (OOD)" (of all except the training modality).

Tidy tables have a row per arm and part, with the fields of `Estimate`: ``arm``, ``part``, ``value``, ``low``, ``high``
(in [0, 1], differences in [-1, 1]; intervals may reach beyond), ``runs`` and ``p``. Intervals are over runs (or
students, if there are several) and images together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kepo_core.analysis.aggregate import Estimate, holm, over_runs
from kepo_core.analysis.answers import Curve, correctness
from kepo_core.analysis.claims import Key, Outcomes
from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.data.records import Answer, categories

Answers = Mapping[str, Mapping[Key, Sequence[Answer]]]  # arm → run → its answers
_FIELDS = ["value", "low", "high", "runs", "p"]


def arm_accuracies(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """The accuracy of each arm's models. Raises ``ValueError`` if two runs answered different questions."""
    return _tidy(_answers(outcomes), images, in_domain)


def arm_differences(outcomes: Outcomes, compared_with: str, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """Each other arm's accuracy minus that of ``compared_with``, paired by run and question, over common runs."""
    others = _answers(outcomes)
    reference = others.pop(compared_with, {})
    return _tidy(others, images, in_domain, dict.fromkeys(others, reference))


def arm_changes(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """Accuracy after training minus that of the run's untrained student; arms without training have no rows."""
    before = {arm: {key: run.before for key, run in runs.items() if run.before} for arm, runs in outcomes.items()}
    return _tidy(_answers(outcomes), images, in_domain, before)


def arm_courses(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """Accuracies during training, for runs with a curve: a column ``step``, and a separate interval for each step.

    Raises ``ValueError`` if the curves of an arm have different steps.
    """
    tables = [_tidy({}, images, in_domain).assign(step=0)]
    for arm, runs in outcomes.items():
        curves = {key: run.curve for key, run in runs.items() if run.curve}
        for step in _steps(list(curves.values())):
            given = {arm: {key: curve[step] for key, curve in curves.items()}}
            tables.append(_tidy(given, images, in_domain).assign(step=step))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def results_table(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """`arm_accuracies` in per cent, for reading: a row per arm, with its number of runs, in domain and on average."""
    return _cells(arm_accuracies(outcomes, images, in_domain), in_domain)


def comparison_table(outcomes: Outcomes, compared_with: str, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """`arm_differences` in points, for reading: a row per arm, in domain and on average.

    ``p (Holm)``: for the hypothesis that the difference of "Avg." is 0, adjusted for the number of tests; "–" with
    fewer than three runs, or if all runs are equal.
    """
    differences = arm_differences(outcomes, compared_with, images, in_domain)
    table = _cells(differences, in_domain)
    tests = differences[differences["part"] == AVG].dropna(subset="p")
    adjusted = {arm: f"{p:.2g}" for arm, p in zip(tests["arm"], holm(tests["p"].tolist()), strict=True)}
    return table.assign(**{"p (Holm)": [adjusted.get(str(arm), "–") for arm in table.index]})


def by_part(table: pd.DataFrame) -> pd.DataFrame:
    """`arm_accuracies` in the form of ``statistics.accuracy_table``: a row per arm, columns (part, number)."""
    numbers = ["accuracy", "low", "high"]
    wide = table.rename(columns={"value": "accuracy"}).pivot(index="arm", columns="part", values=numbers)
    columns = pd.MultiIndex.from_product([table["part"].unique(), numbers])
    return wide.swaplevel(axis=1).reindex(index=table["arm"].unique(), columns=columns)


def _answers(outcomes: Outcomes) -> dict[str, dict[Key, Sequence[Answer]]]:
    return {arm: {key: run.answers for key, run in runs.items()} for arm, runs in outcomes.items()}


def _tidy(answers: Answers, images: Mapping[str, str], in_domain: str, before: Answers | None = None) -> pd.DataFrame:
    """Accuracies of ``answers``, or their differences from the same arm and run in ``before``."""
    rows = []
    for arm, runs in answers.items():
        keys = [key for key in runs if before is None or key in before[arm]]
        if not keys:
            continue
        order, students = runs[keys[0]], [student for student, _ in keys]
        scores = _scores([runs[key] for key in keys], order)
        if before is not None:
            scores = scores - _scores([before[arm][key] for key in keys], order)
        for part, modalities in _parts(order, in_domain).items():
            own = [i for i, answer in enumerate(order) if answer.modality in modalities]
            estimate = over_runs(scores[:, own], [order[i] for i in own], images, students)
            rows.append({"arm": arm, "part": part, **asdict(estimate)})
    return pd.DataFrame(rows, columns=["arm", "part", *_FIELDS])


def _scores(runs: Sequence[Sequence[Answer]], order: Sequence[Answer]) -> NDArray[np.float64]:
    """Correctness (runs, items), in the order of the questions and samples of ``order``."""
    if any(len(given) != len(order) for given in runs):
        raise ValueError("answers: two runs answered different questions, expected the same questions in all runs.")
    return np.stack([correctness(given, order) for given in runs])


def _steps(curves: Sequence[Curve]) -> list[int]:
    """The steps of an arm's curves; empty without curves."""
    steps = [sorted(curve) for curve in curves]
    if other := [found for found in steps if found != steps[0]]:
        raise ValueError(f"runs: one curve has steps {steps[0]}, another {other[0]}, expected the same steps.")
    return steps[0] if steps else []


def _parts(order: Sequence[Answer], in_domain: str) -> dict[str, list[str]]:
    """The parts with answers: name → modalities."""
    present = categories(answer.modality for answer in order)
    parts = {**{m: [m] for m in present}, AVG: present, AVG_OOD: [m for m in present if m != in_domain]}
    return {part: modalities for part, modalities in parts.items() if modalities}


def _cells(table: pd.DataFrame, in_domain: str) -> pd.DataFrame:
    """A row per arm: its number of runs, and the estimates of three parts as text."""
    rows: dict[str, dict[str, object]] = {}
    for row in table[table["part"].isin([in_domain, AVG, AVG_OOD])].to_dict("records"):
        text = str(Estimate(**{name: row[name] for name in _FIELDS}))
        rows.setdefault(row["arm"], {"runs": row["runs"]})[row["part"]] = text
    return pd.DataFrame.from_dict(rows, orient="index")
