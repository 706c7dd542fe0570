"""The paper's claims: their metrics by hand, and verdicts on runs whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from kepo_core.analysis.aggregate import Estimate
from kepo_core.analysis.claims import METRICS, Claim, Outcome, claims, claims_table, score, thirds, verdict
from kepo_core.data.records import Answer, AnswerOutcome
from kepo_core.experiment.methods import methods, paper_table

MADE = Answer("", "MRI", "", "", AnswerOutcome.CORRECT, "A", True, True, 5, True)
IMAGES = {f"q{i}": f"image{i}" for i in range(400)}


def answered(right) -> list[Answer]:
    """A quarter of the questions is about MRI, the others about two modalities."""
    names = ("MRI", "CT", "MRI" if len(right) < 4 else "CT", "X-Ray")
    return [replace(MADE, question_id=f"q{i}", modality=names[i % 4], correct=bool(x)) for i, x in enumerate(right)]


def test_every_claim_is_about_methods_and_metrics_that_there_are() -> None:
    for claim in claims():
        assert {claim.of, claim.against} <= set(methods()) and claim.of != claim.against, claim
        assert claim.metric in METRICS and claim.expected in ("above", "below", "not above"), claim
        assert claim.source.split(",")[0] in ("4.4", "4.5", "Table 1")


def test_claims_of_table_1_are_what_table_1_says() -> None:
    ood = paper_table()["Avg. (OOD)"]
    for claim in claims():
        if claim.metric == "final":
            ours, theirs = (float(ood.loc[[methods()[name].row]].iloc[0]) for name in (claim.of, claim.against))
            assert (ours > theirs) == (claim.expected == "above"), claim


def test_the_metrics_by_hand() -> None:
    # Steps 1 to 9: the first third is 1-3, the middle 4-6, the last 7-9. Question 0 is right from step 2, 1 until 7.
    curve = {step: answered([step >= 2, step < 8]) for step in range(10)}
    order = answered([1, 1])
    outcome = Outcome(answered([0, 1]), curve)
    assert score(outcome, "final", order).tolist() == [0, 1]
    assert score(outcome, "early", order) == pytest.approx([2 / 3, 1])
    assert score(outcome, "late change", order) == pytest.approx([1 - 1, 1 / 3 - 1])
    assert score(outcome, "final", order[::-1]).tolist() == [1, 0]
    assert score(outcome, "throughout", order) == pytest.approx([8 / 9, 7 / 9])
    few = Outcome(order, {0: answered([0, 0]), 5: answered([1, 0]), 10: answered([1, 1])})
    assert thirds(few.curve) is None and thirds(curve) == ([1, 2, 3], [4, 5, 6], [7, 8, 9]) and thirds({}) is None
    with pytest.raises(ValueError, match="a third of training has no evaluated step"):
        score(few, "early", order)
    with pytest.raises(ValueError, match="q2 is not answered"):
        score(outcome, "final", [*order, replace(MADE, question_id="q2")])


def test_verdicts() -> None:
    above, below, not_above = (Claim("", "", "a", "b", "final", how) for how in ("above", "below", "not above"))
    gain, loss, small = (Estimate(x, x - 0.1, x + 0.1, 3, np.nan) for x in (0.2, -0.2, 0.005))
    assert [verdict(above, e, 0.01) for e in (gain, loss)] == ["held", "not held"]
    assert [verdict(below, e, 0.01) for e in (gain, loss)] == ["not held", "held"]
    assert [verdict(not_above, e, 0.01) for e in (gain, loss, small)] == ["not held", "held", "held"]
    assert {verdict(c, e, 0.06) for c in (above, below, not_above) for e in (gain, loss)} == {"inconclusive"}


def study(rates: dict[str, float], seeds: int = 3) -> dict[str, dict[tuple[int, int], Outcome]]:
    rng = np.random.default_rng(0)

    def outcome(rate: float) -> Outcome:
        curve = {step: answered(rng.random(400) < rate * step / 6) for step in range(7)}
        return Outcome(answered(rng.random(400) < rate), curve)

    return {name: {(0, seed): outcome(rate) for seed in range(seeds)} for name, rate in rates.items()}


def test_a_table_of_claims_tells_what_the_runs_tell_and_no_more() -> None:
    rates = {"kepo-tau1": 0.9, "grpo": 0.5, "kepo-tau0": 0.9, "zero-shot": 0.7, "zero-shot-nothink": 0.2}
    table = claims_table(study(rates), IMAGES, "MRI").set_index("claim")
    assert table.loc["KEPO is above GRPO out of distribution", "verdict"] == "held"
    assert table.loc["KEPO gains faster early than GRPO", "verdict"] == "held"
    assert table.loc["Thinking alone does not help the student", "verdict"] == "not held"
    assert table.loc["A gate at τ = 1 is above τ = 0", "verdict"] == "inconclusive"
    assert not any("MM-GKD" in claim for claim in table.index)  # there are no runs of it
    pairs = claims_table(study(rates, seeds=2), IMAGES, "MRI")
    assert set(pairs["verdict"]) == {"inconclusive"} and set(pairs["p (Holm)"]) == {"–"}  # of two runs
    # In-domain answers are no part of it: all of them wrong changes nothing.
    runs = study(rates)
    spoilt = {key: replace(o, answers=[replace(a, correct=a.correct and a.modality != "MRI") for a in o.answers])
              for key, o in runs["kepo-tau1"].items()}  # fmt: skip
    again = claims_table({**runs, "kepo-tau1": spoilt}, IMAGES, "MRI").set_index("claim")
    assert again.equals(table)
    # Without curves there is no word on what happens on the way.
    bare = {name: {k: replace(o, curve={}) for k, o in found.items()} for name, found in runs.items()}
    assert not claims_table(bare, IMAGES, "MRI")["difference"].str.contains("early|late").any()
    assert claims_table({}, IMAGES, "MRI").empty
    few = {
        name: {k: replace(o, curve={s: o.curve[s] for s in (0, 6)}) for k, o in found.items()}
        for name, found in runs.items()
    }
    assert claims_table(few, IMAGES, "MRI").equals(claims_table(bare, IMAGES, "MRI"))
    only = {name: {k: replace(o, answers=[a for a in o.answers if a.modality == "MRI"], curve={})
                   for k, o in found.items()} for name, found in runs.items()}  # fmt: skip
    assert claims_table(only, IMAGES, "MRI").empty


def test_a_slow_learner_does_not_degrade_less_than_what_does_not_degrade() -> None:
    rng = np.random.default_rng(0)

    def outcome(rates) -> Outcome:
        return Outcome(answered(np.ones(400)), {step: answered(rng.random(400) < r) for step, r in enumerate(rates)})

    flat, slow, fallen = [0.5, *[0.8] * 6], [0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [0.5, 0.8, 0.9, 0.9, 0.9, 0.5, 0.4]
    claim = "KEPO degrades less late than GRPO"

    def verdict_of(kepo, grpo) -> str:
        runs = {
            name: {(0, s): outcome(rates) for s in range(3)}
            for name, rates in {"kepo-tau1": kepo, "grpo": grpo}.items()
        }
        return claims_table(runs, IMAGES, "MRI").set_index("claim").loc[claim, "verdict"]

    assert verdict_of(slow, [*flat[:4], 0.85, 0.85, 0.85]) == "inconclusive"
    assert (
        verdict_of(flat, fallen) == "held" and verdict_of(fallen, [0.5, 0.8, 0.8, 0.8, 0.8, 0.78, 0.78]) == "not held"
    )
