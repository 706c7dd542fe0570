"""One matrix of rewards, by TRL's `_calculate_rewards`, for the trigger, acceptance, the gate, advantages and logs.

A reward may be None: the function does not apply to that completion (NaN in the matrix). It opens no gate, whatever τ
and ``gate_compare`` are, and accepts no draw. A group has failed where one of its rewards is known and none is above 0.
Sums, means and advantages are of what is known.

A completion is scored once. Rollouts of a batch that may explore are scored before exploration, hint-aware draws when
they are drawn, and TRL then gets the rewards of what it trains on without a second call.
"""

import difflib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable

from kepo_core.method.loss import GatedLossTrainer
from kepo_core.method.rollouts import Completion
from kepo_core.method.task import Prompt, Row


def checked_reward(reward: Any) -> Any:
    """A reward function that may return finite numbers and None alone: TRL would take NaN for None, not applicable.

    Reward models, and their names, are returned as they are; ``ValueError`` for what is no reward. The function raises:
        ValueError: anything else came back; names the function and the first completion it failed for.
    """
    if isinstance(reward, str | nn.Module):
        return reward
    if isinstance(reward, type):
        raise ValueError(f"a reward is the class {reward.__name__}, expected an instance of it: {reward.__name__}(...)")
    if not callable(reward):
        raise ValueError(
            f"a reward is {reward!r}, expected a function (or a partial one, a method, an object that is called), a "
            "reward model or its name, or a list of these"
        )
    name = getattr(reward, "__name__", "") or get_callable_name(reward)  # a partial one may be given a name of its own

    async def checked_async(**kwargs: Any) -> list[float | None]:
        return _numbers(name, await reward(**kwargs))

    def checked(**kwargs: Any) -> list[float | None]:
        return _numbers(name, reward(**kwargs))

    wrapper: Callable[..., Any] = checked_async if is_async_callable(reward) else checked
    wrapper.__name__ = name  # by which TRL logs it
    return wrapper


def _numbers(name: str, values: Any) -> list[float | None]:
    """What a reward function returned, as numbers; TRL checks how many there are."""
    values = list(values) if isinstance(values, Iterable) else [values]
    for row, value in enumerate(values):
        if value is not None and not (hasattr(value, "__float__") and math.isfinite(value)):
            raise ValueError(
                f"the reward function {name} returned {value!r} for completion {row}, expected a finite number, or "
                "None where it does not apply"
            )
    return [None if value is None else float(value) for value in values]


class ScoringTrainer(GatedLossTrainer):
    """GRPOTrainer that can score completions before TRL asks for their rewards, and knows rewards by name."""

    _scored: Tensor | None = None  # what TRL is going to ask for, (rows of all processes, reward functions)
    _rewards: Tensor  # the rewards last returned to TRL
    # What reward functions have logged and TRL has not shown yet.
    _pending_extra_logs: dict[str, list[Any]]
    _pending_metrics: dict[str, list[float]]

    def _find_rewards(self) -> None:
        """Find the columns that ``gate_reward`` and ``exploration_reward`` name, once the functions are known."""
        self._columns = {
            name: find_reward(name, getattr(self.args, name), self.reward_func_names)
            for name in ("gate_reward", "exploration_reward")
        }

    def total(self, rewards: Tensor) -> Tensor:
        """TRL's weighted sum, (rows,); NaN where no function applies."""
        summed = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return torch.where(rewards.isnan().all(1), math.nan, summed)

    def signal(self, which: str, rewards: Tensor) -> Tensor:
        """The reward that ``which`` (gate_reward or exploration_reward) names, (rows,); NaN where it does not apply."""
        column = self._columns[which]
        return self.total(rewards) if column is None else rewards[:, column]

    def score(self, rows: Sequence[Row], prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Tensor:
        """TRL's rewards of completions of the plain prompts, (rows of all processes, reward functions)."""
        said = [as_trl(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return self._finite(super()._calculate_rewards(rows, prompts, said, [c.ids for c in completions]))

    def score_apart(
        self, rows: Sequence[Row], prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """`score` of completions that may never be trained on, and what functions logged of them, by column.

        These logs do not enter TRL's tables, and metrics are dropped.
        """
        kept = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            return self.score(rows, prompts, completions), dict(self._pending_extra_logs)
        finally:
            self._pending_extra_logs, self._pending_metrics = kept

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's gathered rewards; those that are known already are not asked for again."""
        if self._scored is None:
            self._rewards = self._finite(super()._calculate_rewards(inputs, prompts, completions, completion_ids_list))
        else:
            self._rewards, self._scored = self._scored, None
        return self._rewards

    def _finite(self, rewards: Tensor) -> Tensor:
        """``rewards``, which may be NaN (not applicable); a reward model's infinite one is refused."""
        if rewards.isinf().any():
            row, function = rewards.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"the reward function {self.reward_func_names[function]} returned {rewards[row, function].item()} for "
                f"row {row} of step {self.state.global_step + 1}, expected a finite number"
            )
        return rewards


def as_trl(prompt: Prompt, completion: Completion) -> Any:
    """A completion as TRL hands it to reward functions: text after text, a message after messages."""
    return completion.text if isinstance(prompt, str) else [{"role": "assistant", "content": completion.text}]


def find_reward(parameter: str, name: str, known: Sequence[str]) -> int | None:
    """The column of the reward called ``name`` (``_reward`` at its end may be left out); None for the weighted sum.

    Raises:
        ValueError: no reward has that name (the message suggests the nearest), or several do.
    """
    if name == "total":
        if name in known:
            raise ValueError(f"{parameter} is 'total', the weighted sum, but a reward has that name: rename the reward")
        return None
    if not name:
        return 0
    for wanted in (name, f"{name}_reward"):
        if (found := known.count(wanted)) > 1:
            raise ValueError(
                f"{parameter} is {name!r}, but {found} reward functions have that name: set the __name__ of one"
            )
        if found:
            return known.index(wanted)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise ValueError(
        f"{parameter} is {name!r}, expected total or a reward function: "
        + (f"the nearest is {near[0]!r}" if near else ", ".join(map(repr, known)))
    )


def distinct(names: Sequence[str]) -> list[str]:
    """``names``, those that several rewards have with a number of their own."""
    return [name if names.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names, 1)]
