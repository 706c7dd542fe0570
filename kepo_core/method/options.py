"""The method's parameters, each declared once; `KEPOConfig` and the study's ``Params`` take them from here.

A declaration is a dataclass field: its type, ``Annotated`` with a `Range` where it is a number, and `option` with its
default, its meaning and its choices. `check_options` checks any dataclass against its declarations.
"""

import dataclasses
import math
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from kepo_core.errors import ParamError

#: Which count the sum of gated divergences is divided by.
NORMALIZERS = ("sequences", "tokens", "gated_tokens")

#: The gates of `gates`, which has the functions.
GATES = ("reward", "below", "always", "corrective", "unsure", "teacher", "aligned")

#: What a value of each type is called.
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


class Range(NamedTuple):
    """The numbers that a parameter takes: ``low`` to ``high``, both included, or all of them above ``low``."""

    low: float
    high: float = math.inf
    above: bool = False

    def check(self, name: str, value: float) -> None:
        """Raise `ParamError` unless ``value`` is finite and in the range."""
        if math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low):
            return
        if self.low == -math.inf:
            raise ParamError(f"{name} must be a finite number, got {value:g}")
        least = f"greater than {self.low:g}" if self.above else f"at least {self.low:g}"
        most = "" if self.high == math.inf else f" and at most {self.high:g}"
        raise ParamError(f"{name} must be {least}{most}, got {value:g}")


Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Declare a parameter: its default, one line on what it does, and its values if they are few."""
    return dataclasses.field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


@dataclasses.dataclass
class MethodOptions:
    """Method: quality-gated distillation (Eq. 7), and exploration with hints (Algorithm 1)."""

    distill: bool = option(True, "let the teacher guide the student's own rollouts, where the gate is open (Eq. 7)")
    tau: float = option(1.0, "the gate's threshold τ, in the units of gate_reward (accuracy: 0 to 1; total: 0 to 2)")
    gate_reward: str = option(
        "", "the reward that the gate compares with τ: a reward function's name, or total; empty: the first, accuracy"
    )
    gate: str = option(
        "reward",
        "which rollouts or tokens the teacher guides, and how much; reward is KEPO's: those that reach τ",
        choices=GATES,
    )
    guidance: str = option(
        "loss",
        "how it guides: by the divergence in the loss (Eq. 7), or by its log-ratio in the advantage, plain or bounded",
        choices=("loss", "advantage", "bounded"),
    )
    distill_beta: Share = option(0.0, "the divergence: 0 is forward KL(π_T‖π_θ), 1 reverse KL, between generalised JSD")
    distill_coef: NotNegative = option(1.0, "weight of the guidance in the loss or in the advantage")
    distill_temperature: Positive = option(1.0, "temperature that divides both models' logits in the divergence")
    distill_normalizer: str = option(
        "sequences", "the sum of gated divergences is divided by the number of these", choices=NORMALIZERS
    )
    explore: bool = option(True, "if all rollouts of a prompt fail, retry with the teacher's hint")
    exploration_reward: str = option(
        "", "rollouts fail if this reward is not above 0, retries are accepted if it is; named as gate_reward"
    )
    rejection_budget: Count = option(5, "B: rounds of retries with a hint per failed group, at most")
    injected_per_group: Count = option(1, "m: retries per round, and accepted retries that replace originals, at most")
    hint_source: str = option(
        "own",
        "own: the question's hint; failure: its teacher also reads a wrong rollout of the group (as HiLL); other "
        "(control): a hint written for another question",
        choices=("own", "failure", "other"),
    )
    hint_reliance: NotNegative = option(
        0.0,
        "largest hint reliance of an accepted retry, log π(y|x,h,a) − log π(y|x) per token in nats (as HiLL measures "
        "it); 0: no bound",
    )
    hint_importance: str = option(
        "none", "importance weight of injected (off-policy) sequences in the loss", choices=("none", "truncated")
    )
    hint_max_tokens: Count = option(32, "maximum length of a hint, in tokens")

    def check_group(self, size: int, name: str) -> None:
        """Raise `ParamError` unless originals stay in a group of ``size``, which the parameter ``name`` sets."""
        if self.explore and self.injected_per_group >= size:
            raise ParamError(
                f"injected_per_group must be smaller than {name} ({size}), so that originals stay, got "
                f"{self.injected_per_group}"
            )


@cache
def declared(owner: type) -> dict[str, "dataclasses.Field[Any]"]:
    """The fields that a class of parameters declares by `option`, by name, inherited ones first."""
    fields = dataclasses.fields(owner)
    return {field.name: field for field in fields if "help" in field.metadata}


@cache
def kind_of(owner: type, name: str) -> tuple[type, Range | None]:
    """The type of a declared parameter (bool, int, float or str), and its range if it has one."""
    hint = get_type_hints(owner, include_extras=True)[name]
    if get_origin(hint) is not Annotated:
        return hint, None
    kind, allowed = get_args(hint)
    return kind, allowed


def check_option(owner: type, name: str, value: Any) -> Any:
    """``value`` in the type of the parameter ``name`` of ``owner``: a bool is not a number, whole numbers widen.

    Raises:
        ParamError: it has another type or is out of range; names the parameter and what was expected.
    """
    kind, allowed = kind_of(owner, name)
    number: Any
    choices = declared(owner)[name].metadata.get("choices", ())
    number = {int: Integral, float: Real}.get(kind)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, number or kind):
        hint = ""
        if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            hint = " (write it with a capital and without quotes)"
        raise ParamError(f"{name} must be {KINDS[kind]}, got {value!r}{hint}")
    value = kind(value)
    if choices and value not in choices:
        raise ParamError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if kind is str and declared(owner)[name].default and not value.strip():
        raise ParamError(f"{name} must not be empty")
    if number is not None:
        (allowed or Range(-math.inf)).check(name, value)
    return value


def check_options(owner: type, values: Any) -> None:
    """Check the attributes of ``values`` against what ``owner`` declares; `ParamError` for the first wrong one."""
    for name in declared(owner):
        object.__setattr__(values, name, check_option(owner, name, getattr(values, name)))
