"""Algorithm 1, driven by scripted hinters and samplers: what is called, how often, with what, and what results."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kepo_core.method.exploration import (
    Explored,
    GroupOutcome,
    Request,
    explore,
    failing_groups,
    leaving_members,
)


@dataclass
class Script:
    """Plays a teacher and a student; ``good[group]`` says which of that group's draws are right, in order."""

    good: dict[int, Sequence[bool]]
    hints: dict[int, str | None] = field(default_factory=dict)
    hint_calls: list[list[int]] = field(default_factory=list)
    sample_calls: list[list[Request]] = field(default_factory=list)
    drawn: Counter = field(default_factory=Counter)

    def hinter(self, groups: Sequence[int]) -> list[str | None]:
        self.hint_calls.append(list(groups))
        return [self.hints.get(g, f"hint {g}") for g in groups]

    def sampler(self, requests: Sequence[Request]) -> list[str]:
        self.sample_calls.append(list(requests))
        out = []
        for r in requests:
            out.append(f"{r.group}.{self.drawn[r.group]}")
            self.drawn[r.group] += 1
        return out

    def accept(self, requests: Sequence[Request], draws: Sequence[str]) -> list[bool]:
        assert [int(d.split(".")[0]) for d in draws] == [r.group for r in requests]
        script = {g: list(flags) for g, flags in self.good.items()}
        return [
            number < len(script.get(group, [])) and script[group][number]
            for group, number in (map(int, d.split(".")) for d in draws)
        ]

    def run(self, groups: Sequence[int], budget: int = 5, m: int = 1, **kw) -> list[Explored[str]]:
        return explore(
            groups,
            hinter=self.hinter,
            sampler=self.sampler,
            accept=self.accept,
            rejection_budget=budget,
            injected_per_group=m,
            **kw,
        )


def test_trigger_is_per_group_and_needs_every_member_to_fail() -> None:
    assert failing_groups([0, 0, 0, 1, 0, 0], 2) == [0, 2]
    assert failing_groups([0, 0, 2, 0], 4) == []
    assert failing_groups([], 2) == []
    with pytest.raises(ValueError, match="whole groups"):
        failing_groups([0, 0, 0], 2)


def test_no_failing_group_calls_nobody() -> None:
    script = Script({})
    assert script.run([]) == []
    assert script.hint_calls == [] and script.sample_calls == []


def test_success_at_draw_k_stops_there() -> None:
    for k in range(1, 6):
        script = Script({7: [False] * (k - 1) + [True] * 9})
        assert script.run([7]) == [Explored(7, "hint 7", k, (f"7.{k - 1}",))]
        assert script.sample_calls == [[Request(7, "hint 7", attempt)] for attempt in range(1, k + 1)]


def test_exhausted_after_exactly_the_budget() -> None:
    script = Script({3: [False] * 4 + [True]})
    (result,) = script.run([3], budget=4)
    assert result == Explored(3, "hint 3", 4, ()) and result.outcome is GroupOutcome.EXHAUSTED
    assert len(script.sample_calls) == 4


def test_an_unparsable_hint_draws_nothing_and_does_not_disturb_the_others() -> None:
    script = Script({1: [True], 2: [True]}, hints={1: None})
    first, second = script.run([1, 2])
    assert first == Explored(1, None, 0, ()) and first.outcome is GroupOutcome.UNPARSABLE
    assert second.outcome is GroupOutcome.RESCUED and second.accepted == ("2.0",)
    assert script.sample_calls == [[Request(2, "hint 2", 1)]]


def test_only_unparsable_hints_call_no_sampler() -> None:
    script = Script({}, hints={1: None, 2: None})
    assert [e.outcome for e in script.run([1, 2])] == [GroupOutcome.UNPARSABLE] * 2
    assert script.sample_calls == []


def test_all_failing_groups_share_each_round() -> None:
    script = Script({0: [True], 4: [False, True], 9: [False, False, True]})
    results = script.run([0, 4, 9])
    assert script.hint_calls == [[0, 4, 9]]  # one call of the teacher
    assert [[r.group for r in call] for call in script.sample_calls] == [[0, 4, 9], [4, 9], [9]]
    assert [r.draws for r in results] == [1, 2, 3]


def test_accepted_draws_accumulate_to_m_and_surplus_is_left_out() -> None:
    script = Script({0: [True, False, True, True], 1: [True, True], 2: [False] * 6})
    a, b, c = script.run([0, 1, 2], budget=3, m=2)
    assert a == Explored(0, "hint 0", 4, ("0.0", "0.2"))
    assert b == Explored(1, "hint 1", 2, ("1.0", "1.1"))
    assert c == Explored(2, "hint 2", 6, ())
    assert [len(call) for call in script.sample_calls] == [6, 4, 2]


def test_fewer_than_m_accepted_is_still_a_rescue() -> None:
    (result,) = Script({0: [False, True]}).run([0], budget=2, m=3)
    assert result.accepted == ("0.1",) and result.draws == 6 and result.outcome is GroupOutcome.RESCUED


def test_every_group_gets_its_own_hint() -> None:
    script = Script({}, hints={0: "left", 1: "right"})
    script.run([0, 1], budget=2)
    assert all(r.hint == {0: "left", 1: "right"}[r.group] for call in script.sample_calls for r in call)


def test_a_process_without_work_makes_the_same_calls_as_the_one_that_has_it() -> None:
    busy = Script({0: [False, False, True]})
    flags: list[bool] = []

    def record(flag: bool) -> bool:
        flags.append(flag)
        return flag

    busy.run([0], anyone=record)
    replay = iter(flags)
    idle = Script({})
    assert idle.run([], anyone=lambda flag: next(replay) or flag) == []
    assert [len(c) for c in idle.sample_calls] == [0] * len(busy.sample_calls)
    assert idle.hint_calls == [[]] and next(replay, None) is None


@pytest.mark.parametrize(("budget", "m"), [(0, 1), (1, 0), (-1, 1)])
def test_budgets_below_one_raise(budget: int, m: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Script({}).run([0], budget=budget, m=m)


def test_callables_of_the_wrong_length_raise() -> None:
    with pytest.raises(ValueError):
        explore([0, 1], hinter=lambda g: ["h"], sampler=list, accept=lambda r, d: [True] * len(d),
                rejection_budget=1, injected_per_group=1)  # fmt: skip
    with pytest.raises(ValueError):
        explore([0, 1], hinter=lambda g: ["h", "h"], sampler=lambda r: ["d"], accept=lambda r, d: [True],
                rejection_budget=1, injected_per_group=1)  # fmt: skip


def model_of_algorithm_1(good: list[bool], hint: str | None, budget: int, m: int) -> tuple[int, list[int]]:
    """One group, one draw at a time, straight from the appendix (m draws a round)."""
    accepted: list[int] = []
    drawn = 0
    if hint is None:
        return 0, []
    for _ in range(budget):
        if len(accepted) >= m:
            break
        for _ in range(m):
            if good[drawn] and len(accepted) < m:
                accepted.append(drawn)
            drawn += 1
    return drawn, accepted


@given(
    st.dictionaries(
        st.integers(0, 20),
        st.tuples(st.booleans(), st.lists(st.booleans(), min_size=24, max_size=24)),
        max_size=5,
    ),
    st.integers(1, 6),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_batched_rounds_equal_the_one_by_one_algorithm(groups: dict, budget: int, m: int) -> None:
    script = Script(
        {g: flags for g, (_, flags) in groups.items()}, {g: None for g, (ok, _) in groups.items() if not ok}
    )
    for result in script.run(list(groups), budget=budget, m=m):
        ok, flags = groups[result.group]
        draws, accepted = model_of_algorithm_1(flags, "h" if ok else None, budget, m)
        assert (result.draws, list(result.accepted)) == (draws, [f"{result.group}.{i}" for i in accepted])
    assert len(script.hint_calls) == (1 if groups else 0) and len(script.sample_calls) <= budget


@given(st.integers(2, 12), st.data())
@settings(deadline=None)
def test_leaving_members_are_distinct_in_range_and_from_the_generator(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size - 1))
    leaving = leaving_members(count, size, random.Random(3))
    assert len(set(leaving)) == count and all(0 <= i < size for i in leaving)
    assert leaving == leaving_members(count, size, random.Random(3))


def test_leaving_members_are_uniform() -> None:
    rng = random.Random(0)
    counts = Counter(i for _ in range(4000) for i in leaving_members(2, 8, rng))
    assert all(850 < counts[i] < 1150 for i in range(8))


def test_a_whole_group_never_leaves() -> None:
    with pytest.raises(ValueError, match="fewer than all"):
        leaving_members(4, 4, random.Random(0))


def test_a_group_that_the_reward_does_not_apply_to_has_not_failed() -> None:
    nan = float("nan")
    assert failing_groups([nan, nan, 0.0, nan, -1.0, 0.0, nan, 1.0], 2) == [1, 2]
