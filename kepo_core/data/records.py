"""The typed rows that everything else speaks of: a question as asked, an answer as given."""

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

#: The letters of a question's options; what has more options than letters cannot be asked.
LETTERS = string.ascii_uppercase


class AnswerOutcome(StrEnum):
    """What the answer field of one completion turned out to be (Appendix B, read as FIDELITY does)."""

    CORRECT = "correct"
    WRONG = "wrong"
    MISSING = "missing"  # finished, but no answer field with exactly one option letter in it
    AMBIGUOUS = "ambiguous"  # several different letters
    TRUNCATED = "truncated"  # hit the token limit before an answer field was closed


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question about one image.

    ``options`` holds the option texts in letter order (2 to 26 of them); ``answer`` is the letter of the
    right one; ``image`` is an absolute path. ``modality`` is the question's category, whatever the data divide
    themselves into: one is trained on, all are tested. ``split`` is the part that the data put it in ("train",
    "validation" or "test"), "" where they do not say; ``image_name`` calls the picture the same wherever the data lie,
    "" where its path does (``splits.image_key``).
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
    """The categories that ``names`` has, each once: Table 1's modalities in its order, then all others by name."""
    known = {name: place for place, name in enumerate(MODALITIES)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))
