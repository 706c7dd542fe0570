"""Tables of your own data, from files, a ``datasets`` folder or the Hub → parts with rows to read."""

import csv
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kepo_core.data.ledger import reason_of
from kepo_core.data.omnimedvqa import json_rows
from kepo_core.data.source import cache_dir
from kepo_core.errors import DataError

#: Names of parts of a data set, and which of the three splits each is.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}  # fmt: skip
SUFFIXES = (".csv", ".jsonl", ".parquet")
REQUIRED = ("image", "question", "options", "answer")
ROLES = (*REQUIRED, "id", "category", "question_type", "split")

Columns = Mapping[str, Sequence[str]]  # one of ROLES → the columns that hold it; several only of options

_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True)
class Part:
    """One table: a file or a part of a data set. ``rows`` are a list, or a ``datasets.Dataset`` in Arrow's format.

    ``labels``: column of a data set → the names that its numbers mean.
    """

    name: str
    columns: Sequence[str]
    rows: Any
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _single: dict[str, "_Mapped"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def split(self) -> str:
        """The split that the name gives, also for files sharded as on the Hub and for slices; "" if it gives none."""
        found = re.fullmatch(r"([a-z]+)(-\d+-of-\d+)?(\[[^\]]*\])?(\.\w+)?", self.name.lower())
        return SPLITS.get(found[1], "") if found else ""

    def read(self, columns: Sequence[str]) -> Iterator[Any]:
        """The rows in their order; of a data set, only these columns."""
        if isinstance(self.rows, list):
            yield from self.rows
            return
        named = {column: dict(enumerate(self.labels[column])) for column in columns if column in self.labels}
        mapped = _Mapped(self.rows, columns)
        for start in range(0, len(self.rows), 32):
            for row in mapped[start : start + 32]:
                yield row | {column: names.get(row[column]) for column, names in named.items()}

    def cell(self, index: int, column: str) -> Any:
        """One cell of a data set."""
        if column not in self._single:
            self._single[column] = _Mapped(self.rows, [column])
        return self._single[column][index : index + 1][0][column]


class _Mapped:
    """Some columns of a ``datasets.Dataset``, read without keeping all of its files in memory.

    Bytes read through a mapped file count as memory of the process until the mapping is closed, so the file is mapped
    again after every `_MOST` bytes.
    """

    _MOST = 32 * 2**20  # bytes

    def __init__(self, dataset: Any, columns: Sequence[str]) -> None:
        self._dataset = dataset.select_columns(list(dict.fromkeys(columns)))
        self._read, self._mapped = 0, self._dataset

    def __getitem__(self, rows: slice) -> list[dict[str, Any]]:
        table = self._mapped[rows]
        self._read += table.nbytes
        if self._read > self._MOST and self._dataset.cache_files:
            self._read, self._mapped = 0, pickle.loads(pickle.dumps(self._dataset))  # maps its files again
        found: list[dict[str, Any]] = table.to_pylist()
        return found


def parse_columns(text: str) -> dict[str, str]:
    """``"question=stem, options=A+B+C"`` → for each role (one of `ROLES`), the name of its column or columns.

    Raises ``DataError`` for anything else.
    """
    found: dict[str, str] = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        role, _, name = (part.strip() for part in pair.partition("="))
        if role not in ROLES or not name or role in found:
            raise DataError(
                f"data_columns: {pair!r} is not understood, expected some of {', '.join(ROLES)}, each once, as in "
                "question=NAME, options=A+B+C."
            )
        found[role] = name
    return found


def find_columns(given: Mapping[str, str], part: Part, root: Path) -> Columns:
    """The columns of a table. Raises ``DataError`` naming the missing columns and the existing ones."""
    found: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for role in ROLES:
        name = given.get(role, role)
        if role == "image" and role not in given and "image" not in part.columns and "images" in part.columns:
            name = "images"
        names = [name] if name in part.columns or role != "options" else [one.strip() for one in name.split("+")]
        if absent := [one for one in names if one not in part.columns]:
            if role in given or role in REQUIRED:
                missing[role] = ", ".join(absent)
        else:
            found[role] = names
    if missing:
        raise DataError(
            f"data_root {root}: {part.name} has no column {', '.join(missing.values())}; its columns are "
            f"{', '.join(part.columns) or 'none'}. Expected {', '.join(REQUIRED)}; set data_columns for columns of "
            f"other names: {', '.join(f'{role}=NAME' for role in missing)}."
        )
    return found


def table_files(folder: Path) -> list[Path]:
    """The tables directly in a folder, in name order."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted(file for file in files if file.is_file())


def read_file(file: Path) -> Part:
    """A CSV, JSON lines or Parquet file. Raises ``DataError`` if it cannot be read."""
    if file.suffix.lower() == ".parquet":
        from datasets import Dataset

        dataset = _loaded(
            f"{file.name}", lambda: Dataset.from_parquet(str(file), cache_dir=str(cache_dir() / "tables"))
        )
        return _part(file.name, dataset)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror}), expected a table.") from error
    return _csv(file.name, content) if file.suffix.lower() == ".csv" else _json_lines(file.name, content)


def _csv(name: str, content: bytes) -> Part:
    try:
        text = content.decode(json.detect_encoding(content))  # any Unicode encoding
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8, expected a table in UTF-8 or "
            'UTF-16: save it again, in a spreadsheet as "CSV UTF-8".'
        ) from error
    lines = _cells(name, text)
    columns = [column.replace("\ufeff", "").strip() for column in next(filter(any, lines), [])]
    if repeated := sorted({column for column in columns if column and columns.count(column) > 1}):
        raise DataError(f"{name}: two columns are called {repeated[0]!r}, expected each name once.")
    # A row that is longer or shorter than the header stays a list: its cells may belong to other columns.
    rows = [dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else cells for cells in lines if cells]
    return Part(name, list(filter(None, columns)), rows)


def _cells(name: str, text: str) -> Iterator[list[str]]:
    """The cells of each row. Raises ``DataError`` naming the line where an unreadable row begins."""
    first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    said = re.fullmatch(r"\ufeff?sep=(.)\s*", first)  # a line for Excel, not a row
    # Where a comma is the decimal mark, spreadsheets write semicolons; others write tabs.
    mark = said[1] if said else max(",;\t", key=re.sub('"[^"]*"', "", first).count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=mark != "\t")
    begin = 1
    try:
        for cells in lines:
            if not (said and begin == 1):
                yield cells
            begin = lines.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}, line {begin}: the row that begins here cannot be read: a quotation mark is never closed or is "
            f"not doubled inside a text, or a text is longer than {csv.field_size_limit():,} characters; put texts "
            f'with {mark!r} or quotation marks in quotation marks, and double those inside ("").'
        ) from error


def _json_lines(name: str, content: bytes) -> Part:
    rows = json_rows(name, content)
    return Part(name, list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row)), rows)


def is_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written the folder."""
    whole = (folder / "dataset_dict.json").is_file()
    return whole or all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def read_dataset(folder: Path) -> list[Part]:
    """What ``save_to_disk`` wrote. Raises ``DataError`` if it cannot be read, or names files outside of the folder."""
    from datasets import load_from_disk

    def load() -> Any:
        names = [folder]
        if (whole := folder / "dataset_dict.json").is_file():
            names = [folder / name for name in json.loads(whole.read_text("utf-8"))["splits"]]
        files = [name / file["filename"] for name in names
                 for file in json.loads((name / "state.json").read_text("utf-8"))["_data_files"]]  # fmt: skip
        if any(not file.resolve().is_relative_to(folder.resolve()) for file in files):
            raise ValueError("it names files outside of its folder")
        return load_from_disk(str(folder))

    return _parts(folder.name, _loaded(f"data_root {folder}", load))


def is_hub(data_root: object) -> bool:
    """Whether ``data_root`` names a data set of the Hub."""
    return str(data_root).startswith("hf:")


def read_hub(data_root: object) -> list[Part]:
    """A data set of the Hub, through the ``datasets`` library, which runs none of its code.

    Raises ``DataError`` if it cannot be loaded.
    """
    from datasets import load_dataset

    found = _HUB.fullmatch(str(data_root))
    if found is None:
        raise DataError(f"data_root {data_root}: not understood, expected hf:OWNER/NAME or hf:OWNER/NAME:SPLIT.")
    # This address is never read as a local folder of the same name.
    loaded = _loaded(
        f"data_root {data_root}", lambda: load_dataset(f"hf://datasets/{found['name']}", split=found["split"])
    )
    return _parts(found["split"] or "", loaded)


def _loaded(what: str, load: Callable[[], Any]) -> Any:
    """What ``load``, a function of the ``datasets`` library, returns; its many errors become one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError) as error:
        cause = reason_of(error.__cause__ or error)
        raise DataError(f"{what}: cannot be loaded by the datasets library ({cause}).") from error


def _parts(name: str, loaded: Any) -> list[Part]:
    named = loaded if isinstance(loaded, dict) else {str(loaded.split or name): loaded}
    return [_part(name, dataset) for name, dataset in named.items()]


def _part(name: str, dataset: Any) -> Part:
    from datasets import ClassLabel

    labels = {column: kind.names for column, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    return Part(name, dataset.column_names, dataset.with_format("arrow"), labels)
