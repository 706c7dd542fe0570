"""Where a completion answers, and which option letters it names there (rules 1 to 4 of ``rewards``)."""

import functools
import re
from collections.abc import Sequence

from kepo_core.data.omnimedvqa import same_text
from kepo_core.data.records import LETTERS

_FIELD = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BARE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_MARKED = re.compile(r"\s*\(?([A-Za-z])\s*[.):](.*)", re.DOTALL)
_CAPITAL = re.compile(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9'’])")
# A further letter offered in the text behind a marked one: "… C) …", "… C: …", "… or C", "…, C".
_OFFERED = re.compile(
    r"(?<![A-Za-z0-9])(?:([A-Za-z])\)|([A-Z])[.:]\s+\S)|(?:(?<![A-Za-z0-9])(?:or|and)|[,/;])\s*\(?([A-Za-z])[\W_]*\Z",
    re.DOTALL,
)
#: What replaces an option's text among other words: a word that is not a letter.
_SOME_TEXT = "text"


def answer_fields(text: str) -> list[str]:
    """The content of each closed ``<answer>…</answer>`` of ``text``; of nested ones, the innermost."""
    return _FIELD.findall(text)


def letters_in(field: str, options: Sequence[str]) -> set[str]:
    """The different letters that one answer field names (upper case); empty when it names none."""
    letters = LETTERS[: len(options)]
    bare = _BARE.fullmatch(field)
    if bare and bare[1].upper() in letters:
        return {bare[1].upper()}
    if named := named_by_text(field, options):
        return named
    text = without_texts(field, options)
    words = [w for w in re.split(r"[\W_]+", text) if w and w.lower() not in ("or", "and")]
    if words and all(len(w) == 1 and w.isascii() and w.isalpha() for w in words):
        return {w.upper() for w in words}
    marked = _MARKED.match(text)
    if marked:
        offered = {letter.upper() for groups in _OFFERED.findall(marked[2]) for letter in groups if letter}
        return {marked[1].upper()} | offered & set(letters)
    capitals = set(_CAPITAL.findall(text))
    return capitals if len(capitals) > 1 else set()


def named_by_text(field: str, options: Sequence[str]) -> set[str]:
    """The letters of the options whose whole text, or line in the prompt, equals the field."""

    def of_text(text: str) -> set[str]:
        said = _parts(text)
        return {letter for letter, option in zip(LETTERS, options, strict=False) if _parts(option) == said}

    named, marked = of_text(field), _MARKED.match(field)
    behind = of_text(marked[2]) if marked else set()
    return named | {marked[1].upper()} | behind if marked and behind else named


def without_texts(field: str, options: Sequence[str]) -> str:
    """``field`` with each option's text replaced by another word, so that none of its letters is left."""
    return any_of(tuple(options)).sub(_SOME_TEXT, field)


def _parts(text: str) -> list[str]:
    """The words and marks of a text, so that ``C.albicans`` is ``C. albicans``, and ``acyst`` is not ``a cyst``."""
    return re.findall(r"\w+|[^\w\s]", same_text(text))


@functools.lru_cache(maxsize=4096)
def any_of(options: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any option's text of more than one letter as whole words, the longest first."""
    texts = sorted({same_text(option) for option in options}, key=len, reverse=True)
    # Between two words there is white space, beside a mark there may be some.
    spaced = [r"(?:(?<!\w)|(?!\w))\s*".join(map(re.escape, _parts(text))) for text in texts if len(text) > 1]
    return re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)" if spaced else r"(?!)", re.IGNORECASE)
