"""Statements over runs: against hand-worked matrices, closed forms and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from kepo_core.analysis.aggregate import (
    holm,
    interquartile_mean,
    mean_over_runs,
    mean_over_runs_and_images,
    probability_of_improvement,
    seeds_needed,
)


def test_the_t_interval_by_hand_and_a_single_run_knows_nothing_of_others() -> None:
    # 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.3027 → ± 4.3027/√3
    estimate = mean_over_runs([1, 2, 3])
    assert (estimate.value, estimate.runs) == (2, 3)
    assert (estimate.low, estimate.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert mean_over_runs([0.5]).low == -np.inf and mean_over_runs([0.5]).high == np.inf
    with pytest.raises(ValueError, match="at least one run"):
        mean_over_runs([])


def test_the_probability_of_improvement_by_hand() -> None:
    # Task 1: 2 > 1, 2 = 2, 4 > 1, 4 > 2 → 3.5/4; task 2: all below → 0.
    assert probability_of_improvement([[2, 0], [4, 0]], [[1, 1], [2, 1]]).value == pytest.approx(3.5 / 8)
    x, y = np.random.default_rng(0).random((2, 5, 3))
    assert probability_of_improvement(x, x).value == 0.5
    there, back = probability_of_improvement(x, y), probability_of_improvement(y, x)
    assert (there.value + back.value, there.low + back.high, there.p) == pytest.approx((1, 1, back.p))
    u = [stats.mannwhitneyu(x[:, m], y[:, m]).statistic / 25 for m in range(3)]
    assert there.value == pytest.approx(np.mean(u))
    assert probability_of_improvement(x + 1, y).high == 1 and probability_of_improvement(x + 1, y).low == 0
    assert probability_of_improvement(x[:1], y).low == 0
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\), expected"):
        probability_of_improvement(x, y[:, :2])


def test_the_probability_of_improvement_covers_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), []

    def draw(level: float) -> np.ndarray:  # runs are good or bad in all tasks together
        return level + rng.normal(0, 0.7, (8, 1)) + rng.normal(0, 0.7, (8, 8))

    for _ in range(1000):
        estimate = probability_of_improvement(draw(0.6), draw(0.0))
        hits.append(estimate.low <= stats.norm.cdf(0.6 / 0.7 / 2) <= estimate.high)
    assert 0.93 <= np.mean(hits) <= 0.98


def simulate(rng: np.random.Generator, runs: int, truth: float) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Correctness of two methods on 2 tasks × 80 images × 2 questions; seeds, images and questions vary."""
    tasks = ["MRI"] * 160 + ["CT"] * 160
    images = [f"{task}{i // 2}" for i, task in enumerate(tasks)]
    base = np.repeat(rng.uniform(0.25, 0.65, 160), 2)
    gain = truth + rng.normal(0, 0.03, (runs, 1)) + np.repeat(rng.normal(0, 0.08, 160), 2)
    before = rng.random((runs, 320)) < base
    after = rng.random((runs, 320)) < np.clip(base + gain, 0, 1)
    return before.astype(float), after.astype(float), images, tasks


@pytest.mark.parametrize("runs", [2, 3, 5, 12])
def test_a_difference_over_seeds_and_images_covers_as_it_says(runs: int) -> None:
    rng = np.random.default_rng(runs)
    hits = []
    for _ in range(1000):
        before, after, images, tasks = simulate(rng, runs, 0.1)
        estimate = mean_over_runs_and_images(after - before, images, tasks)
        hits.append(estimate.low <= 0.1 <= estimate.high)
    assert 0.93 <= np.mean(hits) <= 0.97


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


def test_as_many_seeds_as_are_needed_and_no_fewer() -> None:
    runs = seeds_needed(1.0, 1.0)
    rng = np.random.default_rng(0)

    def power(n: int) -> float:
        found = stats.ttest_1samp(rng.normal(1.0, 1.0, (4000, n)), 0, axis=1).pvalue < 0.05
        return float(np.mean(found))

    assert runs == 10 and power(runs) > 0.8 and power(runs - 2) < 0.8
    assert seeds_needed(0.0, 0.1) == 2 and seeds_needed(1.0, 0.5) > seeds_needed(1.0, 1.0)
    with pytest.raises(ValueError, match="expected ≥ 0 and > 0"):
        seeds_needed(1, 0)


def test_the_interquartile_mean_by_hand() -> None:
    # 2 runs × 4 tasks, 1 to 8: two are cut off at each end, 3 4 5 6 remain.
    estimate = interquartile_mean([[1, 3, 5, 7], [2, 4, 6, 8]])
    assert estimate.value == 4.5 and interquartile_mean([[1, 3, 5, 7], [2, 4, 6, 8000]]).value == 4.5
    # Left out whole: without the first run 4 and 6 remain, without the second 3 and 5 → √(1/2 · 2 · 0.5²) = 0.5.
    assert estimate.high - estimate.value == pytest.approx(stats.t.ppf(0.975, 1) * 0.5)
    assert interquartile_mean([[1, 3, 5, 7]]).high == np.inf
    with pytest.raises(ValueError, match=r"scores_RM: shape \(3,\)"):
        interquartile_mean([1, 2, 3])


@pytest.mark.parametrize("runs", [2, 3, 10])
def test_the_interquartile_mean_covers_as_it_says(runs: int) -> None:
    rng = np.random.default_rng(runs)

    def draw() -> np.ndarray:  # runs are good or bad in all tasks together
        return rng.normal(0, 0.03, (runs, 1)) + rng.normal(0, 0.03, (runs, 8)) + np.linspace(0.4, 0.9, 8)

    found = [interquartile_mean(draw()) for _ in range(1000)]
    assert 0.93 <= np.mean([e.low <= 0.65 <= e.high for e in found]) <= 0.97


def test_several_students_count_as_many_runs_not_their_seeds() -> None:
    rng = np.random.default_rng(0)
    tasks, images = ["MRI"] * 60 + ["CT"] * 60, [str(i) for i in range(120)]
    hits = {"students": [], "seeds": []}
    for _ in range(1000):
        # Five students, three seeds each; the gain is a student's own.
        students = np.repeat(range(5), 3)
        gain = 0.1 + np.repeat(rng.normal(0, 0.1, 5), 3)[:, None] + rng.normal(0, 0.05, 120)
        values = rng.normal(gain, 0.5)
        for name, who in (("students", students), ("seeds", None)):
            estimate = mean_over_runs_and_images(values, images, tasks, students_R=who)
            hits[name].append(estimate.low <= 0.1 <= estimate.high)
    assert 0.93 <= np.mean(hits["students"]) <= 0.97 and np.mean(hits["seeds"]) < 0.85
    one = mean_over_runs_and_images(values, images, tasks, students_R=["a"] * 15)
    assert one == mean_over_runs_and_images(values, images, tasks)
    with pytest.raises(ValueError, match="students_R: 2 for 15 runs"):
        mean_over_runs_and_images(values, images, tasks, students_R=["a", "b"])


def test_p_values_are_those_of_the_intervals() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, 20)
    assert mean_over_runs(x).p == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    assert np.isnan(mean_over_runs([1, 1]).p)
    estimate = mean_over_runs_and_images(x[None], [str(i) for i in range(20)], ["MRI"] * 20)
    assert estimate.p == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
