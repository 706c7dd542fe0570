"""Intervals, tests and tables against published values, closed forms and simulated coverage."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from kepo_core.analysis import statistics
from kepo_core.analysis.intervals import design_effect, difference_interval, mean_interval, wilson_interval
from kepo_core.analysis.statistics import format_table, mcnemar_exact, outcome_table, type_table
from kepo_core.data.records import Answer, AnswerOutcome


def accuracy_table(given, images=None, in_domain="MRI"):
    return statistics.accuracy_table(given, images, in_domain)


def paired_differences(before, after, images=None, in_domain="MRI"):
    return statistics.paired_differences(before, after, images, in_domain)


def answers(correct, modality="MRI", prefix=None):
    """Answers to questions <prefix>0, <prefix>1, … that are right where ``correct`` is true."""
    return [
        Answer(
            question_id=f"{prefix or modality}{i}",
            modality=modality,
            question_type="Disease Diagnosis",
            completion="<answer>A</answer>",
            outcome=AnswerOutcome.CORRECT if right else AnswerOutcome.WRONG,
            letter="A",
            correct=bool(right),
            format_ok=True,
            tokens=10 + i,
            finished=True,
        )
        for i, right in enumerate(correct)
    ]


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_gives_the_published_values(successes, n, expected):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - expected[1], 1 - expected[0]), abs=5e-5)


def test_wilson_holds_its_estimate_to_the_last_bit():
    for n in (*range(1, 400), 17.3, 233.7, 299.999):
        for successes in (0, n, n / 3):
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1, (successes, n)


def test_wilson_needs_a_count_within_its_total():
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 ≤ successes ≤ n"):
            wilson_interval(successes, n)


def test_mcnemar_by_hand():
    # 8 gained, 1 lost: 2 · (C(9,0) + C(9,1)) / 2^9
    before, after = answers([0] * 8 + [1] + [1, 0, 1]), answers([1] * 8 + [0] + [1, 0, 1])
    test = mcnemar_exact(before, after)
    assert (test.gained, test.lost) == (8, 1)
    assert test.p_value == pytest.approx(2 * 10 / 512)
    assert mcnemar_exact(after, before).p_value == pytest.approx(2 * 10 / 512)
    assert mcnemar_exact(before, before).p_value == 1.0


def test_pairs_are_made_by_id_not_by_position():
    before, after = answers([1, 0, 0, 0]), answers([1, 1, 0, 0])[::-1]
    assert (mcnemar_exact(before, after).gained, mcnemar_exact(before, after).lost) == (1, 0)
    assert paired_differences(before, after).loc["MRI", "difference"] == pytest.approx(0.25)


def test_unequal_questions_are_not_compared():
    with pytest.raises(ValueError, match="1 questions occur on only one side"):
        mcnemar_exact(answers([1, 0]), answers([1, 0, 1]))
    with pytest.raises(ValueError, match="occurs twice"):
        mcnemar_exact(answers([1, 0]) * 2, answers([1, 0]) * 2)
    with pytest.raises(ValueError, match="no answers"):
        paired_differences([], [])


def test_design_effect_at_its_limits():
    x = np.tile([0.0, 1.0], 30)
    assert design_effect(x, [str(i) for i in range(60)]) == 1
    # Copies of one answer are one answer: the effect is the cluster's size (up to n/(n-1) against K/(K-1)).
    copies = np.repeat(np.tile([0.0, 1.0], 15), 4)
    assert design_effect(copies, np.repeat(np.arange(30), 4)) == pytest.approx(4 * (30 / 29) / (120 / 119))
    # Opposite answers within each cluster would shrink the interval: not taken.
    assert design_effect(x, np.repeat(np.arange(30), 2)) == 1
    assert design_effect(np.ones(6), list("aabbcc")) == 1
    assert design_effect([1, 1, 0, 0], list("aabb")) == pytest.approx(3) and design_effect([1, 0], list("aa")) == 1
    with pytest.raises(ValueError, match="clusters: 2 for 3 values"):
        design_effect([0, 1, 1], ["a", "b"])


def test_the_mean_of_equal_symmetric_intervals_shrinks_by_the_root_of_their_number():
    mean, low, high = mean_interval([0.4, 0.6, 0.5, 0.5], [(0.3, 0.5), (0.5, 0.7), (0.4, 0.6), (0.4, 0.6)])
    assert (mean, low, high) == pytest.approx((0.5, 0.45, 0.55))
    # The asymmetry of a part shows: only the upper side has room at 0.
    mean, low, high = mean_interval([0.0, 0.0], [(0.0, 0.2), (0.0, 0.2)])
    assert (mean, low) == (0, 0)
    assert high == pytest.approx(np.sqrt(0.08) / 2)


def test_the_paired_interval_by_hand():
    # Bonett & Price: n = 98, g = 20, l = 10 → d̃ = 10/100, ṽ = (32/100 - 0.01)/100
    low, high = difference_interval(20, 10, 98)
    half = 1.959964 * np.sqrt(0.31 / 100)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    low, high = difference_interval(0, 0, 50)
    assert low == pytest.approx(-high)
    assert high > 0
    assert difference_interval(40, 0, 40)[1] == 1 and difference_interval(0, 40, 40)[0] == -1


def test_the_table_has_the_papers_columns_and_averages():
    given = [*answers([1] * 3 + [0] * 7, "CT"), *answers([1] * 9 + [0], "MRI"), *answers([1, 0], "OCT")]
    table = accuracy_table({"student": given})
    assert list(table.columns.unique(level=0)) == ["MRI", "CT", "OCT", "Avg.", "Avg. (OOD)"]
    row = table.loc["student"]
    assert row[("CT", "accuracy")] == pytest.approx(0.3)
    assert (row[("CT", "low")], row[("CT", "high")]) == pytest.approx(wilson_interval(3, 10))
    # Unweighted means over modalities, not over questions.
    assert row[("Avg.", "accuracy")] == pytest.approx((0.3 + 0.9 + 0.5) / 3)
    assert row[("Avg. (OOD)", "accuracy")] == pytest.approx(0.4)
    assert row[("Avg. (OOD)", "n")] == 12
    assert row[("Avg.", "low")] < row[("Avg.", "accuracy")] < row[("Avg.", "high")]


def test_question_types_have_their_own_table():
    kinds = {"Lesion Grading": [1, 1, 0], "Disease Diagnosis": [0, 1, 1, 1, 0], "": [1]}
    given = [replace(answer, question_type=kind) for kind, right in kinds.items() for answer in answers(right, "CT")]
    table = type_table({"a": given, "b": given[:3]})
    assert list(table.columns.unique(level=0)) == ["(not given)", "Disease Diagnosis", "Lesion Grading"]
    assert table.loc["a", ("Disease Diagnosis", "accuracy")] == pytest.approx(0.6)
    assert table.loc["a", ("Disease Diagnosis", "n")] == 5
    assert tuple(table.loc["a", [("Lesion Grading", "low"), ("Lesion Grading", "high")]]) == wilson_interval(2, 3)
    assert np.isnan(table.loc["b", ("Disease Diagnosis", "accuracy")])
    together = type_table({"a": given}, images={answer.question_id: "one picture" for answer in given})
    assert together.loc["a", ("Disease Diagnosis", "n")] == 5


def test_out_of_domain_means_not_the_training_modality():
    given = [*answers([1] * 4, "CT"), *answers([0] * 4, "MRI"), *answers([0] * 4, "OCT")]
    assert accuracy_table({"m": given}, in_domain="CT").loc["m", ("Avg. (OOD)", "accuracy")] == 0
    assert accuracy_table({"m": given}).loc["m", ("Avg. (OOD)", "accuracy")] == pytest.approx(0.5)
    before = [*answers([0] * 4, "CT"), *answers([0] * 4, "MRI"), *answers([0] * 4, "OCT")]
    assert paired_differences(before, given, in_domain="CT").loc["Avg. (OOD)", "difference"] == 0
    assert paired_differences(before, given, in_domain="CT").loc["Avg. (OOD)", "gained"] == 0
    only = accuracy_table({"m": answers([1, 0], "Microscopy")}, in_domain="Microscopy")
    assert "Avg. (OOD)" not in only.columns.unique(level=0)


def test_a_model_that_lacks_a_modality_gets_no_average():
    table = accuracy_table({"all": [*answers([1], "MRI"), *answers([1], "CT")], "some": answers([1], "MRI")})
    assert np.isnan(table.loc["some", ("Avg.", "accuracy")])
    assert table.loc["all", ("Avg.", "accuracy")] == 1
    assert list(format_table(table).loc["some"])[1:] == ["–", "–", "–"]
    assert format_table(table).loc["some", "MRI"] == "100.0 [20.7, 100.0]"


def test_shared_images_widen_every_interval():
    x = np.repeat(np.tile([0, 1], 10), 5)
    images = {f"MRI{i}": str(i // 5) for i in range(100)}
    alone, shared = (accuracy_table({"m": answers(x)}, images=i).loc["m", "MRI"] for i in (None, images))
    assert shared["accuracy"] == alone["accuracy"]
    deff = design_effect(x, np.repeat(np.arange(20), 5))
    assert (shared["low"], shared["high"]) == pytest.approx(wilson_interval(50 / deff, 100 / deff))
    assert shared["high"] - shared["low"] > 2 * (alone["high"] - alone["low"]) * 0.95
    flipped = answers(1 - x)
    alone, shared = (paired_differences(answers(x), flipped, images=i).loc["MRI"] for i in (None, images))
    assert shared["high"] - shared["low"] > 1.9 * (alone["high"] - alone["low"])


def test_where_all_answers_are_right_each_image_counts_once():
    """Their spread shows no design effect, which need not be small: true at 98 %, images alike, it is several."""
    images = {f"MRI{i}": str(i // 5) for i in range(100)}
    low = accuracy_table({"m": answers([1] * 100)}, images=images).loc["m", ("MRI", "low")]
    assert low == wilson_interval(20, 20)[0] < wilson_interval(100, 100)[0]
    rng, hits = np.random.default_rng(0), []
    for _ in range(100):
        x = _clustered(rng, 60, 5, 0.98, 1 / 9)  # a correlation of 0.9 within images
        row = accuracy_table({"m": answers(x)}, images={f"MRI{i}": str(i // 5) for i in range(300)}).loc["m", "MRI"]
        hits.append(row["low"] <= 0.98 <= row["high"])
    assert covers(hits)


def test_the_paired_interval_is_widened_by_how_alike_the_changes_are_not_the_answers():
    # Answers agree within each image of two, changes do not: every second question is gained.
    images, alike = np.repeat(np.arange(20), 2), np.repeat([1, 0] * 10, 2)
    after = np.maximum(alike, np.tile([0, 1], 20))
    row = paired_differences(answers(alike), answers(after), {f"MRI{i}": str(k) for i, k in enumerate(images)}).loc[
        "MRI"
    ]
    assert design_effect(alike, images) > 1.9
    assert design_effect(after - alike, images) == 1
    assert (row["low"], row["high"]) == pytest.approx(difference_interval(10, 0, 40))


def test_differences_per_modality_and_on_average():
    before = [*answers([0] * 40, "MRI"), *answers([1] * 10, "CT"), *answers([1, 0] * 5, "OCT")]
    after = [*answers([1] * 30 + [0] * 10, "MRI"), *answers([1] * 8 + [0] * 2, "CT"), *answers([1, 0] * 5, "OCT")]
    table = paired_differences(before, after)
    assert list(table.index) == ["MRI", "CT", "OCT", "Avg.", "Avg. (OOD)"]
    assert list(table["difference"]) == pytest.approx([0.75, -0.2, 0.0, 0.55 / 3, -0.1])
    assert list(table["before"]) == pytest.approx([0, 1, 0.5, 0.5, 0.75])
    assert list(table["gained"]) == [30, 0, 0, 30, 0]
    assert list(table["lost"]) == [0, 2, 0, 2, 2]
    assert table.loc["MRI", "p_value"] == pytest.approx(2**-29)
    assert (table["low"] <= table["difference"]).all()
    assert (table["difference"] <= table["high"]).all()
    assert (table["low"] < table["high"]).all()


def test_outcomes_are_counted_and_none_leaves_the_denominator():
    given = answers([1, 1, 0])
    given += [
        Answer("t", "MRI", "", "<think>", AnswerOutcome.TRUNCATED, "", False, False, 48, False),
        Answer("a", "MRI", "", "A or B", AnswerOutcome.AMBIGUOUS, "", False, True, 9, True),
    ]
    row = outcome_table({"m": given}).loc["m"]
    assert (row["correct"], row["wrong"], row["missing"], row["ambiguous"], row["truncated"]) == (2, 1, 0, 1, 1)
    assert (row["n"], row["format_ok"], row["finished"], row["tokens_median"]) == (5, 4, 4, 11)
    assert accuracy_table({"m": given}).loc["m", ("MRI", "accuracy")] == pytest.approx(0.4)


def _clustered(rng, images, per_image, p, spread):
    """Correctness (images · per_image,) of questions whose difficulty varies by image around p."""
    difficulty = rng.beta(p * spread, (1 - p) * spread, images)
    return (rng.random((images, per_image)) < difficulty[:, None]).astype(int).ravel()


def covers(hits):
    """Whether as many intervals hold the truth as 95 % ones would, but for chances of 1 in 1,000."""
    low, high = stats.binom.ppf([0.0005, 0.9995], len(hits), 0.95)
    return low <= np.sum(hits) <= high


def test_intervals_by_image_cover_as_they_say():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(100), 3)
    hits = []
    for _ in range(400):
        x = _clustered(rng, 100, 3, 0.7, 2.0)
        n = len(x) / design_effect(x, clusters)
        low, high = wilson_interval(x.mean() * n, n)
        hits.append(low <= 0.7 <= high)
    assert covers(hits)


def test_paired_and_mean_intervals_cover_as_they_say():
    rng = np.random.default_rng(1)
    truth = np.array([0.15, -0.05, 0.0])
    single, mean = [], []
    for _ in range(400):
        estimates, intervals = [], []
        for d in truth:
            gained, lost, _ = rng.multinomial(300, [0.1 + max(d, 0), 0.1 + max(-d, 0), 0.8 - abs(d)])
            estimates.append((gained - lost) / 300)
            intervals.append(difference_interval(gained, lost, 300))
        single.append(intervals[0][0] <= truth[0] <= intervals[0][1])
        _, low, high = mean_interval(estimates, intervals)
        mean.append(low <= truth.mean() <= high)
    assert covers(single) and covers(mean)


def test_the_paired_interval_by_image_agrees_with_a_bootstrap_over_images():
    rng = np.random.default_rng(2)
    before = _clustered(rng, 120, 3, 0.4, 2.0)
    after = np.maximum(before, _clustered(rng, 120, 3, 0.3, 1.0))
    images = {f"MRI{i}": str(i // 3) for i in range(360)}
    row = paired_differences(answers(before), answers(after), images).loc["MRI"]
    sums = (after - before).reshape(120, 3).sum(1)
    draws = sums[rng.integers(0, 120, (4000, 120))].sum(1) / 360
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012)


def test_several_answers_to_a_question_are_one_question():
    # Copies of an answer say nothing new: the same interval as of one answer each.
    x = np.tile([1, 0, 1, 1, 0], 8)
    once = answers(x)
    copies = [replace(answer, sample=k) for answer in once for k in range(4)]
    assert accuracy_table({"m": copies}).loc["m", ("MRI", "n")] == 40
    one, four = (accuracy_table({"m": given}).loc["m", "MRI"].astype(float) for given in (once, copies))
    assert (four["accuracy"], four["low"], four["high"]) == pytest.approx(
        (one["accuracy"], one["low"], one["high"]), abs=0.003
    )
    # Nor where all agree, or where there is one question alone.
    for same in ([1] * 40, [0]):
        one, four = (accuracy_table({"m": given}).loc["m", "MRI"].astype(float).tolist() for given in (
            answers(same), [replace(answer, sample=k) for answer in answers(same) for k in range(4)]))  # fmt: skip
        assert four == pytest.approx(one)
    unchanged = [paired_differences(given, given).loc["MRI", "high"] for given in (once, copies)]
    assert unchanged[0] == pytest.approx(unchanged[1], rel=0.02)
    # Answers that vary within a question say more than one each, and less than as many questions.
    rng = np.random.default_rng(0)
    share = rng.random(60)
    varied = [replace(answer, sample=k) for k in range(8) for answer in answers(rng.random(60) < share)]
    row, as_if = (
        accuracy_table({"m": given}).loc["m", "MRI"] for given in (varied, answers([a.correct for a in varied]))
    )
    assert row["high"] - row["low"] > 1.5 * (as_if["high"] - as_if["low"])
    # A question is gained whose share of right answers rises, however many of its answers changed.
    after = [replace(answer, correct=True) for answer in varied]
    unsure = {a.question_id for a in varied if not a.correct}
    compared = mcnemar_exact(varied, after)
    assert (compared.gained, compared.lost) == (len(unsure), 0)
    assert paired_differences(varied, after).loc["MRI", "n"] == 60
    with pytest.raises(ValueError, match="expected each of its samples once"):
        mcnemar_exact(varied, [replace(answer, sample=0) for answer in after])
