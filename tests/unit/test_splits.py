"""Splits and samples: nothing leaks, nothing depends on the order of rows, shares are met."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kepo_core.data.records import Question
from kepo_core.data.splits import (
    FRACTIONS,
    fingerprint,
    image_key,
    leaked,
    sample,
    split_as_given,
    split_by_image,
    split_by_question,
    study_split,
)
from kepo_core.errors import DataError

TYPES = ("Disease Diagnosis", "Anatomy Identification", "Lesion Grading")


def make(images_per_modality, questions_per_image=3, root="/data", types=TYPES[:1], named="Images"):
    """Questions in the raw layout's paths, ``{modality: number of images}``; ``types`` in turn."""
    return [
        Question(
            id=f"{modality}_{image}_{k}",
            dataset=modality,
            modality=modality,
            question_type=types[(image * questions_per_image + k) % len(types)],
            question="What is seen?",
            options=("a", "b"),
            answer="A",
            image=Path(root) / "Images" / modality / f"{image}.png",
            image_name=f"{named}/{modality}/{image}.png",
        )
        for modality, images in images_per_modality.items()
        for image in range(images)
        for k in range(questions_per_image)
    ]


def ids(questions):
    return [question.id for question in questions]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from(["MRI", "CT", "OCT"]), st.integers(1, 40), min_size=1),
    per_image=st.integers(1, 5),
    types=st.integers(1, 3),
    seed=st.integers(0, 1000),
    shuffle=st.randoms(use_true_random=False),
)
def test_no_image_is_in_two_splits_and_no_question_is_lost_whatever_the_order(sizes, per_image, types, seed, shuffle):
    questions = make(sizes, per_image, types=TYPES[:types])
    splits = split_by_image(questions, seed)
    assert sorted(i for part in splits.values() for i in ids(part)) == sorted(ids(questions))
    homes = {}
    for name, part in splits.items():
        for question in part:
            assert homes.setdefault(question.image, name) == name
    for modality, images in sizes.items():
        for name, share in FRACTIONS.items():
            n = sum(question.modality == modality for question in splits[name])
            # Half an image at each border of the share: "train" has one border, "validation" two.
            assert abs(n - share * images * per_image) <= per_image * (1 if name == "validation" else 0.5) + 1e-9
    mixed = shuffle.sample(questions, len(questions))
    assert {k: set(ids(v)) for k, v in split_by_image(mixed, seed).items()} == {
        k: set(ids(v)) for k, v in splits.items()
    }


def test_seeds_differ_and_the_place_of_the_root_does_not_matter():
    here, there = make({"MRI": 50}), make({"MRI": 50}, root="/elsewhere/Images/omni")
    assert ids(split_by_image(here, 0)["test"]) == ids(split_by_image(there, 0)["test"])
    assert ids(split_by_image(here, 0)["test"]) != ids(split_by_image(here, 1)["test"])
    assert image_key(there[0]) == "Images/MRI/0.png"
    assert image_key(replace(there[0], image_name="")) == "/elsewhere/Images/omni/Images/MRI/0.png"


def test_which_split_an_image_is_in_is_pinned():
    # Published numbers depend on these splits: a change here changes every one of them.
    assert ids(split_by_image(make({"MRI": 10}, 1), 0)["test"]) == ["MRI_1_0", "MRI_2_0"]
    assert ids(sample(make({"MRI": 10}, 1), 3, 0)) == ["MRI_4_0", "MRI_7_0", "MRI_9_0"]
    typed = make({"MRI": 12}, 1, types=TYPES)
    assert ids(split_by_image(typed, 0)["test"]) == ["MRI_1_0", "MRI_11_0"]
    assert ids(sample(typed, 3, 0)) == ["MRI_4_0", "MRI_11_0", "MRI_9_0"]


@pytest.mark.parametrize("seed", range(5))
def test_every_question_type_has_its_share_in_every_split_and_sample(seed):
    # Three kinds of picture, asked about differently; the rarest is asked about twice as often.
    questions = [
        *make({"MRI": 200, "CT": 50}, 1, types=TYPES[:1]),
        *make({"X-Ray": 100}, 2, types=TYPES[1:]),
        *(replace(q, id="y" + q.id, modality="MRI") for q in make({"MRI": 100}, 1, types=TYPES[1:2], named="c")),
        *(replace(q, id="z" + q.id, modality="MRI") for q in make({"OCT": 20}, 2, types=TYPES[2:])),
    ]
    splits = split_by_image(questions, seed)
    for modality, totals in {"MRI": (200, 100, 40), "CT": (50, 0, 0), "X-Ray": (0, 100, 100)}.items():
        for name, share in FRACTIONS.items():
            for kind, total in zip(TYPES, totals, strict=True):
                n = sum(q.modality == modality and q.question_type == kind for q in splits[name])
                assert abs(n - share * total) <= 4, (modality, name, kind)
    mri = [q for q in questions if q.modality == "MRI"]
    for n in (34, 85, 170):
        drawn = sample(mri, n, seed)
        for kind, total in zip(TYPES, (200, 100, 40), strict=True):
            assert abs(sum(q.question_type == kind for q in drawn) - n * total / 340) <= 1, (n, kind)


def test_a_kind_of_one_can_come_into_any_split():
    homes = set()
    for seed in range(30):
        questions = [*make({"MRI": 20}, 1), replace(make({"MRI": 21}, 1)[-1], question_type=TYPES[2])]
        homes |= {name for name, part in split_by_image(questions, seed).items() if "MRI_20_0" in ids(part)}
    assert homes == set(FRACTIONS)


def test_the_given_split_is_that_of_the_files_and_its_leak_is_seen():
    def given(part, images):
        return [replace(q, id=f"MRI_{part}:{n}") for n, q in enumerate(make({"MRI": 50})) if q.image.stem in images]

    train, test = given("train", {str(i) for i in range(40)}), given("test", {"39", "40", "41"})
    splits = split_as_given([*test, *train], 0)
    assert ids(splits["test"]) == ids(test) and len(splits["validation"]) == 24
    assert sorted(ids(splits["train"]) + ids(splits["validation"])) == sorted(ids(train))
    assert not leaked(splits["train"], splits["validation"])
    assert leaked(train, test) == [q for q in test if q.image.stem == "39"] != []
    with pytest.raises(DataError, match=r"split: .* MRI_0_0 has none .* set split to image or question"):
        split_as_given(make({"MRI": 1}))


def test_what_cannot_be_used_is_passed_over_and_nothing_else_is_tried():
    questions, tried = make({"MRI": 100, "CT": 60}), []

    def usable(question):
        tried.append(question.id)
        return question.image.stem not in ("3", "4", "5", "30", "31")

    train, tests = study_split(questions, "MRI", 50, 20, 0, usable=usable)
    assert len(train) == 50 and {name: len(rows) for name, rows in tests.items()} == {"MRI": 20, "CT": 20}
    assert len(tried) - 90 == sum(not usable(q) for q in questions if q.id in set(tried)) > 0
    whole, _ = study_split(questions, "MRI", 60, 20, 0)
    assert [i for i in ids(whole) if i in set(ids(train))] == ids(train)  # the others in the same order


def test_an_image_under_two_modality_names_still_stays_together():
    questions = make({"MRI": 10, "CT": 10})
    shared = [
        replace(question, id=f"x{i}", image_name=questions[0].image_name) for i, question in enumerate(questions[-9:])
    ]
    for part in split_by_image([*questions, *shared], 3).values():
        assert sum(question.image_name == questions[0].image_name for question in part) in (0, 12)


def test_the_released_way_splits_questions_and_so_leaks_images():
    questions = make({"MRI": 100})
    splits = split_by_question(questions, 0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 180, "validation": 60, "test": 60}
    assert {q.image for q in splits["train"]} & {q.image for q in splits["test"]}


def test_a_sample_is_a_seeded_prefix_of_a_larger_one():
    questions = make({"MRI": 50})
    assert ids(sample(questions, 20, 7)) == ids(sample(questions[::-1], 40, 7))[:20]
    assert ids(sample(questions, 20, 7)) != ids(sample(questions, 20, 8))
    assert len(sample(questions, 1000, 7)) == 150
    first = sum(int(i.split("_")[1]) for i in ids(sample(questions, 50, 0))) / 50
    assert 15 < first < 34  # not the head of the list: the mean image number of a fair sample is 24.5 ± 2


def test_sampling_is_independent_of_splitting():
    # With one hash for both, the test sample would be the images nearest the split's border, not a random one.
    test = split_by_question(make({"MRI": 400}, 1), 0)["test"]
    ranks = {i: n for n, i in enumerate(ids(sample(make({"MRI": 400}, 1), 400, 0)))}
    mean = sum(ranks[i] for i in ids(test)) / len(test)
    assert 160 < mean < 240


def test_the_study_split_has_the_papers_shape():
    questions = make({"CT": 30, "MRI": 300, "OCT": 500})
    train, tests = study_split(questions, "MRI", 500, 250, 0)
    assert len(train) == 500
    assert {question.modality for question in train} == {"MRI"}
    assert list(tests) == ["MRI", "CT", "OCT"]
    assert {name: len(rows) for name, rows in tests.items()} == {"MRI": 180, "CT": 18, "OCT": 250}
    assert all(question.modality == name for name, rows in tests.items() for question in rows)
    assert not {q.image for q in train} & {q.image for rows in tests.values() for q in rows}


def test_settings_are_chosen_on_images_of_their_own():
    questions = make({"CT": 30, "MRI": 300})
    train, validation = study_split(questions, "MRI", 500, 250, 0, eval_split="validation")
    _, tests = study_split(questions, "MRI", 500, 250, 0)
    groups = [{q.image for q in train}, *({q.image for q in t["MRI"] + t["CT"]} for t in (validation, tests))]
    assert all(groups) and not groups[0] & groups[1] and not groups[1] & groups[2]
    assert len(validation["MRI"]) == 180


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_modality": "Ultrasound"}, "train_modality: the data has no 'Ultrasound', expected one of .*MRI, CT"),
        ({"train_items": 0}, "train_items: 0 leaves an empty split"),
        ({"eval_items": -1}, "eval_items: -1 leaves an empty split"),
        ({"split": "images"}, "split: 'images' is unknown, expected one of image, question, given"),
        ({"train_modality": "CT"}, "data_root: no CT questions in the test split"),
    ],
)
def test_an_empty_split_names_its_parameter(arguments, message):
    with pytest.raises(DataError, match=message):
        study_split(make({"MRI": 30, "CT": 1}), **arguments)


def test_shares_must_be_shares():
    with pytest.raises(DataError, match="do not sum to 1"):
        split_by_image(make({"MRI": 3}), 0, {"train": 0.8, "test": 0.3})


def test_the_fingerprint_sees_every_field_and_the_pixels_but_not_order_or_place(tmp_path):
    def questions(root):
        for i in range(2):
            path = root / f"Images/MRI/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), i).save(path)
        return make({"MRI": 2}, root=root)

    here, there = questions(tmp_path / "a"), questions(tmp_path / "b")
    original = fingerprint(here)
    assert fingerprint(there) == original
    assert fingerprint(here[::-1]) == original
    assert fingerprint(here[1:]) != original
    changes = {"id": "z", "dataset": "z", "modality": "CT", "question_type": "z", "question": "z", "answer": "B",
               "options": ("a", "c"), "image": here[-1].image}  # fmt: skip
    for field, value in changes.items():
        assert fingerprint([replace(here[0], **{field: value}), *here[1:]]) != original, field
    copy = here[0].image.with_name("copy.png")
    copy.write_bytes(here[0].image.read_bytes())
    assert fingerprint([replace(here[0], image_name="Images/MRI/copy.png"), *here[1:]]) != original
    Image.new("L", (4, 4), 9).save(here[0].image)
    assert fingerprint(here) != original
