"""Every parameter in which paper and released code differ: each value does something; the two readings are whole."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kepo_harness import batch_of, make_dataset, make_row, make_trainer, right, row_of, sharp_model, wrong
from trl import GRPOConfig

from kepo_core.experiment.experiment import training_config
from kepo_core.method.config import _CHOICES, KEPOConfig
from kepo_core.method.options import MethodOptions, declared
from kepo_core.params import Params, project_root
from kepo_core.task.prompts import HINT_CONTEXTS
from kepo_core.testbed.embedded import build_model

ROOT = project_root()

# A batch in which every parameter matters -------------------------------------------------------------------------


def mixed(text: str, row: dict[str, Any], before: int, hinted: bool) -> str:
    """Question 0 is answered at its second hint-aware draw, 2 never, though in a format; 1 and 3 now and then.

    Their rollouts earn 0, 1 (right without format, or format alone) and 2, at different lengths.
    """
    good, other = right(row), wrong(row)
    if row["id"] == "q0":
        return (good if before % 2 else "no") if hinted else ("who knows", "no idea", "no", "no " * 4)[before % 4]
    if row["id"] == "q2":
        return other if hinted or before % 2 else "never"
    return (good, f"<answer>{row['answer']}</answer>", other + " and more", "none")[before % 4]


def trace(folder: Path, **overrides: Any) -> dict[str, Any]:
    """What one batch and its loss come to: whatever a parameter changes shows in it."""
    thinking = overrides.get("thinking", True)
    trainer = make_trainer(
        folder, mixed, student=build_sharp(folder.parent), dataset=make_dataset(thinking=thinking),
        **{"per_device_train_batch_size": 16, "explore": thinking, "log_rollouts": False} | overrides,
    )  # fmt: skip
    if trainer.ref_model is not None:
        with torch.no_grad():  # as if training had begun: it starts as the student, at a KL of 0
            trainer.ref_model.lm_head.weight.mul_(0.5)
    hints: list[int] = []
    about: list[bool] = []
    if trainer.teacher is not None:

        def write(prompts: list[Any], *, max_tokens: int, **_: Any) -> list[str]:
            hints.append(max_tokens)
            about.extend("Wrong attempt:" in str(prompt) for prompt in prompts)
            return [f"look at {row_of(prompt)['id']}" for prompt in prompts]

        trainer.teacher.write_hints = write
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions(batch_of(trainer, 0, 1, 2, 3))
    noise = torch.Generator().manual_seed(1)
    # Off-policy, so that clips and levels show: any fixed rule for π_old does.
    batch["old_per_token_logps"] = -0.5 - 4 * torch.rand(batch["completion_ids"].shape, generator=noise)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return {
        "asked": trainer.calls,
        "hints": hints,
        "about": about,
        "advantages": batch["advantages"].tolist(),
        "gate": batch["kepo_gate"].tolist() if "kepo_gate" in batch else None,
        "loss": loss.item(),
        "gradient": gradient.norm().item(),
    }


def build_sharp(folder: Path) -> Any:
    """The student, loaded from disk as TRL wants it for its reference model."""
    path = folder / "student"
    if not path.exists():
        sharp_model(0).save_pretrained(path)
    return type(build_model("test", 0)).from_pretrained(path)


VALUES: dict[str, list[Any]] = {
    "thinking": [True, False],
    "distill": [True, False],
    "explore": [True, False],
    "tau": [0.0, 1.0],
    "distill_beta": [0.0, 0.5, 1.0],
    "distill_coef": [0.0, 0.5, 1.0],
    "distill_temperature": [1.0, 2.0],
    "rejection_budget": [1, 2, 5],
    "injected_per_group": [1, 2, 3],
    "hint_max_tokens": [8, 32],
    "hint_reliance": [0.0, 0.01],
    "epsilon": [0.1, 0.2],
    "beta": [0.0, 0.1],
    "gate_reward": ["accuracy", "total"],
    "exploration_reward": ["accuracy", "total"],
    "hint_context": list(HINT_CONTEXTS),
    **{name: list(choices) for name, choices in _CHOICES.items()},
    **{name: list(f.metadata["choices"]) for name, f in declared(MethodOptions).items() if "choices" in f.metadata},
}
VALUES["loss_type"].remove("bnpo")  # which is dapo where a step is one batch of one process
#: Where a parameter needs company to matter.
COMPANY: dict[str, dict[str, Any]] = {
    "tau": {"gate_reward": "total"},
}


def test_every_method_parameter_is_listed_here_with_all_its_choices() -> None:
    assert {*declared(MethodOptions), "epsilon", "beta"} <= set(VALUES)
    for name in VALUES.keys() & declared(Params).keys():
        assert set(declared(Params)[name].metadata.get("choices", ())) <= set(VALUES[name]), name


@pytest.mark.parametrize("name", VALUES)
def test_each_value_of_a_parameter_is_another_run(tmp_path: Path, name: str) -> None:
    traces = []
    values = [value for value in VALUES[name] if value != "fading"]  # which is one of the others at each step
    for number, value in enumerate(values):
        traces.append(trace_of(tmp_path / str(number), COMPANY.get(name, {}) | {name: value}))
    for i, one in enumerate(traces):
        assert torch.isfinite(torch.tensor(one["loss"]))
        for other in traces[:i]:
            assert one != other


def trace_of(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    return trace(folder, **overrides)


def test_the_same_value_is_the_same_run(tmp_path: Path) -> None:
    assert trace_of(tmp_path / "a", {}) == trace_of(tmp_path / "b", {})


# The gate ---------------------------------------------------------------------------------------------------------

#: What a rollout can be → its accuracy and its total reward.
KINDS = {"right, in format": (1, 2), "right": (1, 1), "wrong, in format": (0, 1), "neither": (0, 0)}


def all_kinds(text: str, row: dict[str, Any], before: int, hinted: bool) -> str:
    return (right(row), f"<answer>{row['answer']}</answer>", wrong(row), "none")[before % 4]


@pytest.mark.parametrize(
    ("reward", "gate", "tau"),
    [(r, g, t) for r, most in (("accuracy", 1), ("total", 2)) for g in ("reward", "below") for t in range(most + 1)],
)
def test_the_gate_in_all_its_readings(tmp_path: Path, reward: str, gate: str, tau: int) -> None:
    trainer = make_trainer(
        tmp_path, all_kinds, explore=False, gate_reward=reward, gate=gate, tau=float(tau),
        per_device_train_batch_size=4,
    )  # fmt: skip
    weights = trainer._generate_and_score_completions(batch_of(trainer, 0))["kepo_gate"][:, 0].tolist()
    signals = [total if reward == "total" else accuracy for accuracy, total in KINDS.values()]
    assert weights == [signal >= tau if gate == "reward" else signal < tau for signal in signals]


def test_any_tau_up_to_one_is_the_same_run_under_accuracy(tmp_path: Path) -> None:
    """A binary reward reaches 0.5 exactly where it reaches 1: the same bits after two steps of training."""

    def weights(tau: float) -> torch.Tensor:
        trainer = make_trainer(
            tmp_path / str(tau), mixed, hints=lambda row: "look", tau=tau, max_steps=2, per_device_train_batch_size=16
        )
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    half, one, none = weights(0.5), weights(1.0), weights(0.0)
    assert torch.equal(half, one) and not torch.equal(one, none)


# The two readings as files ----------------------------------------------------------------------------------------

#: Parameters that GRPOConfig knows under another name, as this package's numbers.
RENAMED = {
    "group_size": lambda config, world: config.num_generations,
    "prompts_per_device": lambda config, world: config.per_device_train_batch_size // config.num_generations,
    "prompts_per_step": lambda config, world: config.per_device_train_batch_size // config.num_generations
    * config.gradient_accumulation_steps * world,
    "epochs": lambda config, world: config.num_train_epochs,
    "precision": lambda config, world: "bf16" if config.bf16 else "fp32",
}  # fmt: skip


@pytest.mark.parametrize(("name", "processes"), [("paper", 4), ("released", 8)])
def test_each_key_of_a_reading_arrives(tmp_path: Path, name: str, processes: int) -> None:
    """In the trainer's configuration, or where loading and evaluation read it."""
    file = ROOT / "params" / f"{name}.yaml"
    params, keys = Params.load(file), yaml.safe_load(file.read_text())
    config = training_config(params, tmp_path)
    assert params.processes == processes
    sources = "".join(path.read_text() for path in sorted((ROOT / "kepo_core" / "experiment").glob("*.py")))
    for key in keys:
        value = params.to_dict().get(key, keys[key])
        if key in RENAMED:
            assert RENAMED[key](config, processes) == value, key
        elif key == "activation_checkpointing":  # by its old name
            assert config.gradient_checkpointing is value is True
        elif key in KEPOConfig.__dataclass_fields__ and key != "data_seed":
            assert getattr(config, key) == value, key
        else:
            assert re.search(rf"\bparams\.{key}\b", sources), f"nothing reads {key}"


def test_the_steps_of_the_released_code(tmp_path: Path) -> None:
    """190, of which the last of each of five epochs is on what is left; TRL's sampler leaves that out."""
    params = Params.load(ROOT / "params" / "released.yaml")
    sizes = {"per_device_train_batch_size": 16, "max_steps": -1, "num_train_epochs": params.epochs,
             "gradient_accumulation_steps": params.prompts_per_step // 4}  # fmt: skip
    trainer = make_trainer(tmp_path, mixed, dataset=make_dataset(params.train_items), explore=False, **sizes)
    steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert steps == 185 == params.epochs * (params.train_items // params.prompts_per_step)


@pytest.mark.parametrize("name", ["paper", "released"])
def test_a_reading_runs_as_it_stands(tmp_path: Path, name: str) -> None:
    """All its method parameters together, over a batch with every kind of group."""
    params = Params.load(ROOT / "params" / f"{name}.yaml")
    config = training_config(params, tmp_path)
    own = {key for key in VALUES if key in KEPOConfig.__dataclass_fields__} - {"explore"}
    method = {key: getattr(config, key) for key in (*own, "epsilon_high", "delta")}
    method["hint_context"] = params.hint_context
    got = trace_of(tmp_path / "x", method)
    # Question 2 has a rollout in the right format, which under "total" is a reward: only question 0 explores.
    asked = [text for call in got["asked"][1:] for text in call]
    assert asked and all("Question 0?" in text for text in asked)
    assert all(("<answer>A</answer>" in text) == (name == "paper") for text in asked)
    assert [len(call) for call in got["asked"][1:]] == ([1, 1] if name == "paper" else [2, 2])
    gate = got["gate"]
    gate = [bool(weights[0]) for weights in gate]
    assert gate[4:8] == [True, True, False, False]  # "wrong and more" is outside the format, as is "none"
    assert gate[8:12] == [False, True, False, True]  # wrong answers in the right format pass τ = 1 on the sum
    assert got["hints"] == [256] and make_row(0)["answer"] == "A"


def test_what_trl_decides_without_being_asked_is_what_the_readme_says(tmp_path: Path) -> None:
    """Fields of TRL's that enter the loss and that the study does not set: an upgrade that changes one is noticed."""
    ours = KEPOConfig(str(tmp_path), use_cpu=True)
    told = {
        "use_bias_correction_kl": True, "temperature": 1.0, "mask_truncated_completions": False,
        "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "delta": None,
        "epsilon": 0.2, "num_iterations": 1, "epsilon_high": None,
        "off_policy_mask_threshold": None, "sync_ref_model": False, "disable_dropout": False,
        "router_aux_loss_coef": None, "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": None, "max_grad_norm": 1.0, "weight_decay": 0.0, "reward_weights": None,
        "multi_objective_aggregation": "sum_then_normalize", "label_smoothing_factor": 0.0,
    }  # fmt: skip
    assert {name: getattr(ours, name) for name in told} == told
    theirs = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    others = {"loss_type": "dapo", "scale_rewards": "group"}
    assert {name: getattr(theirs, name) for name in told | others} == told | others
