r"""How models of other families write their answers: what ``answer_format: lenient`` reads beside the paper's rule.

- Tags in any case and with spaces in them (``<Answer>``, ``</ think >``); full-width letters, colons and brackets.
- In an answer field: markdown and LaTeX around what is said (``**B) a cyst**``, ``\boxed{B}``, ``\text{B}``), and
  words before it (``Option B``, ``The answer is B.``).
- Without an answer field, the first of these that there is: ``\boxed{…}``; sentences such as ``The answer is B``;
  lines that are an answer as a whole (``B``, ``Option B``, ``**B) a cyst**``, ``a cyst``).

What is found is read as a field of the paper's: several different letters are ambiguous here, too.
"""

import re
import unicodedata
from collections.abc import Sequence

from kepo_core.task.answer_fields import letters_in, named_by_text, without_texts

_TAG = re.compile(r"<\s*(?:(/)\s*)?(think|answer)\s*>", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_ORNAMENT = re.compile(r"\*+|__|[`$#]")
_WORDS = r"(?:(?:my|the|so|therefore|thus|hence|final|correct|right|best)\b,?\s+)*"
_BEFORE = re.compile(
    rf"\s*{_WORDS}(?:answer|option|choice)\b\s*(?:is\b|[:=])?\s*(?:option|choice)?\b\s*:?", re.IGNORECASE
)
_SENTENCE = re.compile(r"\b(?:answer|option|choice)\s*(?:is\b|[:=])(?:\s*:)?(.*)", re.IGNORECASE)
# At a sentence's beginning: "B", "(B) or C", before its end, a mark or a conjunction.
_LETTERS = re.compile(
    r"\s*(?:option\s+)?(\(?[A-Z]\b\)?(?:\s*(?:,|/|or\b|and\b)\s*\(?[A-Z]\b\)?)*)"
    r"\s*(?:\Z|[.,;:!]|(?:because|since|as|for|due|which|based)\b)",
    re.IGNORECASE,
)
# A line that is one: "B", "B)", "(B) a cyst".
_LINE = re.compile(r"\s*\(?[A-Za-z]\s*(?:[.):].*)?")


def normalised(text: str) -> str:
    """``text`` with plain letters, colons and brackets for full-width ones, and with the paper's tags."""
    return _TAG.sub(lambda tag: f"<{tag[1] or ''}{tag[2].lower()}>", unicodedata.normalize("NFKC", text))


def plain(field: str) -> str:
    """What a field says, without ornaments and words before it."""
    said = _unadorned(field)
    before = _BEFORE.match(said)
    return said[before.end() :] if before else said


def statements(text: str, options: Sequence[str]) -> list[str]:
    """What ``text``, which has no answer field, answers; empty if it does not."""
    if boxed := _BOXED.findall(text):
        return [plain(content) for content in boxed]
    lines = [line for raw in text.splitlines() if (line := _unadorned(raw.replace("<answer>", " ")))]
    said = [_said(sentence[1], options) for line in lines if (sentence := _SENTENCE.search(line))]
    if any(said):
        return said
    return [line for line in map(plain, lines) if _LINE.fullmatch(line) or _names_one(line, options)]


def _unadorned(text: str) -> str:
    """On one line, with single spaces, without markdown and LaTeX."""
    for _ in range(2):  # \boxed{\text{B}}
        text = _COMMAND.sub(r"\1", text)
    return " ".join(_ORNAMENT.sub("", text).split())


def _said(rest: str, options: Sequence[str]) -> str:
    """What a sentence says behind "the answer is": an option's text or line, else the letters that it begins with."""
    begins = _LETTERS.match(without_texts(rest, options))
    if begins and not named_by_text(rest, options):
        return begins[1]
    return rest if letters_in(rest, options) else ""


def _names_one(line: str, options: Sequence[str]) -> bool:
    return len(letters_in(line, options)) == 1
