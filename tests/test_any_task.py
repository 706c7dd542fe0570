"""KEPO as a library: a text-only student, riddles with columns and rewards of their own, nothing of the paper's task.

Groups fail, hints are written and given, draws are accepted, the gate opens where the reward that it is given reaches
τ, and the divergence flows.
"""

import asyncio
import functools
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fake_teacher_server import FakeVLLM, serving
from text_harness import ASKING, WORDS, brief, correct, make_trainer, text_model, tokenizer
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from kepo_core import ServedTeacher, Teacher
from kepo_core.method.chat_client import ChatClient
from kepo_core.method.rollouts import collect_rollouts


def trained(trainer: Any, folder: Path) -> tuple[dict[str, float], pd.DataFrame]:
    """One step; what it logged, and its rollouts."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    return trainer.state.log_history[0], collect_rollouts(folder)


def check(log: dict[str, float], rows: pd.DataFrame) -> None:
    """What the script of the harness comes to with `correct` named for gate and exploration."""
    assert log["kepo/all_fail_rate"] == 2 / 4 and log["kepo/explored_groups"] == 2  # riddles 0 and 1 of 0 to 3
    assert log["kepo/rescued_groups"] == log["kepo/accepted"] == 1
    assert log["kepo/draws"] == 2 + 5 and set(rows.query("group == 0")["hint"]) == {"h0"}
    kept, replaced = rows.query("not replaced"), rows.query("replaced")
    assert len(kept) == 16 and len(replaced) == 1
    assert (kept["gate"] == (kept["rewards/correct"] >= 5)).all() and kept["gate"].sum() == 1 + 2 * 2
    named = kept["completion"].str.startswith("a ")
    assert (kept["rewards/correct"] == 10.0 * named).all()
    assert kept["rewards/brief"].tolist() == pytest.approx((-0.01 * kept["completion"].str.len()).tolist())
    assert rows["reward"].tolist() == pytest.approx((rows["rewards/correct"] + rows["rewards/brief"]).tolist())
    own = rows.query("not injected")
    assert log["kepo/reward"] == pytest.approx(own["reward"].mean())
    assert log["kepo/rewards/correct"] == pytest.approx(own["rewards/correct"].mean()) == 10 * 4 / 16
    assert log["reward"] == pytest.approx(kept["reward"].mean())  # TRL's, after injection
    groups = kept.groupby("group")["reward"]
    assert kept["advantage"].tolist() == pytest.approx((kept["reward"] - groups.transform("mean")).tolist(), abs=1e-6)
    assert log["kepo/divergence"] > 0 and log["kepo/loss_distill"] > 0


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_kepo_trains_on_a_task_of_ones_own(tmp_path: Path, chat: bool) -> None:
    trainer = make_trainer(tmp_path, chat)
    check(*trained(trainer, tmp_path))
    assert trainer.teacher.asked == [f"Riddle {i}?\n\n" + ASKING.format(solution=WORDS[i]) for i in (0, 1)]
    (first, *_) = trainer.calls[1:]  # both failing groups draw together
    assert len(first) == 2 and "Riddle 0?\n\nThe hint is h0 and the solution piano." in first[0]


def test_the_gate_follows_the_reward_that_it_is_given(tmp_path: Path) -> None:
    _, rows = trained(make_trainer(tmp_path, gate_reward="brief", tau=-0.095), tmp_path)
    kept = rows.query("not replaced")
    assert (kept["gate"] == (kept["rewards/brief"] >= -0.095)).all() and 0 < kept["gate"].sum() < 16
    assert (kept["gate"] != (kept["rewards/correct"] >= 5)).any()


def test_exploration_follows_the_reward_that_it_is_given(tmp_path: Path) -> None:
    log, _ = trained(make_trainer(tmp_path, exploration_reward="brief"), tmp_path)
    assert log["kepo/all_fail_rate"] == 1.0 and log["kepo/accepted"] == 0  # no text is worth more than 0
    log, _ = trained(
        make_trainer(tmp_path / "total", exploration_reward="total", tau=9.5, gate_reward="total"), tmp_path
    )
    assert log["kepo/all_fail_rate"] == 0.5 and log["kepo/accepted"] == 1


def test_every_completion_is_scored_once(tmp_path: Path) -> None:
    scored: list[int] = []

    def counted(completions: list[Any], solution: list[str], **columns: Any) -> list[float]:
        scored.append(len(completions))
        return correct(completions, solution, **columns)

    trainer = make_trainer(tmp_path, rewards=[counted, brief])
    log, _ = trained(trainer, tmp_path)
    assert scored[0] == 16 and sum(scored[1:]) == log["kepo/draws"]


def test_async_rewards_and_reward_models_trigger_accept_and_gate(tmp_path: Path) -> None:
    async def correct_later(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return correct(completions, solution)

    made = tokenizer()
    judge = Qwen2ForSequenceClassification(
        Qwen2Config(vocab_size=len(made), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1, num_labels=1, pad_token_id=made.pad_token_id)
    )  # fmt: skip
    judge.config._name_or_path = "some/judge"
    trainer = make_trainer(tmp_path, rewards=[correct_later, brief], exploration_reward="correct_later")
    log, rows = trained(trainer, tmp_path)
    assert log["kepo/accepted"] == 1
    assert (rows.query("not replaced")["gate"] == (rows.query("not replaced")["rewards/correct_later"] >= 5)).all()

    from text_harness import ScriptedText, config, hinting, riddles

    from kepo_core import Templates

    trainer = ScriptedText(
        text_model(0), [judge], config(tmp_path / "judge", tau=0.0, gate_reward="judge"), riddles(),
        processing_class=made, reward_processing_classes=[made], teacher=hinting(Teacher(text_model(1), made)),
        task=Templates(asking=ASKING, telling="The hint is {hint}."),
    )  # fmt: skip
    _, rows = trained(trainer, tmp_path / "judge")
    assert rows["rewards/judge"].nunique() > 1
    kept = rows.query("not replaced")
    assert (kept["gate"] == (kept["rewards/judge"] >= 0)).all()


def scaled(completions: list[Any], solution: list[str], scale: float, **_: Any) -> list[float]:
    return [scale * value for value in correct(completions, solution)]


async def scaled_later(completions: list[Any], solution: list[str], scale: float, **_: Any) -> list[float]:
    return scaled(completions, solution, scale)


class Judge:
    """A reward with a state of its own."""

    def __call__(self, completions: list[Any], solution: list[str], **_: Any) -> list[float]:
        return correct(completions, solution)

    def method(self, completions: list[Any], solution: list[str], **_: Any) -> list[float]:
        return self(completions, solution)


class LateJudge(Judge):
    async def __call__(self, completions: list[Any], solution: list[str], **_: Any) -> list[float]:
        return correct(completions, solution)


CALLED = {
    "scaled": functools.partial(scaled, scale=1.0),
    "scaled_later": functools.partial(functools.partial(scaled_later), scale=1.0),
    "Judge": Judge(),
    "LateJudge": LateJudge(),
    "method": functools.partial(Judge().method),
}


@pytest.mark.parametrize("name", CALLED)
def test_a_reward_is_anything_that_is_called(tmp_path: Path, name: str) -> None:
    """It triggers, accepts and opens the gate by its name, as a function does."""
    trainer = make_trainer(tmp_path, rewards=[brief, CALLED[name]], gate_reward=name, exploration_reward=name)
    log, rows = trained(trainer, tmp_path)
    check(log | {"kepo/rewards/correct": log[f"kepo/rewards/{name}"]},
          rows.rename(columns={f"rewards/{name}": "rewards/correct"}))  # fmt: skip


@pytest.mark.parametrize("parts", [True, False], ids=["kepo", "grpo"])
@pytest.mark.parametrize("gate", ["reward", "below"])
def test_single_completions_that_a_reward_does_not_apply_to(tmp_path: Path, parts: bool, gate: str) -> None:
    """None for every second completion, and for a whole group: unknown is neither right nor wrong."""

    def half(completions: list[Any], solution: list[str], **_: Any) -> list[float | None]:
        values = correct(completions, solution)
        return [
            None if (i % 2 and len(values) == 16) or word == "river" else value
            for i, (value, word) in enumerate(zip(values, solution, strict=True))
        ]

    trainer = make_trainer(tmp_path, rewards=[half], distill=parts, explore=parts, gate=gate)
    trainer.train()
    log, rows = trainer.state.log_history[0], collect_rollouts(tmp_path)
    kept = rows.query("not replaced")
    unknown = kept["rewards/half"].isna()
    assert unknown.sum() >= 7 and not kept[unknown]["gate"].any() and (kept[unknown]["advantage"] == 0).all()
    known = kept[~unknown]
    means = known.groupby("group")["reward"].transform("mean")
    assert known["advantage"].tolist() == pytest.approx((known["reward"] - means).tolist(), abs=1e-6)
    failed = rows.query("not injected").groupby("group")["rewards/half"].max() == 0  # the maximum of what is known
    assert log["kepo/all_fail_rate"] == failed.sum() / 4 and failed.any() and not failed[1]
    assert log["kepo/explored_groups"] == (failed.sum() if parts else 0)
    if parts:
        assert (known["gate"] == (known["reward"] >= 5 if gate == "reward" else known["reward"] < 5)).all()
    assert math.isfinite(log["loss"]) and math.isfinite(log["kepo/reward"])


def test_a_reward_that_does_not_apply_neither_fails_nor_opens_the_gate(tmp_path: Path) -> None:
    def sometimes(completions: list[Any], solution: list[str], **_: Any) -> list[float | None]:
        values = correct(completions, solution)
        return [None if word == "river" else value for word, value in zip(solution, values, strict=True)]

    log, rows = trained(make_trainer(tmp_path, rewards=[sometimes, brief], tau=-1.0), tmp_path)
    assert log["kepo/explored_groups"] == 1  # riddle 1 is not asked about it
    kept = rows.query("not replaced")
    assert kept.query("group == 1")["rewards/sometimes"].isna().all()
    assert (kept["gate"] == (kept["group"] != 1)).all()  # τ = −1 passes all others
    unasked = kept.query("group == 1")
    assert unasked["reward"].tolist() == pytest.approx(unasked["rewards/brief"].tolist())


def test_a_group_that_no_reward_applies_to_does_not_move_the_policy(tmp_path: Path) -> None:
    def sometimes(completions: list[Any], solution: list[str], **_: Any) -> list[float | None]:
        values = correct(completions, solution)
        return [None if word == "river" else value for word, value in zip(solution, values, strict=True)]

    for scaling in ("none", "rloo"):
        folder = tmp_path / scaling
        log, rows = trained(make_trainer(folder, rewards=[sometimes], scale_rewards=scaling), folder)
        assert (rows.query("group == 1 and not replaced")["advantage"] == 0).all()
        assert rows.query("group == 1")["reward"].isna().all() and not math.isnan(log["kepo/reward"])
        rescued = rows.query("group == 0 and not replaced")["advantage"].abs().max()
        assert rescued == pytest.approx(7.5 * (4 / 3 if scaling == "rloo" else 1))


def test_what_rewards_log_belongs_to_what_is_trained_on(tmp_path: Path) -> None:
    """TRL's table of completions shows an injected draw with its own extra columns, not the replaced original's."""

    def telling(completions: list[Any], solution: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("starts", [c[0]["content"][:2] for c in completions])
        log_metric("calls", 1.0)
        return correct(completions, solution)

    trainer = make_trainer(tmp_path, rewards=[telling, brief])
    trained(trainer, tmp_path)
    table = trainer._logs
    texts = [completion[0]["content"] for completion in table["completion"]]
    assert list(table["extra"]["starts"]) == [text[:2] for text in texts]
    assert trainer.state.log_history[0]["calls"] == 1.0


def test_a_served_teacher_does_as_the_one_in_process(tmp_path: Path) -> None:
    """Top k = the whole vocabulary is the whole divergence."""
    local, rows = trained(make_trainer(tmp_path / "local"), tmp_path / "local")
    with serving(FakeVLLM(text_model(1), tokenizer(), "teacher")) as server:
        client = ChatClient(server.url, timeout=30, retries=1, concurrency=4)
        teacher = ServedTeacher(client, "teacher", tokenizer(), top_k=len(tokenizer()))
        write, asked = teacher.write_hints, []

        def hints(prompts: Any, **options: Any) -> list[str]:
            assert write(prompts, **options) == [None] * len(prompts)  # the server writes: noise without tags
            asked.extend(prompts)
            return [f"h{prompt[-1]['content'].split('Riddle ')[1].split('?')[0]}" for prompt in prompts]

        teacher.write_hints = hints
        served, served_rows = trained(make_trainer(tmp_path / "served", teacher=teacher), tmp_path / "served")
    check(served, served_rows)
    assert [prompt[-1]["content"].split("\n\n")[1] for prompt in asked] == [
        ASKING.format(solution=word) for word in WORDS[:2]
    ]
    assert served["kepo/divergence"] == pytest.approx(local["kepo/divergence"], rel=1e-4)
    pd.testing.assert_frame_equal(rows, served_rows, rtol=1e-4)


def test_a_served_teacher_is_asked_by_chats_alone(tmp_path: Path) -> None:
    with serving(FakeVLLM(text_model(1), tokenizer(), "teacher")) as server:
        teacher = ServedTeacher(server.url, "teacher", tokenizer(), top_k=5)
        with pytest.raises(ValueError, match="a prompt is text, expected chat messages"):
            make_trainer(tmp_path, chat=False, teacher=teacher).train()


@pytest.mark.parametrize("rows", [(0, 37), (37, 0)], ids=["teacher", "student"])
def test_a_wider_teacher_padded_to_another_size_guides_over_the_tokens_that_both_have(
    tmp_path: Path, rows: tuple[int, int]
) -> None:
    from text_harness import hinting

    teacher = hinting(Teacher(text_model(1, hidden=48, padded_rows=rows[1]), tokenizer()))
    trainer = make_trainer(tmp_path, teacher=teacher, student=text_model(0, padded_rows=rows[0]))
    log, rows = trained(trainer, tmp_path)
    check(log, rows)
    with pytest.raises(ValueError, match="different vocabularies"):
        other = tokenizer()
        other.add_tokens(["<more>"])
        make_trainer(tmp_path, teacher=Teacher(text_model(1, padded_rows=37), other))
