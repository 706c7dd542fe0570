"""Your own data → typed rows: a table with its pictures, a ``datasets`` folder, or a data set of the Hub.

A row is a question. Columns: ``image`` (or ``images``, one in each), ``question``, ``options`` and ``answer``;
optional: ``id``, ``category``, ``question_type`` and ``split``. Columns of other names are mapped (`parse_columns`).
A picture is a path inside the table's folder, or bytes (``datasets.Image``, Parquet). Bytes are named by the hash of
their content, and written to the cache folder when they are fetched.
"""

import ast
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.omnimedvqa import options_of, same_text, text_of
from kepo_core.data.records import LETTERS, Question
from kepo_core.data.source import OUTSIDE, Folder, cache_dir, is_question_file, picture_name, write_whole
from kepo_core.data.table_files import (
    SPLITS,
    SUFFIXES,
    Columns,
    Part,
    find_columns,
    is_dataset,
    is_hub,
    parse_columns,
    read_dataset,
    read_file,
    read_hub,
    table_files,
)
from kepo_core.errors import DataError

#: The category of data without categories.
ALL = "all"

_TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
#: A list as NumPy prints it (and pandas, for a list from Parquet): Python would join its texts into one.
_NUMPY = re.compile(rf"\s*\[\s*{_TEXT}(\s+{_TEXT})+\s*\]\s*", re.DOTALL)
_MARKED = re.compile(r"\(?([A-Z])[).:]")
_NUMBER = re.compile(r"\s*[+-]?[\d.,]*\d[\d.,]*(e[+-]?\d+)?\s*", re.IGNORECASE)


class Tables(Folder):
    """Tables whose pictures lie in the folder ``home``, in the tables themselves, or in ``downloads``."""

    def __init__(
        self,
        root: Path,
        home: Path,
        parts: Sequence[Part],
        columns: str,
        downloads: Sequence[Path] = (),
        follow_links: bool = False,
    ) -> None:
        super().__init__(root, follow_links)
        self._home = home
        self._downloads = [folder.resolve() for folder in downloads]
        given = parse_columns(columns)
        self.parts = [(part, find_columns(given, part, root)) for part in parts]
        self._inside: dict[Path, tuple[Part, int, str]] = {}  # a picture that is bytes: where they are

    def picture(self, part: Part, index: int, column: str, value: Any, where: str, ledger: Ledger) -> tuple[Path, str]:
        """Where the picture of a cell is, or will be once fetched, and its name, the same wherever the data lie.

        Raises ``RowError`` for no picture, for several, and for a path that leaves the folder or is missing in it.
        """
        if isinstance(value, list) and len(value) > 1:
            raise RowError("several pictures", f"{where}: {column} holds {len(value)} pictures, expected one.")
        if content := self._content(_single(value)):
            name = hashlib.sha256(content).hexdigest()
            path = self._pictures / name
            self._inside.setdefault(path, (part, index, column))
            return path, name
        name = text_of({column: _path(_single(value))}, column, where, ledger)
        return self.locate(name, where), picture_name(name)

    @cached_property
    def _pictures(self) -> Path:
        return cache_dir().resolve() / "pictures"

    def other_files(self) -> list[PurePosixPath]:
        """The files of a folder of tables that may be tables but are not read; nothing for other roots."""
        if not self.root.is_dir() or is_dataset(self.root):
            return []
        read = {PurePosixPath(part.name) for part, _ in self.parts}
        return sorted({*super().other_files(), *self._files(None, is_question_file)} - read)

    def fetch(self, image: Path) -> None:
        """Put a picture that is bytes into the cache, whole or not at all."""
        if image in self._inside and not image.is_file():
            write_whole(image, self.content(image))

    def content(self, image: Path) -> bytes:
        """The bytes in the table, or else in the file."""
        if image not in self._inside:
            return super().content(image)
        part, index, column = self._inside[image]
        return self._content(_single(part.cell(index, column))) or b""

    def stamp(self, image: Path) -> str:
        """For a picture that is bytes, its name: their hash."""
        return image.name if image in self._inside else super().stamp(image)

    def _content(self, value: Any) -> bytes | None:
        """The bytes of a picture that lies in its table, or was downloaded with it."""
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(content, bytes) or not self._downloads:
            return content if isinstance(content, bytes) else None
        try:
            path = Path(os.path.realpath(str(_path(value))))
            if any(path.is_relative_to(folder) for folder in self._downloads):
                return path.read_bytes()
        except (OSError, ValueError):  # not a path: `locate` says so
            pass
        return None


def _single(value: Any) -> Any:
    """The element of a list of one; None for an empty list."""
    return next(iter(value), None) if isinstance(value, list) else value


def _path(value: Any) -> Any:
    return value.get("path") if isinstance(value, Mapping) else value


def open_tables(data_root: str | Path, columns: str = "", follow_links: bool = False) -> Tables | None:
    """The tables at ``hf:OWNER/NAME[:SPLIT]``, in a ``datasets`` folder, or in a table's file; else None."""
    if is_hub(data_root):
        parts = read_hub(data_root)
        from datasets import config
        from huggingface_hub import constants

        downloads = [Path(constants.HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]
        return Tables(Path(data_root), cache_dir().resolve() / "pictures", parts, columns, downloads)
    given = Path(data_root).expanduser()
    root = Path(os.path.realpath(given))
    if is_dataset(root):
        return Tables(root, root, read_dataset(root), columns, follow_links=follow_links)
    for file in (root, given.parent.resolve() / given.name):  # the Hub's cache links to files without a suffix
        if file.is_file() and file.suffix.lower() in SUFFIXES:
            return Tables(file, file.parent, [read_file(file)], columns, follow_links=follow_links)
    return None


def tables_in(folder: Path, columns: str = "", follow_links: bool = False) -> Tables | None:
    """All tables directly in a folder; None without any. Raises ``DataError`` for a link that is not followed."""
    files = table_files(folder)
    if outside := [file for file in files if not (follow_links or file.resolve().is_relative_to(folder))]:
        raise DataError(f"data_root {folder}: {outside[0].name} {OUTSIDE}.")
    parts = [read_file(file) for file in files]
    return Tables(folder, folder, parts, columns, follow_links=follow_links) if files else None


def load_table(source: Tables, ledger: Ledger | None = None) -> list[Question]:
    """All questions of the tables, in their order.

    An answer is an option's text or letter, never a number. A row without an id is named by its table and row number.
    If two tables share an id, every id gets its table's name in front. Duplicate rows are read once. Data without
    categories get the category `ALL`. If a row has no split, its table's name may give one. ``ledger`` and errors as in
    ``omnimedvqa.load_raw``; also raises ``DataError`` for an id that different rows of one table have.
    """
    ledger = ledger or Ledger()
    found: dict[Question, tuple[str, str]] = {}
    count = 0
    for part, columns in source.parts:
        for index, row in enumerate(part.read([name for names in columns.values() for name in names])):
            count += 1
            where = f"{part.name}, row {index + 1}"
            try:
                question = _question(source, part, columns, index, row, where, ledger)
            except RowError as error:
                ledger.drop(error)
                continue
            if question in found:
                ledger.leave_out("a duplicate row", where)
            found.setdefault(question, (part.name, where))
    if not found:
        raise ledger.nothing(source.root, count)
    ledger.read += len(found)
    return _with_own_ids(found, source.root, ledger)


def _with_own_ids(found: Mapping[Question, tuple[str, str]], root: Path, ledger: Ledger) -> list[Question]:
    """The questions, ids with their tables' names if two tables share one. ``found``: each one's table and place."""
    tables: dict[str, list[str]] = defaultdict(list)
    for question, (table, _) in found.items():
        tables[question.id].append(table)
    if twice := [name for name, having in tables.items() if len(set(having)) < len(having)]:
        raise DataError(
            f"data_root {root}: {len(twice)} ids are used by different rows of one table ({', '.join(twice[:5])}), "
            "expected one row each, or no column id."
        )
    if len(tables) == len(found):
        return list(found)
    for _, where in found.values():
        ledger.mend("two tables share an id: the table's name was put in front of all ids", where)
    return [replace(question, id=f"{table}:{question.id}") for question, (table, _) in found.items()]


def _question(
    source: Tables, part: Part, columns: Columns, index: int, row: Any, where: str, ledger: Ledger
) -> Question:
    if not isinstance(row, Mapping):
        raise RowError(
            "not a cell for each column",
            f"{where}: {row!r:.200}, expected a value for each of {', '.join(part.columns)}; in CSV, put texts with "
            "commas in quotation marks.",
        )

    def text(role: str, absent: str = "", empty: str | None = None) -> str:
        return text_of(row, columns[role][0], where, ledger, empty) if role in columns else absent

    name = text("id", f"{part.name}:{index + 1}")
    given = _option_texts(row, columns["options"], where, ledger)
    texts = _without_letters(given, where, ledger)
    options = options_of(
        {f"option_{letter}": option for letter, option in zip(LETTERS, texts, strict=False)}, where, ledger
    )
    image_column = columns["image"][0]
    image, image_name = source.picture(part, index, image_column, row.get(image_column), where, ledger)
    return Question(
        id=name,
        dataset=source.root.name.partition(":")[0],  # a Hub name without its split
        modality=_category(text("category", ALL), where),
        question_type=text("question_type", empty=""),
        question=text("question"),
        options=options,
        answer=_letter(row, columns["answer"][0], given, texts, options, where, ledger),
        image=image,
        split=_split(text("split", empty="") or part.split, where),
        image_name=image_name,
    )


def _option_texts(row: Mapping[str, Any], columns: Sequence[str], where: str, ledger: Ledger) -> list[str]:
    """The options as given, empty ones too: from several columns, or from a list or a text in one column."""
    values: Any = [row.get(column) for column in columns]
    if len(columns) == 1:
        (values,) = values
    if isinstance(values, str):
        values = _listed(values)
    if not isinstance(values, list):
        raise RowError(
            "options are not a list",
            f"{where}: {columns[0]} is {values!r:.200}, expected a list, or texts separated by |.",
        )
    if len(values) > len(LETTERS):
        raise RowError("more options than letters", f"{where}: {len(values)} options, expected at most {len(LETTERS)}.")
    return [text_of({"option": value}, "option", where, ledger, "") for value in values]


def _listed(text: str) -> Any:
    """A list as JSON, Python or NumPy writes it, or else the texts between bars."""
    if _NUMPY.fullmatch(text):
        return [ast.literal_eval(each) for each in re.findall(_TEXT, text, re.DOTALL)]
    if text.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return text.split("|")


def _without_letters(given: Sequence[str], where: str, ledger: Ledger) -> list[str]:
    """The options without their own letters (``A) red``, ``B: blue``), since the prompt puts letters before them.

    Letters are removed only if all options have them, in order; ``A. baumannii`` may be a name.
    """
    marks = [re.match(rf"\(?{letter}\)\s*|{letter}:\s+", text) for letter, text in zip(LETTERS, given, strict=False)]
    found = [mark for mark in marks if mark]
    if len(found) < max(2, len(given)):
        return list(given)
    ledger.mend("options came with letters: these were removed", where)
    return [text[mark.end() :] for text, mark in zip(given, found, strict=True)]


def _letter(
    row: Mapping[str, Any],
    column: str,
    given: Sequence[str],
    texts: Sequence[str],
    options: Sequence[str],
    where: str,
    ledger: Ledger,
) -> str:
    """The letter of the option that a cell's answer names by its text, as ``given`` or in ``texts``, or its letter."""
    if _NUMBER.fullmatch(str(row.get(column))):
        raise RowError(
            "the answer is a number",
            f"{where}: {column} is the number {row[column]}, which may be an option's text or count options from 0 or "
            "from 1, expected the letter of an option, or its text if that is not a number.",
        )
    answer = text_of(row, column, where, ledger)
    as_given = {same_text(one): same_text(text) for one, text in zip(given, texts, strict=True)}
    meant = {as_given.get(same_text(answer), same_text(answer))}
    if len(answer) == 1 and (letter := answer.upper()) in LETTERS[: len(texts)]:
        meant.add(same_text(texts[LETTERS.index(letter)]))
        meant |= {as_given[same_text(one)] for one in given if (mark := _MARKED.match(one)) and mark[1] == letter}
    found = [letter for letter, option in zip(LETTERS, options, strict=False) if same_text(option) in meant]
    if len(found) != 1:
        reason = (
            "the answer is one option's letter and another's text" if found else "the answer is not among the options"
        )
        listed = ", ".join(map(repr, options))
        raise RowError(reason, f"{where}: {column} is {answer!r}, expected the letter or the text of one of {listed}.")
    return found[0]


def _category(text: str, where: str) -> str:
    name = " ".join(text.split())
    if name.startswith("Avg."):
        raise RowError("category Avg.", f"{where}: category {name!r} is a name for averages, expected another name.")
    return name


def _split(text: str, where: str) -> str:
    if text and text.lower() not in SPLITS:
        raise RowError("unknown split", f"{where}: split {text!r} is unknown, expected train, validation or test.")
    return SPLITS.get(text.lower(), "")
