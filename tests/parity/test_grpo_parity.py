"""With both parts off, KEPOTrainer is TRL's GRPOTrainer: same losses, gradients, weights and metrics, bit for bit."""

import functools
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from datasets import Dataset
from kepo_harness import make_dataset, make_row
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOConfig, KEPOTrainer
from kepo_core.testbed.embedded import CHAT_TEMPLATE, VOCAB_SIZE, build_model, build_processor


def token_reward(completions: list, completion_ids: list, **_: Any) -> list[float]:
    """Rewards that differ within every group of a random model, which gives it something to learn."""
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


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def run(trainer: GRPOTrainer) -> dict[str, Any]:
    """Train; keep every loss as computed, every gradient as applied, every metric as logged, and the weights."""
    losses: list[torch.Tensor] = []
    original = trainer.compute_loss

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        losses.append(loss.detach().clone())
        return loss

    trainer.compute_loss = record
    gradients = Gradients()
    trainer.add_callback(gradients)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    clock = ("runtime", "per_second", "step_time")
    logs = [
        {k: v for k, v in entry.items() if not k.endswith(clock) and not k.startswith("profiling") and "kepo/" not in k}
        for entry in trainer.state.log_history
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moved = {name for name, weight in weights.items() if not torch.equal(weight, start[name])}
    return {
        "losses": losses, "gradients": gradients.steps, "logs": logs, "weights": weights, "moved": moved,
        "rng": torch.get_rng_state(),
    }  # fmt: skip


#: What both trainers are told. KEPOConfig's own defaults, the paper's, are in `build`.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl, two iterations": {"scale_rewards": "group", "beta": 0.1, "num_iterations": 2, "max_steps": 4},
    "generation window longer than the step": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "importance_sampling_level": "sequence",
    },
    "lora": {"peft": True},
    "lora with kl": {"peft": True, "beta": 0.1},
    "text only": {"world": "text"},
    "several images": {"world": "images"},
}


def text_world() -> tuple[Any, Any, Dataset]:
    """A text-only language model, its tokenizer, and questions without pictures, scored like the others."""
    tokenizer = build_processor().tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    rows = [
        {"id": f"q{i}", "question": f"Number {i}?", "options": ["red", "blue"], "answer": "A",
         "prompt": [{"role": "user", "content": f"Number {i}?"}]}
        for i in range(8)
    ]  # fmt: skip
    return model, tokenizer, Dataset.from_list(rows)


def images_world(folder: Path) -> tuple[Any, Any, Dataset]:
    """Questions about one or two pictures each."""

    def row(i: int) -> dict[str, Any]:
        pictures = [make_row(i + k)["image"] for k in range(1 + i % 2)]
        # As text, because a column's messages must all have the same parts: TRL puts the pictures' places before it.
        return {"images": pictures, "prompt": [{"role": "user", "content": f"Number {i}?"}]}

    rows = Dataset.from_list([row(i) for i in range(8)])
    return Qwen3VLForConditionalGeneration.from_pretrained(folder), build_processor(), rows


def build(cls: type, tmp_path: Path, overrides: dict[str, Any], folder: Path) -> GRPOTrainer:
    overrides = dict(overrides)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2) if overrides.pop("peft", False) else None
    world = overrides.pop("world", "")
    arguments = settings(tmp_path / cls.__name__, **overrides)
    if cls is KEPOTrainer:
        args = KEPOConfig(**arguments, distill=False, explore=False)
    else:
        args = GRPOConfig(**{"loss_type": "grpo", "scale_rewards": "none"} | arguments)
    if world == "text":
        model, processing_class, dataset = text_world()
    elif world == "images":
        model, processing_class, dataset = images_world(folder)
    else:
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
        processing_class, dataset = build_processor(), make_dataset(8)
    rewards = [token_reward, mean_reward]
    return cls(model, rewards, args, dataset, processing_class=processing_class, peft_config=lora)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student: TRL loads its reference model by path."""
    folder = tmp_path_factory.mktemp("student")
    build_model("test", 0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_parts_off_is_grpo_bit_for_bit(tmp_path: Path, case: str, student_folder: Path) -> None:
    expected = run(build(GRPOTrainer, tmp_path, CASES[case], student_folder))
    got = run(build(KEPOTrainer, tmp_path, CASES[case], student_folder))
    assert_same(expected, got)


def assert_same(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """All bits that `run` keeps are equal, and both trainings have learned something."""
    assert len(expected["losses"]) == len(got["losses"]) >= 3 and len(expected["gradients"]) >= 3
    assert all(torch.equal(a, b) for a, b in zip(expected["losses"], got["losses"], strict=True))
    for theirs_of_step, ours_of_step in zip(expected["gradients"], got["gradients"], strict=True):
        assert theirs_of_step.keys() == ours_of_step.keys()
        for name, gradient in theirs_of_step.items():
            assert torch.equal(gradient, ours_of_step[name]), name
    assert expected["logs"] == got["logs"]
    for name, weight in expected["weights"].items():
        assert torch.equal(weight, got["weights"][name]), name
    assert expected["moved"]  # equal because both learned, not because neither did
    assert torch.equal(expected["rng"], got["rng"])


def test_a_teacher_that_is_not_used_changes_nothing(tmp_path: Path, student_folder: Path) -> None:
    """Neither a coefficient of 0 nor a gate that never opens moves the weights away from GRPO's."""
    expected = run(build(GRPOTrainer, tmp_path, {}, student_folder))
    for number, overrides in enumerate(({"distill_coef": 0.0, "tau": 0.0}, {"tau": 7.0})):  # token_reward is below 7
        args = KEPOConfig(**settings(tmp_path / str(number), **overrides), explore=False)
        model = Qwen3VLForConditionalGeneration.from_pretrained(student_folder)
        teacher = Teacher(build_model("test", 1), build_processor())
        rewards = [token_reward, mean_reward]
        got = run(
            KEPOTrainer(model, rewards, args, make_dataset(8), teacher=teacher, processing_class=build_processor())
        )
        for name, weight in expected["weights"].items():
            assert torch.equal(weight, got["weights"][name]), name


@pytest.mark.parametrize(
    ("scaling", "cls", "config"),
    [
        ("none", GRPOTrainer, functools.partial(GRPOConfig, scale_rewards="none")),
        ("group", GRPOTrainer, functools.partial(GRPOConfig, scale_rewards="group")),
        ("batch", GRPOTrainer, functools.partial(GRPOConfig, scale_rewards="batch")),
        ("rloo", RLOOTrainer, functools.partial(RLOOConfig, beta=0.0, normalize_advantages=False)),
    ],
)
def test_advantages_are_those_of_trl_and_of_objective(tmp_path: Path, scaling: str, cls: type, config: Any) -> None:
    # Neither needs the columns of a scored question.
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(2)])
    batches, weights = [], [0.5, 2.0]
    for kind, make in ((cls, config), (KEPOTrainer, functools.partial(KEPOConfig, distill=False, explore=False,
                                                                     scale_rewards=scaling))):  # fmt: skip
        args = make(**settings(tmp_path, num_generations=4, reward_weights=weights))
        rewards = [token_reward, mean_reward]
        trainer = kind(build_model("test", 0), rewards, args, dataset, processing_class=build_processor())
        trainer.model.train()
        torch.manual_seed(3)
        batches.append(trainer._generate_and_score_completions([dataset[i] for i in (0, 1) for _ in range(4)]))
    theirs, ours = batches
    assert torch.equal(theirs["completion_ids"], ours["completion_ids"])
    assert ours["advantages"].std() > 0
    assert torch.allclose(ours["advantages"], theirs["advantages"], rtol=1e-6, atol=1e-6)
    totals = (trainer._rewards * torch.tensor(weights)).sum(1)
    assert torch.allclose(ours["advantages"], reference.advantages(totals, 4, scaling), rtol=1e-5, atol=1e-6)
