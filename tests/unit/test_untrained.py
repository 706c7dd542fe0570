"""Runs that ask the untrained student the same questions in the same way share its answers, and no others do."""

import os
import shutil
from pathlib import Path

import pytest

from kepo_core.data import phantom
from kepo_core.experiment import experiment
from kepo_core.experiment.models import EMBEDDED_DIR
from kepo_core.experiment.untrained import shared_file
from kepo_core.params import Params
from kepo_core.runs.run import Run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Params:
    root = tmp_path_factory.mktemp("untrained")
    phantom.write_phantom(root / "world", 0, {"MRI": 12, "CT": 4})
    shutil.copytree(EMBEDDED_DIR / "student", root / "student")
    places = {"data_root": str(root / "world"), "results_dir": str(root / "results"), "student": str(root / "student")}
    return Params.load(None, {**places, "train_items": 8, "eval_items": 4})


def test_a_second_run_asks_nothing(base: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    data, models = experiment.load_data(base), experiment.load_models(base)
    before = experiment.evaluate_run(base, Run.allocate(base), data, models, "untrained")
    other = base.replace(method="gkd", seed=1, learning_rate=1e-3, teacher=base.student, curve_steps=5)

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the student is asked again")

    monkeypatch.setattr(type(models.student), "generate", asked)
    run = Run.allocate(other)
    assert experiment.evaluate_run(other, run, data, models, "untrained") == before and len(before) == 8
    assert (run.evaluation_dir / "untrained.jsonl").is_file()
    with pytest.raises(AssertionError, match="asked again"):
        changed = base.replace(eval_max_tokens=8)
        experiment.evaluate_run(changed, Run.allocate(changed), data, models, "untrained")


def test_what_the_answers_depend_on_is_in_the_name(base: Params) -> None:
    data = experiment.load_data(base)
    name = shared_file(Run.allocate(base), data)
    changes = ({"thinking": False, "explore": False}, {"image_size": 32}, {"eval_batch_size": 3}, {"precision": "bf16"},
               {"lora_rank": 2}, {"answer_format": "lenient"}, {"eval_temperature": 1.0},
               {"eval_temperature": 1.0, "seed": 1}, {"student": "embedded:student"})  # fmt: skip
    names = {shared_file(Run.allocate(base.replace(**change)), data) for change in changes}
    assert len(names | {name}) == len(changes) + 1
    fewer = base.replace(eval_items=3)
    assert shared_file(Run.allocate(fewer), experiment.load_data(fewer)) != name
    os.utime(Path(base.student) / "model.safetensors", (0, 0))  # trained anew, in the same folder
    assert shared_file(Run.allocate(base), data) != name
