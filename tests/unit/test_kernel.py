"""A live notebook whose cells are executed twice, or in another order: the record stays true, or it is refused."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import Tensor
from transformers import TrainerCallback

from kepo_core.data import phantom
from kepo_core.data.records import MODALITIES
from kepo_core.errors import ParamError
from kepo_core.experiment import experiment
from kepo_core.experiment.live import LiveTraining
from kepo_core.params import Params
from kepo_core.runs.run import Run

#: Each has its own way to train; the last one keeps no checkpoints.
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "thinking": False},
    "gkd": {"method": "gkd"},
    "kepo": {"explore": False, "save_steps": 0},
    "lora": {"explore": False, "distill": False, "lora_rank": 2, "save_steps": 1},
}


@dataclass
class Notebook:
    """What the cells of notebook 03 leave in the kernel."""

    params: Params
    data: experiment.StudyData
    models: experiment.Models
    run: Run

    def ask(self, name: str) -> Any:
        kept = self.run.evaluation_dir / f"{name}.jsonl"
        return experiment.evaluate_student(self.params, self.models, self.data.test, kept)

    def train(self, shown: TrainerCallback | None = None) -> Tensor:
        shown = shown or LiveTraining(live=False)
        experiment.train_student(self.params, self.run, self.data, self.models, shown)  # type: ignore[arg-type]
        return torch.cat([p.detach().flatten() for p in self.models.student.parameters()])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    phantom.write_phantom(root := tmp_path_factory.mktemp("set"), seed=0, images=dict.fromkeys(MODALITIES, 8))
    return root


@pytest.fixture
def notebook(root: Path, tmp_path: Path) -> Callable[..., Notebook]:
    """The first cells of notebook 03 executed, on four training questions."""

    def notebook(**changes: Any) -> Notebook:
        small = {"train_items": 4, "eval_items": 1, "prompts_per_step": 2, "prompts_per_device": 2, "group_size": 2,
                 "max_completion_length": 4, "eval_max_tokens": 4, "results_dir": str(tmp_path)}  # fmt: skip
        params = Params.load(None, {"data_root": str(root), **small, **changes})
        data, models, run = experiment.load_data(params), experiment.load_to_run(params), Run.for_notebook(params)
        run.remember(data=data.identity())
        return Notebook(params, data, models, run)

    return notebook


@pytest.mark.parametrize("name", METHODS)
def test_the_training_cell_twice(notebook: Callable[..., Notebook], name: str) -> None:
    here = notebook(**METHODS[name])
    trained = here.train()
    metrics = (here.run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(ParamError, match="trained in this kernel already: execute the cell"):
        here.train()
    assert (here.run.path / "metrics.jsonl").read_bytes() == metrics
    assert torch.equal(torch.cat([p.detach().flatten() for p in here.models.student.parameters()]), trained)


class StopsAfterTheFirstStep(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_the_training_cell_interrupted_and_executed_again_goes_on_from_its_checkpoint(
    notebook: Callable[..., Notebook],
) -> None:
    whole, here = (notebook(explore=False, save_steps=1) for _ in range(2))
    expected = whole.train()
    with pytest.raises(KeyboardInterrupt):
        here.train(StopsAfterTheFirstStep())
    assert torch.equal(here.train(), expected) and torch.equal(here.train(), expected)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (here.run.path / name).read_bytes() == (whole.run.path / name).read_bytes(), name


@pytest.mark.parametrize("name", ["sft", "kepo"])
def test_the_untrained_student_cannot_be_asked_once_it_is_trained(notebook: Callable[..., Notebook], name: str) -> None:
    here = notebook(**METHODS[name])
    before = here.ask("untrained")
    here.train()
    assert here.ask("untrained") == before, "these were kept"
    assert here.ask("trained")
    (here.run.evaluation_dir / "untrained.jsonl").unlink()
    with pytest.raises(ParamError, match="trained before it had answered all questions"):
        here.ask("untrained")


def test_cells_above_executed_again_with_other_values(notebook: Callable[..., Notebook]) -> None:
    here = notebook(**METHODS["sft"])
    with pytest.raises(ParamError, match=r"^seed is 1 but 0 in .*-sft-.*: execute the cell that loads"):
        replace(here, params=here.params.replace(seed=1)).train()
    other = here.params.replace(data_seed=1)
    with pytest.raises(ParamError, match="the data differ from those of"):
        replace(here, data=experiment.load_data(other)).train()
    here.run.finish({})
    with pytest.raises(ParamError, match="has completed, and no run is ever overwritten: execute the cell"):
        here.train()


@pytest.mark.parametrize("method", ["none", "kepo"])
def test_nothing_is_asked_or_trained_under_what_the_record_denies(
    notebook: Callable[..., Notebook], method: str
) -> None:
    here = notebook(**METHODS["kepo"], method=method)
    denied = {
        "eval_max_tokens is 3 but 4": replace(here, params=here.params.replace(eval_max_tokens=3)),
        "the data differ from": replace(here, data=experiment.load_data(here.params.replace(data_seed=1))),
    }
    for words, other in denied.items():
        with pytest.raises(ParamError, match=words):
            other.train()
        for student in ("untrained", "trained"):
            with pytest.raises(ParamError, match=words):
                experiment.evaluate_run(other.params, other.run, other.data, other.models, student)
    assert not here.run.evaluation_dir.exists() or not list(here.run.evaluation_dir.iterdir())


def test_a_cell_that_was_skipped_is_missed(notebook: Callable[..., Notebook], tmp_path: Path) -> None:
    """As where the cells of an earlier run have left their answers, metrics and headline in the kernel."""
    here = notebook(**METHODS["kepo"])

    def ask(student: str) -> None:
        experiment.evaluate_run(here.params, here.run, here.data, here.models, student)

    with pytest.raises(ParamError, match="has trained no student yet: execute the cell that trains it"):
        ask("trained")
    here.train()
    with pytest.raises(ParamError, match="has not evaluated the untrained student: execute the cell"):
        ask("trained")
    with pytest.raises(ParamError, match=r"has no predictions\.parquet yet: execute the cells that evaluate"):
        here.run.finish({"MRI before": 0.5, "MRI after": 0.9})
    assert here.run.headline is None and here.run.status["state"] == "running"


def test_a_completed_run_keeps_its_headline(tmp_path: Path) -> None:
    run = Run.allocate(Params(results_dir=str(tmp_path)))
    run.finish({"MRI": 0.5, "worst": math.inf})
    run.finish({"MRI": 0.5, "worst": math.inf})
    with pytest.raises(ParamError, match="has completed with other numbers, and no run is ever overwritten"):
        run.finish({"MRI": 0.9})
    assert run.headline == {"MRI": 0.5, "worst": None} == run.status["headline"]


class Refuses(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise ParamError("the server is down")


def test_a_training_that_was_refused_is_none(notebook: Callable[..., Notebook]) -> None:
    here, whole = (notebook(**METHODS["sft"]) for _ in range(2))
    with pytest.raises(ParamError, match="the server is down"):
        here.train(Refuses())
    assert here.ask("untrained")
    assert torch.equal(here.train(), whole.train())


def test_a_student_with_adapters_is_given_no_others(notebook: Callable[..., Notebook]) -> None:
    here = notebook(**METHODS["lora"])
    with pytest.raises(ParamError, match="the server is down"):
        here.train(Refuses())
    with pytest.raises(ParamError, match="has been given adapters in this kernel already"):
        here.train()


def test_a_scratch_cell_that_raises_leaves_a_completed_run_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    run = Run.for_notebook(Params(results_dir=str(tmp_path)))
    run.finish({"MRI": 0.5})
    shell.run_cell("1 / 0")
    assert run.status["state"] == "completed" and run.status["headline"] == {"MRI": 0.5}
