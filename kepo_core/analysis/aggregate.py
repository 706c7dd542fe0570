"""Many runs → one estimate with its interval, from the correctness of runs × questions. Pure functions.

Notation: R runs (seeds) of a method, N items (questions), M tasks (modalities). Runs of two methods with the same seed
have the same prompts in the same order, so they are paired by row. An interval over runs generalises to other seeds of
the same pretrained student, unless the rows come from several students.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from kepo_core.analysis.intervals import percent
from kepo_core.data.records import Answer

#: Minimum number of runs (or students, if there are several) for a test: the spread of two may be small by chance.
FEWEST = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its 95 % interval, its number of runs, and its p-value.

    ``p``: two-sided, for the hypothesis that the value is 0; NaN if it was not tested.
    """

    value: float
    low: float
    high: float
    runs: int
    p: float

    def __str__(self) -> str:
        if self.runs > 1 and self.low == self.high:
            return f"{100 * self.value:.1f} (all runs equal)"
        known = f"{100 * self.value:.1f}" if np.isinf(self.low) else percent(self.value, self.low, self.high)
        return known if self.runs > 1 else f"{known} (one run)"


def over_runs(
    values_RN: ArrayLike,
    order: Sequence[Answer],
    images: Mapping[str, str],
    students_R: Sequence[Hashable] | None = None,
) -> Estimate:
    """`mean_over_runs_and_images` of values for the questions of ``order``; ``images``: question id → image."""
    where, tasks = [images[answer.question_id] for answer in order], [answer.modality for answer in order]
    return mean_over_runs_and_images(values_RN, where, tasks, students_R)


def mean_over_runs_and_images(
    values_RN: ArrayLike,
    images_N: Sequence[str],
    tasks_N: Sequence[str],
    students_R: Sequence[Hashable] | None = None,
) -> Estimate:
    """The average over tasks of R runs on N items, with an interval over seeds *and* images.

    Row r is a run; column i is question i about ``images_N[i]`` in task ``tasks_N[i]``; a value is a correctness, a
    paired difference of two, or another quantity that adds up over questions. With θ the estimate and c_rk the
    contribution of image k in run r, minus its expectation,

        V = V_runs + V_images − V_cells,   θ ± t √V

    where the three are sums over pairs of cells (r, k) that share a run, an image, or both (Cameron, Gelbach & Miller
    2011). V is at least the larger of the first two; t has the degrees of freedom of the chosen V (Satterthwaite's for
    the sum). In simulation the interval covers 93 to 96 % for three to twelve runs. For two it covers 87 to 96 %, less
    the more runs differ: their spread may be small by chance, so fewer than three runs have no p. (A bootstrap over
    runs and images counts the noise of single answers three times and covers 99 %.) With one run the interval is over
    images only, for that run; (-∞, ∞) if all its items are equal.

    ``students_R`` gives each run's pretrained student. If there are several, the mean over a student's runs counts as
    one run, and the interval generalises to other students; otherwise to other seeds of the same student.

    Raises:
        ValueError: the shapes do not match.
    """
    x = np.asarray(values_RN, dtype=float)
    if x.ndim != 2 or not x.size or not x.shape[1] == len(images_N) == len(tasks_N):
        raise ValueError(
            f"values_RN: shape {x.shape} with {len(images_N)} images and {len(tasks_N)} tasks, expected (runs, items) "
            "with one image and one task per item."
        )
    if students_R is not None and len(students_R) != len(x):
        raise ValueError(f"students_R: {len(students_R)} for {len(x)} runs, expected one per run.")
    runs = len(x)
    if students_R is not None and len(set(students_R)) > 1:  # one row per student from here on
        who = np.array([str(student) for student in students_R])
        x = np.stack([x[who == student].mean(axis=0) for student in dict.fromkeys(who)])
    units, names = len(x), list(dict.fromkeys(tasks_N))
    values, of_images, of_cells, of_units, images = [], 0.0, 0.0, np.zeros(units), 0
    for task in names:
        own = np.flatnonzero(np.asarray(tasks_N) == task)
        _, image = np.unique(np.asarray(images_N)[own], return_inverse=True)
        value = float(x[:, own].mean())
        sums = np.stack([np.bincount(image, weights=row) for row in x[:, own] - value])  # (R, K)
        cells = sums / (len(own) * len(names) * units)
        k = cells.shape[1]
        correction = k / max(k - 1, 1)
        of_images += correction * float(np.sum(cells.sum(axis=0) ** 2))
        of_cells += correction * float(np.sum(cells**2))
        of_units += cells.sum(axis=1)
        values.append(value)
        images += k
    seeds = units / max(units - 1, 1) * float(np.sum(of_units**2))
    of_freedom = (float(max(units - 1, 1)), float(max(images - len(names), 1)))
    variance, free = max((seeds, of_freedom[0]), (of_images, of_freedom[1]))
    if seeds + of_images - of_cells > variance:
        variance = seeds + of_images - of_cells
        free = variance**2 / (seeds**2 / of_freedom[0] + of_images**2 / of_freedom[1])
    if units == 1 and variance < 1e-24:
        return Estimate(float(np.mean(values)), -np.inf, np.inf, runs, np.nan)
    value, error = float(np.mean(values)), float(np.sqrt(variance))
    error = error if error > 1e-12 else 0.0  # equal values, whose mean is rounded
    half = float(stats.t.ppf(0.975, free)) * error
    p = float(2 * stats.t.sf(abs(value) / error, free)) if error and units >= FEWEST else np.nan
    return Estimate(value, value - half, value + half, runs, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the i-th smallest of n times (n − i + 1), never falling, at most 1.

    Rejecting those at most α keeps the chance of any false rejection at α (Holm 1979).
    """
    n = len(p_values)
    adjusted, least = [0.0] * n, 0.0
    for rank, index in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (n - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted
