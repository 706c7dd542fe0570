"""The paper's claims, put to the test on a study's runs: estimate, interval, verdict (``claims.yaml``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from kepo_core.data.records import Answer
from kepo_core.study.aggregate import Estimate, holm, mean_over_runs_and_images
from kepo_core.study.answers import Curve, correctness

#: What a claim's difference is taken of, always out of distribution. Thirds are of the optimiser steps.
METRICS = {
    "final": "accuracy of the trained model",
    "early": "mean accuracy over the first third of training",
    "late change": "mean accuracy over the last third of training less that over the middle third",
}
_MARGIN = 0.01  # what "does not help" leaves room for


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper: of method ``of`` against ``against``, the difference in ``metric`` is as ``expected``.

    ``expected``: "above" or "below" 0, or "not above" a point.
    """

    claim: str
    source: str
    of: str
    against: str
    metric: str
    expected: str


@cache
def claims() -> tuple[Claim, ...]:
    """All of them, in the order of the file."""
    entries = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))
    return tuple(Claim(**entry) for entry in entries)


@dataclass(frozen=True)
class Outcome:
    """What one run left: the trained model's answers to all test questions, and its curve (empty without one)."""

    answers: Sequence[Answer]
    curve: Curve


Outcomes = Mapping[str, Mapping[tuple[int, int], Outcome]]  # method → (student, seed) → what that run left


def claims_table(outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """A row for every claim that ``outcomes`` can speak of: both methods there, with a curve where the metric needs it.

    Runs are paired by student and seed. ``points``: the difference with a 95 % interval over runs and images
    (``mean_over_runs_and_images``), out of distribution: averaged over all modalities but ``in_domain``. ``p (Holm)``:
    that it is 0 (or the margin), adjusted for the number of claims in the table. ``verdict``, at an adjusted p of 0.05:
    *held*, *not held* where the opposite is shown, else *cannot be told*. With a single run all this is about questions
    alone.
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
            "points [95 %]": f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]",
            "p (Holm)": f"{p:.2g}",
            "verdict": verdict(claim, estimate, p),
        }
        for (claim, estimate), p in zip(found.items(), adjusted, strict=True)
    ]
    return pd.DataFrame(rows)


def verdict(claim: Claim, estimate: Estimate, p: float) -> str:
    """What an estimate says of a claim, with ``p`` adjusted for the number of claims."""
    if p > 0.05:
        return "cannot be told"
    bound = _MARGIN if claim.expected == "not above" else 0.0
    return "held" if (estimate.value > bound) == (claim.expected == "above") else "not held"


def _estimate(claim: Claim, outcomes: Outcomes, images: Mapping[str, str], in_domain: str) -> Estimate | None:
    """The difference; its p is against the margin where the claim has one. None where runs or curves are missing."""
    ours, theirs = outcomes.get(claim.of, {}), outcomes.get(claim.against, {})
    keys = [key for key in ours if key in theirs]
    if claim.metric != "final":
        keys = [key for key in keys if len(ours[key].curve) > 2 and len(theirs[key].curve) > 2]
    if not keys:
        return None
    first = ours[keys[0]]
    order = [a for a in (first.curve[0] if claim.metric != "final" else first.answers) if a.modality != in_domain]
    change = np.stack([score(ours[k], claim.metric, order) - score(theirs[k], claim.metric, order) for k in keys])
    where, tasks = [images[a.question_id] for a in order], [a.modality for a in order]
    who = [key[0] for key in keys]
    estimate = mean_over_runs_and_images(change, where, tasks, students_R=who)
    if claim.expected != "not above":
        return estimate
    shifted = mean_over_runs_and_images(change - _MARGIN, where, tasks, students_R=who)
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.runs, shifted.p)


def score(outcome: Outcome, metric: str, order: Sequence[Answer]) -> NDArray[np.float64]:
    """What each question of ``order`` contributes to ``metric`` of a run: (items,) in [-1, 1].

    Raises ``ValueError`` if the run did not answer one of them.
    """
    if metric == "final":
        return correctness(outcome.answers, order)
    steps = sorted(step for step in outcome.curve if step > 0)
    last = steps[-1]

    def mean(low: float, high: float) -> NDArray[np.float64]:
        """Over the steps in (low, high] of training; where none is asked there, over the one nearest to its end."""
        inside = [step for step in steps if low * last < step <= high * last]
        chosen = inside or [min(steps, key=lambda step: abs(step - high * last))]
        values: NDArray[np.float64] = np.stack([correctness(outcome.curve[step], order) for step in chosen]).mean(
            axis=0
        )
        return values

    return mean(0, 1 / 3) if metric == "early" else mean(2 / 3, 1) - mean(1 / 3, 2 / 3)
