"""Statements over runs: against hand-worked matrices, closed forms and simulated coverage."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from kepo_core.analysis.aggregate import Estimate, holm, mean_over_runs_and_images


def covers(hits: Sequence[bool]) -> bool:
    """Whether as many intervals hold the truth as 95 % ones would, but for chances of 1 in 1,000."""
    low, high = stats.binom.ppf([0.0005, 0.9995], len(hits), 0.95)
    return bool(low <= np.sum(hits) <= high)


def simulate(rng: np.random.Generator, runs: int, truth: float) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Correctness of two methods on 2 tasks × 80 images × 2 questions; seeds, images and questions vary."""
    tasks = ["MRI"] * 160 + ["CT"] * 160
    images = [f"{task}{i // 2}" for i, task in enumerate(tasks)]
    base = np.repeat(rng.uniform(0.25, 0.65, 160), 2)
    gain = truth + rng.normal(0, 0.03, (runs, 1)) + np.repeat(rng.normal(0, 0.08, 160), 2)
    before = rng.random((runs, 320)) < base
    after = rng.random((runs, 320)) < np.clip(base + gain, 0, 1)
    return before.astype(float), after.astype(float), images, tasks


def test_the_variance_is_of_runs_and_images_less_what_both_count() -> None:
    # Run r and image k add 1, 0, −1 and 1½, ½, −½, −1½. In 1/144: (3/2) Σ (4 a_r)² = 48 of runs, (4/3) Σ (3 b_k)² = 60
    # of images, (4/3) Σ (a_r + b_k)² = 92/3 of cells.
    values = np.array([[1], [0], [-1]]) + np.array([1.5, 0.5, -0.5, -1.5])
    estimate = mean_over_runs_and_images(values, list("abcd"), ["MRI"] * 4)
    variance = 48 + 60 - 92 / 3
    half = stats.t.ppf(0.975, variance**2 / (48**2 / 2 + 60**2 / 3)) * np.sqrt(variance / 144)
    assert (estimate.low, estimate.high) == pytest.approx((-half, half))


@pytest.mark.parametrize(
    "runs", [pytest.param(2, marks=pytest.mark.slow), 3, 5, pytest.param(12, marks=pytest.mark.slow)]
)
def test_a_difference_over_seeds_and_images_covers_as_it_says(runs: int) -> None:
    rng = np.random.default_rng(runs)
    hits = []
    for _ in range(400):
        before, after, images, tasks = simulate(rng, runs, 0.1)
        estimate = mean_over_runs_and_images(after - before, images, tasks)
        hits.append(estimate.low <= 0.1 <= estimate.high)
    assert covers(hits)


def test_a_difference_over_seeds_and_images_at_its_limits() -> None:
    before, after, images, tasks = simulate(np.random.default_rng(1), 4, 0.1)
    estimate = mean_over_runs_and_images(after - before, images, tasks)
    by_task = [(after - before)[:, [t == task for t in tasks]].mean() for task in ("MRI", "CT")]
    assert estimate.value == pytest.approx(np.mean(by_task))
    assert mean_over_runs_and_images(before - before, images, tasks).high == 0
    # More seeds of the same questions cannot make the questions more.
    copies = mean_over_runs_and_images(np.repeat((after - before)[:1], 40, axis=0), images, tasks)
    alone = mean_over_runs_and_images((after - before)[:1], images, tasks)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.01)
    # One image a question and no difference between seeds: the plain standard error of a mean.
    x = np.random.default_rng(0).normal(size=(1, 50))
    plain = mean_over_runs_and_images(x, [str(i) for i in range(50)], ["MRI"] * 50)
    assert (plain.high - plain.low) / 2 == pytest.approx(stats.t.ppf(0.975, 49) * stats.sem(x[0]))
    # Where one run's items are all alike, nothing is seen of their spread.
    alike = mean_over_runs_and_images([[1, 1, 0]], ["a", "b", "c"], ["MRI", "MRI", "CT"])
    assert (alike.value, alike.low, alike.high) == (0.5, -np.inf, np.inf) and str(alike) == "50.0 (one run)"
    assert str(alone).endswith("] (one run)") and str(copies)[-1] == "]"
    assert str(Estimate(0.5, 0.5, 0.5, 3, np.nan)) == "50.0 (all runs equal)"
    with pytest.raises(ValueError, match="with 320 images and 3 tasks"):
        mean_over_runs_and_images(after - before, images, ["MRI"] * 3)


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04: 4·.01, 3·.02, 2·.03 and, as they never fall, .06 once more.
    assert holm([0.02, 0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.06, 0.04, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


def test_holm_keeps_the_chance_of_any_false_rejection() -> None:
    rng = np.random.default_rng(0)
    wrong = [min(holm(rng.random(8).tolist())) <= 0.05 for _ in range(2000)]
    assert np.mean(wrong) < 0.065


def test_several_students_count_as_many_runs_not_their_seeds() -> None:
    rng = np.random.default_rng(0)
    tasks, images = ["MRI"] * 60 + ["CT"] * 60, [str(i) for i in range(120)]
    hits = {"students": [], "seeds": []}
    for _ in range(400):
        # Five students, three seeds each; the gain is a student's own.
        students = np.repeat(range(5), 3)
        gain = 0.1 + np.repeat(rng.normal(0, 0.1, 5), 3)[:, None] + rng.normal(0, 0.05, 120)
        values = rng.normal(gain, 0.5)
        for name, who in (("students", students), ("seeds", None)):
            estimate = mean_over_runs_and_images(values, images, tasks, students_R=who)
            hits[name].append(estimate.low <= 0.1 <= estimate.high)
    assert covers(hits["students"]) and np.mean(hits["seeds"]) < 0.85
    one = mean_over_runs_and_images(values, images, tasks, students_R=["a"] * 15)
    assert one == mean_over_runs_and_images(values, images, tasks)
    with pytest.raises(ValueError, match="students_R: 2 for 15 runs"):
        mean_over_runs_and_images(values, images, tasks, students_R=["a", "b"])


def test_p_values_are_those_of_the_intervals() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, 20)
    images, tasks = [str(i) for i in range(20)], ["MRI"] * 20
    estimate = mean_over_runs_and_images([x, x, x], images, tasks)
    assert estimate.p == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    assert np.isnan(mean_over_runs_and_images(np.ones((3, 20)), images, tasks).p)  # no spread is seen
    # Of two runs the spread may look small by chance, and so of the runs of two students.
    assert np.isnan(mean_over_runs_and_images([x, x], images, tasks).p)
    assert np.isnan(mean_over_runs_and_images([x] * 4, images, tasks, students_R=["a", "a", "b", "b"]).p)
