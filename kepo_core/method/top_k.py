"""The divergence from a served teacher, from its top-k log-probabilities and the student's hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from kepo_core.method import objective
from kepo_core.method.trl_hooks import addmm_fp32, compute_dtype, project

#: Number of tokens whose logits are in memory at a time: 300 MiB in float32 with a vocabulary of 152,000.
CHUNK = 512


class TopTargets:
    """A served teacher's top-k log-probabilities at N completion tokens of a batch.

    This is not a dataclass, because FSDP2 casts tensors inside dataclasses to the compute precision.

    Attributes:
        positions: (N,) which tokens, as flat indices into (B, T).
        ids: (N, k) the teacher's most likely next tokens.
        log_probs: (N, k+1) their log-probabilities, and that of all others together; (N, V) if k = V.
        completion_length: T.
        beta: see `objective.divergence`.
    """

    def __init__(self, positions: Tensor, ids: Tensor, log_probs: Tensor, completion_length: int, beta: float) -> None:
        self.positions, self.ids, self.log_probs = positions, ids, log_probs
        self.completion_length, self.beta = completion_length, beta


def gather_targets(
    ids: Sequence[Tensor], log_probs: Sequence[Tensor], mask_BT: Tensor, top_k: int, beta: float
) -> TopTargets:
    """The targets of a batch from those of its rows.

    Args:
        ids: B tensors (t, k), t being the number of guided tokens of a row; rows without any are ignored.
        log_probs: B tensors (t, k+1) or (t, V).
        mask_BT: 1 on the tokens to be guided.
        top_k: k, which a batch without guided tokens needs.
    """
    rows = mask_BT.any(1).nonzero().flatten().tolist()
    none = torch.empty(0, top_k, dtype=torch.long), torch.empty(0, top_k + 1)
    return TopTargets(
        positions=mask_BT.flatten().nonzero().flatten(),
        ids=torch.cat([ids[row] for row in rows] or [none[0]]).to(mask_BT.device),
        log_probs=torch.cat([log_probs[row] for row in rows] or [none[1]]).to(mask_BT.device),
        completion_length=mask_BT.shape[1],
        beta=beta,
    )


class TopKDivergence(torch.autograd.Function):
    """`objective.top_k_divergence` from hidden states and head, (N, H) → (N,), without (N, V) logits.

    Logits are computed in chunks of `CHUNK` tokens, and again in the backward pass. The gradient flows to the
    student's hidden states, weight and bias.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, log_probs: Tensor, beta: float
    ) -> Tensor:
        """(N, H), (V, H), (V,) or None, (N, k), (N, k+1), β → (N,)."""
        ctx.beta, ctx.dtype = beta, compute_dtype(hidden)
        ctx.save_for_backward(hidden, weight, bias, ids, log_probs)
        parts = [hidden.new_empty(0, dtype=torch.float32)]
        with maybe_gather_lm_head_ctx(weight, bias):
            for chunk in chunks(len(hidden)):
                logits = logits_of(hidden[chunk], weight, bias, ctx.dtype)
                parts.append(objective.top_k_divergence(logits, ids[chunk], log_probs[chunk], beta))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Each token's gradient reaches its top-k logits directly, and all other logits through one bucket."""
        hidden, weight, bias, ids, log_probs = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight, bias):  # outside it, ZeRO-3's head has no shape
            # Summed in float32, whatever dtype the tensors have.
            sums = [
                torch.zeros(of.shape, dtype=torch.float32, device=of.device) if needed else None
                for of, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            ]
            for chunk in chunks(len(hidden)):
                logits = logits_of(hidden[chunk], weight, bias, ctx.dtype)
                buckets = objective.top_k_buckets(logits, ids[chunk]).requires_grad_()
                with torch.enable_grad():
                    divergence = objective.divergence(buckets, log_probs[chunk], ctx.beta)
                (grad,) = torch.autograd.grad(divergence, buckets, grads[0][chunk].float())
                k = ids.shape[1]
                if buckets.shape[1] > k:  # split the bucket's gradient by the student's probabilities within it
                    logits.sub_(buckets[:, k:].detach()).exp_().mul_(grad[:, k:])
                grad_logits = logits.scatter_(1, ids[chunk], grad[:, :k])
                if sums[2] is not None:
                    sums[2] += grad_logits.sum(0)
                grad_logits = grad_logits.to(ctx.dtype)
                if sums[0] is not None:
                    addmm_fp32(sums[0][chunk], grad_logits, weight.to(ctx.dtype))
                if sums[1] is not None:
                    addmm_fp32(sums[1], grad_logits.t(), hidden[chunk].to(ctx.dtype))
        # Autograd casts each gradient to its tensor's dtype.
        return (*sums, None, None, None)


def chunks(count: int) -> list[slice]:
    """``count`` tokens in parts of `CHUNK`."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(n, V) in float32, computed as in TRL's kernel of the full divergence."""
    logits = torch.empty(len(hidden), weight.shape[0], dtype=torch.float32, device=hidden.device)
    project(logits, hidden.to(dtype), weight, bias, 0, weight.shape[0], dtype)
    return logits
