"""Appendix B: a completion is parsed once into two independent facts, then scored.

The same parser serves training and evaluation. What counts, in full:

*The answer* (accuracy ignores the format)

1. What stands in ``<think>…</think>`` is reasoning, not an answer: it is cut out first. An unclosed ``<think>``
   reaches to the end; text before a ``</think>`` that was never opened is reasoning too (some chat templates
   open the tag in the prompt).
2. Every closed ``<answer>…</answer>`` in the rest is a field; of nested ones the innermost counts.
3. A field names a letter if it is nothing but that letter, in either case, with white space or punctuation
   around it (``B``, `` b ``, ``B.``, ``(B)``), or if it is the letter, one of ``. ) :`` and a text that offers no
   other option's letter (``B) a type A lesion``, ``B) E. coli`` among four; not ``B) or C)``). Several different
   letters (``A or B``) are ambiguous. An option's text without its letter (``a cyst``) is no answer: Appendix C
   asks for the letter.
4. All fields name one same letter: that letter was answered; fields without a letter are passed over.
   Different letters, in one field or in several: AMBIGUOUS. No letter, or one that is not among the
   options: MISSING, or TRUNCATED if the completion hit the token limit before any field was closed.

*The format* (ignores whether the answer is right or even readable)

Thinking: exactly ``<think>…</think>`` then ``<answer>…</answer>``; non-thinking: exactly ``<answer>…</answer>``;
each tag once and nothing but white space outside. What stands inside a field may be anything.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kepo_core.data.records import LETTERS, AnswerOutcome
from kepo_core.method.task import outside_thoughts

#: A completion as TRL hands it to a reward function: plain text, or a list of chat messages.
Completion = str | Sequence[dict[str, Any]]
RewardFunction = Callable[..., list[float]]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FIELD = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_THINKING_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_PLAIN_FORMAT = re.compile(r"\s*<answer>.*</answer>\s*", re.DOTALL)
_MARKED = re.compile(r"\s*\(?([A-Za-z])\s*[.):](.*)", re.DOTALL)
_CAPITAL = re.compile(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9'’])")
# A further letter offered in the text behind a marked one: "… C) …", "… C: …", "… or C".
_OFFERED = re.compile(
    r"(?<![A-Za-z0-9])(?:([A-Za-z])\)|([A-Z])[.:]\s+\S|(?:or|and|[,/;])\s*\(?([A-Za-z])[\W_]*\Z)", re.DOTALL
)


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


def _letters_in(field: str, letters: str) -> set[str]:
    """The different letters that one answer field names (upper case); empty when it names none."""
    words = [w for w in re.split(r"[\W_]+", field) if w and w.lower() not in ("or", "and")]
    if words and all(len(w) == 1 and w.isascii() and w.isalpha() for w in words):
        return {w.upper() for w in words}
    marked = _MARKED.match(field)
    if marked:
        offered = {letter.upper() for groups in _OFFERED.findall(marked[2]) for letter in groups if letter}
        return {marked[1].upper()} | offered & set(letters)
    capitals = set(_CAPITAL.findall(field))
    return capitals if len(capitals) > 1 else set()


@functools.lru_cache(maxsize=4096)  # the task's record and both rewards read one completion
def _read(text: str, letters: str) -> tuple[frozenset[str], bool]:
    """The different letters that a completion's answer fields name, and whether it has a closed one."""
    fields = _FIELD.findall(outside_thoughts(text))
    return frozenset().union(*(_letters_in(field, letters) for field in fields)), bool(fields)


@functools.lru_cache(maxsize=4096)
def _has_format(text: str, thinking: bool) -> bool:
    wanted = (1, 1, 1, 1) if thinking else (0, 0, 1, 1)
    if tuple(text.count(tag) for tag in _TAGS) != wanted:
        return False
    return (_THINKING_FORMAT if thinking else _PLAIN_FORMAT).fullmatch(text) is not None


def score(text: str, answer: str, letters: str, *, thinking: bool, finished: bool) -> Score:
    """Read one completion as the module's docstring says, and compare it with the right ``answer`` letter.

    Args:
        text: the decoded completion.
        answer: the right letter.
        letters: the option letters, upper case, e.g. ``"ABCD"``.
        thinking: which of the two formats was asked for.
        finished: False if generation stopped at the token limit.

    Raises:
        ValueError: ``answer`` is not one of ``letters`` (an error of the data, never a reward of 0).
    """
    if len(answer) != 1 or answer not in letters:
        raise ValueError(f"the right answer is {answer!r}, expected one of the option letters {', '.join(letters)}")
    named, answered = _read(text, letters)
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
    completions: Sequence[Completion], answer: Sequence[str], options: Sequence[Sequence[str]], **_: Any
) -> list[float]:
    """1.0 for each right answer, whatever its format (a TRL reward function over dataset columns)."""
    return [
        # The format asked for and the token limit change other facts about a completion, never its accuracy.
        score(completion_text(c), a, LETTERS[: len(o)], thinking=True, finished=True).accuracy
        for c, a, o in zip(completions, answer, options, strict=True)
    ]


def format_reward(completions: Sequence[Completion], thinking: bool = True, **_: Any) -> list[float]:
    """1.0 for each completion in the exact format, whatever it answers (a TRL reward function)."""
    return [float(_has_format(completion_text(c), thinking)) for c in completions]


def reward_functions(thinking: bool) -> list[RewardFunction]:
    """Appendix B's two rewards in the order [accuracy, format], for prompts with or without reasoning."""

    def bound_format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
        return format_reward(completions, thinking)

    # TRL names its metrics after the function.
    bound_format_reward.__name__ = format_reward.__name__
    return [accuracy_reward, bound_format_reward]
