"""Questions in any layout → typed rows."""

from collections import Counter
from pathlib import Path

from kepo_core.data.ledger import Ledger
from kepo_core.data.medr1 import KEYS, load_medr1
from kepo_core.data.omnimedvqa import load_raw, read_rows
from kepo_core.data.records import Question
from kepo_core.data.source import QA_FOLDER, Folder, Source, open_source
from kepo_core.data.table import Tables, load_table, open_tables, tables_in
from kepo_core.data.table_files import SUFFIXES
from kepo_core.errors import DataError


def open_data(data_root: str | Path, columns: str = "", follow_links: bool = False) -> Source:
    """Open what the parameters ``data_root`` and ``data_columns`` name: a folder, an archive, or your own tables.

    ``follow_links``: see ``source.Folder``. Raises ``DataError`` if nothing is found, or a table lacks a column.
    """
    own = open_tables(data_root, columns, follow_links)
    if own is not None:
        return own
    source = open_source(Path(data_root), follow_links)
    if isinstance(source, Folder) and _benchmark(source) is None:
        own = tables_in(source.root, columns, follow_links)
    if columns and own is None:
        raise DataError(
            f"data_columns: {columns!r} names columns, but there is no table in {source.root}; leave it empty."
        )
    return own or source


def layout_of(source: Source) -> str:
    """Either "raw" (OmniMedVQA's release), "medr1" (Med-R1's question files), or "table".

    Raises ``DataError`` if it is none of these; the message names a folder nearby that is, if there is one.
    """
    layout = "table" if isinstance(source, Tables) else _benchmark(source)
    if layout is None:
        raise DataError(
            f"data_root {source.root}: holds neither {QA_FOLDER}/*.json (OmniMedVQA's release) nor *_train.json and "
            f"*_test.json with {', '.join(KEYS)} (Med-R1's files) nor a table (CSV, JSON lines, Parquet), "
            f"expected one of them{_nearby(source.root)}."
        )
    return layout


def _benchmark(source: Source) -> str | None:
    if any(file.parent == QA_FOLDER for file in source.question_files(QA_FOLDER)):
        return "raw"
    for file in source.question_files():
        try:
            rows = read_rows(source, file)
        except DataError:
            continue  # if it is a question file, reading it later says what is wrong
        if rows and isinstance(rows[0], dict) and set(KEYS) <= set(rows[0]):
            return "medr1"
    return None


def _nearby(root: Path) -> str:
    releases = (folder.parents[1] for folder in root.glob(f"*/{QA_FOLDER}"))
    tables = (file.parent for file in root.glob("*/*") if file.suffix.lower() in SUFFIXES)
    inside = min([*releases, *root.glob("OmniMedVQA*.zip"), *tables], default=None)
    above = next((folder for folder in root.parents[:3] if (folder / QA_FOLDER).is_dir()), None)
    meant = inside or above
    return f"; did you mean {meant}?" if meant else ""


def load_questions(root: Path | Source, ledger: Ledger | None = None, need_images: bool = True) -> list[Question]:
    """All questions of a folder, an archive or an opened source, in any layout.

    See ``load_raw``, ``load_medr1`` and ``load_table``.
    """
    source, ledger = open_data(root) if isinstance(root, Path) else root, ledger or Ledger()
    if isinstance(source, Tables):
        questions = load_table(source, ledger)
    elif layout_of(source) == "raw":
        questions = load_raw(source, ledger)
    else:
        questions = load_medr1(source, ledger, need_images)
    for file in source.other_files():
        below = isinstance(source, Tables) and file.suffix.lower() in SUFFIXES
        reason = "a table in a subfolder, where none is read" if below else "a file of a kind that is not read"
        ledger.leave_out(reason, str(file))
    twice = [question_id for question_id, count in Counter(q.id for q in questions).items() if count > 1]
    if twice:  # answers are identified by it
        raise DataError(
            f"data_root {source.root}: {len(twice)} ids are used twice, {twice[0]!r} first, expected unique ones."
        )
    return questions
