"""A teacher served by a real `vllm serve`: every check of the package, hints, and steps as with the one in process."""

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from kepo_core.cli import main
from kepo_core.experiment import experiment
from kepo_core.experiment.models import EMBEDDED_DIR
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import Params
from kepo_core.runs.run import Run

PORT = 8133


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> dict[str, Any]:
    serve(str(EMBEDDED_DIR / "teacher"), PORT, "embedded:teacher")
    return {"teacher_url": f"http://127.0.0.1:{PORT}/v1", "teacher_top_k": 20}


def test_every_check_passes(served: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    given = [part for name, value in served.items() for part in ("-p", name, str(value))]
    assert main(["check-teacher", *given]) == 0
    said = capsys.readouterr().out
    print(said)
    assert [line.split()[:2] for line in said.splitlines() if line.startswith(("pass", "FAIL"))] == [
        ["pass", "hint"], ["pass", "alignment"], ["pass", "picture"]
    ]  # fmt: skip


def test_steps_are_those_of_the_teacher_in_process(served: dict[str, Any], small: Callable[..., Params]) -> None:
    """Its 20 likeliest tokens and one bucket for the rest leave little out; the first step's rollouts are the same."""
    found = {}
    for name, given in {"served": served, "in process": {}}.items():
        params = small(use_vllm=False, max_steps=3, group_size=2, prompts_per_step=8, prompts_per_device=8, **given)
        run = Run.allocate(params)
        trainer = experiment.make_trainer(params, run, experiment.load_data(params), experiment.load_models(params))
        experiment.fit(trainer, run)
        lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
        found[name] = [row["kepo/divergence"] for row in lines if "loss" in row], collect_rollouts(run.training_dir)
    print("\n" + "\n".join(f"{name}: {[round(d, 4) for d in each[0]]}" for name, each in found.items()))
    assert found["served"][0] == pytest.approx(found["in process"][0], rel=0.05)
    ours, theirs = (found[name][1] for name in found)
    assert ours["hint"].str.len().gt(0).any() and ours["injected"].any()
    first = [rows.loc[rows["step"] == 1, ["hint", "completion", "injected"]] for rows in (ours, theirs)]
    pd.testing.assert_frame_equal(*first)
