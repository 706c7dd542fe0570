"""The same path with real photographs, if the shared data is next to the checkout."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kepo_core.data.images import load_image
from kepo_core.data.inspection import Decodable, Inspector
from kepo_core.data.ledger import Ledger
from kepo_core.data.loading import load_questions
from kepo_core.data.source import open_source
from kepo_core.data.splits import split_by_image, study_split
from kepo_core.experiment.evaluation import evaluate
from kepo_core.task.dataset import to_dataset

BCCD = Path(__file__).parents[3] / "shared/data/bccd_omnimedvqa"

pytestmark = pytest.mark.skipif(not BCCD.is_dir(), reason="these files are not part of the package")


@pytest.fixture(scope="module")
def questions():
    return load_questions(BCCD)


def test_every_row_is_read_and_every_answer_resolved(questions):
    assert len(questions) == 240
    assert {question.modality for question in questions} == {"Microscopy"}
    assert Counter(len(question.options) for question in questions) == {4: 120, 2: 60, 3: 60}
    assert all(question.answer in question.letters for question in questions)
    decodable = Decodable(Ledger(), Inspector(open_source(BCCD)))
    assert all(decodable(question) for question in questions)
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


@pytest.mark.parametrize(("thinking", "image_size"), [(True, 0), (False, 0), (True, 50)])
def test_a_tiny_model_is_evaluated_on_them(questions, tiny_model, processor, tmp_path, thinking, image_size):
    # Sizes as real files have them: odd, narrow, larger than the model's, grey, upper-case ending.
    asked = questions[:12]
    for i, (width, height) in enumerate([(301, 97), (33, 64), (640, 481), (7, 9)]):
        path = tmp_path / f"{i}.JPG"
        load_image(asked[i].image).resize((width, height)).convert("L" if i % 2 else "RGB").save(path)
        asked[i] = replace(asked[i], image=path)
    answers = evaluate(
        tiny_model(),
        processor,
        asked,
        thinking=thinking,
        max_tokens=6,
        batch_size=5,
        pictures=partial(load_image, image_size=image_size),
    )
    assert [answer.question_id for answer in answers] == [question.id for question in asked]
    assert all(answer.tokens == 6 or answer.finished for answer in answers)
    assert all(answer.modality == "Microscopy" for answer in answers)


def test_they_make_a_training_set(questions):
    dataset = to_dataset(questions, thinking=True)
    assert len(dataset) == 240
    assert dataset[239]["image"].size == (640, 480)
    assert dataset[1]["prompt"][0]["content"][1]["text"].startswith(
        "Is at least one white blood cell (WBC) annotated in this blood smear?\nA) No\nB) Yes\n\nYour task:"
    )
