"""The main job and the baselines from the command line to their folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from kepo_core.cli import main

ROOT = Path(__file__).parents[2]
BCCD = ROOT.parent / "shared/data/bccd_omnimedvqa"


def run(smoke_file: Path, *parameters: str) -> Path:
    """Notebook 03 as the command line runs it; returns the new run folder."""
    results = smoke_file.parent / "results"
    before = set(results.glob("*/"))
    assert main(["run", "notebooks/03_train_kepo.ipynb", "-f", str(smoke_file), *parameters]) == 0
    (folder,) = set(results.glob("*/")) - before
    return folder


def test_main_job_twice_is_the_same_to_the_bit_and_complete(smoke_file: Path) -> None:
    one = run(smoke_file, "-p", "tau", "1")
    two = run(smoke_file, "-p", "tau", "1", "-p", "curve_steps", "1")  # asking on the way changes nothing
    for name in ("metrics.jsonl", "rollouts.parquet", "predictions.parquet", "model/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    names = "params.yaml provenance.json timings.jsonl headline.json notebook.ipynb report.html status.json figures"
    assert all((one / name).exists() for name in names.split())
    assert json.loads((one / "status.json").read_text())["state"] == "completed"
    curve = pd.read_parquet(two / "curve.parquet")
    assert curve.groupby("step").size().to_dict() == {0: 32, 1: 32, 2: 32} and not (one / "curve.parquet").exists()
    rollouts, predictions = pd.read_parquet(one / "rollouts.parquet"), pd.read_parquet(one / "predictions.parquet")
    trained = rollouts[~rollouts.replaced]
    assert not (rollouts.replaced & rollouts.injected).any() and rollouts.replaced.sum() == rollouts.injected.sum()
    assert trained.groupby(["step", "group"]).size().eq(4).all() and len(trained) == 2 * 4 * 4
    assert sorted(predictions.model.unique()) == ["kepo-tau1", "untrained"]
    assert len(predictions) == 2 * 8 * 4 and predictions.outcome.isin(["correct", "wrong", "missing"]).any()
    logged = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert {"kepo/accuracy", "kepo/gate_rate", "kepo/all_fail_rate", "kepo/loss_distill"} <= logged[0].keys()
    assert logged[0]["step"] == 1 and not any("time" in key for key in logged[0])


@pytest.mark.slow  # notebook 02 itself runs under nbval
def test_baselines_run_once_and_stand_beside_the_paper(smoke_file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"

    def execute(rows: str) -> str:
        given = ["-p", "rows", rows, "-p", "compared_with", "zero-shot", "-p", "params_file", str(smoke_file)]
        command = [sys.executable, "-m", "papermill", "-k", "python3", "notebooks/02_baselines.ipynb"]
        done = subprocess.run(
            [*command, str(tmp_path / "out.ipynb"), *given],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        outputs = [out for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
                   for out in cell.get("outputs", [])]  # fmt: skip
        assert (done.returncode == 0) == (not any(out.output_type == "error" for out in outputs)), done.stderr[-2000:]
        return "\n".join(out.get("text") or str(out.get("data", out.get("evalue"))) for out in outputs)

    said = execute("zero-shot,huatuo-7b-nothink")  # the second cannot be had here: the first stands all the same
    assert said.count(" started") == 2 and said.count("zero-shot                completed after ") == 1
    assert "huatuo-7b-nothink failed: " in said and "1 of 2 rows failed" in said
    assert "Avg. (OOD)" in said and ">64.0<" in said  # the paper's
    again = execute("zero-shot")
    assert again.count(" reused") == 1 and " started" not in again
    assert len(list(results.glob("*-zero-shot-????????"))) == 1


@pytest.mark.skipif(not BCCD.is_dir(), reason="these files are not part of the package")
def test_main_job_over_real_photographs(smoke_file: Path) -> None:
    folder = run(smoke_file, "-p", "data_root", str(BCCD), "-p", "train_modality", "Microscopy")
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert set(predictions.modality) == {"Microscopy"} and len(predictions) == 2 * 4
    assert set(pd.read_parquet(folder / "rollouts.parquet").id.str[:5]) == {"BCCD_"}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("taw", "1", "taw is not a parameter; the nearest is tau"),
        pytest.param(
            *("data_root", "no/such/folder", "no/such/folder does not exist, expected a folder"),
            marks=pytest.mark.slow,  # test_cli refuses data in a smaller notebook
        ),
    ],
)
def test_what_does_not_fit_stops_with_a_sentence_and_leaves_nothing(
    smoke_file: Path, capsys: pytest.CaptureFixture[str], name: str, value: str, sentence: str
) -> None:
    code = main(["run", "notebooks/03_train_kepo.ipynb", "-f", str(smoke_file), "-p", name, value])
    assert code == 2
    assert sentence in capsys.readouterr().err
    results = smoke_file.parent / "results"
    assert not results.exists() or not list(results.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["evaluation/untrained.jsonl", "training/checkpoint-2", "model/model.safetensors"])
def test_killed_in_training_or_evaluation_and_resumed_is_never_stopped(smoke_file: Path, moment: str) -> None:
    changes = ["-p", "max_steps", "4", "-p", "save_steps", "1", "-p", "eval_items", "12", "-p", "curve_steps", "1"]
    whole = run(smoke_file, *changes)
    command = [sys.executable, "-m", "kepo_core.cli", "run", "notebooks/03_train_kepo.ipynb", "-f", str(smoke_file)]
    started = set(whole.parent.glob("*/"))
    process = subprocess.Popen([*command, *changes], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 300
    while not any((folder / moment).exists() for folder in set(whole.parent.glob("*/")) - started):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the command and its kernel
    process.wait()
    (folder,) = set(whole.parent.glob("*/")) - started
    assert json.loads((folder / "status.json").read_text())["state"] == "running"  # nobody was left to say otherwise
    assert main(["resume", str(folder)]) == 0
    tables = ("metrics.jsonl", "rollouts.parquet", "predictions.parquet", "curve.parquet")
    for name in (*tables, "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert len((folder / "timings.jsonl").read_text().splitlines()) == len(
        (whole / "timings.jsonl").read_text().splitlines()
    )
    assert not list((folder / "training").glob("checkpoint-*"))  # a completed run needs them no more
