"""Hints about a failed attempt, the bound on hint reliance, and hints that fade: in the trainer, with tiny models."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kepo_harness import batch_of, fails_on_0, make_row, make_trainer, right, row_of, score_batch, wrong

from kepo_core import Templates
from kepo_core.method import hinted
from kepo_core.method.checks import check_task
from kepo_core.method.objective import hint_reliance
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.method.task import Task
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import HINT_WRITING, context_at, hint_messages

# Hints about a failed attempt --------------------------------------------------------------------------------------


def attempts(text: str, row: dict, before: int, hinted: bool) -> str:
    """Question 0's rollouts are all wrong, and each is another one."""
    return (
        f"<think>try {before}<|im_end|></think><answer>B</answer>" if row["id"] == "q0" and not hinted else right(row)
    )


def about(trainer: Any, *questions: int) -> list[str]:
    """The texts that the teacher is asked with for a generation batch."""
    asked: list[str] = []

    def write(prompts: Any, **_: Any) -> list[str]:
        asked.extend(part["text"] for prompt in prompts for part in prompt[-1]["content"] if part["type"] == "text")
        return [f"of {row_of(prompt)['id']}" for prompt in prompts]

    trainer.teacher.write_hints = write
    score_batch(trainer, *questions)
    return asked


def test_the_teacher_reads_an_attempt_of_the_same_group_without_its_markup(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, attempts, hint_source="failure")
    (asked,) = about(trainer, 1, 0)
    row = make_row(0)
    plain = hint_messages(row["question"], row["options"], row["answer"])[0]["content"][1]["text"]
    attempt, _, rest = asked.removeprefix("Wrong attempt: ").partition("\n\n")
    assert rest == plain and rest.endswith(HINT_WRITING.replace("{answer}", "A"))
    assert attempt in {f"try {member} B" for member in range(4)}
    assert "<hint>of q0</hint>" in trainer.calls[1][0]


def test_each_of_several_failing_groups_has_its_own_attempt(tmp_path: Path) -> None:
    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        return f"try {before} of {row['id']}"

    for seed in range(4):
        trainer = make_trainer(tmp_path, script, hint_source="failure", rejection_budget=1, seed=seed)
        for asked, group in zip(about(trainer, 1, 0), ("q1", "q0"), strict=True):
            assert asked.partition("\n\n")[0].endswith(f"of {group}")


def test_which_attempt_comes_from_the_seed_and_all_are_possible(tmp_path: Path) -> None:
    seen = set()
    for seed in range(16):
        chosen = [about(make_trainer(tmp_path, attempts, hint_source="failure", seed=seed), 0, 1) for _ in range(2)]
        assert chosen[0] == chosen[1]
        seen.add(chosen[0][0].partition("\n\n")[0])
    assert len(seen) == 4


def test_a_long_attempt_is_cut_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hinted, "FAILURE_TOKENS", 3)
    trainer = make_trainer(tmp_path, attempts, hint_source="failure")
    (asked,) = about(trainer, 0, 1)
    attempt = asked.removeprefix("Wrong attempt: ").partition("\n\n")[0]
    assert attempt.endswith("B") and not attempt.startswith("try")
    assert len(trainer._tokenizer(attempt)["input_ids"]) <= 3


def test_without_a_failing_group_nothing_is_asked(tmp_path: Path) -> None:
    assert about(make_trainer(tmp_path, fails_on_0, hint_source="failure"), 1, 2) == []


def test_a_task_says_whether_it_can_ask_about_a_failure() -> None:
    row = {"prompt": "p", "solution": "x"}

    class Old(Task):
        def ask(self, row: Any) -> str:
            return "write a hint"

        def tell(self, row: Any, hint: str) -> str:
            return hint

    assert check_task(Old(), row)
    with pytest.raises(ValueError, match=r"hint_source is 'failure'.*Old has no ask_about\(row, failure\)"):
        check_task(Old(), row, "an attempt")
    with pytest.raises(ValueError, match=r"hint_source is 'failure'.*without \{failure\}"):
        check_task(Templates("It is {solution}.", "{hint}"), row, "an attempt")
    task = Templates("Not {failure}, but {solution}.", "{hint}")
    assert task.columns == ("solution",) and task.ask_about(row, "{y}") == "p\n\nNot {y}, but x."
    with pytest.raises(ValueError, match=r"asking names \{failure\}.*expected hint_source 'failure'"):
        check_task(task, row)


def test_a_trainer_whose_task_cannot_ask_about_failures_is_not_made(tmp_path: Path) -> None:
    from text_harness import make_trainer as make_text_trainer

    with pytest.raises(ValueError, match="hint_source is 'failure', but the task cannot"):
        make_text_trainer(tmp_path, hint_source="failure")


# The bound on hint reliance ----------------------------------------------------------------------------------------


def test_hint_reliance_by_hand_and_its_limits() -> None:
    plain = torch.tensor([[0.5, 0.25, 0.1], [0.5, 0.5, 0.5]]).log()
    hinted_ = torch.tensor([[1.0, 0.5, 0.9], [0.5, 0.5, 0.5]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert hint_reliance(plain, hinted_, mask).tolist() == pytest.approx([math.log(2), 0.0])
    assert hint_reliance(hinted_, plain, mask).tolist() == pytest.approx([-math.log(2), 0.0])


def measured(folder: Path, bound: float, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    """A batch in which question 0's first draw is right but relies on its hint by 2, and its second by 1."""
    trainer = make_trainer(folder, fails_on_0, hints=lambda row: "h", hint_reliance=bound, **given)
    passes: list[int] = []

    def log_probabilities(trainer: Any, asked: Any, ids: Any) -> Any:
        if len(ids) == 3:  # `_measure_injected`
            return original(trainer, asked, ids)
        passes.append(len(ids))
        shape = len(ids), max(map(len, ids))
        logps = torch.full(shape, -3.0)
        logps[len(ids) // 2 :] += 3 - len(passes)
        return logps, torch.zeros(shape), torch.ones(shape)

    original = hinted.log_probabilities
    monkeypatch.setattr(hinted, "log_probabilities", log_probabilities)
    score_batch(trainer, 0, 1)
    logged = {name: trainer._metrics["train"][f"kepo/{name}"][0] for name in ("draws", "accepted", "refused_draws")}
    return passes, logged, collect_rollouts(folder)


@pytest.mark.parametrize(
    ("bound", "passes", "draws", "accepted", "refused"),
    [(0.0, 0, 1, 1, 0), (3.0, 1, 1, 1, 0), (2.0, 1, 1, 1, 0), (1.5, 2, 2, 1, 1), (0.5, 3, 3, 1, 2)],
)
def test_a_right_draw_above_the_bound_is_refused_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float, passes: int, draws: int, accepted: int, refused: int
) -> None:
    made, logged, rows = measured(tmp_path, bound, monkeypatch)
    assert made == [2] * passes  # one draw under two prompts
    assert logged == {"draws": draws, "accepted": accepted, "refused_draws": refused}
    assert rows["injected"].sum() == accepted and set(rows.query("group == 0")["exploration"]) == {"rescued"}


def test_a_group_whose_right_draws_are_all_refused_is_exhausted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, logged, rows = measured(tmp_path, 1.5, monkeypatch, rejection_budget=1)
    assert logged == {"draws": 1, "accepted": 0, "refused_draws": 1}
    assert set(rows.query("group == 0")["exploration"]) == {"exhausted"} and not rows["injected"].any()


def test_the_bound_and_the_log_measure_the_same(tmp_path: Path) -> None:
    """By the student's own probabilities: just above the logged value the draw is accepted, just below it is not."""
    free = make_trainer(tmp_path / "free", fails_on_0, hints=lambda row: "lower right")
    score_batch(free, 0, 1)
    (logged,) = free._metrics["train"]["kepo/injected_log_ratio"]
    assert logged > 0.001
    for factor, accepted in ((1.001, 1.0), (0.999, 0.0)):
        trainer = make_trainer(
            tmp_path / str(factor), fails_on_0, hints=lambda row: "lower right", hint_reliance=logged * factor
        )
        score_batch(trainer, 0, 1)
        assert trainer._metrics["train"]["kepo/accepted"] == [accepted]
        assert trainer._metrics["train"]["kepo/refused_draws"] == [0.0 if accepted else 5.0]


def test_wrong_draws_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hinted, "log_probabilities", lambda *_: pytest.fail("measured"))
    trainer = make_trainer(tmp_path, lambda *a: wrong(a[1]), hints=lambda row: "h", hint_reliance=0.1)
    score_batch(trainer, 0)
    assert trainer._metrics["train"]["kepo/draws"] == [5.0]


def test_measuring_leaves_the_batch_as_it_is(tmp_path: Path) -> None:
    batches = [
        score_batch(make_trainer(tmp_path / str(bound), fails_on_0, hints=lambda row: "h", hint_reliance=bound), 0, 1)
        for bound in (0.0, 1e9)
    ]
    assert batches[0].keys() == batches[1].keys()
    for name, value in batches[0].items():
        assert torch.equal(value, batches[1][name]) if isinstance(value, torch.Tensor) else value == batches[1][name]


# Hints that fade ---------------------------------------------------------------------------------------------------


def test_fading_withdraws_by_thirds() -> None:
    steps = [context_at("fading", step / 6) for step in range(6)]
    assert steps == ["hint+answer", "hint+answer", "hint", "hint", "none", "none"]
    assert context_at("fading", 0.999999) == "none" and context_at("hint", 0.9) == "hint"
    for total in range(1, 50):  # whole steps: never back to more help, and all of it at first
        order = [("hint+answer", "hint", "none").index(context_at("fading", step / total)) for step in range(total)]
        assert order == sorted(order) and order[0] == 0


def test_a_task_of_fading_hints_asks_and_tells_less_and_less() -> None:
    task, row = MultipleChoice("fading"), make_row(0)
    for progress, context in ((0.0, "hint+answer"), (0.5, "hint"), (0.9, "none"), (0.1, "hint+answer")):
        task.set_progress(progress)
        same = MultipleChoice(context)
        assert task.ask(row) == same.ask(row) and task.tell(row, "h") == same.tell(row, "h")
        assert task.ask_about(row, "x") == same.ask_about(row, "x")


def test_hints_fade_over_training_and_the_teacher_is_asked_only_while_they_are_given(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, lambda *a: wrong(a[1]), hints=lambda row: "secret", hint_context="fading", rejection_budget=1,
        max_steps=6, distill=False,
    )  # fmt: skip
    trainer.train()
    told = [any("<hint>secret</hint>" in text for text in call) for call in trainer.calls[1::2]]
    answer = [any("the ground truth answer is <answer>" in text for text in call) for call in trainer.calls[1::2]]
    assert told == [True] * 4 + [False] * 2 and answer == [True] * 2 + [False] * 4
    assert len(trainer.teacher.hint_rows) == 4


def test_a_resumed_run_fades_where_it_stopped(tmp_path: Path) -> None:
    def calls(folder: Path, **given: Any) -> Any:
        return make_trainer(
            folder, lambda *a: wrong(a[1]), hints=lambda row: "secret", hint_context="fading", rejection_budget=1,
            max_steps=3, distill=False, save_strategy="steps", save_steps=1, **given,
        )  # fmt: skip

    whole = calls(tmp_path / "run")
    whole.train()
    resumed = calls(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.calls == whole.calls[-2:] and not resumed.teacher.hint_rows


def test_a_task_that_begins_to_ask_without_a_teacher_is_told_of(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hint_context="none", distill=False, no_teacher=True)
    trainer.task.context = "hint"
    with pytest.raises(ValueError, match=r"task\.ask asks for a hint at this step, but teacher is None"):
        trainer._generate_and_score_completions(batch_of(trainer, 0, 1))
