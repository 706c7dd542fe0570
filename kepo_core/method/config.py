"""KEPOConfig: TRL's GRPOConfig plus the method's own choices, each named as in the parameter files."""

import math
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from kepo_core.errors import ParamError
from kepo_core.method.objective import ADVANTAGES, LOSS_TYPES, NORMALIZERS, TOKEN_NORMALIZED

_CHOICES = {
    "gate_compare": ("ge", "gt", "lt"),
    "distill_normalizer": NORMALIZERS,
    "on_exhausted": ("keep", "drop"),
    "hint_source": ("own", "other"),
    "hint_importance": ("none", "truncated"),
    "zero_variance": ("keep", "drop"),
    "loss_type": LOSS_TYPES,
    "scale_rewards": ADVANTAGES,
    "importance_sampling_level": ("token", "sequence"),
}


@dataclass
class KEPOConfig(GRPOConfig):  # type: ignore[misc]  # trl is not followed by the type checker
    """TRL's GRPOConfig with KEPO's own choices; every field of GRPOConfig keeps its name and meaning.

    Two of GRPOConfig's defaults are the paper's here: ``loss_type`` is ``"grpo"`` (token mean, then sequence mean), and
    ``scale_rewards`` is ``"none"`` (Eq. 6); it may also be ``"rloo"`` (Eq. 4). Eq. 5 as it is printed,
    min(r, clip(r))·Â, is ``epsilon=1.0, epsilon_high=ε, delta=1 + ε``. Mixed precision is off unless there is a GPU,
    and activation checkpointing is off unless asked for.

    A reward is named as TRL names it: the function's name (``_reward`` at its end may be left out), the environment's
    class, or the last part of a reward model's id.

    Raises:
        ParamError: a value out of range, or two that do not go together; one sentence.

    Example:
    ```python
    >>> from kepo_core import KEPOConfig
    >>> args = KEPOConfig(output_dir="out", tau=5.0, gate_reward="correct", rejection_budget=3, use_cpu=True)
    >>> args.scale_rewards, args.tau
    ('none', 5.0)

    ```
    """

    loss_type: str = field(default="grpo", metadata={"help": "Aggregation of the policy term and its weights: TRL's."})
    scale_rewards: str = field(default="none", metadata={"help": "none (Eq. 6), group, batch, or rloo (Eq. 4)."})
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={"help": "The KL estimate is multiplied by the ratio: its gradient is that of D_KL(π_θ‖π_ref)."},
    )
    # None, as transformers warns of this old name of activation_checkpointing wherever it is set.
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Old name; TRL turns it on."})
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default on a GPU, off without."})

    distill: bool = field(default=True, metadata={"help": "Add the gated divergence from the teacher (Eq. 7)."})
    tau: float = field(default=1.0, metadata={"help": "The gate's threshold on gate_reward, in that reward's units."})
    gate_reward: str = field(
        default="", metadata={"help": "The reward that the gate reads: total, or a reward by name; empty: the first."}
    )
    gate_compare: str = field(default="ge", metadata={"help": "ge: reward ≥ τ; gt: reward > τ; lt: reward < τ."})
    distill_beta: float = field(default=0.0, metadata={"help": "0 forward KL(π_T‖π_θ), 1 reverse, between: JSD."})
    distill_coef: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Divides both models' logits in it."})
    distill_normalizer: str = field(default="sequences", metadata={"help": "sequences, tokens or gated_tokens."})
    explore: bool = field(default=True, metadata={"help": "Explore with hints where a whole group fails."})
    exploration_reward: str = field(
        default="", metadata={"help": "The reward that triggers and accepts (> 0); named as gate_reward."}
    )
    rejection_budget: int = field(default=5, metadata={"help": "B: rounds of hint-aware draws."})
    injected_per_group: int = field(default=1, metadata={"help": "m: draws a round, and at most injected."})
    on_exhausted: str = field(
        default="keep", metadata={"help": "keep or drop a group whose budget ran out without an accepted draw."}
    )
    hint_source: str = field(
        default="own", metadata={"help": "own: the row's hint; other (control): a hint written for another row."}
    )
    hint_importance: str = field(default="none", metadata={"help": "none, or truncated off-policy weights."})
    hint_max_tokens: int = field(default=32, metadata={"help": "Longest hint, in tokens."})
    zero_variance: str = field(default="keep", metadata={"help": "keep or drop groups whose rewards are all equal."})
    log_rollouts: bool = field(default=True, metadata={"help": "Write every rollout to <output_dir>/rollouts/."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available()
        super().__post_init__()
        self._check_method()

    def _check_method(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ParamError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if isinstance(self.tau, str | bool) or not math.isfinite(self.tau):
            raise ParamError(f"tau is {self.tau!r}, expected a finite number")
        if not 0 <= self.distill_beta <= 1:
            raise ParamError(f"distill_beta is {self.distill_beta:g}, expected 0 to 1")
        if self.distill_temperature <= 0:
            raise ParamError(f"distill_temperature is {self.distill_temperature:g}, expected more than 0")
        if self.distill_coef < 0:
            raise ParamError(f"distill_coef is {self.distill_coef:g}, expected at least 0")
        for name in ("rejection_budget", "injected_per_group", "hint_max_tokens"):
            if getattr(self, name) < 1:
                raise ParamError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.explore and self.injected_per_group >= self.num_generations:
            raise ParamError(
                f"injected_per_group is {self.injected_per_group}, expected less than the group size "
                f"(num_generations, {self.num_generations}), so that originals stay"
            )
        if self.scale_rewards == "rloo" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ParamError(
                f"scale_rewards is 'rloo' but multi_objective_aggregation is {self.multi_objective_aggregation!r}, "
                "expected 'sum_then_normalize': Eq. 4 is of one summed reward"
            )
        if self.zero_variance == "drop" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ParamError(
                f"zero_variance is 'drop' but multi_objective_aggregation is {self.multi_objective_aggregation!r}, "
                "expected 'sum_then_normalize': groups of equal sums can have advantages there"
            )
        if self.explore and self.on_exhausted == "drop" and self.loss_type == "bnpo":
            raise ParamError(
                "on_exhausted is 'drop' but loss_type is 'bnpo', expected another loss type: it divides by the tokens "
                "that are left, so dropped groups would not stay in the denominator"
            )
        if self.zero_variance == "drop" and self.loss_type in TOKEN_NORMALIZED:
            raise ParamError(
                f"zero_variance is 'drop' but loss_type is {self.loss_type!r}, whose mean is over tokens, expected a "
                "mean over sequences (grpo, sapo, dr_grpo or luspo)"
            )
