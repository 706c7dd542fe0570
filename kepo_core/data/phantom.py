"""PhantomVQA: a small world of pictures, facts and multiple-choice questions, in OmniMedVQA's raw layout.

Each picture shows one or two equal findings with five facts (kind, place, size, number, contrast) in one of
eight looks. Questions follow OmniMedVQA's five types; *Disease Diagnosis* and *Lesion Grading* need two
facts put together. The words are invented where they would otherwise sound medical: nothing here has medical
meaning. :func:`ensure_phantom` writes the whole set once; the loader for real data reads it.

There are two versions of this world. In version 3, which ships, a finding means the same in every modality and all
modalities are seen equally well. In version 4 what a finding means is each modality's own (`meanings`), and so is
how well it is seen (``phantom_render.SIGHTS``): what carries over from one modality to another is skill alone.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kepo_core.data import source
from kepo_core.data.phantom_render import render
from kepo_core.data.records import LETTERS, MODALITIES
from kepo_core.errors import DataError

VERSION = "3"  # part of the cache folder's name: raise it with every change to what is written
VERSIONS = (VERSION, "4")
KINDS = ("disc", "ring", "bar", "cross")
PLACES = ("upper left", "upper right", "lower left", "lower right")
SIZES = ("small", "large")
NUMBERS = ("one", "two")
CONTRASTS = ("bright", "dark")
DIAGNOSES = ("velora", "tamsin", "quoril", "nexum")
GRADES = ("grade I", "grade II", "grade III", "grade IV")
#: The words of each fact that is drawn.
WORDS: dict[str, tuple[str, ...]] = {
    "modality": MODALITIES,
    "kind": KINDS,
    "place": PLACES,
    "size": SIZES,
    "number": NUMBERS,
    "contrast": CONTRASTS,
}
IMAGES_PER_MODALITY = {modality: 900 if modality == "MRI" else 640 for modality in MODALITIES}
QUESTIONS_PER_IMAGE = 4


@dataclass(frozen=True)
class Meanings:
    """What findings mean in one modality: (kind, contrast) → diagnosis, (size, number) → grade.

    Latin squares: neither fact alone gives a diagnosis away (each kind has two, each contrast all four).
    """

    diagnosis: dict[tuple[str, str], str]
    grade: dict[tuple[str, str], str]

    @classmethod
    def of(cls, bright: list[int], dark: list[int], grades: list[int]) -> "Meanings":
        """From each kind's diagnosis, bright and dark, and the grades of small one, small two, large one, large two."""
        by_contrast = zip(CONTRASTS, (bright, dark), strict=True)
        pairs = [(size, number) for size in SIZES for number in NUMBERS]
        return cls(
            {(k, c): DIAGNOSES[i] for c, named in by_contrast for k, i in zip(KINDS, named, strict=True)},
            {pair: GRADES[i] for pair, i in zip(pairs, grades, strict=True)},
        )


@cache
def meanings(version: str, modality: str) -> Meanings:
    """What findings mean in ``modality``: in version 3 the same everywhere, in version 4 its own.

    In version 4 every finding has each of the four names, and each of the four grades, in exactly two modalities: what
    it means elsewhere says nothing on what it means here.
    """
    if version == "3":
        return Meanings.of([0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 3])
    shift, mirrored = divmod(MODALITIES.index(modality), 2)
    step = -1 if mirrored else 1
    bright = [(step * i + shift) % 4 for i in range(4)]
    return Meanings.of(bright, [(i + step) % 4 for i in bright], [(step * i - shift + 1) % 4 for i in range(4)])


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of one picture of a version of the world; every other field is one of the word tuples above."""

    modality: str
    kind: str
    place: str
    size: str
    number: str
    contrast: str
    version: str = VERSION

    @property
    def diagnosis(self) -> str:
        """The invented condition, from kind and contrast together."""
        return meanings(self.version, self.modality).diagnosis[self.kind, self.contrast]

    @property
    def grade(self) -> str:
        """The grade, from size and number together."""
        return meanings(self.version, self.modality).grade[self.size, self.number]

    @property
    def words(self) -> dict[str, str]:
        """Every fact by name, and what they mean; in version 3 nothing else, as its files were written."""
        words = {**asdict(self), "diagnosis": self.diagnosis, "grade": self.grade}
        return {name: word for name, word in words.items() if (name, word) != ("version", "3")}


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing to ask: its OmniMedVQA type, wordings, possible answers, and how to reason about it."""

    name: str
    question_type: str
    wordings: tuple[str, ...]
    values: tuple[str, ...]
    attribute: str  # of Facts: the right answer
    level: int  # 1: one fact, seen at once; 2: one to be located, told apart or counted; 3: two put together
    evidence: str  # the sentence that states the facts needed, with Facts' fields in braces
    conclusion: str = ""  # the second step of a two-fact question


TOPICS = (
    Topic("modality", "Modality Recognition",
          ("Which imaging modality is this?", "How was this image taken?"),
          MODALITIES, "modality", 1, "This looks like {modality}."),
    Topic("place", "Anatomy Identification",
          ("Where does the finding lie?", "Which region holds the finding?"),
          PLACES, "place", 2, "The finding lies in the {place}."),
    Topic("kind", "Other Biological Attributes",
          ("What shape is the finding?", "Which shape is seen?"),
          KINDS, "kind", 2, "The finding is a {kind}."),
    Topic("size", "Other Biological Attributes",
          ("How large is the finding?",), SIZES, "size", 1, "The finding is {size}."),
    Topic("number", "Other Biological Attributes",
          ("How many findings are there?",), NUMBERS, "number", 2, "The number of findings is {number}."),
    Topic("contrast", "Other Biological Attributes",
          ("Is the finding bright or dark?",), CONTRASTS, "contrast", 1, "The finding is {contrast}."),
    Topic("diagnosis", "Disease Diagnosis",
          ("What is the diagnosis?", "Which condition does the image show?"),
          DIAGNOSES, "diagnosis", 3, "The finding is a {contrast} {kind}.", "A {contrast} {kind} means {diagnosis}."),
    Topic("grade", "Lesion Grading",
          ("What grade is the lesion?", "Which grade applies?"),
          GRADES, "grade", 3, "The size is {size} and the number is {number}.",
          "So {size} and {number} means {grade}."),
)  # fmt: skip
# How often a topic is drawn first. Two-fact questions often, so that reasoning pays; the modality seldom, because
# within one modality its answer can be told without the picture.
_WEIGHTS = np.array([0.006, 0.17, 0.17, 0.035, 0.035, 0.035, 0.285, 0.264])


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about one picture, before it is written to disk or put into a training sequence.

    In version 4, what it says of the picture is what ``answer`` says of it, also where that is not true.
    """

    topic: Topic
    question: str
    options: tuple[str, ...]
    answer: str  # letter
    facts: Facts

    @property
    def value(self) -> str:
        """The right option's text."""
        return self.options[LETTERS.index(self.answer)]

    @property
    def evidence(self) -> str:
        """The facts that the question needs, as one sentence; also what a good hint says."""
        return self._fill(self.topic.evidence)

    @property
    def hint(self) -> str:
        """What a teacher says who knows: the answer in a word, and `statement`."""
        return f"{self.answer} {self.value}. {self.statement}"

    @property
    def statement(self) -> str:
        """What the findings mean where that is asked, else what is seen."""
        return self._fill(self.topic.conclusion or self.topic.evidence)

    @property
    def thought(self) -> str:
        """A right chain of reasoning: the evidence, for two-fact questions the conclusion, and the option's letter.

        In version 4 a conclusion is the modality's own, which is named first.
        """
        steps = [self.evidence]
        if self.topic.conclusion:
            steps.append(self._fill(self.topic.conclusion))
            if self.facts.version != "3":
                steps.insert(0, self._fill(TOPICS[0].evidence))
        return " ".join(steps).removesuffix(".") + f" ({self.answer})."

    def _fill(self, template: str) -> str:
        told = {} if self.facts.version == "3" else {self.topic.attribute: self.value}
        return template.format(**self.facts.words | told)


_BY_WORDING = {wording: topic for topic in TOPICS for wording in topic.wordings}


def topic_of(question: str) -> Topic:
    """The topic of a question's text; ``KeyError`` for a text that PhantomVQA does not ask."""
    return _BY_WORDING[question]


def draw_facts(rng: np.random.Generator, modality: str, version: str = VERSION) -> Facts:
    """Facts drawn independently and uniformly."""
    kind, place, size, number, contrast = (
        str(rng.choice(words)) for words in (KINDS, PLACES, SIZES, NUMBERS, CONTRASTS)
    )
    return Facts(modality, kind, place, size, number, contrast, version)


def ask(rng: np.random.Generator, facts: Facts, topic: Topic) -> Asked:
    """A question on ``topic`` with 2 to 4 options (all there are, if fewer) in random order."""
    value = facts.modality if topic.name == "modality" else getattr(facts, topic.attribute)
    others = [word for word in topic.values if word != value]
    count = min(int(rng.choice([2, 3, 4], p=[0.15, 0.25, 0.6])), len(topic.values))
    options = [value, *(str(word) for word in rng.choice(others, count - 1, replace=False))]
    rng.shuffle(options)
    return Asked(topic, str(rng.choice(topic.wordings)), tuple(options), LETTERS[options.index(value)], facts)


def draw_topics(rng: np.random.Generator, count: int) -> list[Topic]:
    """``count`` different topics by the weights of the set."""
    return [TOPICS[i] for i in rng.choice(len(TOPICS), count, replace=False, p=_WEIGHTS)]


def picture(rng: np.random.Generator, facts: Facts) -> np.ndarray:
    """``uint8`` (64, 64, 3) in which ``facts`` are true."""
    f = facts
    return render(f.modality, f.kind, f.place, f.size, f.number, f.contrast, rng, f.version)


def ensure_phantom(cache_dir: Path | None = None, seed: int = 0, version: str = VERSION) -> Path:
    """The root of PhantomVQA in OmniMedVQA's raw layout, written on first use (about 15 s, 5,380 pictures).

    The set is generated into a temporary folder and moved into place at once, so an interrupted or
    simultaneous first use leaves no half-written set. ``cache_dir`` defaults to ``$KEPO_CACHE`` or
    ``~/.cache/kepo``. Files: ``Images/PhantomVQA-*/NNNNN.png``,
    ``QA_information/Open-access/PhantomVQA-*.json`` and ``facts.json`` (image path → facts).
    """
    cache = cache_dir or source.cache_dir()
    root = cache / f"phantom-v{version}-seed{seed}"
    if root.exists():
        return root
    cache = cache_dir or source.in_cache("")
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=root.name + ".partial-", dir=cache))
    try:
        write_phantom(partial, seed, version=version)
        partial.rename(root)
    except OSError:
        if not root.exists():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def load_facts(root: Path) -> dict[str, Facts]:
    """Image (as ``splits.image_key`` names it) → what is true of it; empty where ``root`` is no PhantomVQA.

    Raises ``DataError`` when ``facts.json`` is there and cannot be used.
    """
    path = root / "facts.json"
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {
            image: Facts(**{name: row[name] for name in WORDS}, version=row.get("version", "3"))
            for image, row in rows.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a table of facts per image, expected what write_phantom wrote: {error!r}"
        ) from error


def write_phantom(root: Path, seed: int, images: dict[str, int] | None = None, version: str = VERSION) -> None:
    """Write the set below ``root`` (``images``: pictures per modality, default IMAGES_PER_MODALITY)."""
    facts_of: dict[str, dict[str, str]] = {}
    questions_dir = root / "QA_information" / "Open-access"
    questions_dir.mkdir(parents=True, exist_ok=True)
    for modality, count in (images or IMAGES_PER_MODALITY).items():
        name = f"PhantomVQA-{modality}"
        (root / "Images" / name).mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for index, (pixels, facts, questions) in enumerate(_world(seed, modality, count, version)):
            path = f"Images/{name}/{index:05d}.png"
            Image.fromarray(pixels).save(root / path, compress_level=1)
            facts_of[path] = facts.words
            rows += [_raw_row(name, len(rows) + k, path, asked) for k, asked in enumerate(questions)]
        (questions_dir / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (root / "facts.json").write_text(json.dumps(facts_of, indent=0), encoding="utf-8")


def _world(seed: int, modality: str, count: int, version: str) -> Iterator[tuple[np.ndarray, Facts, list[Asked]]]:
    # One stream per modality, so that changing the size of one leaves the others as they were. The first
    # word keeps the set apart from the streams on which the embedded models are pre-trained.
    rng = np.random.default_rng([zlib.crc32(b"phantom-set"), seed, MODALITIES.index(modality)])
    for _ in range(count):
        facts = draw_facts(rng, modality, version)
        yield picture(rng, facts), facts, [ask(rng, facts, topic) for topic in draw_topics(rng, QUESTIONS_PER_IMAGE)]


def _raw_row(dataset: str, index: int, path: str, asked: Asked) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "question_id": f"{dataset}_{index:05d}",
        "question_type": asked.topic.question_type,
        "question": asked.question,
        "gt_answer": asked.value,
        "image_path": path,
        **{f"option_{letter}": text for letter, text in zip(LETTERS, asked.options, strict=False)},
        "modality_type": asked.facts.modality,
    }
