"""What arms of a study scored: each estimate that of the scores worked out here, and the same in every table."""

from dataclasses import replace

import numpy as np
import pytest

from kepo_core.analysis.aggregate import holm, mean_over_runs_and_images
from kepo_core.analysis.arms import (
    arm_accuracies,
    arm_changes,
    arm_courses,
    arm_differences,
    by_part,
    comparison_table,
    results_table,
)
from kepo_core.analysis.claims import Outcome
from kepo_core.data.records import Answer, AnswerOutcome

MADE = Answer("", "MRI", "", "", AnswerOutcome.CORRECT, "A", True, True, 5, True)
IMAGES = {f"q{i}": f"MRI{i // 2}" if i < 4 else f"CT{i}" for i in range(8)}
WHERE, TASKS = list(IMAGES.values()), ["MRI"] * 4 + ["CT"] * 4


def answered(right) -> list[Answer]:
    """Four questions of MRI on two images, four of CT on four."""
    return [replace(MADE, question_id=f"q{i}", modality=TASKS[i], correct=bool(x)) for i, x in enumerate(right)]


def outcomes(arms: dict[str, np.ndarray], keys=((0, 0), (0, 1), (0, 2)), before=()) -> dict[str, dict]:
    return {
        name: {key: Outcome(answered(x), {}, before) for key, x in zip(keys, runs, strict=False)}
        for name, runs in arms.items()
    }


@pytest.fixture
def scores() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.random((3, 8)) < p for name, p in {"grpo": 0.3, "kepo": 0.8, "sft": 0.6}.items()}


def row(table, arm: str, part: str):
    (found,) = table[(table["arm"] == arm) & (table["part"] == part)].to_dict("records")
    return found


def test_accuracies_are_over_runs_and_images(scores) -> None:
    table = arm_accuracies(outcomes(scores), IMAGES, "MRI")
    assert list(table) == ["arm", "part", "value", "low", "high", "runs", "p"]
    assert list(table["part"].unique()) == ["MRI", "CT", "Avg.", "Avg. (OOD)"]
    estimate = mean_over_runs_and_images(scores["kepo"], WHERE, TASKS)
    found = row(table, "kepo", "Avg.")
    assert (found["value"], found["low"], found["high"]) == (estimate.value, estimate.low, estimate.high)
    assert (
        row(table, "kepo", "Avg. (OOD)")["value"] == scores["kepo"][:, 4:].mean() == row(table, "kepo", "CT")["value"]
    )
    other = arm_accuracies(outcomes(scores), IMAGES, "CT")
    assert row(other, "kepo", "Avg. (OOD)")["value"] == scores["kepo"][:, :4].mean()
    read = results_table(outcomes(scores), IMAGES, "MRI")
    assert list(read) == ["runs", "MRI", "Avg.", "Avg. (OOD)"] and read.loc["kepo", "runs"] == 3
    assert read.loc["kepo", "Avg."] == str(estimate)
    wide = by_part(table)
    assert list(wide.index) == ["grpo", "kepo", "sft"] and list(wide["MRI"]) == ["accuracy", "low", "high"]
    assert list(wide.columns.unique(level=0)) == list(table["part"].unique())
    assert wide.loc["kepo", ("Avg.", "high")] == estimate.high


def test_differences_are_paired_by_run_and_question(scores) -> None:
    made = outcomes(scores) | {"new": outcomes({"new": scores["kepo"]}, keys=[(0, 7)])["new"]}
    del made["sft"][0, 2]
    estimates = {name: mean_over_runs_and_images(scores[name][:n] * 1.0 - scores["grpo"][:n], WHERE, TASKS)
                 for name, n in {"kepo": 3, "sft": 2}.items()}  # fmt: skip
    table = comparison_table(made, "grpo", IMAGES, "MRI")
    assert list(table.index) == ["kepo", "sft"]  # the other shares no seed
    assert table["Avg."].to_dict() == {name: str(estimate) for name, estimate in estimates.items()}
    assert table["runs"].to_dict() == {"kepo": 3, "sft": 2}
    assert table.loc["kepo", "p (Holm)"] == f"{estimates['kepo'].p:.2g}" and table.loc["sft", "p (Holm)"] == "–"
    adjusted = comparison_table(outcomes(scores), "grpo", IMAGES, "MRI")["p (Holm)"]
    p = arm_differences(outcomes(scores), "grpo", IMAGES, "MRI").query("part == 'Avg.'")["p"]
    assert len(p) == 2 and adjusted.tolist() == [f"{x:.2g}" for x in holm(p.tolist())]
    one = {name: {(0, 0): made[name][0, 0]} for name in ("grpo", "kepo")}
    assert comparison_table(one, "grpo", IMAGES, "MRI").loc["kepo", "Avg."].endswith("] (one run)")
    assert comparison_table(made, "none", IMAGES, "MRI").empty
    short = made["kepo"] | {(0, 1): Outcome(answered(np.ones(3)), {})}
    for compared in ({**made, "kepo": short}, {"kepo": made["kepo"], "grpo": short}):
        with pytest.raises(ValueError, match="answered different questions"):
            comparison_table(compared, "grpo", IMAGES, "MRI")


def test_runs_of_several_students_are_pooled_over_students() -> None:
    rng = np.random.default_rng(1)
    keys = [(0, 0), (0, 1), (1, 0), (2, 5)]  # two runs of the first student, one of each other
    scores = {name: rng.random((4, 8)) < p for name, p in {"grpo": 0.3, "kepo": 0.8}.items()}
    per_student = [[x[:2].mean(axis=0), x[2], x[3]] for x in (scores["kepo"], scores["grpo"])]
    table = results_table(outcomes(scores, keys), IMAGES, "MRI")
    estimate = mean_over_runs_and_images(per_student[0], WHERE, TASKS)
    assert table.loc["kepo", "Avg."] == str(estimate) and table.loc["kepo", "runs"] == 4
    change = mean_over_runs_and_images(np.subtract(*per_student), WHERE, TASKS)
    assert comparison_table(outcomes(scores, keys), "grpo", IMAGES, "MRI").loc["kepo", "Avg."] == str(change)


def test_changes_are_from_each_runs_own_student_and_of_arms_that_train(scores) -> None:
    untrained = np.array([1, 0, 0, 0, 1, 1, 0, 0])
    made = outcomes(scores, before=answered(untrained)) | {"zero-shot": outcomes(scores)["grpo"]}
    table = arm_changes(made, IMAGES, "MRI")
    assert list(table["arm"].unique()) == ["grpo", "kepo", "sft"]
    assert row(table, "kepo", "CT")["value"] == pytest.approx((scores["kepo"] - untrained[None])[:, 4:].mean())


def test_courses_are_means_over_modalities_and_runs() -> None:
    def run(*curve) -> Outcome:
        return Outcome([], dict(curve))

    start = (0, answered([0, 0, 0, 0, 0, 0, 0, 1]))
    ends = [(5, answered(x)) for x in ([1, 1, 1, 0, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1])]
    made = {"kepo": {(0, s): run(start, end) for s, end in enumerate(ends)}, "none": {(0, 0): run()}}
    table = arm_courses(made, IMAGES, "MRI")
    assert set(table["arm"]) == {"kepo"}
    ood = table[table["part"] == "Avg. (OOD)"]
    assert ood["step"].tolist() == [0, 5] and ood["value"].tolist() == pytest.approx([1 / 4, 3 / 4])
    assert (ood["low"] < ood["value"]).all() and (ood["value"] < ood["high"]).all()
    assert arm_courses({"none": {(0, 0): run()}}, IMAGES, "MRI").empty
    with pytest.raises(ValueError, match=r"one curve has steps \[0, 5\], another \[0, 6\]"):
        arm_courses({"kepo": {(0, 0): run(start, ends[0]), (0, 1): run(start, (6, ends[1][1]))}}, IMAGES, "MRI")
