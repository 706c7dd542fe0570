"""Categories are the data's own: splits, tables, figures and warnings over one, over forty, and under any name."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kepo_core.analysis import arms, claims, diagnosis, statistics, survey
from kepo_core.analysis.claims import Outcome
from kepo_core.data.check import Checked
from kepo_core.data.ledger import Ledger
from kepo_core.data.records import MODALITIES, Answer, AnswerOutcome, Question, categories
from kepo_core.data.splits import study_split
from kepo_core.pages import figures, panels

ONE = ["birds"]
FORTY = [f"plot {i:02}" for i in range(38)] + ["$x_{ of $5", "<b>Äpfel</b>"]


def questions(names: list[str]) -> list[Question]:
    return [
        Question(f"{name} {i}", "own", name, "", "What is it?", ("a", "b"), "AB"[i % 2], Path(f"/own/{name}-{i}.png"))
        for name in names
        for i in range(10)
    ]


def answers(asked: list[Question], right: int) -> list[Answer]:
    """The first ``right`` questions of each category are answered correctly."""
    seen: dict[str, int] = {}
    given = []
    for q in asked:
        seen[q.modality] = seen.get(q.modality, 0) + 1
        correct = seen[q.modality] <= right
        outcome = AnswerOutcome.CORRECT if correct else AnswerOutcome.WRONG
        given.append(Answer(q.id, q.modality, "", "x", outcome, "A", correct, True, 3, True))
    return given


def test_table_1s_modalities_come_in_its_order_and_all_others_by_name() -> None:
    assert categories(reversed(MODALITIES)) == list(MODALITIES)
    assert categories(["zebra", "OCT", "ant", "OCT", "MRI"]) == ["MRI", "OCT", "ant", "zebra"]


@pytest.mark.parametrize("names", [ONE, FORTY])
def test_a_study_of_one_category_or_of_forty(names: list[str], tmp_path: Path) -> None:
    """From the split to every table and figure of notebooks 01 to 05."""
    everything = questions(names)
    trained_on = names[0]
    train, tests = study_split(everything, trained_on, 4, 2)
    assert {q.modality for q in train} == {trained_on} and list(tests) == categories(names)
    assert [len(rows) for rows in tests.values()] == [2] * len(names)

    asked = [q for rows in tests.values() for q in rows]
    images = {q.id: str(q.image) for q in asked}
    before, after = answers(asked, 0), answers(asked, 2)
    averages = ["Avg.", "Avg. (OOD)"] if len(names) > 1 else ["Avg."]
    table = statistics.accuracy_table({"untrained": before, "trained": after}, images, trained_on)
    assert list(table.columns.unique(level=0)) == [*categories(names), *averages]
    changes = statistics.paired_differences(before, after, images, trained_on)
    assert list(changes.index) == [*categories(names), *averages] and (changes["difference"] == 1).all()
    compared = statistics.compare({"u": before, "t": after}, "u", images, trained_on)
    assert list(compared.columns[: len(averages) + 1]) == [trained_on, *averages]
    assert list(survey.counts(everything).index) == list(survey.balance(everything).index) == categories(names)
    counted = Checked(tmp_path, "raw", True, everything, Ledger()).tables()["Questions"]
    assert counted["modality"].tolist() == categories(names) and (counted["questions"] == 10).all()

    curve = {0: before, 3: before, 6: after, 9: after}
    outcomes = {arm: {(0, 0): Outcome(after, curve, before)} for arm in ("kepo-tau1", "grpo")}
    changed = arms.arm_changes(outcomes, images, trained_on)
    assert changed.loc[changed["arm"] == "grpo", "part"].tolist() == [*categories(names), *averages]
    judged = claims.claims_table(outcomes, images, trained_on)
    assert judged.empty == (len(names) == 1)  # they are about categories that were not trained on

    figures.use_style()
    axes = Figure(figsize=(11, 9), layout="constrained").subplots(3, 2)
    figures.accuracies(table, axes[0, 0], in_domain=trained_on)
    figures.differences(changes, axes[0, 1], in_domain=trained_on)
    figures.accuracy_curves(arms.arm_courses(outcomes, images, trained_on), axes[1], in_domain=trained_on)
    assert [text.get_text() for text in axes[1, 1].texts] == (["no other modality"] if len(names) == 1 else [])
    panels.gains(
        arms.arm_differences(outcomes, "grpo", images, trained_on), axes[2, 0], compared_with="g", in_domain=trained_on
    )
    panels.change_map(changed, axes[2, 1], in_domain=trained_on)
    assert len(axes[2, 1].get_xticklabels()) == len(names)
    axes[0, 0].figure.savefig(tmp_path / "drawn.png")  # a name in dollar signs is not a formula


def test_a_fall_is_said_of_any_category_and_never_of_an_average() -> None:
    asked = questions(["ants", "bees", "wasps"])
    right = answers(asked, 10)
    fallen = [a if a.modality != "wasps" else b for a, b in zip(right, answers(asked, 0), strict=True)]
    changes = statistics.paired_differences(right, fallen, None, "ants")
    signs = diagnosis.signs_of(diagnosis.training_table([]), changes, "ants")
    assert [str(sign)[:29] for sign in signs] == ["Worse after training: wasps -"]


def test_marks_of_forty_categories_are_told_apart() -> None:
    marks = {(mark["color"], mark["marker"]) for mark in map(figures.marker, range(40))}
    assert len(marks) == 40
