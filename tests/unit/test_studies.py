"""Study files: what they make, what they refuse, and the tables over their runs."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kepo_core import cli
from kepo_core.data.records import Answer, AnswerOutcome
from kepo_core.errors import ParamError
from kepo_core.experiment import experiment
from kepo_core.params import Params, project_root
from kepo_core.runs import shelf
from kepo_core.study import jobs
from kepo_core.study.studies import read_study

ROOT = Path(__file__).parents[2]
FILE = """
params: params/smoke.yaml
methods: [grpo, kepo-tau1]
compared_with: {compared_with}
seeds: [0, 1]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("study-*.yaml")), ids=lambda p: p.stem)
def test_the_files_that_come_with_the_package_are_read(path: Path) -> None:
    study = read_study(path)
    assert len(study.runs) == len({params.hash for params in study.runs.values()}) > 1


def test_methods_times_seeds_times_grid(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, FILE.format(compared_with="grpo")))
    assert list(study.runs) == ["grpo seed 0", "kepo-tau1 seed 0", "grpo seed 1", "kepo-tau1 seed 1"]
    assert not study.runs["grpo seed 1"].explore and study.runs["grpo seed 1"].seed == 1
    assert study.runs["kepo-tau1 seed 0"].hash == Params.load("params/smoke.yaml").hash
    grid = FILE.format(compared_with="'grpo, tau 0.0, learning_rate 0.0001'")
    study = read_study(write(tmp_path, grid + "grid: {tau: [0.0, 1.0], learning_rate: [0.0001]}\n"))
    assert list(study.arms) == [f"{name}, tau {tau}, learning_rate 0.0001" for name in ("grpo", "kepo-tau1")
                                for tau in (0.0, 1.0)]  # fmt: skip
    assert study.arms["kepo-tau1, tau 0.0, learning_rate 0.0001"][0, 1].tau == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seeds: [0, 1]", ""), "study.yaml has no seeds, expected methods"),
        (("seeds: [0, 1]", "seeds: 3"), "seeds in study.yaml is 3, expected a non-empty list"),
        (("seeds: [0, 1]", "seeds: [1, 1]"), r"seeds in study.yaml is \[1, 1\], expected a list of different values"),
        (("seeds: [0, 1]", "seeds: [-1]"), "seed must be at least 0, got -1"),
        (("seeds: [0, 1]", "seeds: [0]\nrepeats: 3"), "repeats in study.yaml is unknown, expected params, methods"),
        (
            ("seeds: [0, 1]", "seeds: [0]\ngrid: {eval_samples: [1, 4]}"),
            "grid in study.yaml has eval_samples, which all",
        ),
        (("methods: [grpo", "methods: [[grpo]"), r"no method is called \"\['grpo'\]\""),
        (("grpo, kepo", "grop, kepo"), "no method is called 'grop'"),
        (("compared_with: grpo", "compared_with: sft"), "compared_with in study.yaml is 'sft', expected one of grpo"),
        (
            ("seeds: [0, 1]", "seeds: [0]\ngrid: {taw: [1]}"),
            "taw under grid in study.yaml is not a parameter; the nearest is tau",
        ),
        (("seeds: [0, 1]", "seeds: [0]\ngrid: {tau: 1}"), "tau in study.yaml is 1, expected a list of different"),
        (("seeds: [0, 1]", "seeds: [0]\ngrid: {train_items: [5, 6]}"), "grid in study.yaml has train_items, which all"),
        (("smoke.yaml", "smog.yaml"), "smog.yaml cannot be read"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(
    tmp_path: Path, change: tuple[str, str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, FILE.format(compared_with="grpo").replace(*change))
    with pytest.raises(ParamError, match=sentence):
        read_study(path)
    assert cli.main(["study", "run", str(path)]) == cli.REFUSED
    assert capsys.readouterr().err.startswith("kepo: ")


def answered(right: np.ndarray) -> list[Answer]:
    """Four questions of MRI on two images, four of CT on four."""
    made = Answer("", "MRI", "", "", AnswerOutcome.CORRECT, "A", True, True, 5, True)
    return [replace(made, question_id=f"q{i}", modality="MRI" if i < 4 else "CT", correct=bool(value))
            for i, value in enumerate(right)]  # fmt: skip


IMAGES = {f"q{i}": f"MRI{i // 2}" if i < 4 else f"CT{i}" for i in range(8)}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("set: {tau: 0.0}", "set in study.yaml has tau, which methods and seeds decide"),
        ("set: {seed: 7}", "set in study.yaml has seed, which methods and seeds decide"),
        ("grid: {1: [2]}", "1 under grid in study.yaml is not a parameter"),
        ("grid: {tau: [0, 0.0]}", "tau in study.yaml is [0, 0.0], expected a list of different values"),
        (
            "grid: {teacher: [a, b]}\nstudents: [{student: c, teacher: d}]",
            "teacher is under grid and under students",
        ),
        ("students: [{}, {student: c}]", "entry 1 is {}, expected student and teacher"),
    ],
)
def test_nothing_is_said_twice_or_where_it_has_no_effect(tmp_path: Path, lines: str, sentence: str) -> None:
    with pytest.raises(ParamError, match=re.escape(sentence)):
        read_study(write(tmp_path, FILE.format(compared_with="grpo") + lines + "\n"))


def test_every_student_is_combined_with_every_seed_and_keeps_its_teacher(tmp_path: Path) -> None:
    text = (
        FILE.format(compared_with="grpo")
        + """set: {curve_steps: 2}
students:
  - {student: "embedded:student", teacher: "embedded:teacher"}
  - {student: "models/seed1/student", teacher: "models/seed1/teacher"}
"""
    )
    study = read_study(write(tmp_path, text.replace("methods: [grpo, kepo-tau1]", "methods: [grpo, teacher]")))
    assert "grpo seed 1 of student 2" in study.runs and len(study.runs) == 8
    assert study.runs["teacher seed 0 of student 2"].student == "models/seed1/teacher"
    assert {params.curve_steps for params in study.runs.values()} == {2}
    with pytest.raises(ParamError, match=r"students in study.yaml: entry 1 is 'a', expected student and teacher"):
        read_study(write(tmp_path, FILE.format(compared_with="grpo") + "students: [a]\n"))


def test_the_command_runs_what_is_missing_and_prints_what_came_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, FILE.format(compared_with="grpo"))
    asked = []

    def run_all(wanted, data, places, show):
        asked.append((dict(wanted), places))
        return {name: name for name in wanted if name != "kepo-tau1 seed 1"}, {"kepo-tau1 seed 1": "it broke"}

    class Data:
        images = IMAGES
        identity = staticmethod(lambda: {"train_items": 2})

    monkeypatch.setattr(experiment, "load_data", lambda params: Data)
    monkeypatch.setattr(jobs, "run_all", run_all)
    monkeypatch.setattr(shelf, "read_answers", lambda run: {"untrained": [], "trained": answered(np.ones(8))})
    monkeypatch.setattr(shelf, "read_curve", lambda run: {})
    assert cli.main(["study", "run", str(path), "--slots", "1"]) == cli.FAILED
    said = capsys.readouterr()
    assert "4 runs, 1 at a time" in said.out and "Against grpo, in points" in said.out
    assert "kepo: kepo-tau1 seed 1 failed: it broke" in said.err
    assert len(asked[0][0]) == 4 and asked[0][1].count == 1
    monkeypatch.setattr(jobs, "run_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["study", "run", str(path)]) == cli.INTERRUPTED
    assert "the same command resumes" in capsys.readouterr().err
    assert project_root() == ROOT
