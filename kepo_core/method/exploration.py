"""Section 3.2.2 and Algorithm 1 as control flow over three callables, without any model.

If all members of a group fail, the teacher writes a hint, and the student samples again with the hint (and the
answer) in its context until a draw is accepted or the budget is spent. All failing groups share each round: one call
of the hinter in total, one call of the sampler per round.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

Draw = TypeVar("Draw")


class GroupOutcome(StrEnum):
    """How exploration of one failing group ended."""

    RESCUED = "rescued"  # at least one draw was accepted
    EXHAUSTED = "exhausted"  # the budget was spent and no draw was accepted
    UNPARSABLE = "unparsable"  # no hint could be read from what the teacher wrote; nothing was drawn


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one hint-aware draw: for ``group``, given ``hint``, in round ``attempt`` (1 to B)."""

    group: int
    hint: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Explored(Generic[Draw]):
    """The result of exploring one failing group.

    ``hint`` is None if it was unparsable; ``draws`` counts all draws; ``accepted`` holds the draws to inject, at most
    ``injected_per_group``, in the order of sampling.
    """

    group: int
    hint: str | None
    draws: int
    accepted: tuple[Draw, ...]

    @property
    def outcome(self) -> GroupOutcome:
        """How the exploration ended."""
        if self.hint is None:
            return GroupOutcome.UNPARSABLE
        return GroupOutcome.RESCUED if self.accepted else GroupOutcome.EXHAUSTED


def failing_groups(rewards: Sequence[float], group_size: int) -> list[int]:
    """The groups without any reward: max_i r(y_i) = 0, line 4 of Algorithm 1.

    Args:
        rewards: one per sequence of the batch, over all processes, the members of a group adjacent. NaN is a reward
            that does not apply; a group of NaNs has not failed.

    Raises:
        ValueError: the rewards do not fill whole groups.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not fill groups of {group_size}, expected whole groups")
    groups = [rewards[start : start + group_size] for start in range(0, len(rewards), group_size)]
    return [
        number
        for number, group in enumerate(groups)
        if not any(reward > 0 for reward in group) and any(reward <= 0 for reward in group)
    ]


def explore(
    groups: Sequence[int],
    *,
    hinter: Callable[[Sequence[int]], Sequence[str | None]],
    sampler: Callable[[Sequence[Request]], Sequence[Draw]],
    accept: Callable[[Sequence[Request], Sequence[Draw]], Sequence[bool]],
    rejection_budget: int,
    injected_per_group: int,
    anyone: Callable[[bool], bool] = bool,
) -> list[Explored[Draw]]:
    """Lines 7 to 14 of Algorithm 1 for all ``groups`` at once.

    Args:
        groups: the failing groups that this process handles; may be empty.
        hinter: returns one hint per group (None: unparsable, the group keeps its originals).
        sampler: returns one draw per request, in order. Each round calls it once, with ``injected_per_group`` requests
            for each group that still lacks accepted draws.
        accept: returns whether each draw has a positive reward.
        rejection_budget: B, the maximum number of rounds.
        injected_per_group: m, the maximum number of accepted draws per group, over all rounds.
        anyone: returns whether its argument is true on any process. All processes make the same calls of hinter and
            sampler, with empty lists if they have no groups left: collective operations inside never hang.

    Returns:
        One result per group, in the order of ``groups``.

    Raises:
        ValueError: ``rejection_budget`` or ``injected_per_group`` is below 1.

    Example with numbers as completions; even ones are accepted (group 7 finds one in round 2, group 9 finds none):

    ```python
    >>> from kepo_core import explore
    >>> drawn = {7: iter([1, 4]), 9: iter([3, 5])}
    >>> found = explore(
    ...     [7, 9],
    ...     hinter=lambda groups: [f"a hint for {group}" for group in groups],
    ...     sampler=lambda requests: [next(drawn[request.group]) for request in requests],
    ...     accept=lambda requests, draws: [draw % 2 == 0 for draw in draws],
    ...     rejection_budget=2,
    ...     injected_per_group=1,
    ... )
    >>> [(group.group, group.accepted, group.draws, str(group.outcome)) for group in found]
    [(7, (4,), 2, 'rescued'), (9, (), 2, 'exhausted')]

    ```
    """
    if rejection_budget < 1 or injected_per_group < 1:
        raise ValueError(
            f"rejection_budget is {rejection_budget} and injected_per_group {injected_per_group}, expected at least 1"
        )
    if not anyone(bool(groups)):
        return []
    hints = dict(zip(groups, hinter(groups), strict=True))
    draws = dict.fromkeys(groups, 0)
    accepted: dict[int, list[Draw]] = {group: [] for group in groups}
    for attempt in range(1, rejection_budget + 1):
        requests = [
            Request(group, hint, attempt)
            for group, hint in hints.items()
            if hint is not None and len(accepted[group]) < injected_per_group
            for _ in range(injected_per_group)
        ]
        if not anyone(bool(requests)):
            break
        drawn = sampler(requests)
        for request, draw, good in zip(requests, drawn, accept(requests, drawn), strict=True):
            draws[request.group] += 1
            if good and len(accepted[request.group]) < injected_per_group:
                accepted[request.group].append(draw)
    return [Explored(group, hints[group], draws[group], tuple(accepted[group])) for group in groups]


def leaving_members(count: int, group_size: int, rng: random.Random) -> list[int]:
    """Which ``count`` members of a group the accepted draws replace (line 15): distinct, uniform at random, sorted.

    Raises:
        ValueError: ``count`` is not in [0, ``group_size``).
    """
    if not 0 <= count < group_size:
        raise ValueError(f"{count} of {group_size} members would leave, expected fewer than all")
    return sorted(rng.sample(range(group_size), count))
