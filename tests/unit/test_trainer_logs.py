"""What KEPOTrainer logs and writes, and that two runs of one seed log and write the same."""

import math
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from kepo_harness import (
    config,
    fails_on_0,
    make_dataset,
    make_row,
    make_trainer,
    right,
    score_batch,
    wrong,
)
from text_harness import make_trainer as make_text_trainer
from text_harness import text_model

from kepo_core.method import agreement
from kepo_core.method.exploration import leaving_members
from kepo_core.method.rollouts import GLOSSARY, collect_rollouts
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.task import rewards
from kepo_core.task.multiple_choice import GLOSSARY as TASK_GLOSSARY
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.testbed.embedded import build_model, build_processor


def test_metrics_are_taken_before_injection_and_each_has_a_definition(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", max_steps=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    logged = {name for name in first if name.startswith("kepo/")}
    rewards = {"kepo/rewards/accuracy_reward", "kepo/rewards/format_reward"}
    defined = set(GLOSSARY) | set(TASK_GLOSSARY) | rewards
    measured = {f"kepo/top_k_{name}/{part}" for name in agreement.MEASURES for part in agreement.PARTS}
    assert logged - measured == defined - {
        "kepo/rewards/NAME",
        *(f"kepo/top_k_{name}/PART" for name in agreement.MEASURES),
        "kepo/teacher_right",  # only with a gate that needs it
        "kepo/log_ratio",  # only where the teacher scores tokens
        "kepo/unasked",  # only with a served teacher
        "kepo/vllm_difference",  # only with vLLM
    }
    assert measured <= logged
    assert first["kepo/rewards/accuracy_reward"] == first["kepo/accuracy"]
    assert first["kepo/accuracy"] == pytest.approx(2 / 8) and first["rewards/accuracy_reward/mean"] == pytest.approx(
        3 / 8
    )
    assert first["kepo/outcome/correct"] == pytest.approx(2 / 8) and first["kepo/outcome/wrong"] == pytest.approx(6 / 8)
    assert first["kepo/format"] == 1.0 and first["kepo/reward"] == pytest.approx(1.25)
    assert first["kepo/all_fail_rate"] == 0.5 and first["kepo/explored_groups"] == 1.0
    assert first["kepo/draws"] == first["kepo/accepted"] == first["kepo/rescued_groups"] == 1.0
    assert first["kepo/draw_tokens"] == len(trainer._tokenizer(right(make_row(0)))["input_ids"]) + 1
    assert first["kepo/gate_rate"] == pytest.approx(3 / 8) and first["kepo/injected_mentions_hint"] == 0.0
    assert first["kepo/loss_distill"] > 0 and first["kepo/divergence"] > 0 and first["kepo/loss_kl"] == 0.0
    assert second["kepo/explored_groups"] == 0.0 and second["kepo/injected_log_ratio"] is None  # questions 2 and 3


@pytest.mark.parametrize(
    ("dtype", "rate", "are_lost"),
    [
        (torch.bfloat16, 1e-6, True),
        (torch.bfloat16, 0.1, False),
        (torch.float32, 1e-6, False),
        (torch.float32, 1e-12, True),
    ],
)
def test_updates_that_are_lost_in_rounding_are_counted(
    tmp_path: Path, dtype: torch.dtype, rate: float, are_lost: bool
) -> None:
    student = text_model(0).to(dtype)
    trainer = make_text_trainer(tmp_path, student=student, learning_rate=rate, max_steps=2)
    before = student.lm_head.weight.detach().clone()
    trainer.train()
    lost = [log["kepo/unmoved_weights"] for log in trainer.state.log_history[:2]]
    assert all(share > 0.9 for share in lost) if are_lost else all(share < 0.1 for share in lost)
    assert ((student.lm_head.weight == before).float().mean() > 0.9) == are_lost


def test_the_first_step_of_a_warm_up_is_not_taken_for_rounding(tmp_path: Path) -> None:
    trainer = make_text_trainer(tmp_path, student=text_model(0), learning_rate=1e-3, lr_scheduler_type="linear",
                                warmup_steps=2, max_steps=2)  # fmt: skip
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert "kepo/unmoved_weights" not in first and second["kepo/unmoved_weights"] < 0.1


def test_without_guidance_there_is_no_gate(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", distill=False)
    trainer.train()
    assert "kepo/accuracy" in trainer.state.log_history[0] and "kepo/gate_rate" not in trainer.state.log_history[0]
    assert not collect_rollouts(tmp_path)["gate"].any()


def test_rollouts_file(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "look left", max_steps=2, num_generations=4)
    trainer.train()
    rows = collect_rollouts(tmp_path)
    assert len(rows) == 2 * 8 + 1 and rows["step"].tolist() == [1] * 9 + [2] * 8
    injected, replaced = rows.query("injected").iloc[0], rows.query("replaced").iloc[0]
    assert injected["row"] == replaced["row"] and injected["id"] == replaced["id"] == "q0"
    assert injected["completion"] == right(make_row(0)) and replaced["completion"] == wrong(make_row(0))
    assert (injected["outcome"], replaced["outcome"]) == ("correct", "wrong")
    columns = ["rewards/accuracy_reward", "rewards/format_reward"]
    assert injected[columns].tolist() == [1.0, 1.0] and replaced[columns].tolist() == [0.0, 1.0]
    assert injected["gate"] and not replaced["gate"] and math.isnan(replaced["advantage"])
    assert injected["advantage"] == pytest.approx(0.75) and injected["reward"] == 2.0 and replaced["reward"] == 1.0
    group = rows.query("step == 1 and group == 0")
    assert (
        set(group["hint"]) == {"look left"} and set(group["draws"]) == {1} and set(group["exploration"]) == {"rescued"}
    )
    assert set(rows.query("group == 1")["hint"]) == {""} and set(rows.query("step == 2")["exploration"]) == {""}
    member = leaving_members(1, 4, random.Random("42/1/0/leave/0"))[0]
    assert injected["row"] == member
    assert not rows["completion"].str.contains("look left").any()


def test_no_rollouts_file_when_it_is_switched_off(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", log_rollouts=False)
    trainer.train()
    assert not (tmp_path / "rollouts").exists() and collect_rollouts(tmp_path).empty
    assert "completion" in collect_rollouts(tmp_path).columns


def test_truncated_completions_are_counted_as_such(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lambda *a: "<think>on and on…", explore=False)
    score_batch(trainer, 0, 1)
    assert trainer._metrics["train"]["kepo/outcome/truncated"] == [1.0]
    finished = make_trainer(tmp_path, lambda *a: "<think>on and on", explore=False)
    score_batch(finished, 0, 1)
    assert finished._metrics["train"]["kepo/outcome/missing"] == [1.0]


def train_for_real(output_dir: Path, seed: int) -> tuple[pd.DataFrame, list[dict], torch.Tensor]:
    args = config(output_dir, max_steps=2, max_completion_length=6, seed=seed, tau=0.0, hint_max_tokens=12,
                  rejection_budget=2, shuffle_dataset=True)  # fmt: skip
    teacher = Teacher(build_model("test", 1), build_processor())
    task = MultipleChoice()
    trainer = KEPOTrainer(build_model("test", 0), task.reward_funcs, args, make_dataset(), teacher=teacher, task=task,
                          processing_class=build_processor())  # fmt: skip
    trainer.train()
    clock = ("runtime", "per_second", "step_time")
    logs = [{k: v for k, v in h.items() if not k.endswith(clock) and "profiling" not in k}
            for h in trainer.state.log_history]  # fmt: skip
    return collect_rollouts(output_dir), logs, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_two_runs_are_equal_bit_for_bit_and_another_seed_is_not(tmp_path: Path) -> None:
    rows, logs, weights = train_for_real(tmp_path / "a", 0)
    again = train_for_real(tmp_path / "b", 0)
    pd.testing.assert_frame_equal(rows, again[0])
    assert logs == again[1] and torch.equal(weights, again[2])
    assert (rows["exploration"] != "").any()
    names = [p.name for p in sorted((tmp_path / "a" / "rollouts").iterdir())]
    assert all((tmp_path / x / "rollouts" / n).read_bytes() == (tmp_path / "a" / "rollouts" / n).read_bytes()
               for x in "ab" for n in names)  # fmt: skip
    other = train_for_real(tmp_path / "c", 1)
    assert not torch.equal(weights, other[2])


def test_no_completion_is_parsed_twice(tmp_path: Path) -> None:
    """The rollout's record and both rewards share one parse of a completion."""
    rewards._read.cache_clear()
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h")
    score_batch(trainer, 0, 1)
    rows, own, final = trainer._generation.rows, trainer._generation.own, trainer._generation.final
    said = {(c.text, len(row["options"])) for made in (own, final) for row, c in zip(rows, made, strict=True)}
    found = rewards._read.cache_info()
    assert found.misses == len(said) and found.hits + found.misses == 2 * (8 + 1)  # eight rollouts and a draw


@pytest.mark.parametrize("choice", [{"scale_rewards": "rloo"}])
def test_trls_table_of_completions_shows_the_advantages_that_train(tmp_path: Path, choice: dict[str, str]) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", **choice)
    output = score_batch(trainer, 0, 1)
    assert list(trainer._logs["advantages"]) == output["advantages"].tolist()
    rows = collect_rollouts(tmp_path).query("not replaced")
    assert rows["advantage"].tolist() == output["advantages"].tolist()


def test_a_rollout_whose_tokens_are_masked_passes_no_gate(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, lambda text, row, before, hinted: right(row) + "…", explore=False, mask_truncated_completions=True
    )
    output = score_batch(trainer, 0, 1)
    assert not output["completion_mask"].any() and not output["kepo_gate"].any()


def test_evaluation_logs_no_divergence(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, fails_on_0, hints=lambda row: "h", per_device_eval_batch_size=8,
        trainer_args={"eval_dataset": make_dataset(2)},
    )  # fmt: skip
    logged = trainer.evaluate()
    assert any(name.endswith("loss_policy") for name in logged | trainer.state.log_history[-1])
    assert not any("loss_distill" in name for name in logged | trainer.state.log_history[-1])
