"""OmniMedVQA's raw release on disk → typed rows.

Layout: ``<root>/QA_information/Open-access/*.json``, each a list of objects with ``question_id``, ``dataset``,
``question_type``, ``question``, ``gt_answer`` (the *text* of the right option), ``image_path`` (relative to the
root), ``option_A`` … and ``modality_type``; the pictures under ``<root>/Images``.
Source: Hu et al., "OmniMedVQA", CVPR 2024. PhantomVQA is written in the same layout and read by the same code.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Set
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.records import LETTERS, MODALITIES, Question
from kepo_core.data.source import QA_FOLDER, Source, picture_name
from kepo_core.errors import DataError

RESTRICTED_FOLDER = QA_FOLDER.with_name("Restricted-access")

# The release spells one modality in several ways, appends explanations in brackets that may lack their end, and
# hyphenates inside words; the part before the bracket, in lower case and without punctuation, identifies it.
_MODALITY_KEYS = {
    "mr": "MRI",
    "mri": "MRI",
    "magneticresonanceimaging": "MRI",
    "ct": "CT",
    "computedtomography": "CT",
    "xray": "X-Ray",
    "ultrasound": "Ultrasound",
    "dermoscopy": "Dermoscopy",
    "fundus": "Fundus",
    "fundusphotography": "Fundus",
    "oct": "OCT",
    "opticalcoherencetomography": "OCT",
    "microscopy": "Microscopy",
    "microscopyimages": "Microscopy",
}

# How JSON lines begin, whatever the file's name: an object, and another on the next line.
_ANOTHER_LINE = re.compile(r"\s*\{[^\n]*\}\s*\n\s*\{")
_OPTION = re.compile(r"\s*option", re.IGNORECASE)
_OPTION_NAMES = tuple(f"option_{letter}" for letter in LETTERS)


@cache
def modality_name(raw: str) -> str | None:
    """The name in MODALITIES that a raw modality string means; None if it means none of the eight."""
    return _MODALITY_KEYS.get(re.sub(r"[\W_]+", "", raw.partition("(")[0].lower()))


def same_text(text: str) -> str:
    """A form that is equal for all spellings of one answer: without case, runs of spaces and final full stops."""
    return " ".join(text.split()).rstrip(". ").casefold()


def load_raw(source: Source, ledger: Ledger | None = None) -> list[Question]:
    """All questions of the release's open-access part, files in name order and rows in file order.

    Every image must exist (it is not opened here: see ``images.load_image``). Options that are absent, null or
    empty are skipped and the letters close up; options with the same text are kept once, since two letters would be
    right. Rows of restricted sets are only counted: their pictures are not part of the release, and users who have
    them would get other splits. ``ledger`` counts what was mended and, if it is not strict, what was dropped; by
    default it is strict. Raises ``DataError`` for a file that cannot be read and, under a strict ledger, for the first
    row that breaks the layout.
    """
    ledger = ledger or Ledger()
    everything = source.question_files(QA_FOLDER.parent)
    files = [file for file in everything if file.parent == QA_FOLDER]
    if not files:
        raise DataError(f"data_root {source.root}: no {QA_FOLDER}/*.json in it, expected OmniMedVQA's raw layout.")
    questions: list[Question] = []
    rows = 0
    for file in files:
        for index, row in enumerate(read_rows(source, file)):
            rows += 1
            where = where_of(file, index, row)
            try:
                question = _parse_row(row, where, source, ledger)
                ledger.claim(question.id, where)
            except RowError as error:
                ledger.drop(error)
                continue
            questions.append(question)
    if not questions:
        raise ledger.nothing(source.root, rows)
    for file in everything:
        if RESTRICTED_FOLDER in file.parents:
            leave_out(source, file, "restricted: its picture is not part of the release", {"question_id"}, ledger)
        elif file not in files:
            leave_out(source, file, f"outside of {QA_FOLDER}", {"question_id"}, ledger)
    ledger.read += len(questions)
    return questions


def leave_out(source: Source, file: PurePosixPath, reason: str, keys: Set[str], ledger: Ledger) -> None:
    """Count the rows of a file that is not read, or only the file if none of its rows has all ``keys``."""
    try:
        rows = read_rows(source, file)
    except DataError:
        rows = []
    if not any(isinstance(row, Mapping) and keys <= row.keys() for row in rows):
        ledger.leave_out("a file without questions", str(file))
        return
    for index, row in enumerate(rows):
        ledger.leave_out(reason, where_of(file, index, row))


def read_rows(source: Source, file: PurePosixPath) -> list[Any]:
    """The rows of a question file, as `json_rows`."""
    return json_rows(file.name, source.read(file))


def json_rows(name: str, content: bytes) -> list[Any]:
    """The rows of the file ``name``: a JSON list or JSON lines, in any Unicode encoding.

    Raises ``DataError`` if it is neither, naming the file and, for JSON lines, the line.
    """
    try:
        text = content.decode(json.detect_encoding(content))
        array = text.lstrip("\ufeff \t\r\n").startswith("[")
        lines = (name.lower().endswith(".jsonl") and not array) or _ANOTHER_LINE.match(text)
        rows = _json_lines(name, text) if lines else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: not valid JSON ({error}), expected a list of question objects.") from error
    except RecursionError as error:
        raise DataError(f"{name}: cannot be read ({error}), expected a JSON list of question objects.") from error
    if not isinstance(rows, list):
        raise DataError(f"{name}: holds a {type(rows).__name__}, expected a list of question objects.")
    return rows


def _json_lines(name: str, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines, which also cuts inside of JSON's texts
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{name}, line {number}: not valid JSON ({error}), expected an object.") from error
    return rows


def where_of(file: PurePosixPath, index: int, row: Any) -> str:
    """How error messages name a row: the file, its position from 1, and its id when it has one."""
    name = row.get("question_id") if isinstance(row, Mapping) else None
    shown = name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) else ""
    return f"{file.name}, row {index + 1}" + (f" ({shown})" if shown else "")


def _parse_row(row: Any, where: str, source: Source, ledger: Ledger) -> Question:
    if not isinstance(row, Mapping):
        raise RowError(
            "not an object",
            f"{where}: a {type(row).__name__}, expected an object with question_id, question and options.",
        )
    raw_modality = text_of(row, "modality_type", where, ledger, "") or text_of(row, "modality", where, ledger, "")
    modality = modality_name(raw_modality)
    if modality is None:
        raise RowError(
            "unknown modality",
            f"{where}: modality_type {raw_modality!r} is unknown, expected one of {', '.join(MODALITIES)}.",
        )
    if not row.get("modality_type"):
        ledger.mend("modality instead of modality_type", where)
    if raw_modality != modality:
        ledger.mend(f"modality {raw_modality!r} read as {modality}", where)
    options = options_of(row, where, ledger)
    answer = text_of(row, "gt_answer", where, ledger)
    letter = _answer_letter(answer, options, where)
    if answer not in options:
        ledger.mend("the answer differs from its option in case, spaces or a full stop", where)
    image = text_of(row, "image_path", where, ledger)
    return Question(
        id=text_of(row, "question_id", where, ledger),
        dataset=text_of(row, "dataset", where, ledger, ""),
        modality=modality,
        question_type=text_of(row, "question_type", where, ledger, ""),
        question=text_of(row, "question", where, ledger),
        options=options,
        answer=letter,
        image=source.locate(image, where),
        image_name=picture_name(image),
    )


def text_of(row: Mapping[str, Any], key: str, where: str, ledger: Ledger, default: str | None = None) -> str:
    """The value of ``key`` as stripped text; absent, null or empty gives ``default``, or raises when that is None.

    A number is read as its digits and NaN, which pandas writes for missing values, as missing; the ledger counts both.
    Raises ``RowError`` for other types.
    """
    value = row.get(key)
    if value != value and default is not None:
        ledger.mend(f"{key} is NaN, read as missing", where)
        return default
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise RowError(f"{key} is not text", f"{where}: {key} is a {type(value).__name__}, expected text.")
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise RowError(f"{key} is not text", f"{where}: {key} is {value}, expected text.")
        ledger.mend(f"{key} is a number, read as text", where)
    # Byte order marks remain in texts that were concatenated from several files.
    text = "" if value is None else str(value).replace("\ufeff", "").strip()
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RowError(f"{key} is not text", f"{where}: {key} contains half a character, expected Unicode text.")
    if text:
        return text
    if default is None:
        raise RowError(f"no {key}", f"{where}: {key} is missing or empty, expected text.")
    return default


def options_of(row: Mapping[str, Any], where: str, ledger: Ledger) -> tuple[str, ...]:
    """The texts of ``option_A``, ``option_B`` and so on, as `load_raw` reads them; ``RowError`` for fewer than two."""
    names = set(filter(_OPTION.match, row))
    if beyond := sorted(names.difference(_OPTION_NAMES)):
        raise RowError(
            "an option that has no letter",
            f"{where}: {beyond[0]!r} is unknown, expected option_A to option_{LETTERS[-1]}.",
        )
    last = max((_OPTION_NAMES.index(name) for name in names), default=-1)
    given = [text_of(row, name, where, ledger, "") for name in _OPTION_NAMES[: last + 1]]
    options: dict[str, str] = {}
    for text in given:
        if text:
            options.setdefault(same_text(text), text)
    if any(later and not text for text, later in itertools.pairwise(given)):
        ledger.mend("an empty option between others was skipped", where)
    if len(options) < sum(map(bool, given)):
        ledger.mend("options that say the same were kept once", where)
    if not options:
        raise RowError("no options", f"{where}: no options, expected option_A, option_B and so on.")
    if len(options) == 1:
        raise RowError(
            "a single option", f"{where}: a single option ({next(iter(options.values()))!r}), expected at least two."
        )
    return tuple(options.values())


def _answer_letter(answer: str, options: tuple[str, ...], where: str) -> str:
    keys = [same_text(option) for option in options]
    try:
        return LETTERS[keys.index(same_text(answer))]
    except ValueError:
        listed = ", ".join(repr(option) for option in options)
        raise RowError(
            "the answer is not among the options",
            f"{where}: gt_answer {answer!r} is not among the options, expected one of {listed}.",
        ) from None
