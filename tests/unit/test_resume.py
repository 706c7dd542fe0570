"""Stopped and resumed is the same as never stopped: weights, metrics and rollouts, to the bit."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from kepo_harness import config, make_dataset, sharp_model
from transformers import TrainerState

from kepo_core.experiment.adapters import lora_config
from kepo_core.method.resume import last_checkpoint
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.params import Params
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.testbed.embedded import build_model, build_processor

STEPS = 6
CLOCK = ("runtime", "per_second", "step_time")
#: Two steps an epoch; windows of one step, of two optimiser steps with two iterations, and of two steps' batches.
WORLDS: dict[str, dict[str, Any]] = {
    "one step a window": {},
    "two iterations": {"num_iterations": 2, "explore": False},
    "a window over two steps": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "logging_steps": 3, "explore": False,
    },
    "half an epoch left": {"max_steps": -1, "num_train_epochs": 2.5, "explore": False},
    "with a reference": {"beta": 0.1, "explore": False},
    "adapters": {"beta": 0.1, "explore": False, "lora_rank": 2},
}  # fmt: skip


def make(folder: Path, lora_rank: int = 0, eval_dataset: Any = None, **overrides: Any) -> KEPOTrainer:
    args = config(
        folder, **{
            "max_steps": STEPS, "max_completion_length": 6, "tau": 0.0, "hint_max_tokens": 8, "rejection_budget": 2,
            "shuffle_dataset": True, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine",
        } | overrides,
    )  # fmt: skip
    teacher = Teacher(sharp_model(1), build_processor())
    student: Any = build_model("test", 0)
    if args.beta:  # TRL loads its reference model by path
        path = folder.parent / "student"
        if not path.exists():
            student.save_pretrained(path)
        student = type(student).from_pretrained(path)
    lora = lora_config(student, Params(lora_rank=lora_rank))
    task = MultipleChoice()
    return KEPOTrainer(
        student, task.reward_funcs, args, make_dataset(), eval_dataset, teacher=teacher, task=task,
        processing_class=build_processor(), peft_config=lora,
    )  # fmt: skip


def state(trainer: KEPOTrainer) -> tuple[pd.DataFrame, torch.Tensor, torch.Tensor]:
    """What was logged at each step, the weights, and the random state; not what depends on the clock."""
    logs = [  # a resumed trainer reads the first lines from a file with sorted names
        {k: v for k, v in sorted(entry.items()) if not k.endswith(CLOCK) and "profiling" not in k}
        for entry in trainer.state.log_history
        if "train_loss" not in entry  # the last line is a mean over this process's steps
    ]
    return (
        pd.DataFrame(logs),
        torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
        torch.get_rng_state(),
    )


def assert_equal(one: KEPOTrainer, other: KEPOTrainer) -> None:
    logs, weights, generator = state(one)
    logs_of_other, weights_of_other, generator_of_other = state(other)
    assert torch.equal(weights, weights_of_other)
    pd.testing.assert_frame_equal(logs, logs_of_other, check_exact=True)
    assert torch.equal(generator, generator_of_other)


@pytest.mark.parametrize(
    ("world", "steps"),
    [
        ("one step a window", (1, STEPS)),
        ("a window over two steps", (1, 3)),
        ("adapters", (2,)),
        ("half an epoch left", (5,)),
        *(pytest.param(world, range(1, STEPS + 1), marks=pytest.mark.slow) for world in WORLDS),
    ],
)
def test_resumed_at_any_step_is_never_stopped(tmp_path: Path, world: str, steps: Sequence[int]) -> None:
    whole = make(tmp_path / "whole", **WORLDS[world])
    whole.train()
    expected, rows = state(whole), collect_rollouts(tmp_path / "whole")
    assert not torch.equal(expected[1], state(make(tmp_path / "start", **WORLDS[world]))[1])
    for k in (step for step in steps if step <= whole.state.global_step):
        resumed = make(tmp_path / f"from{k}", **WORLDS[world])
        torch.manual_seed(99)  # whatever the new process did before
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{k}"))
        got = state(resumed)
        assert torch.equal(expected[1], got[1]), k
        pd.testing.assert_frame_equal(expected[0], got[0], check_exact=True, check_like=True)
        again = collect_rollouts(tmp_path / f"from{k}")
        if len(again):
            later = rows[rows["step"] >= again["step"].min()]
            pd.testing.assert_frame_equal(again.reset_index(drop=True), later.reset_index(drop=True), check_dtype=False)
        assert len(again) or k >= whole.state.global_step - 1  # only the last window has nothing left to generate


def test_resume_true_without_a_checkpoint_starts(tmp_path: Path) -> None:
    trainer = make(tmp_path / "new", max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1 and last_checkpoint(tmp_path / "nowhere") is None


# Damaged ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("optimizer.pt", truncate, "optimizer.pt has changed since it was written"),
        ("model.safetensors", flip, "model.safetensors has changed since it was written"),
        ("loop_0.pt", Path.unlink, "loop_0.pt is missing"),
        ("trainer_state.json", lambda path: path.write_text(""), "trainer_state.json has changed since"),
        ("checksums.json", truncate, "checksums.json cannot be read"),
        ("checksums.json", Path.unlink, "checksums.json does not exist, expected a checkpoint of this trainer"),
        ("checksums.json", lambda path: path.write_text("{}"), "checksums.json lists no file"),
        ("checksums.json", lambda path: path.write_text("[]"), "checksums.json holds [], expected a JSON object"),
        ("loop_1.pt", lambda path: path.write_text(""), "loop_1.pt has changed since"),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_taken_and_the_user_told(
    trained: tuple[Path, KEPOTrainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    harm: Any,
    said: str,
) -> None:
    folder, whole = trained
    shutil.copytree(folder, tmp_path / "run")
    harm(tmp_path / "run/checkpoint-2" / name)
    with pytest.raises(
        ValueError, match=f"checkpoint-2 is damaged: .*{re.escape(said)}.*; resume from an earlier checkpoint"
    ):
        make(tmp_path / "run", max_steps=3).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    resumed = make(tmp_path / "run", max_steps=3, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    told = capsys.readouterr().err
    assert said in told and "renamed to damaged-2; training resumes from checkpoint-1" in told
    assert_equal(resumed, whole)
    assert {path.name for path in (tmp_path / "run").glob("*-*")} == {"damaged-2", "checkpoint-2", "checkpoint-3"}


def test_where_no_checkpoint_is_whole_training_starts_anew(
    trained: tuple[Path, KEPOTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole = trained
    shutil.copytree(folder, tmp_path / "run")
    for step in (1, 2):
        truncate(tmp_path / f"run/checkpoint-{step}/scheduler.pt")
    resumed = make(tmp_path / "run", max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert "training starts over, as there is no other checkpoint" in capsys.readouterr().err
    assert_equal(resumed, whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KEPOTrainer]:
    """A folder with the checkpoints of two steps, and a trainer that has taken a third."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make(folder, max_steps=3)
    trainer.train()
    shutil.rmtree(folder / "checkpoint-3")
    return folder, trainer


# Killed from outside ----------------------------------------------------------------------------------------------

#: Where the process dies: in the third step's loss; in its generation; in the midst of writing checkpoint 3; between
#: writing it and moving it into place.
PLACES = ("loss", "generation", "write", "move")


def die_at(place: str, folder: Path) -> None:
    """Train, and be killed without a word in or right behind step 3 (this function runs in a process of its own)."""
    trainer = make(folder, save_total_limit=2)

    def kill(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def at_step_3(name: str, of: Any = trainer, before: bool = True) -> None:
        original = getattr(of, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            done = 2 if place in ("loss", "generation") else 3
            if trainer.state.global_step == done and before:
                kill()
            result = original(*args, **kwargs)
            if trainer.state.global_step == done:
                kill()
            return result

        setattr(of, name, wrapped)

    if place == "loss":
        at_step_3("_compute_loss", before=False)
    elif place == "generation":
        at_step_3("_generate_single_turn")
    elif place == "write":
        at_step_3("_save_optimizer_and_scheduler")
    else:
        at_step_3("_loop_state", before=False)
    trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_and_resumed_is_never_stopped(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "killed"
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests", Path(__file__).parent)))
    code = f"import test_resume, pathlib; test_resume.die_at({place!r}, pathlib.Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    resumed = make(folder, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole")
    whole.train()
    assert_equal(resumed, whole)
    pd.testing.assert_frame_equal(collect_rollouts(folder), collect_rollouts(tmp_path / "whole"))
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "checkpoint-5", "checkpoint-6", "rollouts"]


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoint_is_kept_known_and_loaded(tmp_path: Path, strategy: str) -> None:
    worlds = {"save_strategy": strategy, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3,
              "load_best_model_at_end": True, "save_total_limit": 1, "metric_for_best_model": "eval_score",
              "greater_is_better": True, "explore": False, "per_device_eval_batch_size": 8}  # fmt: skip
    trainer = make(tmp_path, eval_dataset=make_dataset(), **worlds)
    weights: dict[int, torch.Tensor] = {}

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        weights[trainer.state.global_step] = trainer.model.lm_head.weight.detach().clone()
        return {"eval_score": {1: 0.2, 2: 0.9, 3: 0.5}[trainer.state.global_step]}

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best) and best.is_dir()
    assert torch.equal(trainer.model.lm_head.weight, weights[2]) and not torch.equal(weights[2], weights[3])
    assert TrainerState.load_from_json(str(best / "trainer_state.json")).best_model_checkpoint == str(best)
    assert not list(tmp_path.glob(".partial*")) and "KEPO" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_second_training_in_a_folder_leaves_no_rollouts_of_the_first(tmp_path: Path) -> None:
    make(tmp_path, max_steps=3, explore=False).train()
    make(tmp_path, max_steps=2, explore=False, save_strategy="no").train()
    assert set(collect_rollouts(tmp_path)["step"]) == {1, 2}
