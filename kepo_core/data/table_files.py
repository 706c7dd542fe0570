"""Where the tables of one's own data lie: files, a ``datasets`` folder, the Hub → parts with rows to read."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kepo_core.data.source import cache_dir
from kepo_core.errors import DataError

#: What parts of data are called, and which of the three they are.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}  # fmt: skip
SUFFIXES = (".csv", ".jsonl", ".parquet")
_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True)
class Part:
    """One table: a file or a part of a data set. ``rows`` are a list, or a ``datasets.Dataset`` in Arrow's format.

    ``labels``: of a data set, column → the names that its numbers stand for.
    """

    name: str
    columns: Sequence[str]
    rows: Any
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The part that the name says, also of files sharded as on the Hub, and of slices; "" if none."""
        found = re.fullmatch(r"([a-z]+)(-\d+-of-\d+)?(\[[^\]]*\])?(\.\w+)?", self.name.lower())
        return SPLITS.get(found[1], "") if found else ""

    def read(self, columns: Sequence[str]) -> Iterator[Any]:
        """The rows in their order; of a data set, these columns alone."""
        if isinstance(self.rows, list):
            yield from self.rows
            return
        named = {column: dict(enumerate(self.labels[column])) for column in columns if column in self.labels}
        for batch in self.rows.select_columns(list(dict.fromkeys(columns))).iter(32):
            for row in batch.to_pylist():
                yield row | {column: names.get(row[column]) for column, names in named.items()}

    def cell(self, index: int, column: str) -> Any:
        """One cell of a data set."""
        return self.rows.select_columns([column])[index].to_pylist()[0][column]


def table_files(folder: Path) -> list[Path]:
    """The tables right in a folder, in name order."""
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
        text = file.read_bytes().decode("utf-8-sig")
        return _csv(file.name, text) if file.suffix.lower() == ".csv" else _json_lines(file.name, text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file.name}: cannot be read ({error}), expected a table in UTF-8.") from error


def _csv(name: str, text: str) -> Part:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    columns = [column.strip() for column in next(lines, [])]
    if repeated := sorted({column for column in columns if columns.count(column) > 1}):
        raise DataError(f"{name}: two columns are called {repeated[0]!r}, expected each name once.")
    # A row that is longer or shorter than the first is no mapping: its texts may stand in each other's place.
    rows = [dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else cells for cells in lines if cells]
    return Part(name, columns, rows)


def _json_lines(name: str, text: str) -> Part:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at what JSON has in texts
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name}, line {number}: not valid JSON ({error}), expected an object.") from error
    return Part(name, list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row)), rows)


def is_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written it."""
    whole = (folder / "dataset_dict.json").is_file()
    return whole or all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def read_dataset(folder: Path) -> list[Part]:
    """What ``save_to_disk`` wrote. Raises ``DataError`` if it cannot be read, or names files outside of itself."""
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
    """Whether it names a data set of the Hub."""
    return str(data_root).startswith("hf:")


def read_hub(data_root: object) -> list[Part]:
    """A data set of the Hub, through the ``datasets`` library, which runs no code of it.

    Raises ``DataError`` if it cannot be had.
    """
    from datasets import load_dataset

    found = _HUB.fullmatch(str(data_root))
    if found is None:
        raise DataError(f"data_root {data_root}: not understood, expected hf:OWNER/NAME or hf:OWNER/NAME:SPLIT.")
    # By this address it is never taken from a folder that happens to be called the same.
    loaded = _loaded(
        f"data_root {data_root}", lambda: load_dataset(f"hf://datasets/{found['name']}", split=found["split"])
    )
    return _parts(found["split"] or "", loaded)


def _loaded(what: str, load: Callable[[], Any]) -> Any:
    """What the ``datasets`` library loads; its errors, of many kinds, in one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{what}: cannot be loaded by the datasets library ({cause}).") from error


def _parts(name: str, loaded: Any) -> list[Part]:
    named = loaded if isinstance(loaded, dict) else {str(loaded.split or name): loaded}
    return [_part(name, dataset) for name, dataset in named.items()]


def _part(name: str, dataset: Any) -> Part:
    from datasets import ClassLabel

    labels = {column: kind.names for column, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    return Part(name, dataset.column_names, dataset.with_format("arrow"), labels)
