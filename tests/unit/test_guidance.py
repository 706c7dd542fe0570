"""Gates and forms of guidance in training: what they ask the teacher, what they weigh, and what comes of it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_teacher_server import FakeVLLM, serving
from kepo_harness import batch_of, fails_on_0, make_row, make_trainer, right, row_of, score_batch, sharp_model, wrong
from trl.trainer.utils import split_tensor_dict

from kepo_core.method import agreement, gates, guidance, objective, top_k
from kepo_core.method.chat_client import ChatClient
from kepo_core.method.loss import GatedLossTrainer
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.method.served import ServedTeacher
from kepo_core.testbed.embedded import build_processor


def log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(B, T, V), the plain way."""
    outputs = model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        **{name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")},
    )
    return outputs.logits[:, -batch["completion_ids"].shape[1] - 1 : -1].log_softmax(-1)


def sampled(logps: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    return logps.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def lengthy(text: str, row: dict[str, Any], before: int, hinted: bool) -> str:
    """Right and wrong rollouts of several lengths in every group."""
    return right(row) if before % 2 else wrong(row) + " and more" * (before % 3)


@torch.no_grad()
def expected_known(trainer: Any, batch: dict[str, Any], models: list[Any]) -> gates.Known:
    """What a gate should be told, from full logits."""
    student, teacher = (sampled(log_probs(model, batch), batch) for model in models)
    return gates.Known(
        trainer._rewards[:, 0], 1.0, 4, torch.zeros(8), batch["completion_mask"], student, teacher,
        torch.tensor([True] * 4 + [False] * 4),
    )  # fmt: skip


@pytest.mark.parametrize("gate", list(gates.GATES))
@pytest.mark.parametrize("by_name", [True, False])
def test_each_gate_weighs_what_the_batch_holds(tmp_path: Path, gate: str, by_name: bool) -> None:
    """The weights in the batch are the function's on log-probabilities from full logits; a callable is the same."""
    models = [sharp_model(0), sharp_model(1)]
    own = {"gate": gate} if by_name else {"trainer_args": {"gate": gates.GATES[gate]}}
    trainer = make_trainer(tmp_path, lengthy, student=models[0], teacher_model=models[1], explore=False, **own)
    trainer.teacher.answer = lambda prompts, **_: [
        right(row) if (row := row_of(prompt))["id"] == "q0" else "no idea" for prompt in prompts
    ]
    batch = score_batch(trainer, 0, 1)
    known = expected_known(trainer, batch, models)
    weights = gates.checked(gates.GATES[gate](known), known)
    assert torch.allclose(batch["kepo_gate"], weights, atol=1e-4) and weights.any()
    assert weights.std() > 0 or gate == "always"
    gated = batch["completion_mask"] * weights
    assert batch["kepo_gated_tokens"].item() == pytest.approx(gated.sum().item(), rel=1e-4)
    loss = trainer._compute_loss(trainer.model, batch)
    with torch.no_grad():
        student, teacher = (log_probs(model, batch) for model in models)
    divergence = objective.divergence(student, teacher)
    term = objective.distillation_term(divergence, batch["completion_mask"], batch["kepo_gate"])
    assert trainer._metrics["train"]["kepo/loss_distill"][0] == pytest.approx(term.item(), rel=1e-4)
    loss.backward()
    rows = (weights > 0).any(1)
    logged = trainer._metrics["train"]
    assert logged["kepo/gate_rate"] == [rows.float().mean().item()]
    assert logged["kepo/gate_weight"] == [
        pytest.approx((gated.sum() / batch["completion_mask"].sum()).item(), rel=1e-4)
    ]
    assert logged["kepo/gate_rate/right"] == [rows[trainer._rewards[:, 0] > 0].float().mean().item()]
    assert logged["kepo/gate_rate/wrong"] == [rows[trainer._rewards[:, 0] <= 0].float().mean().item()]
    kept = collect_rollouts(tmp_path)
    means = (gated.sum(1) / batch["completion_mask"].sum(1)).tolist()
    assert kept["gate"].tolist() == pytest.approx(means, rel=1e-4, abs=1e-6)
    assert kept["teacher_right"].isna().all() == (gate != "teacher")


def test_a_teacher_that_is_asked_for_no_log_probability_is_called_for_gated_rows_alone(tmp_path: Path) -> None:
    """A weight of 0 on a token keeps it from the teacher's targets."""

    def second_half(known: gates.Known) -> torch.Tensor:
        return known.right_B.unsqueeze(1) * (known.mask_BT.cumsum(1) > 4).float()

    trainer = make_trainer(tmp_path, lengthy, explore=False, trainer_args={"gate": second_half})
    batch = score_batch(trainer, 0, 1)
    targets = trainer._targets(batch)
    open_BT = batch["completion_mask"] * (batch["kepo_gate"] > 0)
    assert targets.positions.tolist() == open_BT.flatten().nonzero().flatten().tolist() and len(targets.positions) > 0
    assert "kepo/log_ratio" not in trainer._metrics["train"]


def test_a_gate_of_ones_own_is_checked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lengthy, explore=False, trainer_args={"gate": lambda known: known.right_B})
    with pytest.raises(ValueError, match=r"the gate returned \(8,\), expected a tensor of shape \(8, 1\)"):
        score_batch(trainer, 0, 1)
    with pytest.raises(ValueError, match="gate is 'reward', expected a function of Known"):
        make_trainer(tmp_path, lengthy, explore=False, trainer_args={"gate": "reward"})


# Guidance in the advantage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["advantage", "bounded"])
@pytest.mark.parametrize("gate", ["reward", "corrective", "aligned"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_advantage_holds_the_weighted_log_ratio(tmp_path: Path, form: str, gate: str, temperature: float) -> None:
    models = [sharp_model(0), sharp_model(1)]
    trainer = make_trainer(
        tmp_path, lengthy, student=models[0], teacher_model=models[1], explore=False, gate=gate, guidance=form,
        distill_coef=0.7, temperature=temperature,
    )  # fmt: skip
    trainer.teacher.batch_size = 3
    batch = score_batch(trainer, 0, 1)
    with torch.no_grad():
        both = [(log_probs(model, batch) / temperature).log_softmax(-1) for model in models]
    student, teacher = (sampled(logps, batch) for logps in both)
    extra = teacher.exp() - student.exp() if form == "bounded" else teacher - student
    gated = batch["completion_mask"] * batch["kepo_gate"]
    own = objective.advantages(trainer.total(trainer._rewards), 4).unsqueeze(1)
    assert torch.allclose(batch["advantages"], own + 0.7 * gated * extra, atol=1e-5 if form == "bounded" else 1e-4)
    assert (batch["advantages"] - own).abs().max() > 1e-3 and not batch["advantages"].requires_grad
    ratio = ((teacher - student) * (gated > 0)).sum() / (gated > 0).sum()
    assert trainer._metrics["train"]["kepo/log_ratio"] == [pytest.approx(ratio.item(), rel=1e-3)]
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert trainer._metrics["train"]["kepo/loss_distill"] == [0.0]
    assert math.isnan(trainer._metrics["train"]["kepo/divergence"][0])


@pytest.mark.parametrize("form", ["loss", "advantage", "bounded"])
def test_a_teacher_that_is_the_student_changes_nothing(tmp_path: Path, form: str) -> None:
    trainer = make_trainer(tmp_path, lengthy, teacher_model=sharp_model(0), explore=False, tau=0.0, guidance=form)
    batch = score_batch(trainer, 0, 1)
    own = objective.advantages(trainer.total(trainer._rewards), 4)
    if form != "loss":
        assert torch.allclose(batch["advantages"], own.unsqueeze(1).expand(batch["advantages"].shape), atol=1e-5)
    trainer._compute_loss(trainer.model, batch)
    logged = trainer._metrics["train"]
    assert logged["kepo/loss_distill"][0] == pytest.approx(0.0, abs=1e-5)
    assert all(logged[f"kepo/top_k_overlap/{part}"] == [1.0] for part in ("gated", "right", "wrong"))
    assert logged["kepo/top_k_teacher_mass/right"][0] == pytest.approx(logged["kepo/top_k_student_mass/right"][0])


def test_a_coefficient_of_zero_is_the_step_without_guidance(tmp_path: Path) -> None:
    found = []
    for overrides in ({"distill": False}, {"guidance": "advantage", "distill_coef": 0.0}):
        trainer = make_trainer(tmp_path, lengthy, explore=False, **overrides)
        trainer._compute_loss(trainer.model, score_batch(trainer, 0, 1)).backward()
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert torch.equal(*found)


def test_guidance_in_the_advantage_is_weighted_as_the_rest_of_an_injected_row(tmp_path: Path) -> None:
    """min(1, π(y|x) / π(y|x,h)) multiplies all of an injected token's advantage."""
    batches = []
    for importance in ("none", "truncated"):
        trainer = make_trainer(
            tmp_path, fails_on_0, hints=lambda row: "look left", guidance="advantage", hint_importance=importance
        )
        batches.append(score_batch(trainer, 0, 1)["advantages"])
    (row,) = trainer._generation.injected
    weights = batches[1][row] / batches[0][row]
    assert (weights <= 1 + 1e-5).all() and (weights < 0.99).any()
    others = [other for other in range(8) if other != row]
    assert torch.equal(batches[0][others], batches[1][others])


# A served teacher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "form"),
    [("reward", "advantage"), ("below", "bounded"), ("corrective", "advantage"), ("aligned", "loss"),
     ("unsure", "loss"), ("teacher", "advantage")],
)  # fmt: skip
def test_a_served_teacher_guides_as_the_loaded_one(tmp_path: Path, gate: str, form: str) -> None:
    """Reverse KL at sampled tokens needs one number a token, which a server gives exactly."""
    model = sharp_model(1).eval()
    vocabulary = model.lm_head.weight.shape[0]
    found = []
    with serving(FakeVLLM(model, build_processor())) as server:
        for is_served in (False, True):
            trainer = make_trainer(tmp_path, lengthy, teacher_model=model, explore=False, gate=gate, guidance=form)
            if is_served:
                client = ChatClient(server.url, timeout=30, retries=0, concurrency=4)
                top_k = vocabulary if form == "loss" else 3
                trainer.teacher = ServedTeacher(client, server.name, build_processor(), top_k=top_k)
                trainer.teacher.check_fits(trainer.model, trainer.processing_class)
            if gate == "teacher":
                trainer.teacher.answer = lambda prompts, **_: [right(make_row(0))] * len(prompts)
            batch = score_batch(trainer, 0, 1)
            loss = trainer._compute_loss(trainer.model, batch)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
            found.append((batch["kepo_gate"], batch["advantages"], loss.detach(), gradient))
    for loaded, served in zip(*found, strict=True):
        assert torch.allclose(served, loaded, rtol=1e-3, atol=1e-4 * max(1.0, loaded.abs().max().item()))
    assert not any(name.startswith("kepo/top_k") for name in trainer._metrics["train"])


def test_rows_that_cannot_be_scored_are_not_guided(tmp_path: Path) -> None:
    with serving(FakeVLLM(sharp_model(1).eval(), build_processor())) as server:
        trainer = make_trainer(tmp_path, lengthy, explore=False, gate="corrective", guidance="advantage")
        trainer.teacher = ServedTeacher(ChatClient(server.url, retries=0), server.name, build_processor(), top_k=3)
        original = trainer.teacher.is_canonical
        trainer.teacher.is_canonical = lambda one: one.name != "q0" and original(one)
        batch = score_batch(trainer, 0, 1)
    assert not batch["kepo_gate"][:4].any() and batch["kepo_gate"][4:].sum() == pytest.approx(2.0)
    assert trainer._metrics["train"]["kepo/unasked"] == [4.0]


def test_a_server_scores_at_temperature_one_alone(tmp_path: Path) -> None:
    teacher = ServedTeacher("http://127.0.0.1:9/v1", "t", build_processor())
    for overrides in ({"guidance": "advantage"}, {"gate": "aligned"}):
        trainer = make_trainer(tmp_path, lengthy, explore=False)
        args = trainer.args
        args.temperature = 0.9
        for name, value in overrides.items():
            setattr(args, name, value)
        with pytest.raises(
            ValueError, match=r"temperature is 0.9, expected 1 if log-probabilities of a served teacher"
        ):
            type(trainer)(sharp_model(0), trainer.reward_funcs, args, trainer.train_dataset, teacher=teacher,
                          processing_class=build_processor())  # fmt: skip


# A verified teacher -------------------------------------------------------------------------------------------------


def counting(answer: Callable[[dict[str, Any]], str], calls: list[list[str]]) -> Any:
    def write(prompts: list[Any], **_: Any) -> list[str]:
        rows = [row_of(prompt) for prompt in prompts]
        calls.append([row["id"] for row in rows])
        return [answer(row) for row in rows]

    return write


def test_the_teacher_answers_each_prompt_once_in_a_run(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    trainer = make_trainer(tmp_path, lengthy, explore=False, gate="teacher")
    trainer.teacher.answer = counting(lambda row: right(row) if row["id"] == "q1" else wrong(row), calls)
    assert score_batch(trainer, 0, 1)["kepo_gate"][:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    assert score_batch(trainer, 1, 2)["kepo_gate"][:, 0].tolist() == [1.0] * 4 + [0.0] * 4
    assert calls == [["q0", "q1"], ["q2"]]
    assert trainer._metrics["train"]["kepo/teacher_right"] == [0.5, 0.5]
    assert collect_rollouts(tmp_path)["teacher_right"].tolist() == [0.0] * 4 + [1.0] * 8 + [0.0] * 4


def test_a_resumed_run_does_not_ask_again(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, lengthy, explore=False, gate="teacher", max_steps=1 + len(calls),
                               save_strategy="steps", save_steps=1, num_train_epochs=2)  # fmt: skip
        trainer.teacher.answer = counting(right, calls)
        trainer.train(resume_from_checkpoint=True)
    assert calls == [["q0", "q1"], ["q2", "q3"]] and len(trainer.answered) == 4


def test_the_same_question_about_another_picture_is_another_prompt() -> None:
    one, other = make_row(0), make_row(0)
    assert guidance._key(one) == guidance._key(other)
    other["image"] = make_row(1)["image"]
    assert guidance._key(one) != guidance._key(other) != guidance._key(make_row(0) | {"answer": "B"})


def test_a_loaded_and_a_served_teacher_answer_greedily_and_alike(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lengthy, explore=False, gate="teacher")
    prompts = [guidance.with_images(row["prompt"], row) for row in batch_of(trainer, 0, 1)[::4]]
    state = torch.get_rng_state()
    loaded = [trainer.teacher.answer(prompts, max_tokens=6) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state) and loaded[0] == loaded[1] and len(loaded[0]) == 2
    with serving(FakeVLLM(trainer.teacher.model, build_processor())) as server:
        served = ServedTeacher(ChatClient(server.url, retries=0), server.name, build_processor(), top_k=3)
        assert served.answer(prompts, max_tokens=6) == loaded[0]


# Top k ----------------------------------------------------------------------------------------------------------------


def test_agreement_by_hand_and_by_limit() -> None:
    student, teacher = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.tensor([0.1, 0.6, 0.05, 0.25]).log()
    assert agreement.top_k_agreement(student, teacher, 2).tolist() == pytest.approx([0.5, 0.7, 0.35])
    assert agreement.top_k_agreement(student, teacher, 4).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert agreement.top_k_agreement(student, teacher, 9).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert agreement.top_k_agreement(student, student, 2).tolist() == pytest.approx([1.0, 0.8, 0.8])


def test_what_is_logged_is_the_agreement_at_the_tokens_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_k, "CHUNK", 7)
    monkeypatch.setattr(agreement, "ROWS", 6)
    models = [sharp_model(0), sharp_model(1)]
    trainer = make_trainer(tmp_path, lengthy, student=models[0], teacher_model=models[1], explore=False, tau=0.0)

    def half(known: gates.Known) -> torch.Tensor:
        return (known.mask_BT.cumsum(1) % 2).float()

    trainer.gate = half
    batch = score_batch(trainer, 0, 1)
    trainer._compute_loss(trainer.model, batch)
    with torch.no_grad():
        found = agreement.top_k_agreement(*(log_probs(model, batch)[:6] for model in models), 8)
    mask, open_BT = batch["completion_mask"][:6].bool(), batch["kepo_gate"][:6] > 0
    right_B = (trainer._rewards[:6, 0] > 0).unsqueeze(1)
    for part, chosen in (("gated", open_BT), ("ungated", ~open_BT), ("right", right_B), ("wrong", ~right_B)):
        means = found[mask & chosen].mean(0).tolist()
        names = [f"kepo/top_k_{name}/{part}" for name in agreement.MEASURES]
        assert [trainer._metrics["train"][name][0] for name in names] == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize("form", ["loss", "advantage"])
def test_measuring_does_not_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Weights after two optimiser steps of two micro-batches; it is measured once a step."""
    found = []
    for measured in (True, False):
        if not measured:
            monkeypatch.setattr(GatedLossTrainer, "_probe", lambda self, inputs: None)
        trainer = make_trainer(
            tmp_path, lengthy, student=sharp_model(0), explore=False, guidance=form, max_steps=2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        logged = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logged) == 2 and ("kepo/top_k_overlap/right" in logged[0]) == measured
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*found)


def test_weights_follow_their_rows_into_micro_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lengthy, explore=False, gate="aligned")
    batch = score_batch(trainer, 0, 1)
    parts = split_tensor_dict({name: batch[name] for name in ("kepo_gate", "kepo_right", "completion_mask")}, 2)
    assert torch.equal(torch.cat([part["kepo_gate"] for part in parts]), batch["kepo_gate"])
