"""Rows → splits and samples that anybody can draw again.

Nothing here depends on the order of the rows or on a random generator's version: who goes where is decided by
SHA-256 of the seed and the item's own name.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kepo_core.data.errors import DataError
from kepo_core.data.records import MODALITIES, Question

FRACTIONS: Mapping[str, float] = {"train": 0.6, "validation": 0.2, "test": 0.2}


def image_key(question: Question) -> str:
    """The image's path from the release's ``Images`` folder on: the same wherever the data root lies.

    An image outside such a folder is named by its whole path.
    """
    parts = question.image.parts
    start = max((i for i, part in enumerate(parts) if part == "Images"), default=0)
    return "/".join(parts[start:])


def split_by_image(
    questions: Iterable[Question], seed: int = 0, fractions: Mapping[str, float] = FRACTIONS
) -> dict[str, list[Question]]:
    """Disjoint splits in which no image occurs twice, with the same fractions of questions in every modality.

    ``fractions`` maps split names to shares that sum to 1. All questions of an image go together, so the shares
    are met up to one image per boundary. Rows keep the order they came in.
    """
    return _split(list(questions), lambda question: str(question.image), image_key, seed, fractions)


def split_by_question(
    questions: Iterable[Question], seed: int = 0, fractions: Mapping[str, float] = FRACTIONS
) -> dict[str, list[Question]]:
    """As the paper's authors released it: over questions, so that one image can be in train **and** in test."""
    return _split(list(questions), lambda question: question.id, lambda question: question.id, seed, fractions)


#: The values of the parameter ``split``.
SPLITS: Mapping[str, Callable[[Iterable[Question], int], dict[str, list[Question]]]] = {
    "image": split_by_image,
    "question": split_by_question,
}


def sample(questions: Iterable[Question], n: int, seed: int = 0) -> list[Question]:
    """``n`` of the questions, or all when there are fewer, in seeded order; a smaller ``n`` gives a prefix."""
    return sorted(questions, key=lambda question: (_rank(seed, "sample", question.id), question.id))[:n]


def study_split(
    questions: Sequence[Question],
    train_modality: str = "MRI",
    train_items: int = 600,
    eval_items: int = 300,
    seed: int = 0,
    split: str = "image",
    eval_split: str = "test",
) -> tuple[list[Question], dict[str, list[Question]]]:
    """The paper's design: train on one modality, test on every modality that the data has.

    Returns at most ``train_items`` training questions of ``train_modality`` and, in the order of MODALITIES, at
    most ``eval_items`` questions of ``eval_split`` ("test" or "validation") per modality. Raises ``DataError`` naming
    the parameter that leaves one empty.
    """
    if split not in SPLITS:
        raise DataError(f"split: {split!r} is unknown, expected one of {', '.join(SPLITS)}.")
    for name, value in (("train_items", train_items), ("eval_items", eval_items)):
        if value < 1:
            raise DataError(f"{name}: {value} leaves an empty split, expected at least 1.")
    present = {question.modality for question in questions}
    if train_modality not in present:
        found = ", ".join(m for m in MODALITIES if m in present) or "nothing"
        raise DataError(f"train_modality: the data has no {train_modality!r}, expected one of what it has ({found}).")
    parts = SPLITS[split](questions, seed)
    train = sample((q for q in parts["train"] if q.modality == train_modality), train_items, seed)
    tests = {
        modality: sample((q for q in parts[eval_split] if q.modality == modality), eval_items, seed)
        for modality in MODALITIES
        if modality in present
    }
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


def fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) of the rows and their image files' bytes, whatever their order and the data root's place."""
    digests: dict[Path, str] = {}
    lines = []
    for q in questions:
        if q.image not in digests:
            digests[q.image] = hashlib.sha256(q.image.read_bytes()).hexdigest()
        fields = [q.id, q.dataset, q.modality, q.question_type, q.question, list(q.options), q.answer]
        lines.append(json.dumps([*fields, image_key(q), digests[q.image]]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _rank(seed: int, purpose: str, name: str) -> str:
    """A uniformly distributed sort key; ``purpose`` keeps sampling independent of splitting."""
    return hashlib.sha256(f"{seed}\n{purpose}\n{name}".encode()).hexdigest()


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
    strata: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for group, members in groups.items():
        # One image asked about under two modality names counts under the first in the alphabet, in any row order.
        rank = _rank(seed, "split", key_of(members[0]))
        strata[min(question.modality for question in members)].append((rank, group))
    home: dict[str, str] = {}
    for ranked in strata.values():
        order = [group for _, group in sorted(ranked)]
        home.update(_fill(order, [len(groups[group]) for group in order], fractions))
    return {name: [q for q in questions if home[group_of(q)] == name] for name in fractions}


def _fill(order: Sequence[str], sizes: Sequence[int], fractions: Mapping[str, float]) -> dict[str, str]:
    """Each group's split: laid end to end, a group belongs to the share in which its middle falls."""
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
