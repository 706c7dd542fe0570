"""Appendix B: a completion is parsed once into two independent facts, then scored.

The same parser serves training and evaluation. What counts, in full:

*The answer* (accuracy ignores the format)

1. Text in ``<think>…</think>`` is reasoning, not an answer: it is cut out first. An unclosed ``<think>``
   reaches to the end; text before a ``</think>`` that was never opened is reasoning too (some chat templates
   open the tag in the prompt).
2. Every closed ``<answer>…</answer>`` in the rest is a field; of nested ones the innermost counts.
3. A field names a letter if it is nothing but that letter, in either case, with white space or punctuation
   around it (``B``, `` b ``, ``B.``, ``(B)``), or if it is the letter, one of ``. ) :`` and a text that offers no
   other option's letter (``B) a type A lesion``, ``B) E. coli`` among four; not ``B) or C)``). Several different
   letters (``A or B``) are ambiguous.
4. An option's whole text names that option (``a cyst``), and so does its line as the prompt prints it
   (``A) I``, ``D) Both A and B``): case, runs of spaces, spaces beside a mark (``C.albicans``) and final full stops
   do not count. Letters in an option's words name nothing, wherever its text is in a field: ``C. albicans`` is
   option A if that is A's text. If a field may be a letter or a text, it is the letter (``B`` among the blood
   groups); a letter before another option's whole text names both.
5. All fields name the same letter: that letter was answered; fields without a letter are ignored.
   Different letters, in one field or in several: AMBIGUOUS. No letter, or one that is not among the
   options: MISSING, or TRUNCATED if the completion hit the token limit before any field was closed.

That is ``answer_format: paper``. ``lenient`` is for models of other families, which have not learned the paper's tags:
see `lenient`. It changes what counts as an answer, and so every accuracy; the format below stays the paper's.

*The format* (ignores whether the answer is right or even readable)

Thinking: exactly ``<think>…</think>`` then ``<answer>…</answer>``; non-thinking: exactly ``<answer>…</answer>``;
each tag once and only white space outside. A field may contain anything.

The time is linear in the length of the text.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kepo_core.data.records import LETTERS, AnswerOutcome
from kepo_core.method.task import outside_thoughts
from kepo_core.task import answer_fields, lenient

#: A completion as TRL hands it to a reward function: plain text, or a list of chat messages.
Completion = str | Sequence[dict[str, Any]]
RewardFunction = Callable[..., list[float]]
#: The values of the parameter ``answer_format``.
ANSWER_FORMATS = ("paper", "lenient")

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINKING_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_PLAIN_FORMAT = re.compile(r"\s*<answer>.*</answer>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Score:
    """One completion, scored. ``letter`` is "" where none could be read; ``format_ok`` is independent of the answer."""

    outcome: AnswerOutcome
    letter: str
    format_ok: bool

    @property
    def accuracy(self) -> float:
        """1.0 if the answer is right, else 0.0."""
        return float(self.outcome is AnswerOutcome.CORRECT)


@functools.lru_cache(maxsize=4096)  # the task's record and both rewards read one completion
def _read(text: str, options: tuple[str, ...], answer_format: str) -> tuple[frozenset[str], bool]:
    """The different letters that a completion's answers name, and whether it has a closed answer field."""
    if answer_format == "lenient":
        text, options = lenient.normalised(text), tuple(map(lenient.normalised, options))
    rest = outside_thoughts(text)
    found = answer_fields.answer_fields(rest)
    if answer_format == "lenient":
        said = [answer for field in found for answer in lenient.answers(field, options)]
        found = said or lenient.statements(rest, options)
    return frozenset().union(*(answer_fields.letters_in(field, options) for field in found)), bool(found)


@functools.lru_cache(maxsize=4096)
def _has_format(text: str, thinking: bool) -> bool:
    wanted = (1, 1, 1, 1) if thinking else (0, 0, 1, 1)
    if tuple(text.count(tag) for tag in _TAGS) != wanted:
        return False
    return (_THINKING_FORMAT if thinking else _PLAIN_FORMAT).fullmatch(text) is not None


def score(
    text: str, answer: str, options: Sequence[str], *, thinking: bool, finished: bool, answer_format: str = "paper"
) -> Score:
    """Read one completion as the module's docstring says, and compare it with the right ``answer`` letter.

    Args:
        text: the decoded completion.
        answer: the right letter.
        options: the options' texts in the order of their letters; ``"ABCD"`` means four options without texts.
        thinking: which of the two formats the prompt asks for.
        finished: False if generation stopped at the token limit.
        answer_format: "paper" or "lenient".

    Raises:
        ValueError: ``answer`` is not the letter of one of ``options`` (an error of the data, never a reward of 0), or
            ``answer_format`` is unknown.
    """
    letters = LETTERS[: len(options)]
    if len(answer) != 1 or answer not in letters:
        raise ValueError(f"the right answer is {answer!r}, expected one of the option letters {', '.join(letters)}")
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(f"answer_format is {answer_format!r}, expected one of {', '.join(ANSWER_FORMATS)}")
    named, answered = _read(text, tuple(options), answer_format)
    format_ok = _has_format(text, thinking)
    if len(named) > 1:
        return Score(AnswerOutcome.AMBIGUOUS, "", format_ok)
    letter = next(iter(named), "")
    if not letter or letter not in letters:
        truncated = not finished and not answered
        return Score(AnswerOutcome.TRUNCATED if truncated else AnswerOutcome.MISSING, "", format_ok)
    return Score(AnswerOutcome.CORRECT if letter == answer else AnswerOutcome.WRONG, letter, format_ok)


def completion_text(completion: Completion) -> str:
    """The text of a completion in either of TRL's forms.

    Raises:
        TypeError: it is neither text nor a list of messages with text as content.
    """
    if isinstance(completion, str):
        return completion
    parts = [message.get("content") for message in completion]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"a completion is {completion!r}, expected text or chat messages with text content")
    return "".join(part for part in parts if isinstance(part, str))


def accuracy_reward(
    completions: Sequence[Completion],
    answer: Sequence[str],
    options: Sequence[Sequence[str]],
    answer_format: str = "paper",
    **_: Any,
) -> list[float]:
    """1.0 for each right answer, whatever its format (a TRL reward function over dataset columns)."""
    return [
        # The requested format and the token limit change other facts about a completion, never its accuracy.
        score(completion_text(c), a, o, thinking=True, finished=True, answer_format=answer_format).accuracy
        for c, a, o in zip(completions, answer, options, strict=True)
    ]


def format_reward(completions: Sequence[Completion], thinking: bool = True, **_: Any) -> list[float]:
    """1.0 for each completion in the exact format, whatever it answers (a TRL reward function)."""
    return [float(_has_format(completion_text(c), thinking)) for c in completions]


def reward_functions(thinking: bool, answer_format: str = "paper") -> list[RewardFunction]:
    """Appendix B's two rewards in the order [accuracy, format], for prompts with or without reasoning."""
    accuracy = functools.partial(accuracy_reward, answer_format=answer_format)
    formatted = functools.partial(format_reward, thinking=thinking)
    # TRL names its metrics after the function.
    return [functools.update_wrapper(accuracy, accuracy_reward), functools.update_wrapper(formatted, format_reward)]
