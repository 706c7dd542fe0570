r"""How models of other families write their answers: what ``answer_format: lenient`` also reads.

- Tags in any case and with spaces in them (``<Answer>``, ``</ think >``); full-width letters, colons and brackets.
- In an answer field: markdown and LaTeX around the answer (``**B) a cyst**``, ``\boxed{B}``, ``\text{B}``), and words
  before it (``Option B``, ``The answer is B.``).
- Without an answer field: all ``\boxed{…}`` and all sentences such as ``The answer is B`` or ``The answer is a cyst.``,
  anywhere on a line. After the first such sentence, also lines that are an answer as a whole: letters, or an option's
  whole text or line (``B``, ``Option B``, ``**B) a cyst**``, ``a cyst``). Without boxes and sentences, all such lines.
- Corrections: letters and options' texts after ``Wait`` and the like (``The answer is A. Wait, B.``) are further
  answers.

An option's whole text comes first: its parts (``Option B``, ``HLA-B*27``, ``$10``) are neither words before an answer
nor markup. What is found is read as the paper's answer fields are: several different letters are ambiguous, wherever
they were found. So an answer that is given and then changed is ambiguous: the parser does not choose between the two.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

from kepo_core.data.records import LETTERS
from kepo_core.task.answer_fields import any_of, letters_in, named_by_text, without_texts

_TAG = re.compile(r"<\s*(?:(/)\s*)?(think|answer)\s*>", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_WORDS = r"(?:(?:my|the|so|therefore|thus|hence|final|correct|right|best)\b,?\s+)*"
_ORNAMENT = r"\*+|__|[`$#]"
_BEFORE = re.compile(
    rf"(\s*{_WORDS}(?:answer|option|choice)\b\s*(?:is\b|[:=])?)\s*(?:option|choice)?\b\s*:?", re.IGNORECASE
)
_SENTENCE = r"\b(?:answer|option|choice)\s*(?:is\b|[:=])(?:\s*:)?"
_TAKEN_BACK = r"\b(?:wait|actually|correction|hmm+|sorry|instead|rather|scratch that|i mean|on second thoughts?|no,)"
_CAPITAL = re.compile(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9'’])")
# At a sentence's beginning: "B", "(B) or C", before its end, a mark or a conjunction.
_LETTERS = re.compile(
    r"\s*(?:option\s+)?(\(?[A-Z]\b\)?(?:\s*(?:[,;/]|or\b|and\b)\s*\(?[A-Z]\b\)?)*)"
    r"\s*(?:\Z|[.,;:!]|(?:because|since|as|for|due|which|based)\b)",
    re.IGNORECASE,
)


def normalised(text: str) -> str:
    """``text`` with plain letters, colons and brackets for full-width ones, and with the paper's tags."""
    return _TAG.sub(lambda tag: f"<{tag[1] or ''}{tag[2].lower()}>", unicodedata.normalize("NFKC", text))


def plain(field: str, options: Sequence[str]) -> str:
    """What a field says, without markup and words before it; an option's whole text stays as it is."""
    said = _unadorned(field, options)
    before = _BEFORE.match(said)
    shorter = [said[before.end(1) :], said[before.end() :]] if before else []
    candidates = [field, said, *shorter]
    return next((text for text in candidates if named_by_text(text, options)), candidates[-1])


def answers(field: str, options: Sequence[str]) -> list[str]:
    """What an answer field says, and its corrections of that."""
    said = plain(field, options)
    return [said, *(_taken_back(field, options) if letters_in(said, options) else [])]


def statements(text: str, options: Sequence[str]) -> list[str]:
    """The answers in ``text``, which has no answer field; empty if there are none."""
    lines = [raw.replace("<answer>", " ") for raw in text.splitlines()]
    said: list[str] = []
    behind: list[str] = []  # the first sentence's beginning
    for raw in lines:
        line = _unadorned(raw, options)
        rests = _sentences(line, options)
        found = [named for rest in rests for named in _said(rest, options)]
        if said and _is_answer(whole := plain(line, options), options):
            found.append(whole)
        behind += [line] if said else rests if found else []
        said += found
    said += _taken_back("\n".join(behind), options)
    said += [plain(content, options) for content in _BOXED.findall(text)]
    return said or [line for raw in lines if _is_answer(line := plain(raw, options), options)]


def _taken_back(text: str, options: Sequence[str]) -> list[str]:
    """The letters and options' texts after "wait" and the like, unless these are part of an option's text."""
    found = next((each for each in _outside(tuple(options), _TAKEN_BACK).finditer(text) if not each[1]), None)
    if found is None:
        return []
    behind = text[found.end() :]
    letters = set(_CAPITAL.findall(without_texts(behind, options))) & set(LETTERS[: len(options)])
    return [*any_of(tuple(options)).findall(behind), *sorted(letters)]


def _is_answer(line: str, options: Sequence[str]) -> bool:
    """Whether a line is an option's whole text or line, or nothing but letters (one, or several that are ambiguous)."""
    words = re.findall(r"[^\W_]+", line)
    only_letters = all(len(word) == 1 or word.lower() in ("or", "and") for word in words)
    return bool(named_by_text(line, options) or (only_letters and letters_in(line, options)))


def _unadorned(text: str, options: Sequence[str]) -> str:
    """On one line, with single spaces, without markdown and LaTeX, except inside an option's text."""
    for _ in range(2):  # \boxed{\text{B}}
        text = _COMMAND.sub(r"\1", text)
    return " ".join(_outside(tuple(options), _ORNAMENT).sub(r"\1", text).split())


@functools.lru_cache(maxsize=4096)
def _outside(options: tuple[str, ...], pattern: str) -> re.Pattern[str]:
    """``pattern``, or in its first group an option's text, so that the pattern is not found inside one."""
    return re.compile(rf"({any_of(options).pattern})|{pattern}", re.IGNORECASE)


def _sentences(line: str, options: Sequence[str]) -> list[str]:
    """The text after each "the answer is", up to the next."""
    begins = [found for found in _outside(tuple(options), _SENTENCE).finditer(line) if not found[1]]
    ends = [*(found.start() for found in begins[1:]), len(line)]
    rests = [line[found.end() : end].strip() for found, end in zip(begins, ends, strict=False)]
    return [rest for rest in rests if rest]


def _said(rest: str, options: Sequence[str]) -> list[str]:
    """What a sentence says after "the answer is": an option's text or line, or else the letters that it begins with."""
    if named_by_text(rest, options):
        return [rest]
    texts = any_of(tuple(options))
    text = texts.match(rest)
    named = named_by_text(text[0], options) if text else set()
    if text and named and rest.startswith(tuple(".,;:!"), text.end()):  # texts and letters after it contradict it
        return [*texts.findall(rest), f"{min(named)}) {rest[text.end() :]}"]
    begins = _LETTERS.match(without_texts(rest, options))
    if begins:
        return [begins[1]]
    return [rest] if letters_in(rest, options) else []
