"""Trackers, read back: what a run and its resumption leave in TensorBoard's files and in trackio's database."""

import ast
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from tracked_run import STEPS, make

from kepo_core.errors import ParamError
from kepo_core.experiment import experiment
from kepo_core.method.rollouts import GLOSSARY, collect_rollouts
from kepo_core.params import Params
from kepo_core.runs import tracking
from kepo_core.runs.run import Run

ROOT = Path(__file__).parents[2]
#: trackio's requirement of an older Pillow is one that it does not need for what is done here.
TRACKIO = ["trackio==0.43.0", "gradio-client", "orjson", "brotli", "python-multipart"]


def logged(run: Run) -> pd.DataFrame:
    return pd.read_json(run.path / "metrics.jsonl", lines=True)


def test_tensorboards_files_hold_the_run_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make("tensorboard", tmp_path)
    assert "attempting to log a value" not in caplog.text
    read = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"tensors": 0, "images": 0}).Reload()
    tags, metrics = read.Tags(), logged(run)
    known = [name for name in metrics if name.startswith("kepo/") and metrics[name].notna().all()]
    assert len(known) > 10
    for name in [*known, "loss"]:
        events = read.Scalars(f"train/{name}")
        assert [event.step for event in events] == [1, 2, 3, 4], name  # steps 3 and 4 of the killed process are gone
        assert [event.value for event in events] == pytest.approx(metrics[name].tolist()), name

    def text(tag: str, place: int = 0) -> str:
        return read.Tensors(f"{tag}/text_summary")[place].tensor_proto.string_val[0].decode()

    assert "    train_items: 16\n" in text("parameters") and f"max_steps: {STEPS}" in text("parameters")
    rollouts = collect_rollouts(run.training_dir)
    assert [event.step for event in read.Tensors("rollouts/text_summary")] == [1, 2, 3, 4]
    table = text("rollouts", 1).splitlines()
    assert table[0].startswith("| step | generation |") and len(table) == 2 + (rollouts["step"] == 2).sum()
    assert tags["images"] == ["figures/training"] and read.Images("figures/training")[0].width == 6


def test_a_run_that_trains_nothing_sends_its_parameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run.allocate(
        Params.load(overrides={"method": "none", "report_to": "tensorboard", "results_dir": str(tmp_path)})
    )
    tracking.send(run)
    assert EventAccumulator(str(run.path / "tensorboard")).Reload().Tags()["tensors"] == ["parameters/text_summary"]


def test_what_a_model_wrote_is_text_in_a_table() -> None:
    cells = tracking._cells(["<script>x</script> | a\n| b", 0.123456, None])
    assert cells == "| &lt;script&gt;x&lt;/script&gt; &#124; a &#124; b | 0.1235 | None |"


@pytest.mark.slow  # it installs trackio, which is no dependency
def test_trackios_database_holds_the_run_once(tmp_path: Path) -> None:
    packages, database = tmp_path / "packages", tmp_path / "trackio"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *TRACKIO]
    subprocess.run(pip, check=True)
    paths = os.pathsep.join([str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TRACKIO_DIR": str(database), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests/tracked_run.py"), "trackio", str(tmp_path), "mine"]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    run = Run.open(said.splitlines()[-1])
    with sqlite3.connect(database / "mine.db") as connection:
        rows = connection.execute("select run_id, run_name, metrics from metrics order by step").fetchall()
        (config,) = connection.execute("select config from configs").fetchall()
    assert {name for _, name, _ in rows} == {run.path.name} and len({id for id, _, _ in rows}) == 1
    sent = [json.loads(values) for _, _, values in rows]
    metrics, config = logged(run), json.loads(config[0])
    assert config["params/train_items"] == 16 and config["params/report_to"] == "trackio" and config["tau"] == 1.0
    by_step = {row["train/global_step"]: row for row in sent if "train/loss" in row}  # of those sent twice, the last
    assert list(by_step) == [1, 2, 3, 4]
    for name in [name for name in metrics if name.startswith("kepo/")]:
        values = [by_step[step][f"train/{name}"] for step in by_step]
        for value, want in zip(values, metrics[name], strict=True):
            assert value == pytest.approx(want) if pd.notna(want) else value is None or isinstance(value, str), name
    (table,) = [row["rollouts"]["_value"] for row in sent if "rollouts" in row]
    rollouts = collect_rollouts(run.training_dir)
    assert [row["completion"] for row in table] == rollouts[
        "completion"
    ].tolist() and "rewards/accuracy_reward" in table[0]
    (figure,) = [row["figures/training"]["file_path"] for row in sent if "figures/training" in row]
    assert Image.open(database / "media" / figure).size == (6, 4)


def test_every_metric_of_the_glossary_can_be_a_tag() -> None:
    assert all(name.startswith("kepo/") and " " not in name for name in GLOSSARY)


def test_a_tracker_that_is_not_known_or_not_there_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracking.check(Params())
    with pytest.raises(ParamError, match="must be one of none, tensorboard, trackio, wandb, mlflow, got 'com"):
        tracking.check(Params.load(overrides={"report_to": "comet_ml"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ParamError, match="report_to is 'wandb', which is not installed: pip install wandb"):
        experiment.load_to_run(Params.load(overrides={"report_to": "wandb"}))


@pytest.mark.parametrize(("mode", "known", "refused"), [("online", False, True), ("online", True, False),
                                                        ("offline", False, False)])  # fmt: skip
def test_wandb_without_a_login_is_refused_unless_it_is_offline(
    monkeypatch: pytest.MonkeyPatch, mode: str, known: bool, refused: bool
) -> None:
    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    fake = SimpleNamespace(setup=lambda: settings, login=lambda prompt: known)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    given = Params.load(overrides={"report_to": "wandb"})
    if not refused:
        tracking.check(given)
        return
    with pytest.raises(ParamError, match="nobody is logged in: wandb login, or set WANDB_MODE=offline"):
        tracking.check(given)


def test_where_a_run_is_reported_to_is_not_what_is_computed() -> None:
    assert Params.load(overrides={"report_to": "wandb", "project": "x"}).hash == Params().hash
    assert "report_to" not in Params.load(overrides={"report_to": "none"}).to_dict()


def test_a_tracker_that_fails_at_the_end_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: Run, project: str) -> Any:
        raise ConnectionError("no route\nto host")

    run = Run.allocate(Params.load(overrides={"results_dir": str(tmp_path), "report_to": "wandb"}))
    monkeypatch.setitem(tracking._TRACKS, "wandb", broken)
    tracking.send(run)
    said = capsys.readouterr().err
    assert f"misses rollouts or figures (ConnectionError: no route); all of them are in {run.path}" in said


def test_no_tracker_is_imported_that_is_not_named() -> None:
    """TRL itself imports trackio and wandb where they are installed; this package imports them where one is opened."""
    trackers = {*tracking._TRACKS, "torch.utils.tensorboard"}
    found = []
    for path in (ROOT / "kepo_core").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name, id(node) in inside) for name in names if name in trackers]
    assert {name for _, name, _ in found} == trackers - {"tensorboard"}
    assert all(file == "tracking.py" and inside for file, _, inside in found), found
