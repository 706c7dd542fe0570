"""The examples: the method in one file has the trainer's loss, and every script runs as a user runs it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from text_harness import make_trainer, riddles

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_method_in_one_file_is_short_and_needs_nothing_of_ours() -> None:
    text = (EXAMPLES / "kepo_minimal.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert not re.search(r"^\s*(import|from) (kepo_core|trl|accelerate)", text, re.M)


def test_the_method_in_one_file_has_the_trainers_loss_and_gradient(tmp_path: Path) -> None:
    """On a batch of the trainer's, injected rollouts and shut gates among them."""
    trainer = make_trainer(tmp_path, chat=False, gate_reward="total", tau=5.0)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    data = riddles(chat=False)
    batch = trainer._generate_and_score_completions([data[i] for i in range(4) for _ in range(4)])
    assert 0 < batch["kepo_gate"].sum() < 16 and trainer._metrics["train"]["kepo/accepted"] == [1.0]
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    width = batch["completion_ids"].shape[1]
    student, teacher = (
        model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
        for model in (trainer.model, trainer.teacher.model)
    )
    rewards = trainer.total(trainer._rewards)
    own = load("kepo_minimal").kepo_loss(
        student, teacher, batch["completion_ids"], batch["completion_mask"], rewards, 4, 5.0
    )
    own.backward()
    assert own.item() == pytest.approx(loss.item(), rel=1e-4)
    for name, p in trainer.model.named_parameters():
        assert torch.allclose(p.grad, gradient[name], rtol=1e-3, atol=1e-5 * gradient[name].abs().max()), name


def test_the_method_in_one_file_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    minimal = load("kepo_minimal")
    school = minimal.schooled
    monkeypatch.setattr(minimal, "STEPS", 1)
    monkeypatch.setattr(minimal, "schooled", lambda lessons, steps: school(lessons, 5))
    minimal.main()
    assert re.search(r"sums right: student \d+% before, \d+% after; teacher \d+%", capsys.readouterr().out)


def run(name: str, folder: Path, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["kepo_text", "kepo_vqa"])
def test_a_script_runs_from_anywhere(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported what takes seconds; the slow test below starts a process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "1", "--schooling", "2"])
    load(name).main()
    assert re.search(r"\d+% before, +\d+% after", capsys.readouterr().out)
    assert list((tmp_path / f"{name}_output" / "rollouts").glob("step_*.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kepo_minimal", "kepo_text", "kepo_vqa"])
def test_an_example_learns_what_it_was_not_taught(tmp_path: Path, name: str) -> None:
    shares = re.findall(r"(\d+)% before, +(\d+)% after", run(name, tmp_path))
    before, after = map(int, shares[-1])
    assert after >= before + 20
