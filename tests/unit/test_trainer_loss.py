"""KEPOTrainer's loss: Eq. 7 from one forward pass, the teacher's part in it, and off-policy measures."""

import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from kepo_harness import batch_of, fails_on_0, make_row, make_trainer, right, score_batch, sharp_model, wrong
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from kepo_core.method import loss, objective
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.task.prompts import hint_aware_messages, vqa_messages

#: Eq. 5 as it is printed, at ε = 0.2, in TRL's fields.
EQ5 = {"epsilon": 1.0, "epsilon_high": 0.2, "delta": 1.2}


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
    ratio = objective.importance_ratio(logps, old, mask, args.importance_sampling_level)
    epsilon, clip = (args.epsilon, "ppo") if args.delta is None else (args.epsilon_high, "eq5")
    policy = reference.weighted_advantage(ratio, batch["advantages"], epsilon, clip)
    with torch.no_grad():
        teacher_logits = full_logits(teacher, batch)
    divergence = objective.divergence(logits, teacher_logits, args.distill_beta, args.distill_temperature)
    term = objective.distillation_term(divergence, mask, batch["kepo_gate"], args.distill_normalizer)
    return reference.kepo_loss(policy, mask, term, coef=args.distill_coef)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distill_normalizer": "tokens", "distill_beta": 1.0},
        {"distill_normalizer": "gated_tokens", "distill_beta": 0.3, "distill_temperature": 2.0},
        {"tau": 0.0, "distill_coef": 0.5, "scale_rewards": "group"},
        {"scale_rewards": "rloo", **EQ5},
        {"importance_sampling_level": "sequence", **EQ5},
        {"importance_sampling_level": "sequence", "scale_rewards": "batch"},
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


def off_policy_batch(trainer: KEPOTrainer) -> dict[str, Any]:
    """A batch whose old and reference policies differ from the student, with β > 0."""
    batch = score_batch(trainer, 0, 1)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logits = full_logits(trainer.model, batch)
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    batch["old_per_token_logps"] = logps + 0.5 * torch.randn(logps.shape, generator=g)
    trainer.beta, batch["ref_per_token_logps"] = 0.3, logps + 0.5 * torch.randn(logps.shape, generator=g)
    return batch


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_kl_that_is_logged_is_the_kl_that_trains(tmp_path: Path, corrected: bool, level: str) -> None:
    """Value and gradient off-policy against Eq. 7 from full logits, in float64."""
    trainer = make_trainer(
        tmp_path, fails_on_0, explore=False, use_bias_correction_kl=corrected, importance_sampling_level=level
    )
    batch = off_policy_batch(trainer)
    mask, twin = batch["completion_mask"], sharp_model(0).double()
    pictures = {"pixel_values": batch["pixel_values"].double()}
    logits = full_logits(twin, batch | pictures)
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    ratio = objective.importance_ratio(logps, batch["old_per_token_logps"].double(), mask, level)
    kl = objective.kl_to_reference(logps, batch["ref_per_token_logps"].double(), ratio if corrected else 1.0)
    policy = reference.weighted_advantage(ratio, batch["advantages"].double(), trainer.args.epsilon)
    expected = reference.kepo_loss(policy, mask, 0.0, kl, beta=0.3)
    expected.backward()
    loss = trainer._compute_loss(trainer.model, {k: v for k, v in batch.items() if k != "kepo_gate"})
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = dict(twin.named_parameters())
    for name, p in trainer.model.named_parameters():
        scale = wanted[name].grad.abs().max().item()
        assert torch.allclose(p.grad.double(), wanted[name].grad, rtol=1e-3, atol=1e-5 * scale + 1e-8), name
    own = objective.sequence_mean(kl.detach(), mask).mean().item()
    assert trainer._metrics["train"]["kepo/loss_kl"] == [pytest.approx(own, rel=1e-5)]
    assert trainer._metrics["train"]["kepo/loss_policy"] == [pytest.approx(expected.item() - 0.3 * own, abs=1e-5)]


@pytest.mark.parametrize("loss_type", objective.LOSS_TYPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_every_loss_type_takes_the_divergence_and_its_terms_add_up(tmp_path: Path, loss_type: str, parts: int) -> None:
    """Over a step's micro-batches: the loss is policy + coef·D + β·KL, D is the same as under grpo, and KL is the term
    that β adds to TRL's own loss."""
    trainer = make_trainer(
        tmp_path, fails_on_0, explore=False, loss_type=loss_type, distill_coef=0.7, max_completion_length=30,
        per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
    )  # fmt: skip
    batch = off_policy_batch(trainer)
    micro = split_tensor_dict(split_pixel_values_by_grid(batch), parts)
    micro = [unsplit_pixel_values_by_grid(each) for each in micro]
    whole = sum(trainer._compute_loss(trainer.model, each).item() for each in micro)
    logged = {name: sum(trainer._metrics["train"][f"kepo/loss_{name}"]) / parts for name in ("policy", "distill", "kl")}
    assert whole == pytest.approx(logged["policy"] + 0.7 * logged["distill"] + 0.3 * logged["kl"], rel=1e-4, abs=1e-5)
    trainer.beta = 0.0
    without = sum(trainer._compute_loss(trainer.model, each).item() for each in micro)
    assert whole - without == pytest.approx(0.3 * logged["kl"], rel=1e-3, abs=1e-5) and logged["kl"] > 0
    plain = make_trainer(tmp_path / "grpo", fails_on_0, explore=False, distill_coef=0.7)
    plain._compute_loss(plain.model, off_policy_batch(plain))
    assert logged["distill"] == pytest.approx(plain._metrics["train"]["kepo/loss_distill"][0], rel=1e-4)


class WidestTensors(TorchDispatchMode):
    """Records the largest number of rows of any created tensor that is as wide as the vocabulary."""

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
        tmp_path, lambda *a: (right(a[1]) if a[3] else "never") + " and on" * 20, student=models[0],
        teacher_model=models[1], hints=lambda row: "look", tau=0.0, num_iterations=2,
        num_generations=2, per_device_train_batch_size=2, max_completion_length=99,
    )  # fmt: skip
    with WidestTensors(50_000) as seen:  # exploration, off-policy measures and π_old, then all of Eq. 7
        batch = score_batch(trainer, 0)
        trainer._compute_loss(trainer.model, batch).backward()
    tokens = batch["completion_ids"].numel()
    assert tokens > models[0].config.text_config.hidden_size  # a transposed head cannot be mistaken for logits
    assert trainer._metrics["train"]["kepo/accepted"] == [1.0]
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
    # The teacher's states are kept for the second iteration; one call reads every row, to check shared prompts.
    # The third is the probe's, of every row: both iterations are an optimiser step here.
    assert seen == {"student": [8, 8], "teacher": [3, 3, 8, 8]} and batch["kepo_gate"].sum() == 3


def test_the_teacher_sees_each_row_with_its_own_image(tmp_path: Path) -> None:
    """With other images than the student's, the teacher gives another divergence."""
    trainer = make_trainer(tmp_path, fails_on_0, explore=False, tau=0.0)
    batch = score_batch(trainer, 1, 2)
    hidden = trainer.teacher.hidden_states(batch, [1, 6])
    alone = [trainer.teacher.hidden_states(batch, [row]) for row in (1, 6)]
    assert torch.allclose(hidden, torch.cat(alone), atol=1e-5)
    swapped = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert not torch.allclose(trainer.teacher.hidden_states(swapped, [1, 6]), hidden, atol=1e-3)


def test_the_teacher_is_asked_as_often_as_by_the_process_with_most_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, fails_on_0, explore=False)
    trainer.teacher.batch_size, passes = 3, []
    monkeypatch.setattr(loss, "largest", lambda accelerator, number: number + 2)
    trainer.teacher._model.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = score_batch(trainer, 0, 1)
    rows = int(batch["kepo_gate"].sum())
    assert trainer._targets(batch).hidden.shape[0] == batch["completion_mask"][batch["kepo_gate"][:, 0] > 0].sum()
    assert rows and len(passes) == -(-rows // 3) + 2


@pytest.mark.parametrize("normalizer", objective.NORMALIZERS)
def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, normalizer: str) -> None:
    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        return right(row) if before % 2 else wrong(row) + " and much more" * (before % 3)

    grads = []
    for parts, steps in ((1, 1), (2, 1), (4, 1), (4, 2)):  # the last: rollouts of two optimiser steps at once
        trainer = make_trainer(
            tmp_path, script, explore=False, distill_normalizer=normalizer, steps_per_generation=parts,
            per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts // steps,
        )  # fmt: skip
        inputs = batch_of(trainer, 0, 1)
        torch.manual_seed(0)
        for step in range(parts):
            trainer._step = step
            trainer._compute_loss(trainer.model, trainer._prepare_inputs(inputs)).backward()
        grads.append(torch.cat([p.grad.flatten() / steps for p in trainer.model.parameters() if p.grad is not None]))
    assert grads[0].abs().sum() > 0
    for other in grads[1:]:
        assert torch.allclose(grads[0], other, rtol=1e-3, atol=1e-5 * grads[0].abs().max())


@pytest.mark.parametrize("normalizer", objective.NORMALIZERS)
def test_a_gate_that_stays_shut_costs_nothing_and_gives_no_nan(tmp_path: Path, normalizer: str) -> None:
    trainer = make_trainer(tmp_path, lambda *a: wrong(a[1]), explore=False, distill_normalizer=normalizer)
    trainer.teacher.hidden_states = None  # not to be called
    trainer._probe = lambda inputs: None  # which looks at tokens that are not gated, too
    batch = score_batch(trainer, 0, 1)
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == 0.0
    assert trainer._metrics["train"]["kepo/loss_distill"] == [0.0]


def test_gate_thresholds(tmp_path: Path) -> None:
    gates = {}
    for tau in (0.0, 0.5, 1.0):
        trainer = make_trainer(tmp_path, fails_on_0, explore=False, tau=tau)
        gates[tau] = score_batch(trainer, 0, 1)["kepo_gate"][:, 0].tolist()
    assert gates[0.0] == [True] * 8
    assert gates[0.5] == gates[1.0] == [False] * 4 + [False, True] * 2


# Off-policy measures ----------------------------------------------------------------------------------------------


def token_log_probabilities(trainer: KEPOTrainer, prompt: str, image: Any, said: str) -> torch.Tensor:
    """log π of each token of ``said`` after a rendered prompt, (T,), by a plain forward pass of one row."""
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
    """The same number with injection and without exploration: the student's own rollouts are the same."""
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
    """Under vLLM's correction, rows sampled from another prompt are exempt (ratio 1); all others are corrected."""
    trainer = make_trainer(tmp_path, fails_on_0, hints=lambda row: "h")
    trainer.sampling_logps, trainer.use_vllm = -3.0, True
    batch = score_batch(trainer, 0, 1)
    place = int(batch["kepo_gate"][:4].int().argmax())
    ratio = batch["importance_sampling_ratio"].expand_as(batch["completion_ids"])
    injected = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor([place]), True)
    assert (ratio[injected] == 1).all()
    assert (ratio[~injected] != 1).any(dim=1).all()
    with pytest.raises(
        FloatingPointError, match=r"vLLM's log-probabilities differ .* by \d\.\d\d .* at step 1, expected at most 0\.20"
    ):
        trainer._compute_loss(trainer.model, batch)
    batch["sampling_per_token_logps"] = torch.full_like(batch["old_per_token_logps"], math.nan)  # none at all
    with pytest.raises(FloatingPointError, match="vLLM's log-probabilities differ from the trainer's by nan"):
        trainer._compute_loss(trainer.model, batch)
    drawn = batch["completion_mask"].bool() & ~injected.unsqueeze(1)
    for allowed in (0.15, 0.25):  # around the threshold
        off = batch["old_per_token_logps"] + allowed
        batch["sampling_per_token_logps"] = torch.where(drawn, off, math.nan)
        if allowed > 0.2:
            with pytest.raises(FloatingPointError, match=r"by 0\.25 on average"):
                trainer._compute_loss(trainer.model, batch)
        else:
            assert torch.isfinite(trainer._compute_loss(trainer.model, batch))
            assert trainer._metrics["train"]["kepo/vllm_difference"][-1] == pytest.approx(allowed, abs=1e-5)


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


def test_weights_stay_fp32_under_bf16_and_small_steps_arrive(tmp_path: Path) -> None:
    """A step of 2e-6 vanishes in a bf16 weight near 1, whose neighbours are 2⁻⁷ away."""
    gradients: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = make_trainer(
        tmp_path, fails_on_0, hints=lambda row: "h", bf16=True, learning_rate=2e-6,
        trainer_args={"callbacks": [Keep()]},
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    kinds: set[torch.dtype] = set()
    layer = trainer.model.model.language_model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, args, out: kinds.add(out.dtype))
    trainer.train()
    assert kinds == {torch.bfloat16}  # the computation
    moved = wanted = 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == gradients[name].dtype == torch.float32, name
        moved += int(((parameter.detach() != start[name]) & (gradients[name] != 0)).sum())
        wanted += int((gradients[name] != 0).sum())
    assert moved > 0.95 * wanted > 0
    assert trainer.state.log_history[0]["kepo/loss_distill"] > 0
