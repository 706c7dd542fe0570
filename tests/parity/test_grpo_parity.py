"""With both parts off, KEPOTrainer is TRL's GRPOTrainer: same losses, gradients, weights and metrics, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from kepo_harness import make_dataset
from peft import LoraConfig
from transformers import Qwen3VLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOConfig, KEPOTrainer
from kepo_core.study.embedded import build_model, build_processor


def token_reward(completions: list, completion_ids: list, **_: Any) -> list[float]:
    """Rewards that differ within every group of a random model, so that there is something to learn."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def mean_reward(completions: list, completion_ids: list, **_: Any) -> list[float]:
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


def settings(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        **overrides,
    }


def run(trainer: GRPOTrainer) -> dict[str, Any]:
    """Train; keep every loss as computed, every gradient norm and metric as logged, and the weights."""
    losses: list[torch.Tensor] = []
    original = trainer.compute_loss

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        losses.append(loss.detach().clone())
        return loss

    trainer.compute_loss = record
    trainer.train()
    clock = ("runtime", "per_second", "step_time")
    logs = [
        {k: v for k, v in entry.items() if not k.endswith(clock) and not k.startswith(("profiling", "kepo/"))}
        for entry in trainer.state.log_history
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return {"losses": losses, "logs": logs, "weights": weights, "rng": torch.get_rng_state()}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # ours, TRL's
    "plain": ({}, {"scale_rewards": "none"}),
    "kl, two iterations": (
        {"advantage": "std", "beta": 0.1, "num_iterations": 2, "max_steps": 4},
        {"scale_rewards": "group", "beta": 0.1, "num_iterations": 2, "max_steps": 4},
    ),
    "generation window longer than the step": (
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "importance_level": "sequence"},
        {"scale_rewards": "none", "importance_sampling_level": "sequence", "steps_per_generation": 4,
         "gradient_accumulation_steps": 2},
    ),
    "lora": ({"peft": True}, {"scale_rewards": "none", "peft": True}),
}  # fmt: skip


def build(cls: type, tmp_path: Path, overrides: dict[str, Any], folder: Path) -> GRPOTrainer:
    overrides = dict(overrides)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2) if overrides.pop("peft", False) else None
    arguments = settings(tmp_path / cls.__name__, **overrides)
    if cls is KEPOTrainer:
        args = KEPOConfig(**arguments, distill=False, explore=False)
    else:
        args = GRPOConfig(**arguments, loss_type="grpo")
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    rewards = [token_reward, mean_reward]
    return cls(model, rewards, args, make_dataset(8), processing_class=build_processor(), peft_config=lora)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student: TRL loads its reference model by path."""
    folder = tmp_path_factory.mktemp("student")
    build_model("test", 0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_parts_off_is_grpo_bit_for_bit(tmp_path: Path, case: str, student_folder: Path) -> None:
    ours, theirs = CASES[case]
    expected = run(build(GRPOTrainer, tmp_path, theirs, student_folder))
    got = run(build(KEPOTrainer, tmp_path, ours, student_folder))
    assert len(expected["losses"]) == len(got["losses"]) >= 3
    assert all(torch.equal(a, b) for a, b in zip(expected["losses"], got["losses"], strict=True))
    assert expected["logs"] == got["logs"]
    for name, weight in expected["weights"].items():
        assert torch.equal(weight, got["weights"][name]), name
    # Equal because both learnt, not because neither did: LoRA's B matrices start at zero.
    start = dict(Qwen3VLForConditionalGeneration.from_pretrained(student_folder).named_parameters())
    learnt = [n for n in expected["weights"] if "lora_B" in n or n in start]
    assert any(not torch.equal(expected["weights"][n], start.get(n, torch.zeros(()).expand_as(w)))
               for n, w in expected["weights"].items() if n in learnt)  # fmt: skip
    assert torch.equal(expected["rng"], got["rng"])


def test_a_teacher_that_is_not_used_changes_nothing(tmp_path: Path, student_folder: Path) -> None:
    """Neither a coefficient of 0 nor a gate that never opens moves the weights away from GRPO's."""
    expected = run(build(GRPOTrainer, tmp_path, {"scale_rewards": "none"}, student_folder))
    for number, overrides in enumerate(({"distill_coef": 0.0, "tau": 0.0}, {"tau": 1.0, "gate_compare": "gt"})):
        args = KEPOConfig(**settings(tmp_path / str(number), **overrides), explore=False)
        model = Qwen3VLForConditionalGeneration.from_pretrained(student_folder)
        teacher = Teacher(build_model("test", 1), build_processor())
        rewards = [token_reward, mean_reward]
        got = run(
            KEPOTrainer(model, rewards, args, make_dataset(8), teacher=teacher, processing_class=build_processor())
        )
        for name, weight in expected["weights"].items():
            assert torch.equal(weight, got["weights"][name]), name


@pytest.mark.parametrize("advantage", ["mean", "std", "rloo"])
def test_advantages_are_those_of_objective(tmp_path: Path, advantage: str) -> None:
    """TRL computes two of the three; all three are the functions of objective.py on the gathered rewards."""
    from kepo_core.method import objective

    args = KEPOConfig(**settings(tmp_path, num_generations=4, advantage=advantage), distill=False, explore=False)
    # Neither needs the columns of a scored question.
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "Say something."}]}])
    trainer = KEPOTrainer(build_model("test", 0), [token_reward], args, dataset, processing_class=build_processor())
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dataset[0]] * 4)
    totals = trainer._generation.rewards.sum(1)
    assert totals.std() > 0
    assert torch.allclose(batch["advantages"], objective.advantages(totals, 4, advantage), rtol=1e-5, atol=1e-6)
