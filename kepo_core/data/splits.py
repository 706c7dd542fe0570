"""Rows → splits and samples that are the same everywhere.

They depend neither on the order of the rows nor on a random generator's version, only on SHA-256 of the seed and the
item's own name. Splits and samples are stratified: within each modality, the question types have the same shares in
each of them as in the whole, up to rounding.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from kepo_core.data.medr1 import split_of
from kepo_core.data.records import Question, categories
from kepo_core.errors import DataError

T = TypeVar("T")

FRACTIONS: Mapping[str, float] = {"train": 0.6, "validation": 0.2, "test": 0.2}


def image_key(question: Question) -> str:
    """What identifies a picture: the question's ``image_name``, or the image's whole path if it has none.

    The same wherever the data lie and, after ``inspection.name_once``, for all files that show the same.
    """
    return question.image_name or question.image.as_posix()


def split_by_image(
    questions: Iterable[Question], seed: int = 0, fractions: Mapping[str, float] = FRACTIONS
) -> dict[str, list[Question]]:
    """Disjoint splits in which no image occurs twice, with the same fractions of questions in every modality.

    ``fractions`` maps split names to shares that sum to 1. All questions of an image go together, so the shares
    of a modality are met up to one image per boundary. Images with the same question types, equally often, are spread
    over the splits in the same shares. Rows keep their order.
    """
    return _split(list(questions), image_key, image_key, seed, fractions)


def split_by_question(
    questions: Iterable[Question], seed: int = 0, fractions: Mapping[str, float] = FRACTIONS
) -> dict[str, list[Question]]:
    """As in the authors' released code: over questions, so that one image can be in train **and** in test."""
    return _split(list(questions), lambda question: question.id, lambda question: question.id, seed, fractions)


def split_as_given(questions: Iterable[Question], seed: int = 0) -> dict[str, list[Question]]:
    """The data's own split: each question's ``split`` or, for Med-R1, its file; an image can be in several parts.

    Without a validation part, a fifth of the train part is set aside for it, by image. Raises ``DataError`` for data
    without a split of their own.
    """
    given: dict[str, list[Question]] = {"train": [], "validation": [], "test": []}
    for question in questions:
        given[question.split or split_of(question)].append(question)
    if not given["validation"]:
        given |= split_by_image(given["train"], seed, {"train": 0.8, "validation": 0.2})
    return given


#: The values of the parameter ``split``.
SPLITS: Mapping[str, Callable[[Iterable[Question], int], dict[str, list[Question]]]] = {
    "image": split_by_image,
    "question": split_by_question,
    "given": split_as_given,
}


def shuffled(questions: Iterable[Question], seed: int = 0) -> list[Question]:
    """The questions in a seeded order in which the first n have the question types in their shares, for every n."""
    return _spread(list(questions), lambda q: (q.modality, q.question_type), lambda q: q.id, seed, "sample")


def sample(questions: Iterable[Question], n: int, seed: int = 0) -> list[Question]:
    """The first ``n`` of `shuffled`, or all when there are fewer."""
    return shuffled(questions, seed)[:n]


def study_split(
    questions: Sequence[Question],
    train_modality: str = "MRI",
    train_items: int = 600,
    eval_items: int = 300,
    seed: int = 0,
    split: str = "image",
    eval_split: str = "test",
    usable: Callable[[Question], bool] = lambda question: True,
    usable_in_test: Callable[[Question], bool] | None = None,
) -> tuple[list[Question], dict[str, list[Question]]]:
    """The paper's design: train on one modality, test on every modality that the data has.

    Returns at most ``train_items`` training questions of ``train_modality`` and, in the order of `categories`, at
    most ``eval_items`` questions of ``eval_split`` ("test" or "validation") per modality: the first of `shuffled`
    that are ``usable`` (for tests ``usable_in_test``, if given). Questions after these are not checked. Raises
    ``DataError`` naming the parameter that leaves a split empty.
    """
    if split not in SPLITS:
        raise DataError(f"split: {split!r} is unknown, expected one of {', '.join(SPLITS)}.")
    for name, value in (("train_items", train_items), ("eval_items", eval_items)):
        if value < 1:
            raise DataError(f"{name}: {value} leaves an empty split, expected at least 1.")
    present = categories(question.modality for question in questions)
    if train_modality not in present:
        found = ", ".join(present) or "nothing"
        raise DataError(f"train_modality: the data has no {train_modality!r}, expected one of {found}.")
    parts = SPLITS[split](questions, seed)

    def take(part: str, modality: str, n: int, wanted: Callable[[Question], bool]) -> list[Question]:
        order = shuffled((q for q in parts[part] if q.modality == modality), seed)
        return list(islice(filter(wanted, order), n))

    train = take("train", train_modality, train_items, usable)
    tests = {modality: take(eval_split, modality, eval_items, usable_in_test or usable) for modality in present}
    if not train:
        raise DataError(
            f"train_modality: no {train_modality} questions in the train split, expected more images of it."
        )
    for modality, rows in tests.items():
        if not rows:
            raise DataError(
                f"data_root: no {modality} questions in the {eval_split} split, expected more images of it."
            )
    return train, tests


def leaked(train: Iterable[Question], test: Iterable[Question]) -> list[Question]:
    """Those of ``test`` whose image is also in ``train``, under any name (see `image_key`)."""
    known = {image_key(question) for question in train}
    return [question for question in test if image_key(question) in known]


def fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) of the rows and their image files' bytes, whatever their order and the data root's path."""
    digests: dict[Path, str] = {}
    lines = []
    for q in questions:
        if q.image not in digests:
            digests[q.image] = hashlib.sha256(q.image.read_bytes()).hexdigest()
        fields = [q.id, q.dataset, q.modality, q.question_type, q.question, list(q.options), q.answer]
        lines.append(json.dumps([*fields, image_key(q), digests[q.image]]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _rank(seed: int, purpose: str, name: str) -> str:
    """A uniformly distributed number in hexadecimal; ``purpose`` keeps sampling independent of splitting."""
    return hashlib.sha256(f"{seed}\n{purpose}\n{name}".encode()).hexdigest()


def _spread(
    items: list[T], stratum_of: Callable[[T], Hashable], name_of: Callable[[T], str], seed: int, purpose: str
) -> list[T]:
    """``items`` in seeded order, each stratum spread evenly over the whole.

    The i-th of a stratum's n items comes at (i + u)/n of the way. Each stratum has its own u in [0, 1), so that a
    single item can come anywhere.
    """
    strata: dict[Hashable, list[tuple[str, str, int]]] = defaultdict(list)
    for index, item in enumerate(items):
        name = name_of(item)
        strata[stratum_of(item)].append((_rank(seed, purpose, name), name, index))
    placed = []
    for stratum, members in strata.items():
        start = int(_rank(seed, f"{purpose} of", repr(stratum))[:13], 16) / 16**13
        for i, (rank, name, index) in enumerate(sorted(members)):
            placed.append(((i + start) / len(members), rank, name, index))
    return [items[index] for *_, index in sorted(placed)]


def _split(
    questions: list[Question],
    group_of: Callable[[Question], str],
    key_of: Callable[[Question], str],
    seed: int,
    fractions: Mapping[str, float],
) -> dict[str, list[Question]]:
    if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) < 0:
        raise DataError(f"fractions: {dict(fractions)} do not sum to 1, expected shares of the whole.")
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[group_of(question)].append(question)

    def kind_of(group: str) -> tuple[str, ...]:
        # One image asked about under two modality names counts under the first in the alphabet, in any row order.
        return (min(q.modality for q in groups[group]), *sorted(q.question_type for q in groups[group]))

    of_modality: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        of_modality[kind_of(group)[0]].append(group)
    home: dict[str, str] = {}
    for own in of_modality.values():
        order = _spread(own, kind_of, lambda group: key_of(groups[group][0]), seed, "split")
        home.update(_fill(order, [len(groups[group]) for group in order], fractions))
    return {name: [q for q in questions if home[group_of(q)] == name] for name in fractions}


def _fill(order: Sequence[str], sizes: Sequence[int], fractions: Mapping[str, float]) -> dict[str, str]:
    """Each group's split: with all groups laid end to end, the share in which the group's middle falls."""
    total = sum(sizes)
    bounds: list[tuple[float, str]] = []
    upper = 0.0
    for name, share in fractions.items():
        upper += share
        bounds.append((upper, name))
    home = {}
    done = 0
    for group, size in zip(order, sizes, strict=True):
        middle = (done + size / 2) / total
        home[group] = next((name for upper, name in bounds if middle < upper), bounds[-1][1])
        done += size
    return home
