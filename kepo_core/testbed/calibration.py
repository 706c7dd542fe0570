"""Is the testbed fair? What the embedded models can and cannot do, measured against what the testbed is meant for."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kepo_core.analysis.intervals import difference_interval, wilson_interval
from kepo_core.analysis.statistics import mcnemar_exact
from kepo_core.data.loading import load_questions
from kepo_core.data.phantom import Facts, load_facts
from kepo_core.data.records import Answer, Question
from kepo_core.data.splits import image_key, split_by_image
from kepo_core.experiment import experiment
from kepo_core.experiment.evaluation import evaluate
from kepo_core.experiment.experiment import StudyData
from kepo_core.experiment.models import load_model
from kepo_core.experiment.pair import Models
from kepo_core.method.task import with_images
from kepo_core.params import Params
from kepo_core.task.dataset import to_dataset
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import hint_aware_messages
from kepo_core.testbed.embedded import LETTERS

TWO_FACT_TYPES = ("Disease Diagnosis", "Lesion Grading")


@dataclass(frozen=True, slots=True)
class Measured:
    """A share or a difference of shares with its 95 % interval, and the range it is meant to lie in."""

    what: str
    value: float
    low: float
    high: float
    n: int
    target: tuple[float, float]

    @classmethod
    def share(cls, what: str, flags: Iterable[bool], target: tuple[float, float]) -> "Measured":
        """Of true ``flags``, with Wilson's interval."""
        values = list(flags)
        low, high = wilson_interval(sum(values), len(values)) if values else (0.0, 1.0)
        return cls(what, float(np.mean(values)) if values else float("nan"), low, high, len(values), target)

    @classmethod
    def mean(cls, what: str, values: np.ndarray, target: tuple[float, float]) -> "Measured":
        """Of ``values`` (n,) in [-1, 1], with a normal interval; the widest one where there are fewer than two."""
        if len(values) < 2:
            return cls(what, float(values.mean()) if len(values) else float("nan"), -1.0, 1.0, len(values), target)
        mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
        return cls(what, mean, mean - half, mean + half, len(values), target)

    @property
    def met(self) -> bool:
        """Whether the value lies in the target's range (NaN does not)."""
        return self.target[0] <= self.value <= self.target[1]


def table(measured: Sequence[Measured]) -> pd.DataFrame:
    """One row per measurement, in per cent."""
    rows = [
        {
            "measured": m.what,
            "per cent": f"{100 * m.value:.1f} [{100 * m.low:.1f}, {100 * m.high:.1f}]",
            "n": m.n,
            "target": _range(*m.target),
            "met": "yes" if m.met else "no",
        }
        for m in measured
    ]
    return pd.DataFrame(rows).set_index("measured")


def _range(low: float, high: float) -> str:
    if high >= 1:
        return f"at least {100 * low:.0f}"
    return f"{100 * low:.0f} to {100 * high:.0f}" if low > 0 else f"at most {100 * high:.0f}"


class Calibration:
    """Measures two models on the data of ``params``; every method returns what it measured.

    Greedy decoding on the test sets, sampling at temperature 1 on ``groups`` training questions. Sampling follows
    ``seed``.
    """

    def __init__(self, params: Params, data: StudyData, groups: int, seed: int = 0) -> None:
        self.params, self.data, self.groups, self.seed = params, data, groups, seed
        self.models: Models = experiment.load_models(params)
        self.teacher = load_model(params.teacher, "teacher", trained=False)

    def measure(self) -> list[Measured]:
        """Everything, in the order of the table."""
        samples = self.groups_of_samples()
        return [*self.accuracy(), *self.sampling(samples), *self.hints(samples), self.thinking()]

    def accuracy(self) -> list[Measured]:
        """The student's accuracy over all test sets, with and without thinking, and the teacher's on each."""
        student, teacher = (self._greedy(m) for m in (self.models.student, self.teacher))
        plain = self._greedy(self.models.student, thinking=False)
        rows = [
            Measured.share("student, greedy", (a.correct for a in student), (0.40, 0.70)),
            Measured.share("student, greedy, without thinking", (a.correct for a in plain), (0.40, 0.70)),
        ]
        for modality in self.data.tests:
            flags = [a.correct for a in teacher if a.modality == modality]
            rows.append(Measured.share(f"teacher, greedy, {modality}", flags, (0.90, 1.0)))
        return rows

    def sampling(self, samples: list[list[Answer]]) -> list[Measured]:
        """Format and learning cliff of the student's groups."""
        flat = [answer for group in samples for answer in group]
        wrong = [not any(a.correct for a in group) for group in samples]
        name = self.params.train_modality
        return [
            Measured.share("student, samples in the format", (a.format_ok for a in flat), (0.60, 0.95)),
            Measured.share(f"{name} training groups of {self.params.group_size} all wrong", wrong, (0.15, 1.0)),
        ]

    def hints(self, samples: list[list[Answer]]) -> list[Measured]:
        """Hint-aware draws on the questions of all-wrong groups, and what another question's hint does."""
        training = self.data.train[: self.groups]
        failed = [q for q, group in zip(training, samples, strict=True) if not any(a.correct for a in group)]
        task = MultipleChoice()
        asked = [with_images(task.ask(row), row) for row in to_dataset(failed, thinking=True)]
        assert self.models.teacher is not None
        written = self.models.teacher.write_hints(asked, max_tokens=self.params.hint_max_tokens, seed=self.seed)
        told = [(q, hint) for q, hint in zip(failed, written, strict=True) if hint is not None]
        questions, hints = [q for q, _ in told], [hint for _, hint in told]
        budget = self.params.rejection_budget
        draws = self._hinted(questions, hints, self.params.hint_context, budget)
        alone = self._hinted(questions, hints, "hint", budget)
        shuffled = self._hinted(questions, hints[1:] + hints[:1], "hint", budget)
        difference = alone.mean(axis=1) - shuffled.mean(axis=1)
        return [
            Measured.share("hints that can be read", (hint is not None for hint in written), (0.90, 1.0)),
            Measured.share(f"draws accepted ({self.params.hint_context})", draws.ravel().tolist(), (0.30, 0.80)),
            Measured.share(f"groups rescued within {budget}", draws.max(axis=1).tolist(), (0.80, 1.0)),
            Measured.share("draws accepted (hint)", alone.ravel().tolist(), (0.30, 0.80)),
            Measured.share("draws accepted (another question's hint)", shuffled.ravel().tolist(), (0.0, 0.5)),
            Measured.mean("own hint − another's (hint)", difference, (0.05, 1.0)),
        ]

    def thinking(self) -> Measured:
        """The teacher's two-fact questions, thinking − not thinking."""
        asked = [q for q in self.data.test if q.question_type in TWO_FACT_TYPES]
        with_, without = (self._greedy(self.teacher, asked, thinking) for thinking in (True, False))
        compared = mcnemar_exact(without, with_)
        difference = (compared.gained - compared.lost) / len(asked)
        low, high = difference_interval(compared.gained, compared.lost, len(asked))
        name = "teacher, two-fact questions, thinking − not"
        return Measured(name, difference, low, high, len(asked), (0.10, 1.0))

    def _greedy(self, model: object, questions: Sequence[Question] = (), thinking: bool = True) -> list[Answer]:
        return evaluate(
            model,
            self.models.processor,
            questions or self.data.test,
            thinking=thinking,
            max_tokens=self.params.eval_max_tokens,
            batch_size=self.params.eval_batch_size,
        )

    def _sampled(
        self, questions: Sequence[Question], samples: int, messages: Sequence[list[dict[str, object]]] | None = None
    ) -> list[list[Answer]]:
        """``samples`` answers to each question, at temperature 1."""
        answers = evaluate(
            self.models.student,
            self.models.processor,
            questions,
            thinking=True,
            max_tokens=self.params.of_trl("max_completion_length"),
            batch_size=self.params.eval_batch_size,
            messages=messages,
            temperature=1.0,
            samples=samples,
            seed=self.seed,
        )
        return [answers[start : start + samples] for start in range(0, len(answers), samples)]

    def groups_of_samples(self) -> list[list[Answer]]:
        """Samples at temperature 1 of the first ``groups`` training questions."""
        return self._sampled(self.data.train[: self.groups], self.params.group_size)

    def _hinted(self, questions: Sequence[Question], hints: Sequence[str], context: str, draws: int) -> np.ndarray:
        """(questions, draws) bool: accepted."""
        messages = [
            hint_aware_messages(q.question, q.options, hint, q.answer, context)
            for q, hint in zip(questions, hints, strict=True)
        ]
        answers = self._sampled(questions, draws, messages)
        return np.array([[a.correct for a in given] for given in answers]).reshape(len(questions), draws)


# --- priors: what can be had without looking, or without reading ----------------------------------------------

#: What a blind model knows about one option of a question.
Clues = Callable[[Question, int], Iterable[Hashable]]


def letter_clues(question: Question, index: int) -> Iterable[Hashable]:
    """The option's letter, and how many there are."""
    return ((LETTERS[index], len(question.options)),)


def question_clues(question: Question, index: int) -> Iterable[Hashable]:
    """All that the text says: wording, option and letter, alone and together."""
    option = question.options[index]
    return (*letter_clues(question, index), option, (question.question, option), (option, LETTERS[index]))


def image_clues(facts: dict[str, Facts]) -> Clues:
    """All that the picture shows (its true facts) with the letters, but no text."""

    def clues(question: Question, index: int) -> Iterable[Hashable]:
        shown = facts[question.id]
        values = (shown.kind, shown.place, shown.size, shown.number, shown.contrast)
        return (*letter_clues(question, index), *((value, LETTERS[index]) for value in values))

    return clues


def prior(
    what: str, train: Sequence[Question], test: Sequence[Question], clues: Clues, margin: float = 0.02
) -> Measured:
    """How much more than chance a softmax regression over ``clues`` answers right on ``test`` (1/options is chance).

    Fitted on ``train`` with weight decay, full batch, from zeros: no randomness.
    """
    vocabulary = {clue: i for i, clue in enumerate(dict.fromkeys(
        clue for q in train for index in range(len(q.options)) for clue in clues(q, index)
    ))}  # fmt: skip

    def encode(questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.zeros(len(questions), len(LETTERS), len(vocabulary))
        absent = torch.zeros(len(questions), len(LETTERS))
        for row, q in enumerate(questions):
            absent[row, len(q.options) :] = -torch.inf
            for index in range(len(q.options)):
                for clue in clues(q, index):
                    if clue in vocabulary:
                        features[row, index, vocabulary[clue]] = 1.0
        return features, absent

    weights = torch.zeros(len(vocabulary), requires_grad=True)
    features, absent = encode(train)
    right = torch.tensor([LETTERS.index(q.answer) for q in train])
    optimizer = torch.optim.AdamW([weights], lr=0.05, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(features @ weights + absent, right).backward()
        optimizer.step()
    features, absent = encode(test)
    with torch.no_grad():
        chosen = (features @ weights + absent).argmax(-1).tolist()
    gains = np.array([
        (LETTERS[index] == q.answer) - 1 / len(q.options) for index, q in zip(chosen, test, strict=True)
    ])  # fmt: skip
    return Measured.mean(f"{what}: above chance", gains, (-1.0, margin))


def priors(root: Path, seed: int = 0) -> list[Measured]:
    """The blind baselines on PhantomVQA at ``root``: over all modalities, and within each one's own questions.

    Within one modality, the text of a modality question gives its answer away; such questions are about 1 %.
    """
    questions = load_questions(root)
    shown = load_facts(root)
    facts = {question.id: shown[image_key(question)] for question in questions}
    parts = split_by_image(questions, seed)
    blind = {"majority letter": letter_clues, "question only": question_clues, "picture only": image_clues(facts)}
    measured = [prior(f"{name}, all", parts["train"], parts["test"], clues) for name, clues in blind.items()]
    own = {part: [q for q in rows if q.modality == "MRI"] for part, rows in parts.items()}
    return [*measured, *(prior(f"{name}, MRI", own["train"], own["test"], clues) for name, clues in blind.items())]
