"""What the arms of a study scored, pooled over their runs: tidy tables, and two of them for reading.

An *arm* is a method with one combination of a study's values; its runs are named by (student, seed). A *part* of the
test is a modality, "Avg." (the unweighted mean of all) or "Avg. (OOD)" (of all but the one that was trained on).

Tidy tables have a row per arm and part, with the fields of `Estimate`: ``arm``, ``part``, ``value``, ``low``, ``high``
(in [0, 1], differences in [-1, 1], intervals may reach beyond), ``runs`` and ``p``. Intervals are over runs (students,
where there are several) and images together.
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
    """How accurate each arm's models are. Raises ``ValueError`` if two runs answered different questions."""
    return _tidy(_answers(outcomes), images, in_domain)


def arm_differences(outcomes: Outcomes, compared_with: str, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """Each other arm's accuracy less that of ``compared_with``, paired by run and question, by the runs both have."""
    others = _answers(outcomes)
    reference = others.pop(compared_with, {})
    return _tidy(others, images, in_domain, dict.fromkeys(others, reference))


def arm_changes(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """What training changed, against each run's own untrained student; arms that train nothing have no rows."""
    before = {arm: {key: run.before for key, run in runs.items() if run.before} for arm, runs in outcomes.items()}
    return _tidy(_answers(outcomes), images, in_domain, before)


def arm_courses(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """Accuracies on the way, of runs with a curve: with the column ``step``, intervals of each step by itself.

    Raises ``ValueError`` if runs of an arm asked at different steps.
    """
    tables = [_tidy({}, images, in_domain).assign(step=0)]
    for arm, runs in outcomes.items():
        curves = {key: run.curve for key, run in runs.items() if run.curve}
        for step in _steps(list(curves.values())):
            given = {arm: {key: curve[step] for key, curve in curves.items()}}
            tables.append(_tidy(given, images, in_domain).assign(step=step))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def results_table(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """`arm_accuracies` in per cent, for reading: a row per arm, with its runs, in domain and on average."""
    return _cells(arm_accuracies(outcomes, images, in_domain), in_domain)


def comparison_table(outcomes: Outcomes, compared_with: str, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """`arm_differences` in points, for reading: a row per arm, in domain and on average.

    ``p (Holm)``: that the difference of "Avg." is 0, adjusted for the number of tests; none with fewer than three runs,
    or where they are all alike.
    """
    differences = arm_differences(outcomes, compared_with, images, in_domain)
    table = _cells(differences, in_domain)
    tests = differences[differences["part"] == AVG].dropna(subset="p")
    adjusted = {arm: f"{p:.2g}" for arm, p in zip(tests["arm"], holm(tests["p"].tolist()), strict=True)}
    return table.assign(**{"p (Holm)": [adjusted.get(str(arm), "–") for arm in table.index]})


def by_part(table: pd.DataFrame) -> pd.DataFrame:
    """`arm_accuracies` in the shape of ``statistics.accuracy_table``: a row per arm, columns (part, number)."""
    numbers = ["accuracy", "low", "high"]
    wide = table.rename(columns={"value": "accuracy"}).pivot(index="arm", columns="part", values=numbers)
    columns = pd.MultiIndex.from_product([table["part"].unique(), numbers])
    return wide.swaplevel(axis=1).reindex(index=table["arm"].unique(), columns=columns)


def _answers(outcomes: Outcomes) -> dict[str, dict[Key, Sequence[Answer]]]:
    return {arm: {key: run.answers for key, run in runs.items()} for arm, runs in outcomes.items()}


def _tidy(answers: Answers, images: Mapping[str, str], in_domain: str, before: Answers | None = None) -> pd.DataFrame:
    """Accuracies of ``answers``, or their differences from those of the same arm and run in ``before``."""
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
    """Correctness (runs, items) in the order of ``order``'s questions and samples."""
    if any(len(given) != len(order) for given in runs):
        raise ValueError("answers: two runs answered different questions, expected the same ones of all.")
    return np.stack([correctness(given, order) for given in runs])


def _steps(curves: Sequence[Curve]) -> list[int]:
    """The steps at which all of an arm's runs asked; none without a run."""
    steps = [sorted(curve) for curve in curves]
    if other := [found for found in steps if found != steps[0]]:
        raise ValueError(f"runs: one asked at the steps {steps[0]}, another at {other[0]}, expected the same ones.")
    return steps[0] if steps else []


def _parts(order: Sequence[Answer], in_domain: str) -> dict[str, list[str]]:
    """The parts that there are answers for: name → modalities."""
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
