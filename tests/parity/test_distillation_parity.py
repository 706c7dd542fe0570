"""The distillation term (open gate) has the gradient of TRL's DistillationTrainer; its kernel is our divergence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kepo_harness import batch_of, make_dataset, make_trainer, right, sharp_model, wrong
from trl import DistillationConfig, DistillationTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from kepo_core.method import objective
from kepo_core.testbed.embedded import build_processor


def says(text: str, row: dict[str, Any], before: int, hinted: bool) -> str:
    """Completions of different lengths, all finished."""
    return right(row) if before % 2 else wrong(row) + " and more" * (before % 3)


def gradients(trainer: Any, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    for batch in batches:
        trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_is_that_of_distillation_trainer(tmp_path: Path, beta: float, parts: int) -> None:
    ours = make_trainer(
        tmp_path / "ours", says, explore=False, tau=0.0, distill_beta=beta, distill_normalizer="tokens",
        per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
    )  # fmt: skip
    inputs, batches = batch_of(ours, 0, 1), []
    torch.manual_seed(0)
    for step in range(parts):
        ours._step = step
        batches.append(ours._prepare_inputs(inputs))
    assert all(batch["kepo_gate"].all() for batch in batches)
    for batch in batches:
        batch["advantages"] = torch.zeros_like(batch["advantages"])  # the policy term's gradient is exactly 0
    args = DistillationConfig(
        str(tmp_path / "theirs"), beta=beta, use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, report_to="none",
    )  # fmt: skip
    theirs = DistillationTrainer(
        sharp_model(0), sharp_model(1), args, make_dataset(), processing_class=build_processor()
    )
    theirs.model.train()
    expected, got = gradients(theirs, batches), gradients(ours, batches)
    assert expected.keys() == got.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-5, atol=1e-6 * largest), name


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trl_kernel_is_the_same_function_with_the_same_gradient(beta: float, temperature: float) -> None:
    """The direction of β and the role of student and teacher are the same in TRL's chunked kernel."""
    hidden_s, hidden_t = torch.randn(6, 8, requires_grad=True), torch.randn(6, 12)
    head_s, head_t = torch.randn(50, 8, requires_grad=True), torch.randn(50, 12)
    kernel, _ = ChunkedDivergenceFunction.apply(hidden_s, head_s, None, hidden_t, head_t, None, beta, temperature)
    ours = objective.divergence(hidden_s @ head_s.T, hidden_t @ head_t.T, beta, temperature)
    assert torch.allclose(kernel, ours, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(kernel.sum(), (hidden_s, head_s))
    expected = torch.autograd.grad(ours.sum(), (hidden_s, head_s))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
