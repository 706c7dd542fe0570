"""The page about data of one's own, as it is written: its ten rows, trained and evaluated."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Value

from kepo_core.data.ledger import Ledger
from kepo_core.data.loading import load_questions, open_data
from kepo_core.experiment import experiment
from kepo_core.params import Params

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples/own_data.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder with what the page has one make in it."""
    for name in ("notebooks", "params"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, check=True)
    (tmp_path / "data/shapes/questions.csv").write_text(blocks("csv")[0], encoding="utf-8")
    (tmp_path / "data/shapes/run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return tmp_path


def test_the_ten_rows_are_read_and_dealt_out_as_the_page_says(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    params = Params.load("data/shapes/run.yaml")
    data = experiment.load_data(params)
    assert [len(data.train), *map(len, data.tests.values())] == [4, 2, 3] and list(data.tests) == ["circle", "square"]
    ledger = Ledger()
    questions = load_questions(open_data(project / params.data_root), ledger)
    assert [q.options[ord(q.answer) - ord("A")] for q in questions] == [
        *("red", "green", "blue", "red", "green", "blue", "red", "green", "blue", "red")
    ]
    assert [q.modality for q in questions] == ["circle"] * 7 + ["square"] * 3
    assert ledger.read == 10 and not ledger.dropped and not ledger.mended


@pytest.mark.parametrize("kind", [Value("int8"), ClassLabel(num_classes=3), ClassLabel(names=["red", "green", "blue"])])
def test_answers_that_are_numbers_are_changed_as_the_page_says(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    options = ["red", "green", "blue"]
    made = [{"image": PIL.Image.new("RGB", (8, 8), colour), "question": "Which?", "options": options, "answer": i}
            for i, colour in enumerate(options)]  # fmt: skip
    data = Dataset.from_list(made).cast_column("answer", kind)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    exec(blocks("python")[1], {})
    assert [q.answer for q in load_questions(open_data(tmp_path / "data/saved"))] == ["A", "B", "C"]


def test_answers_whose_classes_are_letters_or_options_need_no_change(tmp_path: Path) -> None:
    options = ["red", "green", "blue"]
    for names in (options, ["A", "B", "C"]):
        made = [{"image": PIL.Image.new("RGB", (8, 8), colour), "question": "Which?", "options": options, "answer": i}
                for i, colour in enumerate(options)]  # fmt: skip
        folder = tmp_path / names[0]
        Dataset.from_list(made).cast_column("answer", ClassLabel(names=names)).save_to_disk(str(folder))
        assert [q.answer for q in load_questions(open_data(folder))] == ["A", "B", "C"]


@pytest.mark.slow  # half a minute
def test_the_page_ends_in_a_trained_and_evaluated_run(project: Path) -> None:
    kepo = f"{sys.executable} -m kepo_core.cli "
    commands = [line.replace("kepo ", kepo, 1) for line in blocks("bash")[0].splitlines()]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=project, env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (folder for folder in (project / "results").iterdir() if folder.is_dir() and folder.name[0] != ".")
    assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    assert "completed" in done.stdout and "circle" in done.stdout and (folder / "report.html").is_file()
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert predictions.groupby(["model", "modality"]).size().to_dict() == {
        ("kepo-tau1", "circle"): 2, ("kepo-tau1", "square"): 3, ("untrained", "circle"): 2, ("untrained", "square"): 3,
    }  # fmt: skip
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
