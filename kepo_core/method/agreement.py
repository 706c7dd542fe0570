"""How alike student and teacher are at the tokens that the student samples: overlap and mass of their top k.

As verl logs them for on-policy distillation (overlap_ratio, teacher_mass, student_mass), and apart for gated and other
tokens, right and wrong rollouts. Measured on the first micro-batch of an optimiser step, on its first `ROWS` rows,
beside the loss: training is the same to the bit without it. A served teacher gives no distribution at tokens that it
does not guide, so nothing is measured with one.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from kepo_core.method.top_k import chunks, logits_of
from kepo_core.method.trl_hooks import compute_dtype

#: k, and how many rows of a micro-batch are measured.
K, ROWS = 8, 16
#: What `top_k_agreement` measures, and where.
MEASURES = ("overlap", "teacher_mass", "student_mass")
PARTS = ("gated", "ungated", "right", "wrong")


def top_k_agreement(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """|S ∩ T| / k, the teacher's probability of S, and the student's probability of T; (…, V) → (…, 3).

    S and T are the k most likely tokens of student and teacher (all V of them if V < k). Each value lies in [0, 1]; all
    are 1 at k = V, and for equal models the overlap is 1 and both masses are equal.
    """
    k = min(k, student_logits.shape[-1])
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    in_s, in_t = log_s.topk(k).indices, log_t.topk(k).indices
    overlap = (in_s.unsqueeze(-1) == in_t.unsqueeze(-2)).any(-1).sum(-1) / k
    return torch.stack([overlap, log_t.gather(-1, in_s).exp().sum(-1), log_s.gather(-1, in_t).exp().sum(-1)], -1)


class Probe:
    """The teacher's states at N tokens of the first rows of a micro-batch, to be compared with the student's.

    This is not a dataclass, because FSDP2 casts tensors inside dataclasses to the compute precision.

    Attributes:
        positions: (N,) which tokens, as flat indices into (B, T).
        hidden: (N, H_T), without gradient.
        head: the teacher's output embedding.
        completion_length: T.
    """

    def __init__(self, positions: Tensor, hidden: Tensor, head: Any, completion_length: int) -> None:
        self.positions, self.hidden, self.head, self.completion_length = positions, hidden, head, completion_length

    @classmethod
    def of(cls, teacher: Any, inputs: Mapping[str, Any]) -> "Probe":
        """The first rows of a GRPOTrainer batch under a loaded ``teacher``; all processes must call it together."""
        mask = inputs["completion_mask"][:ROWS]
        hidden = teacher.hidden_states(inputs, list(range(len(mask))))
        return cls(mask.flatten().nonzero().flatten(), hidden[mask.bool()], teacher.head, mask.shape[1])

    @torch.no_grad()
    def compare(self, states: Tensor, heads: tuple[tuple[Any, Any], tuple[Any, Any]]) -> Tensor:
        """`top_k_agreement` at the N tokens, (N, 3).

        Args:
            states: (N, H) the student's.
            heads: weight and bias of the student's head and of the teacher's.
        """
        parts = [states.new_empty(0, len(MEASURES), dtype=torch.float32)]
        rows = min(len(weight) for weight, _ in heads)  # where heads are padded to different sizes
        for chunk in chunks(len(states)):
            both = [part[chunk].detach() for part in (states, self.hidden.to(states.device))]
            logits = [_logits(part, *head)[:, :rows] for part, head in zip(both, heads, strict=True)]
            parts.append(top_k_agreement(logits[0], logits[1].to(logits[0].device), K))
        return torch.cat(parts)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, V) in float32, by a head that may be on another device or sharded."""
    with maybe_gather_lm_head_ctx(weight, bias):
        return logits_of(hidden.to(weight.device), weight, bias, compute_dtype(hidden))


def log_agreement(trainer: Any, measured: Tensor, inputs: Mapping[str, Any]) -> None:
    """Log the means of `Probe.compare`'s (N, 3) over all processes, apart for gated tokens and right rollouts.

    Args:
        trainer: a KEPOTrainer.
        inputs: the micro-batch, with ``kepo_gate`` and ``kepo_right``.
    """
    mask = inputs["completion_mask"][:ROWS].bool()
    gated = (inputs["kepo_gate"][:ROWS] > 0).expand_as(mask)[mask]
    right = inputs["kepo_right"][:ROWS].unsqueeze(1).expand(mask.shape)[mask]  # NaN: neither
    chosen = torch.stack([gated, ~gated, right == 1, right == 0]).to(measured.dtype)
    sums = torch.cat([chosen @ measured, chosen.sum(1, keepdim=True)], dim=1)
    for part, (*values, count) in zip(PARTS, trainer.accelerator.reduce(sums, reduction="sum").tolist(), strict=True):
        for name, value in zip(MEASURES, values, strict=True):
            trainer._metrics["train"][f"kepo/top_k_{name}/{part}"].append(value / count if count else math.nan)
