"""Whether a thought is true of its picture, states the facts that the question needs, and leads to the answer.

On PhantomVQA the facts of every picture are known, and a thought's statements can be parsed: "coherent reasoning" can
be counted. Real data has no such facts; this module does not apply to it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from kepo_core.analysis.intervals import design_effect, percent, wilson_interval
from kepo_core.data import phantom
from kepo_core.data.phantom import TOPICS, Facts
from kepo_core.data.records import LETTERS, Answer, Question
from kepo_core.data.splits import image_key

_WORDS = {**phantom.WORDS, "diagnosis": phantom.DIAGNOSES, "grade": phantom.GRADES}


def _pattern(template: str) -> re.Pattern[str]:
    """The pattern that parses a topic's sentence; a thought may end it with the option's letter, not a full stop."""
    parts = re.split(r"\{(\w+)\}", template.removesuffix("."))
    alternatives = {f: "|".join(map(re.escape, _WORDS[f])) for f in parts[1::2]}
    written = [rf"(?P<{part}>{alternatives[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)]
    return re.compile(r"\b" + "".join(written) + r"\b")


_SENTENCES = [_pattern(s) for topic in TOPICS for s in (topic.evidence, topic.conclusion) if s]


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """What one thought states.

    ``stated`` counts distinct claims (a fact, diagnosis or grade with its value; two values are two claims), ``true``
    those that hold for the picture. ``relevant`` in [0, 1] is the share of the needed facts that are stated, true or
    not. ``consistent``: the answer, and every conclusion in the thought, follows from the stated facts (by the rule, if
    the question has one).
    """

    stated: int
    true: int
    relevant: float
    consistent: bool

    @property
    def faithful(self) -> bool:
        """Nothing stated is false, and the answer follows from the stated facts (all needed ones are stated)."""
        return self.true == self.stated and self.consistent


def thought(completion: str) -> str:
    """The text before ``</think>`` (the opening tag may be missing); "" without a closing tag."""
    before, tag, _ = completion.partition("</think>")
    return before.rpartition("<think>")[2] if tag else ""


def judge(completion: str, letter: str, question: Question, facts: Facts) -> Faithfulness:
    """Check the thought of ``completion``, which answered ``letter`` ("" for none), against the picture's ``facts``.

    Raises ``KeyError`` for a question that PhantomVQA does not ask.
    """
    topic = phantom.topic_of(question.question)
    text = thought(completion)
    claims = {
        claim for sentence in _SENTENCES for match in sentence.finditer(text) for claim in match.groupdict().items()
    }
    true = sum(getattr(facts, name) == value for name, value in claims)
    needed = re.findall(r"\{(\w+)\}", topic.evidence)
    values = {name: [value for claimed, value in claims if claimed == name] for name in _WORDS}
    relevant = sum(bool(values[name]) for name in needed) / len(needed)
    consistent = False
    if all(len(values[name]) == 1 for name in needed):
        follows = getattr(replace(facts, **{name: values[name][0] for name in needed}), topic.attribute)
        answered = dict(zip(LETTERS, question.options, strict=False)).get(letter)
        consistent = answered == follows and set(values[topic.attribute]) <= {follows}
    return Faithfulness(len(claims), true, relevant, consistent)


def judge_rollouts(rollouts: pd.DataFrame, questions: Sequence[Question], facts: Mapping[str, Facts]) -> pd.DataFrame:
    """The fields of `Faithfulness` and ``faithful`` for every row of a rollouts file, on its index.

    ``facts`` maps image keys to facts, as ``phantom.load_facts`` reads them.
    """
    by_id = {question.id: question for question in questions}
    judged = []
    for row in rollouts.itertuples():
        question = by_id[str(row.id)]
        judged.append(judge(str(row.completion), str(row.letter), question, facts[image_key(question)]))
    names = [*(field.name for field in fields(Faithfulness)), "faithful"]
    return pd.DataFrame([[getattr(j, name) for name in names] for j in judged], rollouts.index, names)


def faithfulness_table(
    answers: Mapping[str, Sequence[Answer]], questions: Sequence[Question], facts: Mapping[str, Facts]
) -> pd.DataFrame:
    """A row per model, in per cent of all its answers, with Wilson's 95 % intervals that respect shared images.

    ``faithful``; ``right for the right reason`` (correct and faithful); ``right without it`` (correct, not faithful);
    ``all stated is true``, of the thoughts that state anything.
    """
    by_id = {question.id: question for question in questions}
    rows = {}
    for model, given in answers.items():
        asked = [by_id[answer.question_id] for answer in given]
        judged = [
            judge(answer.completion, answer.letter, question, facts[image_key(question)])
            for answer, question in zip(given, asked, strict=True)
        ]
        right = np.array([answer.correct for answer in given])
        faithful = np.array([j.faithful for j in judged])
        states = np.array([j.stated > 0 for j in judged])
        true = np.array([j.true == j.stated for j in judged])
        images = np.array([image_key(question) for question in asked])
        rows[model] = {
            "n": len(given),
            "faithful": _cell(faithful, images),
            "right for the right reason": _cell(right & faithful, images),
            "right without it": _cell(right & ~faithful, images),
            "all stated is true": _cell(true[states], images[states]),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _cell(flags: np.ndarray, images: np.ndarray) -> str:
    if not len(flags):
        return "–"
    n = len(flags) / design_effect(flags, images)
    return percent(flags.mean(), *wilson_interval(flags.mean() * n, n))
