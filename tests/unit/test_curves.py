"""Accuracy while training: what is asked, kept and forgotten."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kepo_core.analysis.answers import correctness, from_table, to_table
from kepo_core.data.records import Answer, AnswerOutcome, Question
from kepo_core.runs.curves import CurveWriter, asked, collect, forget_after

MADE = Answer("", "MRI", "", "", AnswerOutcome.CORRECT, "A", True, True, 5, True)


def answered(right) -> list[Answer]:
    return [replace(MADE, question_id=f"q{i}", modality="MRI" if i < 2 else "CT", correct=bool(x))
            for i, x in enumerate(right)]  # fmt: skip


QUESTIONS = [Question(f"q{i}", "made", "MRI", "", "", ("a", "b"), "A", Path("x.png")) for i in range(3)]


def test_answers_survive_the_table() -> None:
    given = {10: answered([1, 0, 1]), 0: [replace(MADE, outcome=AnswerOutcome.MISSING, letter="", sample=3)]}
    assert from_table(to_table(given, "step"), "step") == given


def test_the_writer_asks_on_the_way_and_what_comes_after_a_checkpoint_is_forgotten(tmp_path: Path) -> None:
    folder, now = tmp_path / "evaluation", []
    writer = CurveWriter(lambda: answered(now), folder, every=2)
    for step in range(1, 7):
        now[:] = [step > 3, 1, 0]
        writer.on_step_end(None, SimpleNamespace(global_step=step, max_steps=6, is_world_process_zero=True), None)
    elsewhere = CurveWriter(lambda: asked_elsewhere.append(1) or answered(now), tmp_path / "elsewhere", every=2)
    asked_elsewhere: list[int] = []
    elsewhere.on_step_end(None, SimpleNamespace(global_step=2, max_steps=6, is_world_process_zero=False), None)
    assert asked_elsewhere and not (tmp_path / "elsewhere").exists()  # all ask, the first process writes
    assert sorted(path.name for path in folder.iterdir()) == ["step-2.parquet", "step-4.parquet"]
    before, after = answered([0, 0, 0, 0]), answered([1, 1, 1, 1])
    curve = collect(folder, 2, 6, QUESTIONS, before, after)
    order = answered([1, 1, 1])
    assert {step: correctness(given, order).tolist() for step, given in curve.items()} == {
        0: [0, 0, 0], 2: [0, 1, 0], 4: [1, 1, 0], 6: [1, 1, 1]}  # fmt: skip
    forget_after(folder, 2)
    assert [path.name for path in folder.iterdir()] == ["step-2.parquet"]
    with pytest.raises(ValueError, match=r"the answers of step 4 are missing, expected those of \[2, 4\]"):
        collect(folder, 2, 6, QUESTIONS, before, after)
    forget_after(tmp_path / "not there", 0)


def test_a_random_sample_of_every_modality_is_asked() -> None:
    assert asked({"MRI": QUESTIONS, "CT": QUESTIONS[:1]}, 2) == [*QUESTIONS[:2], QUESTIONS[0]]
