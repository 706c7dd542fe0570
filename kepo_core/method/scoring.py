"""One matrix of rewards, by TRL's `_calculate_rewards`, for the trigger, acceptance, the gate, advantages and logs.

A reward may be None: the function does not apply to that completion (NaN in the matrix). It passes no gate of
`gates`, and accepts no draw. A group fails if at least one of its rewards is a number and none is
above 0. Sums, means and advantages ignore NaN.

Each completion is scored once: rollouts before exploration (if the batch may explore), hint-aware draws when they are
sampled. TRL then gets the rewards of the final rollouts without a second call.
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
    """``reward``, wrapped to return only finite numbers and None: TRL would treat NaN as None, not applicable.

    Reward models and their names are returned unchanged.

    Raises:
        ValueError: ``reward`` is not a reward. The wrapped function raises it for any other return value, and names
            the function and the first such completion.
    """
    if isinstance(reward, nn.Module) and not hasattr(reward, "config"):
        raise ValueError(
            f"a reward is a {type(reward).__name__}, a module without transformers' config, expected a reward model "
            "of transformers, or a function that calls the module"
        )
    if isinstance(reward, str | nn.Module):
        return reward
    if isinstance(reward, type):
        raise ValueError(f"a reward is the class {reward.__name__}, expected an instance of it: {reward.__name__}(...)")
    if not callable(reward):
        raise ValueError(
            f"a reward is {reward!r}, expected a function (or another callable), a reward model or its name, or a list "
            "of these"
        )
    name = getattr(reward, "__name__", "") or get_callable_name(reward)  # a functools.partial may have been named

    async def checked_async(**kwargs: Any) -> list[float | None]:
        return _numbers(name, await reward(**kwargs))

    def checked(**kwargs: Any) -> list[float | None]:
        return _numbers(name, reward(**kwargs))

    wrapper: Callable[..., Any] = checked_async if is_async_callable(reward) else checked
    wrapper.__name__ = name  # by which TRL logs it
    return wrapper


def _numbers(name: str, values: Any) -> list[float | None]:
    """The values that a reward function returned, as numbers; TRL checks their count."""
    values = list(values) if isinstance(values, Iterable) else [values]
    for row, value in enumerate(values):
        if value is not None and not (hasattr(value, "__float__") and math.isfinite(value)):
            raise ValueError(
                f"the reward function {name} returned {value!r} for completion {row}, expected a finite number, or "
                "None where it does not apply"
            )
    return [None if value is None else float(value) for value in values]


class ScoringTrainer(GatedLossTrainer):
    """GRPOTrainer that can score completions before TRL requests their rewards, and finds rewards by name."""

    _scored: Tensor | None = None  # what TRL will request next, (rows of all processes, reward functions)
    _rewards: Tensor  # the rewards last returned to TRL
    # Logged by reward functions, not yet shown by TRL.
    _pending_extra_logs: dict[str, list[Any]]
    _pending_metrics: dict[str, list[float]]

    def _find_rewards(self) -> None:
        """Find the columns of ``gate_reward`` and ``exploration_reward``; TRL must have named the functions before."""
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
        """TRL's rewards for completions of the plain prompts, (rows of all processes, reward functions)."""
        said = [as_trl(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return self._finite(super()._calculate_rewards(rows, prompts, said, [c.ids for c in completions]))

    def score_apart(
        self, rows: Sequence[Row], prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """`score` for completions that may never be trained on, and the columns that reward functions logged.

        These columns do not enter TRL's tables, and logged metrics are dropped.
        """
        kept = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            return self.score(rows, prompts, completions), dict(self._pending_extra_logs)
        finally:
            self._pending_extra_logs, self._pending_metrics = kept

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's gathered rewards; completions that have been scored are not scored again."""
        if self._scored is None:
            self._rewards = self._finite(super()._calculate_rewards(inputs, prompts, completions, completion_ids_list))
        else:
            self._rewards, self._scored = self._scored, None
        return self._rewards

    def _finite(self, rewards: Tensor) -> Tensor:
        """``rewards``, which may be NaN (not applicable); ``ValueError`` for an infinite one, from a reward model."""
        if rewards.isinf().any():
            row, function = rewards.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"the reward function {self.reward_func_names[function]} returned {rewards[row, function].item()} for "
                f"row {row} of step {self.state.global_step + 1}, expected a finite number"
            )
        return rewards


def as_trl(prompt: Prompt, completion: Completion) -> Any:
    """A completion in the form that TRL passes to reward functions: text for a text prompt, a message for a chat."""
    return completion.text if isinstance(prompt, str) else [{"role": "assistant", "content": completion.text}]


def find_reward(parameter: str, name: str, known: Sequence[str]) -> int | None:
    """The column of the reward ``name`` (a final ``_reward`` may be omitted); None for "total", the weighted sum.

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
    """``names``; those that occur several times get a number each."""
    return [name if names.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names, 1)]
