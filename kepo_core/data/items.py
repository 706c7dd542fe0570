"""The items of a study as a small file of ids, so that others can train and test on the same ones."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from kepo_core.data.records import Question, categories
from kepo_core.data.splits import image_key
from kepo_core.errors import DataError

COLUMNS = ("part", "modality", "id", "image")


def write_items(path: Path, train: Sequence[Question], tests: Mapping[str, Sequence[Question]]) -> None:
    """Write ``path``: a row per item, ``train`` or ``eval``, with its id and (for people) modality and image."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for part, questions in (("train", train), *(("eval", rows) for rows in tests.values())):
            writer.writerows((part, q.modality, q.id, image_key(q)) for q in questions)


def read_images(path: Path) -> dict[str, str]:
    """Question id → image of the evaluated items that ``path`` names; empty if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    return {row["id"]: row["image"] for row in rows if row.get("part") == "eval" and row.get("id") and row.get("image")}


def read_items(
    path: Path, questions: Sequence[Question], train_modality: str, train_items: int, eval_items: int
) -> tuple[list[Question], dict[str, list[Question]]]:
    """The items that ``path`` names, in its order, as `splits.study_split` returns them.

    At most ``train_items``, and ``eval_items`` per modality: the first ones. Raises ``DataError`` naming file and row
    for anything but ids of ``questions``, each once, with training items of ``train_modality``.
    """
    by_id = {question.id: question for question in questions}
    found: dict[str, dict[str, Question]] = {"train": {}, "eval": {}}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"items_file {path}: cannot be read ({error}), expected the items.csv of a run.") from error
    for number, row in enumerate(rows, start=2):
        where, part, name = f"items_file {path}, line {number}", row.get("part"), row.get("id")
        if part not in found or not name:
            raise DataError(f"{where}: part {part!r} and id {name!r}, expected train or eval and the id of a question.")
        if name not in by_id:
            raise DataError(
                f"{where}: question {name} is not in data_root, expected the data that the file was made from."
            )
        if name in found["train"] or name in found["eval"]:
            raise DataError(f"{where}: question {name} appears twice, expected each once.")
        if part == "train" and by_id[name].modality != train_modality:
            raise DataError(
                f"{where}: question {name} is {by_id[name].modality}, expected train_modality {train_modality}."
            )
        found[part][name] = by_id[name]
    if not found["train"] or not found["eval"]:
        raise DataError(f"items_file {path}: no train or no eval items, expected {','.join(COLUMNS)} and rows of both.")
    asked = list(found["eval"].values())
    tests = {name: [q for q in asked if q.modality == name] for name in categories(q.modality for q in asked)}
    return list(found["train"].values())[:train_items], {name: rows[:eval_items] for name, rows in tests.items()}
