"""OmniMedVQA's raw release, as it lies on disk → typed rows.

Layout: ``<root>/QA_information/Open-access/*.json``, each a list of objects with ``question_id``, ``dataset``,
``question_type``, ``question``, ``gt_answer`` (the *text* of the right option), ``image_path`` (relative to the
root), ``option_A`` … and ``modality_type``; the pictures under ``<root>/Images``.
Source: Hu et al., "OmniMedVQA", CVPR 2024. PhantomVQA is written in the same layout and read by the same code.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kepo_core.data.errors import DataError
from kepo_core.data.records import LETTERS, MODALITIES, Question

__all__ = ["DataError", "load_raw", "modality_name", "same_text"]

QA_FOLDER = Path("QA_information") / "Open-access"

# The release spells one modality in several ways, appends explanations in brackets that may lack their end, and
# hyphenates inside words; what stands before the bracket, in lower case and without punctuation, identifies it.
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


def modality_name(raw: str) -> str | None:
    """The name in MODALITIES that a raw modality string means, or None when it is none of the eight."""
    return _MODALITY_KEYS.get(re.sub(r"[\W_]+", "", raw.partition("(")[0].lower()))


def same_text(text: str) -> str:
    """What two spellings of one answer have in common: case, runs of spaces and final full stops do not count."""
    return " ".join(text.split()).rstrip(". ").casefold()


def load_raw(root: Path) -> list[Question]:
    """All questions of the release under ``root``, files in name order and rows in file order.

    Every image must exist (it is not opened here: see ``images.check_images``). Options that are absent, null or
    empty are skipped and the letters close up; options that say the same thing are kept once, since two letters
    would be right. Raises ``DataError`` naming the file and row, for the first that breaks the layout.
    """
    root = Path(root).expanduser().resolve()
    files = sorted((root / QA_FOLDER).glob("*.json"))
    if not files:
        raise DataError(f"data_root {root}: no {QA_FOLDER.as_posix()}/*.json in it, expected OmniMedVQA's raw layout.")
    locate = _ImageLocator(root)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for file in files:
        for index, row in enumerate(_read_rows(file)):
            where = _where(file, index, row)
            question = _parse_row(row, where, locate)
            if question.id in seen:
                raise DataError(f"{where}: question_id is already that of {seen[question.id]}, expected a unique one.")
            seen[question.id] = where
            questions.append(question)
    if not questions:
        raise DataError(f"data_root {root}: its {len(files)} question files hold no rows, expected at least one.")
    return questions


def _read_rows(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: not valid JSON ({error}), expected a list of question objects.") from error
    except (OSError, RecursionError) as error:
        raise DataError(f"{file.name}: cannot be read ({error}), expected a JSON list of question objects.") from error
    if not isinstance(rows, list):
        raise DataError(f"{file.name}: holds a {type(rows).__name__}, expected a list of question objects.")
    return rows


def _where(file: Path, index: int, row: Any) -> str:
    """How error messages name a row: the file, its position from 1, and its id when it has one."""
    name = row.get("question_id") if isinstance(row, Mapping) else None
    return f"{file.name}, row {index + 1}" + (f" ({name})" if isinstance(name, str) else "")


def _parse_row(row: Any, where: str, locate: "_ImageLocator") -> Question:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a {type(row).__name__}, expected an object with question_id, question and options.")
    raw_modality = _text(row, "modality_type", where, default="") or _text(row, "modality", where, default="")
    modality = modality_name(raw_modality)
    if modality is None:
        raise DataError(f"{where}: modality_type {raw_modality!r} is unknown, expected one of {', '.join(MODALITIES)}.")
    options = _options(row, where)
    return Question(
        id=_text(row, "question_id", where),
        dataset=_text(row, "dataset", where, default=""),
        modality=modality,
        question_type=_text(row, "question_type", where, default=""),
        question=_text(row, "question", where),
        options=options,
        answer=_answer_letter(_text(row, "gt_answer", where), options, where),
        image=locate(_text(row, "image_path", where), where),
    )


def _text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The value of ``key`` as stripped text; absent, null or empty gives ``default``, or raises when that is None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise DataError(f"{where}: {key} is a {type(value).__name__}, expected text.")
    text = "" if value is None else str(value).strip()
    if text:
        return text
    if default is None:
        raise DataError(f"{where}: {key} is missing or empty, expected text.")
    return default


def _options(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    options: dict[str, str] = {}
    for letter in LETTERS:
        text = _text(row, f"option_{letter}", where, default="")
        if text:
            options.setdefault(same_text(text), text)
    if not options:
        raise DataError(f"{where}: no options, expected option_A, option_B and so on.")
    if len(options) == 1:
        raise DataError(f"{where}: a single option ({next(iter(options.values()))!r}), expected at least two.")
    return tuple(options.values())


def _answer_letter(answer: str, options: tuple[str, ...], where: str) -> str:
    keys = [same_text(option) for option in options]
    try:
        return LETTERS[keys.index(same_text(answer))]
    except ValueError:
        listed = ", ".join(repr(option) for option in options)
        raise DataError(f"{where}: gt_answer {answer!r} is not among the options, expected one of {listed}.") from None


class _ImageLocator:
    """Relative image paths → absolute ones that exist inside the root. Remembers folders: rows share few of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[Path, Path] = {}

    def __call__(self, relative: str, where: str) -> Path:
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts or "\0" in relative or re.match(r"[A-Za-z]:[\\/]|\\", relative):
            raise DataError(f"{where}: image_path {relative!r} leaves data_root, expected a relative path inside it.")
        absolute = self._folder(self._root / path.parent) / path.name
        if absolute.is_symlink():
            absolute = absolute.resolve()
        if not absolute.is_relative_to(self._root):
            raise DataError(f"{where}: image_path {relative!r} is a link out of data_root, expected a file inside it.")
        if not absolute.is_file():
            raise DataError(f"{where}: image {relative!r} is missing under data_root, expected a file.")
        return absolute

    def _folder(self, folder: Path) -> Path:
        if folder not in self._folders:
            self._folders[folder] = Path(os.path.realpath(folder))
        return self._folders[folder]
