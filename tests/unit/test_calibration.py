"""The calibration's own arithmetic: intervals, targets, and that a planted prior is found."""

import math
from pathlib import Path

import numpy as np
import pytest

from kepo_core.analysis.intervals import wilson_interval
from kepo_core.data.phantom import Facts
from kepo_core.data.records import LETTERS, Question
from kepo_core.testbed import calibration
from kepo_core.testbed.calibration import Measured, image_clues, letter_clues, prior, question_clues


def test_a_share_has_wilsons_interval_and_meets_its_target_or_not() -> None:
    share = Measured.share("x", [True, False, True, True], (0.5, 0.8))
    assert (share.value, share.n, (share.low, share.high)) == (0.75, 4, wilson_interval(3, 4)) and share.met
    assert not Measured.share("x", [True], (0.0, 0.9)).met
    nothing = Measured.share("x", [], (0.0, 1.0))
    assert math.isnan(nothing.value) and not nothing.met and (nothing.low, nothing.high) == (0.0, 1.0)


def test_the_table_says_what_was_meant_and_whether_it_holds() -> None:
    table = calibration.table(
        [Measured("a", 0.5, 0.4, 0.61, 10, (0.4, 0.7)), Measured("b", 0.5, 0.4, 0.6, 10, (0.6, 1))]
    )
    assert table.loc["a"].tolist() == ["50.0 [40.0, 61.0]", 10, "40 to 70", "yes"]
    assert table.loc["b", ["target", "met"]].tolist() == ["at least 60", "no"]
    assert calibration.table([Measured("c", 0.0, -0.1, 0.1, 9, (-1.0, 0.02))]).loc["c", "target"] == "at most 2"


def asked(count: int, seed: int, right) -> list[Question]:
    """Four-option questions; ``right(options, rng)`` says which index is right."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        options = tuple(str(w) for w in rng.permutation(["disc", "ring", "bar", "cross"]))
        answer = LETTERS[right(options, rng)]
        rows.append(Question(f"q{i}", "d", "MRI", "t", "Which shape?", options, answer, Path("x.png")))
    return rows


@pytest.mark.parametrize(
    ("clues", "right"),
    [
        (letter_clues, lambda options, rng: 2 if rng.random() < 0.5 else int(rng.integers(4))),
        (question_clues, lambda options, rng: options.index("ring") if rng.random() < 0.5 else int(rng.integers(4))),
    ],
    ids=["a letter", "a word"],
)
def test_a_planted_prior_is_found(clues, right) -> None:
    found = prior("x", asked(800, 0, right), asked(800, 1, right), clues)
    assert found.low > 0.2 and found.value == pytest.approx(0.375, abs=0.06) and not found.met


def test_no_prior_is_found_where_there_is_none() -> None:
    fair = [asked(3000, seed, lambda options, rng: int(rng.integers(4))) for seed in (0, 1)]
    for clues in (letter_clues, question_clues):
        assert abs(prior("x", *fair, clues).value) < 0.04


def test_a_picture_that_gives_the_letter_away_is_found() -> None:
    questions = asked(1000, 0, lambda options, rng: int(rng.integers(4)))
    place = dict(zip("ABCD", ("upper left", "upper right", "lower left", "lower right"), strict=True))
    facts = {q.id: Facts("MRI", "disc", place[q.answer], "small", "one", "dark") for q in questions}
    assert prior("x", questions, questions, image_clues(facts)).value == pytest.approx(0.75)
