"""KEPOConfig: TRL's GRPOConfig and the method's own parameters."""

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from trl import GRPOConfig

from kepo_core.errors import ParamError
from kepo_core.method.objective import ADVANTAGES, LOSS_TYPES
from kepo_core.method.options import MethodOptions, Range, check_options

#: TRL's own fields whose values are checked here, as TRL finds a wrong one only in the middle of a step.
_CHOICES = {
    "loss_type": LOSS_TYPES,
    "scale_rewards": ADVANTAGES,
    "importance_sampling_level": ("token", "sequence"),
}
#: … and their ranges.
_RANGES = {
    "temperature": Range(0, above=True),
    "top_p": Range(0, 1, above=True),
    "num_iterations": Range(1),
    "learning_rate": Range(0),
    "max_grad_norm": Range(0),
    "epsilon": Range(0),
    "beta": Range(0),
}


@dataclass
class KEPOConfig(MethodOptions, GRPOConfig):  # type: ignore[misc]  # trl is not followed by the type checker
    """TRL's GRPOConfig with KEPO's own choices, `MethodOptions`; GRPOConfig's fields keep their names and meanings.

    Two of GRPOConfig's defaults are the paper's here: ``loss_type`` is ``"grpo"`` (token mean, then sequence mean), and
    ``scale_rewards`` is ``"none"`` (Eq. 6); it may also be ``"rloo"`` (Eq. 4). Eq. 5 as it is printed,
    min(r, clip(r))·Â, is ``epsilon=1.0, epsilon_high=ε, delta=1 + ε``. Mixed precision is off unless there is a GPU,
    and activation checkpointing is off unless asked for.

    A reward is named as TRL names it: the function's name (``_reward`` at its end may be left out), the environment's
    class, or the last part of a reward model's id.

    Raises:
        ParamError: a value out of range, or two that contradict each other; one sentence.

    Example:
    ```python
    >>> from kepo_core import KEPOConfig
    >>> args = KEPOConfig(output_dir="out", tau=5.0, gate_reward="correct", rejection_budget=3, use_cpu=True)
    >>> args.scale_rewards, args.tau
    ('none', 5.0)

    ```
    """

    loss_type: str = field(default="grpo", metadata={"help": "Aggregation and weights of the policy term, as in TRL."})
    scale_rewards: str = field(default="none", metadata={"help": "none (Eq. 6), group, batch, or rloo (Eq. 4)."})
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={"help": "Multiply the KL estimate by the ratio: its gradient is then that of D_KL(π_θ‖π_ref)."},
    )
    # Declared here too, as transformers 5.19 has only the old name.
    activation_checkpointing: bool | None = field(default=None, metadata={"help": "Recompute activations."})
    # None, as transformers warns of this old name of activation_checkpointing wherever it is set.
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Old name of the above."})
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default on if there is a GPU."})

    log_rollouts: bool = field(default=True, metadata={"help": "Write every rollout to <output_dir>/rollouts/."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available()
        if self.activation_checkpointing:
            self.gradient_checkpointing = True
        super().__post_init__()
        self._check_method()

    def _check_method(self) -> None:
        check_options(MethodOptions, self)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ParamError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name, allowed in _RANGES.items():
            value: Any = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise ParamError(f"{name} must be a number, got {value!r}")
            if value is not None:
                allowed.check(name, float(value))
        self.check_group(self.num_generations, "num_generations")
        if self.scale_rewards == "rloo" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ParamError(
                f"scale_rewards is 'rloo' but multi_objective_aggregation is {self.multi_objective_aggregation!r}, "
                "expected 'sum_then_normalize': Eq. 4 is of one summed reward"
            )
