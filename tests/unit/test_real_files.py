"""The same path over real photographs, where the shared data lies beside the checkout."""

from collections import Counter
from pathlib import Path

import pytest

from kepo_core.data.images import check_images, load_image
from kepo_core.data.omnimedvqa import load_raw
from kepo_core.data.splits import split_by_image, study_split

BCCD = Path(__file__).parents[3] / "shared/data/bccd_omnimedvqa"

pytestmark = pytest.mark.skipif(not BCCD.is_dir(), reason="no ../shared/data/bccd_omnimedvqa beside the checkout")


@pytest.fixture(scope="module")
def questions():
    return load_raw(BCCD)


def test_every_row_is_read_and_every_answer_resolved(questions):
    assert len(questions) == 240
    assert {question.modality for question in questions} == {"Microscopy"}
    assert Counter(len(question.options) for question in questions) == {4: 120, 2: 60, 3: 60}
    assert all(question.answer in question.letters for question in questions)
    assert check_images(questions) == 60
    # The rows whose gt_answer differs from its option in case and full stop: "microscopy." for "Microscopy".
    recognition = [question for question in questions if question.question_type == "Modality Recognition"]
    assert len(recognition) == 60
    assert {question.options["ABCD".index(question.answer)] for question in recognition} == {"Microscopy"}


def test_no_photograph_is_in_two_splits(questions):
    splits = split_by_image(questions, 0)
    images = {name: {question.image for question in part} for name, part in splits.items()}
    assert {name: len(part) for name, part in images.items()} == {"train": 36, "validation": 12, "test": 12}
    assert not images["train"] & images["test"]
    assert not images["validation"] & (images["train"] | images["test"])


def test_the_study_split_of_a_single_modality(questions):
    train, tests = study_split(questions, "Microscopy", 100, 20, 0)
    assert (len(train), {name: len(rows) for name, rows in tests.items()}) == (100, {"Microscopy": 20})


def test_photographs_are_decoded_and_squashed(questions):
    assert load_image(questions[0].image).size == (640, 480)
    assert load_image(questions[0].image, 64).size == (64, 64)
