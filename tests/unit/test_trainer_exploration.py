"""KEPOTrainer with a scripted student: its draws, their prompts and hints, and what is injected."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kepo_harness import (
    batch_of,
    config,
    decode,
    fails_on_0,
    hint_prompt,
    make_dataset,
    make_row,
    make_trainer,
    right,
    score_batch,
    sharp_model,
    wrong,
)

from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.testbed.embedded import build_processor


def test_a_failed_group_explores_with_its_own_hint_answer_and_image(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: f"secret of {row['id']}")
    score_batch(trainer, 0, 1)
    assert trainer.teacher.hint_rows == [["q0"]]
    (asked,) = trainer.calls[1:]
    assert len(asked) == 1  # one draw, as the first was accepted
    assert "Question 0?" in asked[0] and "<hint>secret of q0</hint>" in asked[0] and "<answer>A</answer>" in asked[0]
    assert list(trainer.pictures[1][0][0].getdata()) == list(make_row(0)["image"].getdata())


def test_the_accepted_draw_replaces_one_original_and_is_scored_under_the_plain_prompt(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "secret")
    plain = make_trainer(tmp_path / "plain", fails_on_0, explore=False)
    batch, reference = score_batch(trainer, 0, 1), score_batch(plain, 0, 1)
    for key in ("prompt_ids", "prompt_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        shared = min(batch[key].shape[-1], reference[key].shape[-1])
        assert torch.equal(batch[key][..., :shared], reference[key][..., :shared]), key
    assert "secret" not in "".join(trainer._tokenizer.batch_decode(batch["prompt_ids"]))
    said = decode(trainer, batch["completion_ids"], batch["completion_mask"])
    assert sorted(said[:4]) == sorted([right(make_row(0))] + [wrong(make_row(0))] * 3)
    assert said[4:] == decode(plain, reference["completion_ids"], reference["completion_mask"])[4:]
    # Eq. 6 on 2, 1, 1, 1 and on 1, 2, 1, 2
    assert sorted(batch["advantages"][:4].tolist()) == pytest.approx([-0.25, -0.25, -0.25, 0.75])
    assert batch["advantages"][4:].tolist() == pytest.approx([-0.5, 0.5, -0.5, 0.5])
    assert batch["kepo_gate"][:, 0].tolist() == [text == right(make_row(0)) for text in said[:4]] + [False, True] * 2


def test_evaluation_between_steps_names_no_generation(tmp_path: Path) -> None:
    """The generation's seed decides on replaced rows and hints: evaluation must not change it."""
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h")
    trainer.model.eval()
    score_batch(trainer, 0, 1)
    trainer.model.train()
    score_batch(trainer, 0, 1)
    assert trainer._generation_of_step == (1, 0)


def test_which_original_leaves_comes_from_the_seed_alone(tmp_path: Path) -> None:
    places = set()
    for seed in range(4):
        trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", seed=seed)
        batch = score_batch(trainer, 0, 1)
        place = batch["kepo_gate"][:4].int().argmax().item()
        again = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", seed=seed)
        torch.manual_seed(99)
        repeated = again._generate_and_score_completions(batch_of(again, 0, 1))
        assert repeated["kepo_gate"][:4].int().argmax().item() == place
        places.add(place)
    assert len(places) > 1


def test_all_failing_groups_are_drawn_for_in_one_call_a_round(tmp_path: Path) -> None:
    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        good = {"q0": 1, "q1": 2, "q2": 3, "q3": 99}[row["id"]]
        return right(row) if hinted and before + 1 >= good else wrong(row)

    trainer = make_trainer(tmp_path, script, hints=lambda row: row["id"], per_device_train_batch_size=16)
    batch = score_batch(trainer, 0, 1, 2, 3)
    asked = [[t.split("Question ")[1][0] for t in call] for call in trainer.calls[1:]]
    assert asked == [["0", "1", "2", "3"], ["1", "2", "3"], ["2", "3"], ["3"], ["3"]]
    assert trainer.teacher.hint_rows == [["q0", "q1", "q2", "q3"]]
    assert batch["kepo_gate"].view(4, 4).sum(1).tolist() == [1, 1, 1, 0]


def test_m_accepted_draws_replace_m_distinct_originals(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", injected_per_group=3)
    batch = score_batch(trainer, 0, 1)
    assert [len(call) for call in trainer.calls] == [8, 3]
    assert batch["kepo_gate"][:4].sum() == 3


def test_unparsable_hints_leave_the_group_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: None)
    batch = score_batch(trainer, 0, 1)
    assert len(trainer.calls) == 1 and "tool_mask" not in batch
    assert trainer._metrics["train"]["kepo/unparsable_hints"] == [1.0]


@pytest.mark.parametrize("context", ["hint+answer", "hint", "answer"])
def test_hint_context(tmp_path: Path, context: str) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "secret", hint_context=context)
    score_batch(trainer, 0, 1)
    asked = trainer.calls[1][0]
    assert ("<hint>secret</hint>" in asked) == ("hint" in context)
    assert trainer.teacher.hint_rows == ([["q0"]] if "hint" in context else [])
    assert ("<answer>A</answer>" in asked) == ("answer" in context)


def test_retries_without_a_hint_see_the_plain_prompt_and_need_no_teacher(tmp_path: Path) -> None:
    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        assert not hinted
        return right(row) if row["id"] == "q1" or before == 5 else wrong(row)

    trainer = make_trainer(tmp_path, script, hint_context="none", explore=True, distill=False, no_teacher=True)
    score_batch(trainer, 0, 1)
    assert [len(call) for call in trainer.calls] == [8, 1, 1]  # the second retry is right
    assert {call[0] for call in trainer.calls} == {trainer.calls[0][0]}
    assert trainer._metrics["train"]["kepo/accepted"] == [1.0] and trainer.teacher is None


def test_another_questions_hint_is_told_and_the_own_answer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: f"of {row['id']}", hint_source="other")
    score_batch(trainer, 0, 1, 2)
    assert trainer.teacher.hint_rows == [["q1"]]
    assert "<hint>of q1</hint> and the ground truth answer is <answer>A</answer>" in trainer.calls[1][0]
    assert "Question 0?" in trainer.calls[1][0]
    with pytest.raises(ValueError, match="hint_source is 'other' but a process holds only one prompt"):
        score_batch(trainer, 0)


def test_the_answer_alone_needs_no_teacher_either(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hint_context="answer", distill=False, no_teacher=True)
    score_batch(trainer, 0, 1)
    assert "The ground truth answer is <answer>A</answer>" in trainer.calls[1][0]


def test_the_opposite_gate_passes_what_the_gate_does_not(tmp_path: Path) -> None:
    gates = {}
    for gate in ("reward", "below"):
        trainer = make_trainer(tmp_path / gate, fails_on_0, explore=False, gate=gate)
        gates[gate] = score_batch(trainer, 0, 1)["kepo_gate"]
    assert torch.equal(gates["below"], 1 - gates["reward"]) and gates["below"].any() and gates["reward"].any()


def test_total_reward_triggers_and_accepts_on_format_alone(tmp_path: Path) -> None:
    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        return wrong(row) if hinted else "no idea"

    trainer = make_trainer(tmp_path, script, hints=lambda row: "h", exploration_reward="total", gate_reward="total")
    batch = score_batch(trainer, 0, 1)
    assert len(trainer.calls) == 2 and trainer._metrics["train"]["kepo/accepted"] == [2.0]
    assert batch["kepo_gate"].sum() == 2  # τ = 1 on the sum passes a wrong answer in the right format
    strict = make_trainer(tmp_path, script, hints=lambda row: "h", exploration_reward="accuracy")
    score_batch(strict, 0, 1)
    assert len(strict.calls) == 1 + 5
    formatted = make_trainer(tmp_path, lambda *a: wrong(a[1]), hints=lambda row: "h", exploration_reward="total")
    score_batch(formatted, 0, 1)
    assert len(formatted.calls) == 1  # the format alone is a reward


def test_evaluation_never_explores_and_sees_no_hint(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, fails_on_0, hints=lambda row: "secret", per_device_eval_batch_size=8,
        trainer_args={"eval_dataset": make_dataset()},
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert trainer.teacher.hint_rows == [] and len(trainer.calls) == 2
    assert not any("secret" in text for call in trainer.calls for text in call)
    assert metrics["eval_rewards/accuracy_reward/mean"] == pytest.approx(3 / 8)
    assert not (tmp_path / "rollouts").exists()


def test_hints_depend_on_the_seed_and_leave_the_students_randomness_alone(tmp_path: Path) -> None:
    teacher = Teacher(sharp_model(1), build_processor())
    rows = [hint_prompt(make_row(0)), hint_prompt(make_row(1))]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = teacher.write_hints(rows, max_tokens=6, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert teacher.write_hints(rows, max_tokens=6, seed=3) == first


def test_hint_aware_draws_are_one_generation_a_round(tmp_path: Path) -> None:
    """With a real student, not the scripted one: its ``generate`` runs once for all groups of a round."""
    args = config(tmp_path, per_device_train_batch_size=16, max_completion_length=4, rejection_budget=3)
    teacher = Teacher(sharp_model(1), build_processor())
    teacher.write_hints = lambda rows, **_: ["look"] * len(rows)
    task = MultipleChoice()
    trainer = KEPOTrainer(
        sharp_model(0), task.reward_funcs, args, make_dataset(), teacher=teacher, task=task,
        processing_class=build_processor(),
    )  # fmt: skip
    trainer.model.train()
    sizes: list[int] = []
    generate = trainer.model.generate

    def counted(*positional: Any, **inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return generate(*positional, **inputs)

    trainer.model.generate = counted
    score_batch(trainer, 0, 1, 2, 3)
    assert sizes[-4:] == [16, 4, 4, 4]  # noise never answers: all four groups, three rounds
    assert set(sizes[:-4]) == {4}  # the distinct prompts of the rollouts, and the comparison's usual generation


def test_injected_rows_are_scored_by_all_three_models_under_the_plain_prompt_with_their_picture(tmp_path: Path) -> None:
    sharp_model(0).save_pretrained(tmp_path / "student")  # TRL loads its reference model by path
    student = type(sharp_model(0)).from_pretrained(tmp_path / "student")
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "secret", student=student, beta=0.1, tau=0.0)
    seen: dict[str, list[dict[str, Any]]] = {"student": [], "reference": [], "teacher": []}
    models = {"student": trainer.model, "reference": trainer.ref_model, "teacher": trainer.teacher._model}
    for name, model in models.items():
        model.model.register_forward_hook(
            lambda m, args, kwargs, out, name=name: seen[name].append(kwargs), with_kwargs=True
        )
    batch = score_batch(trainer, 0, 1)
    seen["student"].clear()  # it generated, and measured the injected row under both prompts
    trainer._compute_loss(trainer.model, batch)
    plain = make_trainer(tmp_path / "plain", fails_on_0, explore=False)
    ids = score_batch(plain, 0, 1)["prompt_ids"]
    pixels = plain.processing_class(
        text=["<|image_pad|>"] * 8, images=[[make_row(i // 4)["image"]] for i in range(8)], return_tensors="pt"
    )["pixel_values"]
    place = next(i for i, text in enumerate(decode(trainer, batch["completion_ids"], batch["completion_mask"]))
                 if text == right(make_row(0)))  # fmt: skip
    assert place < 4
    assert {name: len(calls) for name, calls in seen.items()} == {"student": 2, "reference": 1, "teacher": 3}
    for name, call in [(name, call) for name, calls in seen.items() for call in calls]:
        # Student and teacher each run once more, to compare their states with those from shared prompts, and the
        # teacher to measure how alike they are.
        assert torch.equal(call["input_ids"][:, : ids.shape[1]], ids), name
        assert torch.equal(call["input_ids"][:, ids.shape[1] :], batch["completion_ids"]), name
        assert torch.equal(call["pixel_values"], pixels), name
