"""The order of a study's rows beside Table 1's."""

import numpy as np
import pytest

from kepo_core.analysis.claims import Outcome
from kepo_core.data.records import MODALITIES, Answer, AnswerOutcome
from kepo_core.experiment.methods import methods, paper_table
from kepo_core.study.paper_order import order_beside_paper, spearman

ROWS = ("zero-shot", "grpo", "kepo-ke-tau1", "kepo-tau1")


def outcome(share: float, spread: int = 0) -> Outcome:
    right = round(share * 100) + spread
    answers = [
        Answer(f"{m}{i}", m, "t", "", AnswerOutcome.CORRECT, "A", i < right, True, 5, True)
        for m in MODALITIES for i in range(100)
    ]  # fmt: skip
    return Outcome(answers, {})


def test_ranks_by_hand() -> None:
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == 1
    assert spearman(np.array([3.0, 2, 1]), np.array([10.0, 20, 30])) == -1
    assert spearman(np.array([1.0, 2, 2, 4]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.9486833)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_the_papers_own_numbers_are_in_its_order_and_reversed_ones_against_it() -> None:
    paper = {name: float(paper_table().loc[methods()[name].row, "Avg. (OOD)"]) / 100 for name in ROWS}
    for sign in (1, -1):
        found = {
            name: {(0, seed): outcome(0.5 + sign * (share - 0.7)) for seed in (0, 1)} for name, share in paper.items()
        }
        table = order_beside_paper(found, "MRI")
        assert table.loc["Avg. (OOD)", "ρ [95 %]"] == f"{sign:+.2f} [{sign:+.2f}, {sign:+.2f}]"
        assert table["rows"].tolist() == [4, 4, 4]


def test_seeds_that_change_the_order_widen_the_interval_and_controls_do_not_count() -> None:
    found = {name: {(0, seed): outcome(0.5, 10 * seed * (i % 2)) for seed in (0, 1, 2)} for i, name in enumerate(ROWS)}
    low, high = (
        order_beside_paper(found | {"explore-only": found["grpo"]}, "MRI")
        .loc["MRI", "ρ [95 %]"][6:]
        .strip("[]")
        .split(", ")
    )
    assert float(low) < float(high)
    assert order_beside_paper({"grpo": found["grpo"], "explore-only": found["grpo"]}, "MRI").empty
