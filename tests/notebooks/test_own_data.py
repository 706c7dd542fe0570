"""The page about data of one's own, as it is written: its ten rows, trained and evaluated."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

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
