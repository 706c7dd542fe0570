"""Rollouts by vLLM: TRL's own code over fake engines, in both modes, hint-aware draws included."""

import sys
from pathlib import Path
from typing import Any

import fake_vllm
import pandas as pd
import pytest
import torch
from kepo_harness import ScriptedTrainer, config, fails_on_0, make_dataset, make_row, make_trainer, sharp_model

from kepo_core.experiment import launch
from kepo_core.experiment.experiment import training_config
from kepo_core.method import hinted
from kepo_core.method.exploration import Request
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.method.task import with_images
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.params import Params
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import vqa_messages
from kepo_core.testbed.embedded import build_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import check_vllm


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(says: fake_vllm.Says | None = None) -> None:
        fake_vllm.install(says, lambda *given: monkeypatch.setattr(*given, raising=False))

    return install


def test_the_fake_takes_what_trl_gives() -> None:
    assert fake_vllm.same_signatures()


def test_parameters_arrive(tmp_path: Path) -> None:
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://host:8000"}
    given = training_config(Params.load(None, server), tmp_path)
    assert (given.use_vllm, given.vllm_mode, given.vllm_server_base_url) == (True, "server", "http://host:8000")
    memory = Params().replace(use_vllm=True, vllm_gpu_memory_utilization=0.2, vllm_max_model_length=4096)
    here = training_config(memory, tmp_path)
    assert (here.vllm_mode, here.vllm_gpu_memory_utilization, here.vllm_max_model_length) == ("colocate", 0.2, 4096)
    assert here.vllm_server_base_url is None and here.vllm_importance_sampling_correction
    nucleus = training_config(Params().replace(use_vllm=True, top_p=0.95), tmp_path)
    assert not nucleus.vllm_importance_sampling_correction


@pytest.mark.parametrize("mode", ["colocate", pytest.param("server", marks=pytest.mark.slow)])
def test_the_engine_draws_what_the_student_would(tmp_path: Path, install: Any, mode: str) -> None:
    """Over three optimiser steps its log-probabilities are the trainer's: weights, pictures and sampling agree."""
    install()
    args = config(
        tmp_path, use_vllm=True, vllm_mode=mode, per_device_train_batch_size=4, max_completion_length=5, max_steps=3,
        tau=0.0, temperature=0.9, rejection_budget=1,
    )  # fmt: skip
    teacher, processor = Teacher(sharp_model(1), build_processor()), build_processor()
    task = MultipleChoice("answer")
    trainer = KEPOTrainer(
        sharp_model(0), task.reward_funcs, args, make_dataset(3), teacher=teacher, task=task, processing_class=processor
    )
    trainer.train()
    for step in trainer.state.log_history[:3]:
        assert step["sampling/sampling_logp_difference/max"] < 1e-3
        assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    engine = trainer.vllm_generation.engine
    assert engine.synced == 3  # once a step, and hint-aware draws use what was synced for the rollouts
    assert {(s["temperature"], s["max_tokens"]) for s in engine.sampling} == {(0.9, 5)}
    hinted = [text for text in engine.asked if "ground truth" in text]
    assert len(engine.asked) == 3 * 4 + len(hinted) and len(hinted) == 3  # a random student fails every time


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_an_accepted_draw_is_injected_and_free_of_the_samplers_correction(
    tmp_path: Path, install: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The scripted student behind vLLM does what it does behind transformers."""
    calls: list[str] = []
    tokenizer = build_processor().tokenizer

    def says(text: str, pictures: list[Any]) -> list[int]:
        row = make_row(int(text.split("Question ")[1].split("?")[0]))
        assert [p.tobytes() for p in pictures] == [row["image"].tobytes()]
        said = fails_on_0(text, row, calls.count(text), "ground truth" in text)
        calls.append(text)
        return [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]

    def rows(folder: str, **overrides: Any) -> Any:
        trainer = make_trainer(tmp_path / folder, fails_on_0, hints=lambda row: "look", **overrides)
        trainer.train()
        return trainer, collect_rollouts(tmp_path / folder)

    _, plain = rows("plain")
    monkeypatch.delattr(ScriptedTrainer, "_generate_single_turn")
    install(says)
    kept: list[dict[str, Any]] = []
    compute = KEPOTrainer._compute_loss
    monkeypatch.setattr(KEPOTrainer, "_compute_loss", lambda s, m, i: (kept.append(i), compute(s, m, i))[1])
    _, drawn = rows("vllm", use_vllm=True, vllm_mode=mode)
    columns = ["row", "id", "completion", "outcome", "reward", "advantage", "injected", "replaced", "gate"]
    assert drawn[columns].equals(plain[columns]) and drawn["injected"].sum() == 1
    assert torch.equal(kept[0]["importance_sampling_ratio"], torch.ones(8, 1))


def test_a_process_asks_a_server_for_as_many_as_the_others(tmp_path: Path, install: Any, monkeypatch: Any) -> None:
    """TRL gives each process its share of the answers by its own number of prompts, which must be everybody's."""
    tokenizer = build_processor().tokenizer
    monkeypatch.delattr(ScriptedTrainer, "_generate_single_turn")
    install(lambda text, pictures: [*tokenizer("red")["input_ids"], tokenizer.eos_token_id])
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://nowhere"}
    trainer = make_trainer(tmp_path, fails_on_0, **server)
    trainer.state.global_step = 0
    monkeypatch.setattr(hinted, "largest", lambda accelerator, number: max(3, number))
    monkeypatch.setattr(hinted._Sampler, "_scored", lambda self, places, draws: draws)
    row = make_row(0) | {"prompt": vqa_messages("Question 9?", ["red", "blue"], True)}
    prompt = with_images(row["prompt"], row)
    draws = hinted._Sampler(trainer, [row], [prompt], [], {0: 0}, "0").draw([Request(0, "look", 1)])
    asked = trainer.vllm_generation.engine.asked
    assert len(draws) == 1 and len(asked) == 3
    assert ["look" in text for text in asked] == [True, False, False]


@pytest.mark.slow
def test_the_check_of_the_real_vllm_passes_over_the_fake_one(
    install: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    monkeypatch.setattr(launch, "check", lambda params: None)
    monkeypatch.setattr("sys.argv", ["check_vllm.py", "--steps", "2"])
    assert check_vllm.main() == 0
    said = capsys.readouterr().out
    assert said.count("PASS  ") == 11 and "FAIL" not in said


def test_the_check_of_the_real_vllm_can_fail(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    row = {"step": 1, "group": 0, "completion": "a", "tokens": 49, "exploration": "", "hint": "", "accuracy": 1.0}
    rows = pd.DataFrame([row | {"injected": False}] * 7 + [row | {"injected": True, "accuracy": 0.0}])
    steps = [{"loss": float("nan"), "sampling/sampling_logp_difference/mean": 0.2}]
    found = list(check_vllm.checks(Params().replace(max_steps=1), rows, steps, 0.05))
    assert [holds for _, holds, _ in found] == [False] * 8 + [True, False]  # something was injected
    monkeypatch.setattr("sys.argv", ["check_vllm.py"])
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert check_vllm.main() == 2 and "vllm is not installed" in capsys.readouterr().err
