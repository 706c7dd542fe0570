"""Eq. 3, 4, 6 and 7, one pure function each.

Suffixes give shapes: ``_B`` sequences (groups × G, the members of a group adjacent), ``_T`` completion tokens,
``_V`` vocabulary. ``mask_BT`` is 1 on the tokens of a completion (its end-of-sequence token included) and 0 on
padding. Log-probabilities are natural logarithms. Each function says which arguments receive gradient. The policy
term (Eq. 5) is TRL's; tests/reference.py restates it as pure functions and tests training against them.

The gate of Eq. 7 and its rivals are in `gates`.

Example with two groups of two: the advantages of Eq. 6.

```python
>>> import torch
>>> from kepo_core import objective
>>> rewards_B = torch.tensor([0.0, 1.0, 2.0, 2.0])
>>> objective.advantages(rewards_B, group_size=2).tolist()
[-0.5, 0.5, 0.0, 0.0]

```
"""

import math

import torch
from torch import Tensor

from kepo_core.method.options import NORMALIZERS as NORMALIZERS

#: Values of ``scale_rewards``: Eq. 6; Eq. 6 divided by a standard deviation, of the group or the batch; Eq. 4.
ADVANTAGES = ("none", "group", "batch", "rloo")
#: TRL's loss types.
LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def _check(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{name} is {choice!r}, expected one of {', '.join(choices)}")


def sequence_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over the tokens of each sequence where the mask is 1, (B,); 0 for a sequence without any."""
    masked = torch.where(mask_BT.bool(), values_BT, 0.0)
    return masked.sum(-1) / mask_BT.sum(-1).clamp(min=1)


def importance_ratio(logps_BT: Tensor, old_logps_BT: Tensor, mask_BT: Tensor, level: str = "token") -> Tensor:
    """Eq. 3: w = π_θ(y|x) / π_θ_old(y|x).

    level: "token" gives one ratio per token, (B, T); "sequence" one per sequence, (B, 1): the geometric mean of its
        tokens' ratios, as in TRL and GSPO (the plain product of Eq. 3 leaves any clip range within a few tokens).
        Both are 1 when on-policy. ``old_logps_BT`` is detached.
    """
    _check("level", level, ("token", "sequence"))
    log_ratio_BT = logps_BT - old_logps_BT.detach()
    if level == "sequence":
        return sequence_mean(log_ratio_BT, mask_BT).unsqueeze(-1).exp()
    return log_ratio_BT.exp()


def advantages(rewards_B: Tensor, group_size: int) -> Tensor:
    """Eq. 6: Â_i = r_i − mean_j r_j over the rewards of a group, (B,), without gradient.

    NaN marks a sequence that no reward function scores: the mean ignores it, and its Â is 0.

    Raises:
        ValueError: the rewards do not fill whole groups of at least two.
    """
    if group_size < 2 or rewards_B.numel() % group_size:
        raise ValueError(
            f"{rewards_B.numel()} rewards do not fill groups of {group_size}, expected whole groups of ≥ 2"
        )
    groups = rewards_B.detach().view(-1, group_size)
    return (groups - groups.nanmean(1, keepdim=True)).nan_to_num(nan=0.0).view(-1)


def leave_one_out(rewards_B: Tensor, group_size: int) -> Tensor:
    """Eq. 4: Â_i = r_i − mean_{j≠i} r_j = n/(n−1) times `advantages`, with n the group's rewards that are not NaN."""
    centred = advantages(rewards_B, group_size).view(-1, group_size)
    scored = (~rewards_B.view(-1, group_size).isnan()).sum(1, keepdim=True)
    return (centred * scored / (scored - 1).clamp(min=1)).view(-1)


def kl_to_reference(logps_BT: Tensor, ref_logps_BT: Tensor, ratio: Tensor | float = 1.0) -> Tensor:
    """The estimate of D_KL(π_θ‖π_ref) of Eq. 2 and 7 at each sampled token, (B, T): w · (exp(d) − d − 1).

    d = log π_ref − log π_θ; exp(d) − d − 1 (k3) is never negative, and 0 where the two agree.
    ratio: w = π_θ/π_old of Eq. 3 from `importance_ratio`, with its gradient. It makes the value unbiased under samples
        from π_old, and the gradient that of D_KL(π_θ‖π_ref), also on-policy, where w is 1. Without it (1.0), the
        on-policy gradient is that of another divergence, D_KL(π_ref‖π_θ).
    ``ref_logps_BT`` is detached.
    """
    d = ref_logps_BT.detach() - logps_BT
    return (d.exp() - d - 1) * ratio


def teacher_advantage(teacher_logps_BT: Tensor, student_logps_BT: Tensor, *, bounded: bool = False) -> Tensor:
    """What the teacher adds to the advantage of each sampled token, (B, T), without gradient.

    log π_T(y_t) − log π_θ_old(y_t): by the policy gradient, its expectation over y_t ~ π_θ_old gives the gradient of
    −KL(π_θ‖π_T) at that token (as in ms-swift's ``teacher_kl_coef``, slime's ``--opd-kl-coef``, NeMo-RL and verl). It
    needs one number per token of the teacher, but has no lower bound.
    bounded: π_T(y_t) − π_θ_old(y_t) instead, between −1 and 1 and of the same sign: PowerOPD (arXiv 2606.17199),
        (π_T^α − π_θ^α)/α at α = 1; α → 0 is the log-ratio.
    """
    student, teacher = student_logps_BT.detach(), teacher_logps_BT.detach()
    return teacher.exp() - student.exp() if bounded else teacher - student


def divergence(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.0, temperature: float = 1.0) -> Tensor:
    """D(π_T‖π_θ) at each token from both models' full logits, (…, V) → (…).

    beta: 0, forward KL(π_T‖π_θ), the paper's formula; 1, reverse KL(π_θ‖π_T); in between, the generalised
        Jensen-Shannon divergence β·KL(π_T‖m) + (1−β)·KL(π_θ‖m) with m = β·π_T + (1−β)·π_θ.
    temperature: divides both models' logits.
    The teacher is detached. Training uses TRL's chunked kernel of the same function, which never holds a
    (B, T, V) tensor; this function is its reference in tests, and fits small vocabularies.
    """
    log_s = (student_logits / temperature).log_softmax(-1)
    log_t = (teacher_logits.detach() / temperature).log_softmax(-1)
    if beta == 0.0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1.0:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    kl_t = (log_t.exp() * (log_t - log_m)).sum(-1)
    kl_s = (log_s.exp() * (log_s - log_m)).sum(-1)
    return beta * kl_t + (1 - beta) * kl_s


def top_k_buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """A distribution over V tokens, reduced to the k tokens in ``ids`` and one bucket for all others.

    logits: (…, V); ids: (…, k), distinct at each position.
    Returns the logits of the buckets, (…, k+1): those of ``ids``, then log Σ exp of the rest (log(1 − Σ p) would cancel
    numerically). If k = V there is no rest: (…, V), in the order of ``ids``.
    """
    top = logits.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return top
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], dim=-1)


def top_k_divergence(student_logits: Tensor, ids: Tensor, teacher_buckets: Tensor, beta: float = 0.0) -> Tensor:
    """D(π_T‖π_θ) at each token over the teacher's top-k tokens and one bucket for the rest, (…).

    Both distributions are summed over the same buckets: the value is at most `divergence` (data-processing
    inequality), grows as buckets are split, and equals it at k = V, in value and gradient.
    student_logits: (…, V); ids: (…, k), the teacher's most likely tokens.
    teacher_buckets: (…, k+1), the teacher's log-probabilities of these tokens and of the rest, or (…, V) if k = V;
        detached.
    """
    return divergence(top_k_buckets(student_logits, ids), teacher_buckets, beta)


def distillation_term(
    divergence_BT: Tensor,
    mask_BT: Tensor,
    weights_BT: Tensor,
    normalizer: str = "sequences",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Σ_i I[r_i ≥ τ] D_i of Eq. 7, with a gate's weights for the indicator, normalised: a scalar.

    It is exactly 0 if no token passes the gate.
    weights_BT: w of `gates`, (B, 1) or (B, T), at least 0.
    normalizer: "sequences", the sum of the token means of w·D of all sequences, divided by their number; "tokens", the
        sum of w·D over all tokens, divided by their number; "gated_tokens", the same sum divided by that of w, which
        is the number of gated tokens if the gate says yes or no.
    denominator: the divisor, if the batch is only a part of the optimiser step; by default the number of sequences or
        tokens, or the sum of the weights, in this batch.
    """
    _check("normalizer", normalizer, NORMALIZERS)
    gated_BT = mask_BT * weights_BT.to(divergence_BT.dtype)
    # Behind a closed gate D may be anything, NaN included.
    weighted_BT = torch.where(gated_BT > 0, gated_BT * divergence_BT, 0.0)
    if normalizer == "sequences":
        total = sequence_mean(weighted_BT, mask_BT).sum()
        own: Tensor | float = float(mask_BT.shape[0])
    else:
        total = weighted_BT.sum()
        own = (mask_BT if normalizer == "tokens" else gated_BT).sum()
    scale = torch.as_tensor(own if denominator is None else denominator, dtype=total.dtype, device=total.device)
    # Nothing gated means 0 / 0 under "gated_tokens": nothing to learn, not NaN.
    return total / torch.where(scale > 0, scale, 1.0)


def aggregate(
    values_BT: Tensor, mask_BT: Tensor, loss_type: str, *, tokens: Tensor | float = 1.0, longest: int = 1
) -> Tensor:
    """Per-token values averaged as a loss type of TRL does: a scalar.

    loss_type: "grpo", "sapo": mean over the tokens of a sequence, then over sequences; "luspo": sum over the tokens of
        a sequence, then mean over sequences; "dr_grpo": sum over all tokens, divided by sequences × ``longest``;
        "bnpo": mean over the tokens of this batch; "dapo", "cispo", "vespo": sum over them, divided by ``tokens``.
    tokens: the mean number of tokens per batch, over all batches that are averaged.
    longest: the maximum completion length in tokens.
    """
    _check("loss_type", loss_type, LOSS_TYPES)
    if loss_type in ("grpo", "sapo"):
        return sequence_mean(values_BT, mask_BT).mean()
    summed_B = torch.where(mask_BT.bool(), values_BT, 0.0).sum(-1)
    if loss_type == "luspo":
        return summed_B.mean()
    if loss_type == "dr_grpo":
        return summed_B.mean() / longest
    return summed_B.sum() / (mask_BT.sum().clamp(min=1) if loss_type == "bnpo" else tokens)


def hint_reliance(plain_logps_BT: Tensor, hinted_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """How much likelier a hint makes each trajectory y_h, (B,): the token mean of log π(y_h|x,h,y) − log π(y_h|x).

    The measure of HiLL (arXiv 2604.00698; its code has the opposite sign), where correct trajectories that rely less
    on the hint transfer better to the policy without it. 0: the hint changes nothing; below 0: it is a hindrance.
    """
    return sequence_mean(hinted_logps_BT - plain_logps_BT, mask_BT)


def hint_importance_weights(logps_BT: Tensor, hinted_logps_BT: Tensor) -> Tensor:
    """The off-policy correction of injected tokens, (B, T), without gradient: min(1, π_old(y|x) / π_old(y|x, h, y*)).

    An accepted trajectory is sampled from the hint-aware prompt and trained under the plain one. Truncation at 1
    limits its weight to that of the student's own trajectories (cf. Guide, arXiv 2506.13923).
    """
    return (logps_BT.detach() - hinted_logps_BT.detach()).exp().clamp(max=1.0)
