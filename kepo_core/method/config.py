"""KEPOConfig: TRL's GRPOConfig plus the method's own choices, each named as in the parameter files."""

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from kepo_core.errors import ParamError
from kepo_core.method.objective import ADVANTAGES, NORMALIZERS
from kepo_core.task.prompts import HINT_CONTEXTS

_CHOICES = {
    "gate_reward": ("accuracy", "total"),
    "gate_compare": ("ge", "gt", "lt"),
    "distill_normalizer": NORMALIZERS,
    "exploration_reward": ("accuracy", "total"),
    "on_exhausted": ("keep", "drop"),
    "hint_context": HINT_CONTEXTS,
    "hint_source": ("own", "other"),
    "hint_importance": ("none", "truncated"),
    "advantage": ADVANTAGES,
    "zero_variance": ("keep", "drop"),
    "ratio_clip": ("ppo", "eq5"),
    "importance_level": ("token", "sequence"),
}
#: The largest value of each reward that τ can be compared with.
LARGEST_REWARD = {"accuracy": 1.0, "total": 2.0}


@dataclass
class KEPOConfig(GRPOConfig):  # type: ignore[misc]  # trl is not followed by the type checker
    """Everything `KEPOTrainer` can be told; what is not listed here is GRPOConfig's.

    ``beta`` (KL to the reference), ``epsilon`` (clip range) and ``num_generations`` (G) are GRPOConfig's own
    fields. ``advantage`` decides ``scale_rewards`` and ``importance_level`` decides
    ``importance_sampling_level``; setting those as well to something else raises. Aggregation is GRPO's (token
    mean, then sequence mean; ``loss_type="grpo"``), the only one that Eq. 2 and 7 are compatible with.
    Mixed precision is off unless there is a GPU, activation checkpointing is off unless asked for.
    """

    loss_type: str = field(default="grpo", metadata={"help": "Token mean, then sequence mean; nothing else fits."})
    # None, as transformers warns of this old name of activation_checkpointing wherever it is set.
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Old name; TRL turns it on."})

    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default on a GPU, off without."})

    thinking: bool = field(default=True, metadata={"help": "The prompts ask for explicit reasoning."})
    distill: bool = field(default=True, metadata={"help": "Add the gated divergence from the teacher (Eq. 7)."})
    tau: float = field(default=1.0, metadata={"help": "The gate's threshold on gate_reward."})
    gate_reward: str = field(default="accuracy", metadata={"help": "What the gate compares: accuracy or total."})
    gate_compare: str = field(default="ge", metadata={"help": "ge: reward ≥ τ; gt: reward > τ; lt: reward < τ."})
    distill_beta: float = field(default=0.0, metadata={"help": "0 forward KL(π_T‖π_θ), 1 reverse, between: JSD."})
    distill_coef: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Divides both models' logits in it."})
    distill_normalizer: str = field(default="sequences", metadata={"help": "sequences, tokens or gated_tokens."})
    explore: bool = field(default=True, metadata={"help": "Explore with hints where a whole group fails."})
    exploration_reward: str = field(default="accuracy", metadata={"help": "Triggers and accepts: accuracy or total."})
    rejection_budget: int = field(default=5, metadata={"help": "B: rounds of hint-aware draws."})
    injected_per_group: int = field(default=1, metadata={"help": "m: draws a round, and at most injected."})
    on_exhausted: str = field(default="keep", metadata={"help": "keep or drop a group that found nothing."})
    hint_context: str = field(default="hint+answer", metadata={"help": "hint+answer, hint, answer or none."})
    hint_source: str = field(default="own", metadata={"help": "The question's own hint, or another question's."})
    hint_importance: str = field(default="none", metadata={"help": "none, or truncated off-policy weights."})
    hint_max_tokens: int = field(default=32, metadata={"help": "Longest hint, in tokens."})
    advantage: str = field(default="mean", metadata={"help": "mean (Eq. 6), std, or rloo (Eq. 4)."})
    zero_variance: str = field(default="keep", metadata={"help": "keep or drop groups whose rewards are all equal."})
    ratio_clip: str = field(default="ppo", metadata={"help": "ppo, or eq5 as Eq. 5 is printed."})
    importance_level: str = field(default="token", metadata={"help": "token or sequence."})
    log_rollouts: bool = field(default=True, metadata={"help": "Write every rollout to <output_dir>/rollouts/."})

    def __post_init__(self) -> None:
        self._check_method()
        self._map("scale_rewards", {"mean": "none", "rloo": "none", "std": "group"}[self.advantage], "advantage")
        self._map("importance_sampling_level", self.importance_level, "importance_level")
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available()
        super().__post_init__()
        if self.injected_per_group >= self.num_generations:
            raise ParamError(
                f"injected_per_group is {self.injected_per_group}, expected less than the group size "
                f"(num_generations, {self.num_generations}), so that originals stay"
            )

    def _map(self, theirs: str, value: str, ours: str) -> None:
        """Set a field of GRPOConfig from one of ours, unless the caller asked for something else in it."""
        default = type(self).__dataclass_fields__[theirs].default
        if getattr(self, theirs) not in (default, value):
            raise ParamError(
                f"{theirs} is {getattr(self, theirs)!r} but {ours}={getattr(self, ours)!r} needs {value!r}, "
                f"expected {ours} alone to be set"
            )
        setattr(self, theirs, value)

    def _check_method(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ParamError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if self.loss_type != "grpo":
            raise ParamError(f"loss_type is {self.loss_type!r}, expected 'grpo', the aggregation of Eq. 2 and 7")
        if self.explore and not self.thinking:
            raise ParamError(
                "explore is True but thinking is False, expected thinking: no hint-aware prompt exists without it"
            )
        largest = LARGEST_REWARD[self.gate_reward]
        if not 0 <= self.tau <= largest:
            raise ParamError(f"tau is {self.tau:g}, expected 0 to {largest:g}, the largest {self.gate_reward} reward")
        if not 0 <= self.distill_beta <= 1:
            raise ParamError(f"distill_beta is {self.distill_beta:g}, expected 0 to 1")
        if self.distill_temperature <= 0:
            raise ParamError(f"distill_temperature is {self.distill_temperature:g}, expected more than 0")
        if self.distill_coef < 0:
            raise ParamError(f"distill_coef is {self.distill_coef:g}, expected at least 0")
        for name in ("rejection_budget", "injected_per_group", "hint_max_tokens"):
            if getattr(self, name) < 1:
                raise ParamError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.ratio_clip == "eq5" and (self.delta is not None or self.epsilon_high is not None):
            raise ParamError("ratio_clip is 'eq5' but delta or epsilon_high is set, expected epsilon alone")
