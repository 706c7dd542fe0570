"""KEPOTrainer with a scripted student: what is drawn, injected, gated, scored, logged and refused."""

import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from kepo_harness import batch_of, config, make_dataset, make_row, make_trainer, right, sharp_model, wrong
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from trl import GRPOConfig, GRPOTrainer

from kepo_core.method import objective
from kepo_core.method.exploration import leaving_members
from kepo_core.method.prompts import hint_aware_messages, vqa_messages
from kepo_core.method.rewards import reward_functions
from kepo_core.method.rollouts import GLOSSARY, collect_rollouts
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOConfig, KEPOTrainer
from kepo_core.params import ParamError, Params
from kepo_core.study.embedded import build_model, build_processor


def fails_on_0(text: str, row: dict, before: int, hinted: bool) -> str:
    """Question 0 is never answered without a hint; all others alternate between right and wrong."""
    if row["id"] == "q0":
        return right(row) if hinted else wrong(row)
    return right(row) if before % 2 else wrong(row)


def score_batch(trainer: KEPOTrainer, *questions: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(batch_of(trainer, *questions))


def decode(trainer: KEPOTrainer, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    return [
        trainer._tokenizer.decode(row[m.bool()], skip_special_tokens=True) for row, m in zip(ids, mask, strict=True)
    ]


# Exploration ------------------------------------------------------------------------------------------------------


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
    assert batch["kepo_gate"].tolist() == [text == right(make_row(0)) for text in said[:4]] + [False, True] * 2


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
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: None, on_exhausted="drop")
    batch = score_batch(trainer, 0, 1)
    assert len(trainer.calls) == 1 and "tool_mask" not in batch
    assert trainer._metrics["train"]["kepo/unparsable_hints"] == [1.0]


@pytest.mark.parametrize("context", ["hint+answer", "hint", "answer"])
def test_hint_context(tmp_path: Path, context: str) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "secret", hint_context=context)
    score_batch(trainer, 0, 1)
    asked = trainer.calls[1][0]
    assert ("<hint>secret</hint>" in asked) == ("hint" in context)
    assert ("<answer>A</answer>" in asked) == ("answer" in context)


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


def test_exhausted_groups_stay_or_are_dropped_from_the_loss_but_not_from_its_denominator(tmp_path: Path) -> None:
    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        if row["id"] == "q0":
            return wrong(row) if before % 2 else "I cannot say"  # rewards 0 and 1: the policy term is not 0
        return fails_on_0(text, row, before, hinted)

    losses = {}
    for kind in ("keep", "drop"):
        trainer = make_trainer(tmp_path / kind, script, hints=lambda r: "h", on_exhausted=kind, distill=False)
        batch = score_batch(trainer, 0, 1)
        logps = torch.full(batch["completion_ids"].shape, -0.5)
        batch["old_per_token_logps"] = logps  # any fixed values: ratios differ from 1
        losses[kind] = trainer._compute_loss(trainer.model, batch)
        assert ("tool_mask" in batch) == (kind == "drop")
        rows = collect_rollouts(tmp_path / kind)
        assert rows["dropped"].tolist() == ([True] * 4 + [False] * 4 if kind == "drop" else [False] * 8)
        if kind == "drop":
            half = {k: v for k, v in batch.items() if k != "tool_mask"}
            half["completion_mask"] = batch["completion_mask"].clone()
            half["completion_mask"][:4] = 0
            assert losses[kind].item() == pytest.approx(trainer._compute_loss(trainer.model, half).item(), rel=1e-5)
    assert losses["keep"].item() != pytest.approx(losses["drop"].item())


def test_dropped_rows_pass_no_gate(tmp_path: Path) -> None:
    """Not even at τ = 0, where all others do."""
    trainer = make_trainer(
        tmp_path, lambda *a: wrong(a[1]) if a[1]["id"] == "q0" else fails_on_0(*a), hints=lambda row: "h",
        on_exhausted="drop", tau=0.0,
    )  # fmt: skip
    batch = score_batch(trainer, 0, 1)
    assert batch["kepo_gate"].tolist() == [False] * 4 + [True] * 4
    assert trainer._metrics["train"]["kepo/gate_rate"] == [0.5]
    assert batch["kepo_gated_tokens"] == batch["completion_mask"][4:].sum()
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()  # kept in the denominator


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
    rows = [make_row(0), make_row(1)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = teacher.write_hints(rows, max_tokens=6, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert teacher.write_hints(rows, max_tokens=6, seed=3) == first


# One forward, and Eq. 7 ------------------------------------------------------------------------------------------


def full_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(B, T, V), the plain way."""
    outputs = model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        mm_token_type_ids=batch["mm_token_type_ids"],
    )
    return outputs.logits[:, -batch["completion_ids"].shape[1] - 1 : -1]


def reference_loss(trainer: KEPOTrainer, teacher: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Eq. 7 from full logits and the functions of objective.py."""
    args, mask = trainer.args, batch["completion_mask"]
    logits = full_logits(trainer.model, batch)
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    old = batch.get("old_per_token_logps", logps.detach())
    ratio = objective.importance_ratio(logps, old, mask, args.importance_level)
    policy = objective.weighted_advantage(ratio, batch["advantages"], args.epsilon, args.ratio_clip)
    with torch.no_grad():
        teacher_logits = full_logits(teacher, batch)
    divergence = objective.divergence(logits, teacher_logits, args.distill_beta, args.distill_temperature)
    term = objective.distillation_term(divergence, mask, batch["kepo_gate"], args.distill_normalizer)
    return objective.kepo_loss(policy, mask, term, coef=args.distill_coef)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distill_normalizer": "tokens", "distill_beta": 1.0},
        {"distill_normalizer": "gated_tokens", "distill_beta": 0.3, "distill_temperature": 2.0},
        {"tau": 0.0, "distill_coef": 0.5, "advantage": "std"},
        {"advantage": "rloo", "ratio_clip": "eq5"},
        {"ratio_clip": "eq5", "importance_level": "sequence"},
        {"importance_level": "sequence"},
    ],
)
@pytest.mark.parametrize("off_policy", [False, True])
def test_loss_and_gradient_equal_eq_7_from_full_logits(tmp_path: Path, settings: dict, off_policy: bool) -> None:
    teacher = sharp_model(1)
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", teacher_model=teacher, **settings)
    batch = score_batch(trainer, 0, 1)
    assert batch["kepo_gate"].sum() > 0 and batch["advantages"].abs().sum() > 0
    if off_policy:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            logits = full_logits(trainer.model, batch)
        logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
        batch["old_per_token_logps"] = logps + 0.5 * torch.randn(logps.shape, generator=g)
    expected = reference_loss(trainer, teacher, batch)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    for name, p in trainer.model.named_parameters():
        if name in wanted:
            assert torch.allclose(p.grad, wanted[name], rtol=1e-3, atol=1e-5 * wanted[name].abs().max() + 1e-7), name
    assert all(p.grad is None for p in teacher.parameters())
    logged = trainer._metrics["train"]
    assert logged["kepo/loss_policy"][0] + trainer.args.distill_coef * logged["kepo/loss_distill"][0] == pytest.approx(
        loss.item(), rel=1e-4, abs=1e-6
    )


def test_kl_joins_the_loss_and_is_logged_apart(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, explore=False, distill_coef=0.7)
    batch = score_batch(trainer, 0, 1)
    without = trainer._compute_loss(trainer.model, batch).item()
    with torch.no_grad():
        logits = full_logits(trainer.model, batch)
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    trainer.beta, batch["ref_per_token_logps"] = 0.3, logps - 0.5
    kl = objective.kl_to_reference(torch.zeros(()), torch.tensor(-0.5)).item()
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(without + 0.3 * kl, rel=1e-4)
    logged = {name: trainer._metrics["train"][f"kepo/loss_{name}"] for name in ("policy", "distill", "kl")}
    assert logged["kl"] == [0.0, pytest.approx(kl, rel=1e-4)]
    assert logged["policy"][1] == pytest.approx(logged["policy"][0], abs=1e-5)
    assert logged["distill"][1] == pytest.approx(logged["distill"][0], rel=1e-5)


class WidestTensors(TorchDispatchMode):
    """Remembers the most rows that any tensor made had, of those as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


def test_no_tensor_of_rows_times_tokens_times_vocabulary_is_made(tmp_path: Path) -> None:
    models = [sharp_model(0), sharp_model(1)]
    for model in models:
        model.resize_token_embeddings(50_000, mean_resizing=False)
    trainer = make_trainer(
        tmp_path, lambda *a: right(a[1]) + " and on" * 20, student=models[0], teacher_model=models[1], explore=False,
        num_generations=2, per_device_train_batch_size=2, max_completion_length=99,
    )  # fmt: skip
    batch = score_batch(trainer, 0)
    tokens = batch["completion_ids"].numel()
    assert tokens > models[0].config.text_config.hidden_size  # so that a transposed head is not mistaken for logits
    with WidestTensors(50_000) as seen:
        trainer._compute_loss(trainer.model, batch).backward()
    assert seen.rows < tokens
    with WidestTensors(50_000) as seen, torch.no_grad():
        full_logits(trainer.model, batch)
    assert seen.rows >= tokens


def test_one_student_forward_and_the_teacher_on_gated_rows_only(tmp_path: Path) -> None:
    teacher = sharp_model(1)
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", teacher_model=teacher, num_iterations=2)
    batch = score_batch(trainer, 0, 1)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    for name, model in (("student", trainer.model), ("teacher", teacher)):
        model.model.register_forward_hook(
            lambda m, args, kwargs, out, name=name: seen[name].append(out.last_hidden_state.shape[0]), with_kwargs=True
        )
    for _ in range(2):
        trainer._compute_loss(trainer.model, batch).backward()
    assert seen == {"student": [8, 8], "teacher": [int(batch["kepo_gate"].sum())]}  # kept for the second iteration
    assert batch["kepo_gate"].sum() == 3


def test_the_teacher_sees_each_row_with_its_own_image(tmp_path: Path) -> None:
    """A teacher given other images than the student's gives another divergence."""
    trainer = make_trainer(tmp_path, fails_on_0, explore=False, tau=0.0)
    batch = score_batch(trainer, 1, 2)
    hidden = trainer.teacher.hidden_states(batch, [1, 6])
    alone = [trainer.teacher.hidden_states(batch, [row]) for row in (1, 6)]
    assert torch.allclose(hidden, torch.cat(alone), atol=1e-5)
    swapped = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert not torch.allclose(trainer.teacher.hidden_states(swapped, [1, 6]), hidden, atol=1e-3)


@pytest.mark.parametrize("normalizer", objective.NORMALIZERS)
def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, normalizer: str) -> None:
    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        return right(row) if before % 2 else wrong(row) + " and much more" * (before % 3)

    grads = []
    for parts in (1, 2, 4):
        trainer = make_trainer(
            tmp_path, script, explore=False, distill_normalizer=normalizer,
            per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
        )  # fmt: skip
        inputs = batch_of(trainer, 0, 1)
        torch.manual_seed(0)
        for step in range(parts):
            trainer._step = step
            trainer._compute_loss(trainer.model, trainer._prepare_inputs(inputs)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert grads[0].abs().sum() > 0
    for other in grads[1:]:
        assert torch.allclose(grads[0], other, rtol=1e-3, atol=1e-5 * grads[0].abs().max())


@pytest.mark.parametrize("normalizer", objective.NORMALIZERS)
def test_a_gate_that_stays_shut_costs_nothing_and_gives_no_nan(tmp_path: Path, normalizer: str) -> None:
    trainer = make_trainer(tmp_path, lambda *a: wrong(a[1]), explore=False, distill_normalizer=normalizer)
    trainer.teacher.hidden_states = None  # not to be called
    batch = score_batch(trainer, 0, 1)
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == 0.0
    assert trainer._metrics["train"]["kepo/loss_distill"] == [0.0]


def test_gate_thresholds(tmp_path: Path) -> None:
    gates = {}
    for tau in (0.0, 0.5, 1.0):
        trainer = make_trainer(tmp_path, fails_on_0, explore=False, tau=tau)
        gates[tau] = score_batch(trainer, 0, 1)["kepo_gate"].tolist()
    assert gates[0.0] == [True] * 8
    assert gates[0.5] == gates[1.0] == [False] * 4 + [False, True] * 2
    above = make_trainer(tmp_path, fails_on_0, explore=False, tau=0.0, gate_compare="gt")
    assert score_batch(above, 0, 1)["kepo_gate"].tolist() == gates[1.0]


# Off-policy measures ----------------------------------------------------------------------------------------------


def token_log_probabilities(trainer: KEPOTrainer, prompt: str, image: Any, said: str) -> torch.Tensor:
    """log π of each token of ``said`` behind a rendered prompt, (T,), by a plain forward of one row."""
    ids = [*trainer._tokenizer(said)["input_ids"], trainer._tokenizer.eos_token_id]
    inputs = trainer.processing_class(text=[prompt], images=[[image]], return_tensors="pt")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, len(ids)).long()], 1)
    with torch.no_grad():
        logits = trainer.model(**inputs).logits[0, -len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def test_hint_importance_and_log_ratio_follow_from_both_contexts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "look left", hint_importance="truncated")
    batch = score_batch(trainer, 0, 1)
    row = make_row(0)

    def rendered(messages: Any) -> str:
        return trainer.processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    plain = rendered(vqa_messages(row["question"], row["options"], True))
    aware = rendered(hint_aware_messages(row["question"], row["options"], "look left", "A"))
    under_x = token_log_probabilities(trainer, plain, row["image"], right(row))
    under_h = token_log_probabilities(trainer, aware, row["image"], right(row))
    place = int(batch["kepo_gate"][:4].int().argmax())
    weights = (under_x - under_h).exp().clamp(max=1)
    assert (weights < 0.99).any()
    assert batch["advantages"].shape == batch["completion_ids"].shape
    assert torch.allclose(batch["advantages"][place, : len(weights)], 0.75 * weights, rtol=1e-3)
    others = [i for i in range(4) if i != place]
    assert torch.allclose(batch["advantages"][others], torch.tensor(-0.25))
    ratio = float((under_h - under_x).mean())
    assert trainer._metrics["train"]["kepo/injected_log_ratio"][0] == pytest.approx(ratio, rel=1e-3, abs=1e-5)
    assert collect_rollouts(tmp_path).query("injected")["hint_log_ratio"].item() == pytest.approx(ratio, rel=1e-3)
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


def test_entropy_is_that_of_the_rollouts_before_injection(tmp_path: Path) -> None:
    """With injection, and without exploration at all, the same number: the student said the same on its own."""
    numbers = []
    for explore in (True, False):
        trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", explore=explore)
        batch = score_batch(trainer, 0, 1)
        trainer._compute_loss(trainer.model, batch)
        numbers.append(trainer._metrics["train"]["kepo/entropy"][0])
        if explore:
            assert trainer._metrics["train"]["entropy"][0] != pytest.approx(numbers[0], rel=1e-6)
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_a_samplers_own_log_probabilities_do_not_correct_injected_rows(tmp_path: Path) -> None:
    """With vLLM's correction, rows drawn from another prompt are exempt (ratio 1), all others are corrected."""
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h")
    trainer.sampling_logps, trainer.use_vllm = -3.0, True
    batch = score_batch(trainer, 0, 1)
    place = int(batch["kepo_gate"][:4].int().argmax())
    ratio = batch["importance_sampling_ratio"].expand_as(batch["completion_ids"])
    injected = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor([place]), True)
    assert (ratio[injected] == 1).all()
    assert (ratio[~injected] != 1).any(dim=1).all()
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


def test_distillation_through_lora(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", trainer_args={"peft_config": lora})
    whole = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h")
    losses = []
    for each in (trainer, whole):  # LoRA starts as the identity
        losses.append(each._compute_loss(each.model, score_batch(each, 0, 1)))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    losses[0].backward()
    moved = {n for n, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved and all("lora_B" in name for name in moved)


# Logs -------------------------------------------------------------------------------------------------------------


def test_metrics_are_taken_before_injection_and_each_has_a_definition(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", max_steps=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    logged = {name for name in first if name.startswith("kepo/")}
    assert logged == set(GLOSSARY)
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


def test_rollouts_file(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "look left", max_steps=2, num_generations=4)
    trainer.train()
    rows = collect_rollouts(tmp_path)
    assert len(rows) == 2 * 8 + 1 and rows["step"].tolist() == [1] * 9 + [2] * 8
    injected, replaced = rows.query("injected").iloc[0], rows.query("replaced").iloc[0]
    assert injected["row"] == replaced["row"] and injected["id"] == replaced["id"] == "q0"
    assert injected["completion"] == right(make_row(0)) and replaced["completion"] == wrong(make_row(0))
    assert (injected["outcome"], replaced["outcome"]) == ("correct", "wrong")
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


# Determinism ------------------------------------------------------------------------------------------------------


def train_for_real(output_dir: Path, seed: int) -> tuple[pd.DataFrame, list[dict], torch.Tensor]:
    args = config(output_dir, max_steps=2, max_completion_length=6, seed=seed, tau=0.0, hint_max_tokens=12,
                  rejection_budget=2, shuffle_dataset=True)  # fmt: skip
    teacher = Teacher(build_model("test", 1), build_processor())
    trainer = KEPOTrainer(build_model("test", 0), None, args, make_dataset(), teacher=teacher,
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


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"thinking": False}, "explore is True but thinking is False"),
        ({"tau": 1.5}, "tau is 1.5, expected 0 to 1"),
        ({"tau": -0.1}, "tau"),
        ({"tau": 2.5, "gate_reward": "total"}, "expected 0 to 2"),
        ({"gate_reward": "format"}, "gate_reward is 'format', expected one of accuracy, total"),
        ({"on_exhausted": "retry"}, "on_exhausted"),
        ({"advantage": "median"}, "advantage"),
        ({"injected_per_group": 4}, "injected_per_group is 4"),
        ({"rejection_budget": 0}, "rejection_budget"),
        ({"distill_beta": 1.1}, "distill_beta"),
        ({"distill_temperature": 0.0}, "distill_temperature"),
        ({"distill_coef": -1.0}, "distill_coef"),
        ({"loss_type": "dapo"}, "loss_type"),
        ({"scale_rewards": "batch"}, "scale_rewards is 'batch'"),
        ({"importance_sampling_level": "sequence"}, "importance_level"),
        ({"ratio_clip": "eq5", "epsilon_high": 0.3}, "epsilon_high"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(tmp_path: Path, overrides: dict, sentence: str) -> None:
    with pytest.raises(ParamError, match=sentence):
        config(tmp_path, **overrides)


def test_every_method_parameter_of_a_run_is_a_field_of_the_configuration() -> None:
    here, defaults = KEPOConfig.__dataclass_fields__, Params()
    method = ["thinking", "distill", "tau", "gate_reward", "gate_compare", "distill_beta", "distill_coef",
              "distill_temperature", "distill_normalizer", "explore", "exploration_reward", "rejection_budget",
              "injected_per_group", "on_exhausted", "hint_context", "hint_importance", "hint_max_tokens", "advantage",
              "ratio_clip", "importance_level", "epsilon", "beta"]  # fmt: skip
    assert {name: here[name].default for name in method} == {name: getattr(defaults, name) for name in method}


def build(
    tmp_path: Path, teacher: Any = None, dataset: Any = None, rewards: Any = None, **overrides: Any
) -> KEPOTrainer:
    return KEPOTrainer(build_model("test", 0), rewards, config(tmp_path, **overrides), dataset or make_dataset(),
                       teacher=teacher, processing_class=build_processor())  # fmt: skip


def test_a_missing_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distill is True but teacher is None"):
        build(tmp_path)
    with pytest.raises(ValueError, match="explore is True but teacher is None"):
        build(tmp_path, distill=False)


@pytest.mark.parametrize("column", ["question", "options", "answer", "image", "id"])
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


@pytest.mark.parametrize("value", [float("nan"), None, float("inf")])
@pytest.mark.parametrize("parts", [True, False])
def test_a_reward_that_is_no_number_stops_the_run(tmp_path: Path, value: Any, parts: bool) -> None:
    def broken_reward(completions: list, **_: Any) -> list:
        return [1.0] * (len(completions) - 1) + [value]

    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", distill=parts, explore=parts)
    trainer.reward_funcs, trainer.reward_func_names = [broken_reward], ["broken_reward"]
    trainer.reward_weights, trainer.reward_processing_classes = torch.ones(1), [None]
    with pytest.raises(ValueError, match="broken_reward returned"):
        score_batch(trainer, 1, 2)


def test_a_reward_that_is_no_number_stops_exploration_too(tmp_path: Path) -> None:
    def broken_reward(completions: list, **_: Any) -> list:
        return [None] * len(completions)

    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h", exploration_reward="total")
    trainer.reward_funcs, trainer.reward_weights = [broken_reward], torch.ones(1)
    with pytest.raises(ValueError, match="broken_reward returned"):
        score_batch(trainer, 0, 1)


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


def test_reward_functions_fit_the_prompt(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lambda *a: f"<answer>{a[1]['answer']}</answer>", explore=False, thinking=False,
                           dataset=make_dataset(thinking=False))  # fmt: skip
    score_batch(trainer, 0, 1)
    assert trainer._metrics["train"]["kepo/reward"] == [2.0] and trainer._metrics["train"]["reward"] == [2.0]
    assert trainer.reward_func_names == [f.__name__ for f in reward_functions(False)]
