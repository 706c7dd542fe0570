"""Accuracy while training: what is asked, kept, forgotten and drawn."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kepo_core.analysis.answers import correctness, from_table, to_table
from kepo_core.analysis.curves import CurveWriter, asked, bands, collect, forget_after
from kepo_core.data.records import Answer, AnswerOutcome, Question

MADE = Answer("", "MRI", "", "", AnswerOutcome.CORRECT, "A", True, True, 5, True)


def answered(right) -> list[Answer]:
    return [replace(MADE, question_id=f"q{i}", modality="MRI" if i < 2 else "CT", correct=bool(x))
            for i, x in enumerate(right)]  # fmt: skip


IMAGES = {f"q{i}": f"image{i}" for i in range(8)}
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


def test_bands_are_means_over_modalities_and_runs() -> None:
    curves = [{0: answered([0, 0, 0, 0, 1]), 5: answered(x)} for x in ([1, 1, 1, 0, 0], [1, 0, 1, 1, 1])]
    found = bands({"kepo": {(0, s): curve for s, curve in enumerate(curves)}, "none": {}}, IMAGES, "MRI")
    assert list(found) == ["MRI", "Avg. (OOD)"] and list(found["MRI"]) == ["kepo"]
    assert found["MRI"]["kepo"]["accuracy"].tolist() == [0, 0.75]
    ood = found["Avg. (OOD)"]["kepo"]
    assert ood["step"].tolist() == [0, 5] and ood["accuracy"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert (ood["low"] < ood["accuracy"]).all() and (ood["accuracy"] < ood["high"]).all()
    with pytest.raises(ValueError, match=r"one asked at the steps \[0, 5\], another at \[0, 6\]"):
        bands({"kepo": {(0, 0): curves[0], (0, 1): {0: curves[0][0], 6: curves[0][5]}}}, IMAGES, "MRI")
    with pytest.raises(ValueError, match="q4 is not answered"):
        bands({"kepo": {(0, 0): {0: answered(np.ones(5))}, (0, 1): {0: answered(np.ones(4))}}}, IMAGES, "MRI")
