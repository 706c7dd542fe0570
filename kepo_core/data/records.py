"""The typed rows that all other modules use: a question as asked, an answer as given."""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

#: The eight imaging modalities of Table 1, in its column order: the categories of OmniMedVQA, Med-R1 and PhantomVQA.
MODALITIES = ("MRI", "CT", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus", "OCT", "Microscopy")

QUESTION_TYPES = (
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Modality Recognition",
    "Other Biological Attributes",
)

#: The letters of a question's options; a question with more options cannot be asked.
LETTERS = string.ascii_uppercase


class AnswerOutcome(StrEnum):
    """What a completion's answer turned out to be (Appendix B; the rules are in ``task.rewards``)."""

    CORRECT = "correct"
    WRONG = "wrong"
    MISSING = "missing"  # finished, but no answer field with exactly one option letter in it
    AMBIGUOUS = "ambiguous"  # several different letters
    TRUNCATED = "truncated"  # hit the token limit before an answer field was closed


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question about one image.

    ``options`` holds the option texts in letter order (2 to 26 of them); ``answer`` is the letter of the
    right one; ``image`` is an absolute path. ``modality`` is the question's category, of any kind: one is trained on,
    all are tested. ``split`` is the data's own split ("train", "validation" or "test"), "" if they have none.
    ``image_name`` identifies the picture wherever the data lie; if it is "", the path does (``splits.image_key``).
    """

    id: str
    dataset: str
    modality: str
    question_type: str
    question: str
    options: tuple[str, ...]
    answer: str
    image: Path
    split: str = ""
    image_name: str = ""

    @property
    def letters(self) -> str:
        """The valid answer letters, e.g. ``"ABC"`` for three options."""
        return LETTERS[: len(self.options)]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion of one question, scored. ``letter`` is "" when none could be read.

    ``sample`` counts from 0 where a question is asked more than once.
    """

    question_id: str
    modality: str
    question_type: str
    completion: str
    outcome: AnswerOutcome
    letter: str
    correct: bool
    format_ok: bool
    tokens: int
    finished: bool
    sample: int = 0


def categories(names: Iterable[str]) -> list[str]:
    """The different categories in ``names``: Table 1's modalities in its order, then all others by name."""
    known = {name: place for place, name in enumerate(MODALITIES)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))
