"""KEPOTrainer's errors, and their messages."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kepo_harness import (
    batch_of,
    config,
    fails_on_0,
    make_dataset,
    make_trainer,
    score_batch,
)
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from kepo_core.errors import ParamError
from kepo_core.method import gates
from kepo_core.method.checks import check_arguments
from kepo_core.method.options import MethodOptions, declared
from kepo_core.method.scoring import checked_reward, distinct, find_reward
from kepo_core.method.served import ServedTeacher
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOConfig, KEPOTrainer
from kepo_core.params import Params
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.rewards import reward_functions
from kepo_core.testbed.embedded import build_model, build_processor


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"tau": math.inf}, "tau must be a finite number, got inf"),
        ({"tau": "1"}, "tau must be a number, got '1'"),
        ({"hint_source": "failures"}, "hint_source must be one of own, failure, other, got 'failures'"),
        ({"hint_reliance": math.inf}, "hint_reliance must be at least 0, got inf"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": 0.0}, "top_p must be greater than 0 and at most 1"),
        ({"scale_rewards": "median"}, "scale_rewards is 'median', expected one of none, group, batch, rloo"),
        ({"injected_per_group": 4}, "injected_per_group must be smaller than num_generations"),
        ({"rejection_budget": 0}, "rejection_budget"),
        ({"distill_beta": 1.1}, "distill_beta"),
        ({"distill_temperature": 0.0}, "distill_temperature"),
        ({"distill_coef": -1.0}, "distill_coef"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo', expected one of grpo, dapo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'"),
        ({"scale_rewards": "rloo", "multi_objective_aggregation": "normalize_then_sum"}, "scale_rewards is 'rloo' but"),
        ({"gate": "open"}, "gate must be one of reward, below, .*, got 'open'"),
        ({"guidance": "reward"}, "guidance must be one of loss, advantage, bounded, got 'reward'"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(tmp_path: Path, overrides: dict, sentence: str) -> None:
    with pytest.raises(ParamError, match=sentence):
        config(tmp_path, **overrides)


def test_a_parameter_of_the_method_is_declared_once_for_scripts_and_studies() -> None:
    ours = declared(MethodOptions)
    assert not ours.keys() & {*KEPOConfig.__annotations__, *GRPOConfig.__annotations__, *Params.__annotations__}
    for kind in (KEPOConfig, Params):
        assert {name: field.default for name, field in ours.items()} == {n: getattr(kind, n) for n in ours}


def build(
    tmp_path: Path, teacher: Any = None, dataset: Any = None, rewards: Any = None, task: Any = None, **overrides: Any
) -> KEPOTrainer:
    task = task or MultipleChoice()
    return KEPOTrainer(build_model("test", 0), rewards or MultipleChoice().reward_funcs, config(tmp_path, **overrides),
                       dataset or make_dataset(), teacher=teacher, task=task,
                       processing_class=build_processor())  # fmt: skip


def test_a_missing_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distill is True but teacher is None"):
        build(tmp_path)
    with pytest.raises(ValueError, match="explore is True but teacher is None"):
        build(tmp_path, distill=False)


@pytest.mark.parametrize("column", ["question", "options", "answer", "image"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    rows = [{k: v for k, v in make_dataset()[i].items() if k != column} for i in range(2)]

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict:
            return rows[i]

    with pytest.raises(ValueError, match=f"train_dataset lacks {column}"):
        build(tmp_path, teacher=Teacher(build_model("test", 1), build_processor()), dataset=Rows())


def test_a_plain_grpo_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a KEPOConfig"):
        KEPOTrainer(build_model("test", 0), None, GRPOConfig(str(tmp_path), use_cpu=True), make_dataset())


def broken(value: Any) -> Any:
    def broken_reward(completions: list, **_: Any) -> Any:
        return [1.0] * (len(completions) - 1) + [value] if value != "short" else [1.0]

    return broken_reward


@pytest.mark.parametrize("value", [float("nan"), "many", float("inf"), "short"])
@pytest.mark.parametrize("parts", [True, False])
def test_a_reward_that_is_no_number_for_each_completion_stops_the_run(tmp_path: Path, value: Any, parts: bool) -> None:
    trainer = make_trainer(
        tmp_path, fails_on_0, hints=lambda row: "h", distill=parts, explore=parts, rewards=broken(value)
    )
    said = "1 rewards, but 8 were expected" if value == "short" else f"{value!r} for completion 7, expected a finite"
    with pytest.raises(ValueError, match=f"he reward function '?broken_reward'? returned {said}"):
        score_batch(trainer, 1, 2)


def test_a_reward_that_is_no_list_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", rewards=lambda completions, **_: 1.0)
    with pytest.raises(ValueError, match="returned 1 rewards, but 8 were expected"):
        score_batch(trainer, 1, 2)


@pytest.mark.parametrize("value", [float("nan"), "short"])
def test_a_broken_reward_stops_exploration_too(tmp_path: Path, value: Any) -> None:
    trainer = make_trainer(
        tmp_path, fails_on_0, hints=lambda row: "h", exploration_reward="total", rewards=[broken(value)]
    )
    with pytest.raises(ValueError, match=r"broken_reward.? returned"):
        score_batch(trainer, 0, 1)


def test_a_reward_models_infinite_output_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h")
    trainer.reward_funcs, trainer.reward_weights = [broken(math.inf)], torch.ones(1)  # as a model's output would pass
    trainer.reward_func_names, trainer.reward_processing_classes = ["model"], [None]
    with pytest.raises(ValueError, match="model returned inf for row 7 of step 1"):
        score_batch(trainer, 1, 2)


@pytest.mark.parametrize("parameter", ["gate_reward", "exploration_reward"])
def test_a_reward_that_there_is_not_is_named_with_the_nearest(tmp_path: Path, parameter: str) -> None:
    with pytest.raises(ValueError, match=f"{parameter} is 'acuracy', .* the nearest is 'accuracy_reward'"):
        make_trainer(tmp_path, fails_on_0, **{parameter: "acuracy"})
    with pytest.raises(ValueError, match=f"{parameter} is 'zzz', .*'accuracy_reward', 'format_reward'"):
        make_trainer(tmp_path, fails_on_0, **{parameter: "zzz"})
    twice = [lambda completions, **_: [0.0] * len(completions)] * 2
    with pytest.raises(ValueError, match="2 reward functions have that name"):
        make_trainer(tmp_path, fails_on_0, rewards=twice, **{parameter: "<lambda>"})


def test_exploration_without_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="explore is True but task is None"):
        KEPOTrainer(build_model("test", 0), MultipleChoice().reward_funcs, config(tmp_path), make_dataset(),
                    teacher=Teacher(build_model("test", 1), build_processor()),
                    processing_class=build_processor())  # fmt: skip


def test_hints_without_reasoning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="thinking is False, expected True"):
        make_trainer(tmp_path, fails_on_0, thinking=False)


@pytest.mark.parametrize("part", ["distill", "explore"])
@pytest.mark.parametrize("argument", ["tools", "rollout_func", "environment_factory"])
def test_completions_of_several_turns_are_refused(tmp_path: Path, part: str, argument: str) -> None:
    other = "explore" if part == "distill" else "distill"
    with pytest.raises(ValueError, match=f"{argument} is set, expected it unset: {part} supports single-turn"):
        make_trainer(tmp_path, fails_on_0, trainer_args={argument: [len]}, **{other: False})


def test_a_reward_that_raises_is_not_swallowed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h")
    rows = batch_of(trainer, 1, 2)
    rows[3] = rows[3] | {"answer": "Z"}
    with pytest.raises(ValueError, match="option letters"):
        trainer._generate_and_score_completions(rows)


def test_a_completion_of_no_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, distill=False, explore=False)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda *a, **k: ([[5, 6], []], None))
    with pytest.raises(ValueError, match="completion 1 of step 1 has no tokens"):
        trainer._generate_and_score_completions(batch_of(trainer, 0)[:2])


def test_a_loss_that_is_no_number_names_step_and_term(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, explore=False)
    with torch.no_grad():
        trainer.teacher.head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="the distill loss is nan at step 1"):
        trainer.train()


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, fails_on_0, explore=False, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1
    )
    after: dict[int, torch.Tensor] = {}

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            after[state.global_step] = model.lm_head.weight.detach().clone()
            if state.global_step == 2:
                with torch.no_grad():
                    trainer.teacher.head.weight[3] = math.nan

    trainer.add_callback(Break())
    with pytest.raises(FloatingPointError, match="at step 3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    (name,) = [key for key in saved if "embed_tokens" in key]  # tied to the head
    assert torch.equal(saved[name], after[2]) and torch.equal(trainer.model.lm_head.weight, after[2])


def test_a_group_that_does_not_fill_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation_batch_size \(8\) must be divisible by num_generations \(3\)"):
        config(tmp_path, num_generations=3)


def test_reward_functions_fit_the_prompt(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lambda *a: f"<answer>{a[1]['answer']}</answer>", explore=False, thinking=False,
                           dataset=make_dataset(thinking=False))  # fmt: skip
    score_batch(trainer, 0, 1)
    assert trainer._metrics["train"]["kepo/reward"] == [2.0] and trainer._metrics["train"]["reward"] == [2.0]
    assert trainer.reward_func_names == [f.__name__ for f in reward_functions(False)]


def test_a_teacher_or_task_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher is a Qwen3VL\w+, expected a Teacher"):
        build(tmp_path, teacher=build_model("test", 1))
    with pytest.raises(ValueError, match="task is the class MultipleChoice, expected an instance"):
        build(tmp_path, teacher=Teacher(build_model("test", 1), build_processor()), task=MultipleChoice)


def test_a_teacher_that_is_the_student_is_refused(tmp_path: Path) -> None:
    model = build_model("test", 0)
    with pytest.raises(ValueError, match="teacher and student are one model"):
        make_trainer(tmp_path, fails_on_0, student=model, teacher_model=model)


def test_a_teacher_without_a_chat_template_is_refused_before_training(tmp_path: Path) -> None:
    processor = build_processor()
    teacher = Teacher(build_model("test", 1), processor)
    teacher.processor.chat_template = None
    with pytest.raises(ValueError, match="the teacher's tokenizer has no chat template"):
        build(tmp_path, teacher=teacher)


def test_a_served_teacher_takes_no_distill_temperature(tmp_path: Path) -> None:
    teacher = ServedTeacher("http://127.0.0.1:9/v1", "teacher", build_processor())
    with pytest.raises(ValueError, match="distill_temperature is 2, expected 1 with a served teacher"):
        build(tmp_path, teacher=teacher, distill_temperature=2.0)


def test_columns_of_held_out_rows_are_checked_too(tmp_path: Path) -> None:
    rows = [{k: v for k, v in make_dataset()[0].items() if k != "answer"}]
    with pytest.raises(ValueError, match="eval_dataset ood lacks answer"):
        check_arguments(config(tmp_path), None, MultipleChoice(), {"id": make_dataset(), "ood": rows}, gates.reward)


@pytest.mark.parametrize("reward", [3.0, ["accuracy"], {"accuracy": 1}])
def test_what_is_no_reward_is_refused(reward: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a function .*, a reward model or its name"):
        checked_reward(reward)


def test_a_module_that_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(ValueError, match="a reward is a Linear, a module without transformers' config"):
        checked_reward(torch.nn.Linear(2, 1))


def test_a_class_in_the_place_of_a_reward_is_refused_before_it_is_called() -> None:
    class Judge:
        def __call__(self, completions: list, **_: Any) -> list[float]: ...

    with pytest.raises(ValueError, match=r"a reward is the class Judge, expected an instance of it: Judge\(\.\.\.\)"):
        checked_reward(Judge)


def test_names_of_rewards_stay_apart() -> None:
    assert distinct(["a", "b", "a"]) == ["a#1", "b", "a#3"]
    strict, lenient = (functools.partial(fails_on_0, strict=strict) for strict in (True, False))
    assert checked_reward(strict).__name__ == "fails_on_0"  # as TRL names it
    lenient.__name__ = "lenient"
    assert checked_reward(lenient).__name__ == "lenient"
    with pytest.raises(ValueError, match="2 reward functions have that name: set the __name__ of one"):
        find_reward("gate_reward", "fails_on_0", ["fails_on_0", "fails_on_0"])
    with pytest.raises(ValueError, match="gate_reward is 'total', the weighted sum, but a reward has that name"):
        find_reward("gate_reward", "total", ["total", "other"])
