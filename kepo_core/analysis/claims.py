"""Tests of the paper's claims (``claims.yaml``) on a study's runs: estimate, interval, verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from kepo_core.analysis.aggregate import Estimate, holm, over_runs
from kepo_core.analysis.answers import Curve, correctness
from kepo_core.analysis.intervals import percent
from kepo_core.data.records import Answer

#: The quantities that claims compare, always out of distribution. A third is a third of the optimiser steps.
METRICS = {
    "final": "accuracy of the trained model",
    "early": "mean accuracy over the first third of training",
    "throughout": "mean accuracy over all of training",
    "late change": "mean accuracy over the last third of training minus that over the middle third",
}
_MARGIN = 0.01  # "does not help" allows a gain of up to one point


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: ``metric`` of method ``of`` minus that of method ``against`` is as ``expected``.

    ``expected``: "above" or "below" (0), or "not above" (one point).
    """

    claim: str
    source: str
    of: str
    against: str
    metric: str
    expected: str


@cache
def claims() -> tuple[Claim, ...]:
    """All claims, in the order of the file."""
    entries = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))
    return tuple(Claim(**entry) for entry in entries)


@dataclass(frozen=True)
class Outcome:
    """The results of one run: the trained model's answers to all test questions, its curve (empty without one), and the
    untrained student's answers (empty if nothing was trained).
    """

    answers: Sequence[Answer]
    curve: Curve
    before: Sequence[Answer] = ()


#: A run within its arm: the number of its pretrained student, and its seed.
Key = tuple[int, int]
Outcomes = Mapping[str, Mapping[Key, Outcome]]  # arm (method) → run → its results


def claims_table(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """A row for every claim that ``outcomes`` can test: both methods have runs, and curves if the metric needs them.

    Runs are paired by student and seed. ``points``: the difference with a 95 % interval over runs and images
    (``aggregate.over_runs``), out of distribution: averaged over all modalities except ``in_domain``. ``p (Holm)``: for
    the hypothesis that it is 0 (or the margin), adjusted for the number of claims in the table. ``verdict``, at an
    adjusted p of 0.05: *held*; *not held* if the opposite is shown; else *inconclusive*. Fewer than three runs (or
    students, if there are several) have no p and are inconclusive, and so is a claim about degrading if the other
    method does not degrade. With a single run the interval covers only its questions.
    """
    found: dict[Claim, Estimate] = {}
    for claim in claims():
        estimate = _estimate(claim, outcomes, images, in_domain)
        if estimate is not None:
            found[claim] = estimate
    adjusted = holm([1.0 if np.isnan(e.p) else e.p for e in found.values()])
    rows = [
        {
            "claim": claim.claim,
            "in the paper": claim.source,
            "difference": f"{claim.of} − {claim.against}, {claim.metric}",
            "runs": estimate.runs,
            "points [95 %]": percent(estimate.value, estimate.low, estimate.high, sign="+"),
            "p (Holm)": "–" if np.isnan(estimate.p) else "<0.001" if p < 0.001 else f"{p:.2g}",
            "verdict": verdict(claim, estimate, p),
        }
        for (claim, estimate), p in zip(found.items(), adjusted, strict=True)
    ]
    columns = ["claim", "in the paper", "difference", "runs", "points [95 %]", "p (Holm)", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def verdict(claim: Claim, estimate: Estimate, p: float) -> str:
    """The verdict on a claim: "held", "not held" or "inconclusive". ``p`` is adjusted for the number of claims."""
    if p > 0.05:
        return "inconclusive"
    bound = _MARGIN if claim.expected == "not above" else 0.0
    return "held" if (estimate.value > bound) == (claim.expected == "above") else "not held"


def _estimate(claim: Claim, outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> Estimate | None:
    """The difference, with p against the margin if the claim has one. None if runs or curves are missing."""
    ours, theirs = outcomes.get(claim.of, {}), outcomes.get(claim.against, {})
    keys = [key for key in ours if key in theirs]
    if claim.metric != "final":
        keys = [key for key in keys if all(thirds(run.curve) for run in (ours[key], theirs[key]))]
    if not keys:
        return None
    first = ours[keys[0]]
    order = [a for a in (first.curve[0] if claim.metric != "final" else first.answers) if a.modality != in_domain]
    if not order:
        return None
    scores = [np.stack([score(side[key], claim.metric, order) for key in keys]) for side in (ours, theirs)]
    change, students = scores[0] - scores[1], [student for student, _ in keys]
    estimate = over_runs(change, order, images, students)
    if claim.metric == "late change" and over_runs(scores[1], order, images, students).value >= 0:
        return replace(estimate, p=np.nan)  # without degradation there is no claim: a slow learner would always win
    if claim.expected != "not above":
        return estimate
    return replace(estimate, p=over_runs(change - _MARGIN, order, images, students).p)


def score(outcome: Outcome, metric: str, order: Sequence[Answer]) -> NDArray[np.float64]:
    """The contribution of each question of ``order`` to ``metric`` of a run: (items,) in [-1, 1].

    Raises ``ValueError`` if the run did not answer a question, or if a third of training has no step of its curve.
    """
    if metric == "final":
        return correctness(outcome.answers, order)
    first, middle, last = thirds(outcome.curve) or ([], [], [])
    if not first:
        raise ValueError("curve: a third of training has no evaluated step, expected at least one in each.")

    def mean(steps: Sequence[int]) -> NDArray[np.float64]:
        right = [correctness(outcome.curve[step], order) for step in steps]
        return np.asarray(np.mean(right, axis=0), dtype=np.float64)

    if metric == "late change":
        return mean(last) - mean(middle)
    return mean(first if metric == "early" else [*first, *middle, *last])


def thirds(curve: Curve) -> tuple[list[int], list[int], list[int]] | None:
    """The evaluated steps of the first, middle and last third of training; ``None`` if one of them has none."""
    last = max(curve, default=0)
    steps = sorted(step for step in curve if step > 0)
    parts = [[step for step in steps if k * last < 3 * step <= (k + 1) * last] for k in range(3)]
    return (parts[0], parts[1], parts[2]) if all(parts) else None
