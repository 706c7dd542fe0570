"""The divergence from a teacher's likeliest tokens: never above the whole, and the whole at k = V."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kepo_core.method import objective, top_k
from kepo_core.method.top_k import TopKDivergence, gather_targets

TOKENS, HIDDEN, VOCABULARY = 23, 8, 40
BETAS = [0.0, 0.3, 1.0]


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, bias, and a teacher's logits (N, V)."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias, logits = (
        torch.randn(*shape, generator=g)
        for shape in ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,), (TOKENS, VOCABULARY))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 3 * logits


def told(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of the k likeliest tokens and of the rest."""
    values, ids = logits.double().log_softmax(-1).topk(k)
    if k == logits.shape[-1]:
        return ids, values.float()
    return ids, torch.cat([values, torch.log1p(-values.exp().sum(-1, keepdim=True))], -1).float()


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_never_above_the_whole_and_grows_with_k_to_reach_it(beta: float) -> None:
    hidden, weight, bias, teacher = made()
    student = (hidden @ weight.T + bias).detach()
    whole = objective.divergence(student, teacher, beta)
    found = [objective.top_k_divergence(student, *told(teacher, k), beta) for k in (1, 2, 5, 20, 39, 40)]
    for less, more in zip(found, [*found[1:], whole], strict=True):
        assert (less <= more + 1e-5).all()
    assert (found[0] >= -1e-6).all() and (whole - found[0]).mean() > 0.1 * whole.mean()
    assert torch.allclose(found[-1], whole, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_give_value_and_gradient_of_the_whole(beta: float) -> None:
    hidden, weight, bias, teacher = made()
    objective.divergence(hidden @ weight.T + bias, teacher, beta).sum().backward()
    wanted = [t.grad.clone() for t in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    TopKDivergence.apply(hidden, weight, bias, *told(teacher, VOCABULARY), beta).sum().backward()
    for tensor, grad in zip((hidden, weight, bias), wanted, strict=True):
        assert torch.allclose(tensor.grad, grad, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 7, 39])
def test_the_kernel_is_the_equation_in_chunks(monkeypatch: pytest.MonkeyPatch, beta: float, k: int) -> None:
    monkeypatch.setattr(top_k, "CHUNK", 5)
    hidden, weight, bias, teacher = made()
    ids, log_probs = told(teacher, k)
    weights = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
    expected = objective.top_k_divergence(hidden @ weight.T + bias, ids, log_probs, beta)
    (expected * weights).sum().backward()
    wanted = [t.grad.clone() for t in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    got = TopKDivergence.apply(hidden, weight, bias, ids, log_probs, beta)
    (got * weights).sum().backward()
    assert torch.allclose(got, expected, atol=1e-6)
    for tensor, grad in zip((hidden, weight, bias), wanted, strict=True):
        assert torch.allclose(tensor.grad, grad, atol=1e-5)


def test_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/4), student uniform over three; k = 1: ½ log(½ / ⅓) + ½ log(½ / ⅔)."""
    ids, log_probs = told(torch.tensor([[0.5, 0.25, 0.25]]).log(), 1)
    expected = 0.5 * torch.tensor(1.5).log() + 0.5 * torch.tensor(0.75).log()
    assert objective.top_k_divergence(torch.zeros(1, 3), ids, log_probs).item() == pytest.approx(expected.item())


def test_the_buckets_of_a_batch_of_sequences_are_those_of_their_tokens() -> None:
    logits, ids = torch.randn(2, 4, 5), torch.tensor([[[0, 3]] * 4, [[4, 1]] * 4])
    buckets = objective.top_k_buckets(logits, ids)
    assert buckets.shape == (2, 4, 3)
    assert torch.equal(buckets.flatten(0, 1), objective.top_k_buckets(logits.flatten(0, 1), ids.flatten(0, 1)))
    every = torch.arange(5).expand(2, 4, 5)
    assert torch.equal(objective.top_k_buckets(logits, every), logits)


def test_a_student_without_a_doubt_has_a_finite_divergence_and_gradient() -> None:
    """Where 1 − Σ p of the likeliest is nothing in float32, its logarithm still is right."""
    logits = torch.tensor([[60.0, 30.0, 0.0, 0.0]], requires_grad=True)
    ids, log_probs = told(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), 1)
    divergence = objective.top_k_divergence(logits, ids, log_probs)
    divergence.sum().backward()
    rest = 1 - torch.tensor([2.0, 1.0, 0.0, 0.0]).softmax(-1)[0]
    assert divergence.item() == pytest.approx(
        (rest * 30 + rest * rest.log() + (1 - rest) * (1 - rest).log()).item(), rel=1e-4
    )
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0.1


def test_no_tokens_are_no_divergence() -> None:
    hidden, weight, _, _ = made()
    targets = gather_targets([], [], torch.zeros(0, 4), 3, 0.0)
    found = TopKDivergence.apply(hidden[targets.positions], weight, None, targets.ids, targets.log_probs, 0.0)
    found.sum().backward()
    assert found.shape == (0,) and weight.grad.abs().sum() == 0


def test_targets_are_gathered_row_by_row() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    ids = [torch.tensor([[1], [2]]), torch.empty(0, 1).long(), torch.tensor([[3], [4], [5]])]
    log_probs = [torch.full((len(row), 2), -0.5) for row in ids]
    targets = gather_targets(ids, log_probs, mask, 1, 0.5)
    assert targets.positions.tolist() == [0, 1, 6, 7, 8] and targets.ids.flatten().tolist() == [1, 2, 3, 4, 5]
    assert (targets.completion_length, targets.beta) == (3, 0.5)


class Widest(TorchDispatchMode):
    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_k, "CHUNK", 9)  # more than HIDDEN, whose transposed head is as wide
    hidden, weight, bias, teacher = made()
    ids, log_probs = told(teacher, 4)
    with Widest() as seen:
        TopKDivergence.apply(hidden, weight, bias, ids, log_probs, 0.0).sum().backward()
    assert seen.rows == 9


def test_a_head_that_has_no_shape_until_it_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZeRO-3 has it: a partitioned weight is empty but within the context."""
    hidden, weight, _, logits = made()
    ids, log_probs = told(logits, 5)
    wanted = torch.autograd.grad(
        TopKDivergence.apply(hidden, weight, None, ids, log_probs, 0.0).sum(), (hidden, weight)
    )
    whole = weight.detach().clone()

    @contextmanager
    def gathered(*parameters: Any) -> Iterator[None]:
        weight.data = whole
        try:
            yield
        finally:
            weight.data = torch.empty(0)

    monkeypatch.setattr(top_k, "maybe_gather_lm_head_ctx", gathered)
    hooked = weight.expand_as(weight)  # as DeepSpeed's hook: autograd knows the whole shape while this lives
    weight.data = torch.empty(0)
    found = torch.autograd.grad(TopKDivergence.apply(hidden, weight, None, ids, log_probs, 0.0).sum(), (hidden, weight))
    assert hooked.shape == whole.shape and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
