"""Section 3.2.2 and Algorithm 1 as control flow over three callables; no model is in it.

Where every member of a group failed, the teacher writes a hint and the student draws again with the hint (and the
answer) in its context until a draw is right or the budget is spent. All failing groups go through each round
together: one call of the hinter in all, one call of the sampler a round.
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
    EXHAUSTED = "exhausted"  # the budget was spent without one
    UNPARSABLE = "unparsable"  # no hint could be read from what the teacher wrote; nothing was drawn


@dataclass(frozen=True, slots=True)
class Request:
    """One wanted hint-aware draw: for ``group``, given ``hint``, in round ``attempt`` (1 to B)."""

    group: int
    hint: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Explored(Generic[Draw]):
    """What became of one failing group.

    ``hint`` is None when it was unparsable; ``draws`` counts all draws, ``accepted`` holds those that will be
    injected, at most ``injected_per_group`` of them, in the order they were drawn.
    """

    group: int
    hint: str | None
    draws: int
    accepted: tuple[Draw, ...]

    @property
    def outcome(self) -> GroupOutcome:
        """How it ended."""
        if self.hint is None:
            return GroupOutcome.UNPARSABLE
        return GroupOutcome.RESCUED if self.accepted else GroupOutcome.EXHAUSTED


def failing_groups(rewards: Sequence[float], group_size: int) -> list[int]:
    """The groups without any reward: max_i r(y_i) = 0, line 4 of Algorithm 1.

    Args:
        rewards: of all sequences of the batch over all processes, a group's members side by side. NaN is a reward that
            does not apply: a group of nothing else has not failed.
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
        groups: the failing groups that this process takes care of; may be empty.
        hinter: writes one hint per group (None: unparsable, the group keeps its originals).
        sampler: one draw per request, in order. It is called once a round with ``injected_per_group`` requests
            for each group that still lacks accepted draws.
        accept: whether each draw has a positive reward.
        rejection_budget: B, the number of rounds.
        injected_per_group: m; accepted draws accumulate over the rounds up to m.
        anyone: whether the argument is true on any process. All processes make the same calls of the hinter and
            the sampler, with empty lists where they have nothing to ask, so that collective operations inside
            them never wait for a process that is done.

    Returns:
        What became of each group, in their order.

    Raises:
        ValueError: a budget or number of draws below 1.

    Example, of numbers instead of completions (group 7 finds an even one in its second round, group 9 none):

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
    """Which ``count`` members of a group leave for the accepted draws (line 15): distinct, uniform, sorted."""
    if not 0 <= count < group_size:
        raise ValueError(f"{count} of {group_size} members would leave, expected fewer than all")
    return sorted(rng.sample(range(group_size), count))
