"""What TRL computes for the trainer, as pure functions in the notation of `kepo_core.method.objective`."""

import torch
from torch import Tensor

from kepo_core.method import objective

#: TRL's constant in the division by the standard deviation, which the released code keeps.
STD_EPSILON = 1e-4


def advantages(rewards_B: Tensor, group_size: int, kind: str) -> Tensor:
    """Â of each sequence, (B,), under ``scale_rewards=kind``.

    kind: "none", Eq. 6; "rloo", Eq. 4; "group" and "batch": Eq. 6 divided by the sample standard deviation of the
        group, or of all rewards, + 1e-4. Rewards that are NaN are left out of it.
    """
    if kind == "rloo":
        return objective.leave_one_out(rewards_B, group_size)
    parts = rewards_B.view(-1, group_size) if kind == "group" else rewards_B.view(1, -1)
    centred = objective.advantages(rewards_B, group_size)
    if kind == "none":
        return centred
    squares = (parts - parts.nanmean(1, keepdim=True)) ** 2
    std = (squares.nansum(1, keepdim=True) / ((~parts.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
    return (centred.view_as(parts) / (std + STD_EPSILON)).view(-1)


def weighted_advantage(ratio: Tensor, advantages_B: Tensor, epsilon: float, clip: str = "ppo") -> Tensor:
    """The summand w·Â of Eq. 2, in the shape of ``ratio``, clipped in one of two ways.

    clip: "ppo", min(r·Â, clip(r, 1−ε, 1+ε)·Â), pessimistic for either sign of Â;
        "eq5", min(r, clip(r, 1−ε, 1+ε))·Â, Eq. 5 as printed, where the lower bound never acts.
    ``advantages_B`` is detached.
    """
    detached = advantages_B.detach().unsqueeze(-1)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    if clip == "ppo":
        return torch.minimum(ratio * detached, clipped * detached)
    return torch.minimum(ratio, clipped) * detached


def kepo_loss(
    policy_BT: Tensor,
    mask_BT: Tensor,
    distillation: Tensor | float = 0.0,
    kl_BT: Tensor | None = None,
    *,
    coef: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """−J_KEPO of Eq. 7 (Eq. 2 without distillation): −[mean_i w_i·Â_i − coef·D − β·mean_i KL_i], a scalar.

    policy_BT: `weighted_advantage`, (B, T) or (B, 1); mean over tokens, then over sequences, as in GRPO.
    distillation: `objective.distillation_term`, already normalised and gated.
    kl_BT: `objective.kl_to_reference`.
    """
    loss = -objective.sequence_mean(policy_BT.expand_as(mask_BT), mask_BT).mean() + coef * distillation
    return loss if kl_BT is None else loss + beta * objective.sequence_mean(kl_BT, mask_BT).mean()
