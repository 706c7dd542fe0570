"""The question files that Med-R1 publishes for OmniMedVQA → typed rows.

Layout: ``<modality>_<split>.json`` anywhere below the root, each a list of objects with ``image`` (relative to the
release's folder), ``problem`` (question and options on one line: ``What is seen? A)a cyst, B)Optic disc (OD).``) and
``solution`` (``<answer> B </answer>``). Source: Lai et al., "Med-R1", arXiv 2503.13939. The pictures are those of
the raw release, in whose folder the question files may lie (see ``source.Folder``).
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.omnimedvqa import modality_name, read_rows, same_text, text_of, where_of
from kepo_core.data.records import LETTERS, MODALITIES, Question
from kepo_core.data.source import Source
from kepo_core.errors import DataError

_FILE = re.compile(r"(?P<modality>.+)_(?P<split>train|test)")
_SOLUTION = re.compile(r"<answer>\s*([A-Z])\s*</answer>")
KEYS = ("image", "problem", "solution")


def split_problem(problem: str) -> tuple[str, tuple[str, ...]]:
    """A problem's question and its options, without their letters.

    The marks stand in the order of the alphabet, ``A)`` behind a space (the last one before ``B)``), all others behind
    a comma; so the end of an acronym such as ``(ACJ OA).`` or ``(WHO A)`` is none. No marks: the whole text and no
    options.
    """
    second = re.search(r",\s*B\)", problem)
    starts = list(re.finditer(r"(?:^|\s)A\)", problem[: second.start() if second else None]))
    if not starts:
        return problem.strip(), ()
    start = starts[-1]
    question, rest, options = problem[: start.start()].strip(), problem[start.end() :], []
    for letter in LETTERS[1:]:
        mark = re.search(rf",\s*{letter}\)", rest)
        if mark is None:
            break
        options.append(rest[: mark.start()].strip())
        rest = rest[mark.end() :]
    return question, (*options, rest.strip())


def load_medr1(source: Source, ledger: Ledger | None = None, need_images: bool = True) -> list[Question]:
    """All questions of the files below the root, in name order and rows in file order.

    A file's name says the modality of its rows; where it does not (``unknown_train.json``), the modality is that of
    the same data set in other files. ``need_images=False`` takes questions whose pictures are not there. The files
    do not tell question types: they are "". ``ledger`` and errors as in ``omnimedvqa.load_raw``.
    """
    ledger = ledger or Ledger()
    files = [file for file in source.question_files() if _FILE.fullmatch(file.stem)]
    if not files:
        raise DataError(
            f"data_root {source.root}: no *_train.json or *_test.json in it, expected Med-R1's question files."
        )
    rows = [(file, index, row) for file in files for index, row in enumerate(read_rows(source, file))]
    homes = _modalities_of_datasets(rows)
    questions = []
    for file, index, row in rows:
        where = where_of(file, index, row)
        try:
            fields = _parse_row(row, where, file, homes, ledger)
            image = source.locate(text_of(row, "image", where), where, must_exist=need_images)
        except RowError as error:
            ledger.drop(error)
            continue
        questions.append(Question(id=f"{file.stem}:{index + 1}", question_type="", image=image, **fields))
    if not questions:
        raise ledger.nothing(source.root, len(rows))
    ledger.read += len(questions)
    return questions


def split_of(question: Question) -> str:
    """Either "train" or "test": the file that a question of ``load_medr1`` came from."""
    found = _FILE.fullmatch(question.id.rpartition(":")[0])
    if found is None:
        raise DataError(
            f"split: question {question.id} is in no *_train.json or *_test.json and has no split of its own, "
            "as 'given' needs."
        )
    return found["split"]


def _modality_of_file(file: PurePosixPath) -> str | None:
    found = _FILE.fullmatch(file.stem)
    return modality_name(found["modality"]) if found else None


def _dataset(row: Any) -> str:
    parts = PurePosixPath(str(row.get("image", ""))).parts if isinstance(row, Mapping) else ()
    return parts[1] if len(parts) > 2 and parts[0] == "Images" else ""


def _modalities_of_datasets(rows: list[tuple[PurePosixPath, int, Any]]) -> dict[str, set[str]]:
    homes: dict[str, set[str]] = {}
    for file, _, row in rows:
        modality = _modality_of_file(file)
        if modality is not None:
            homes.setdefault(_dataset(row), set()).add(modality)
    return homes


def _parse_row(
    row: Any, where: str, file: PurePosixPath, homes: Mapping[str, set[str]], ledger: Ledger
) -> dict[str, Any]:
    """The fields of a ``Question`` that the row tells."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"{where}: a {type(row).__name__}, expected an object with {', '.join(KEYS)}.")
    dataset, modality = _dataset(row), _modality_of_file(file)
    if modality is None:
        candidates = homes.get(dataset, set())
        if len(candidates) != 1:
            raise RowError(
                "unknown modality",
                f"{where}: {file.name} names none of {', '.join(MODALITIES)}, and no other file has {dataset!r}.",
            )
        (modality,) = candidates
        ledger.mend("the file names no modality: that of the data set was taken", where)
    problem, solution = text_of(row, "problem", where), text_of(row, "solution", where)
    question, given = split_problem(problem)
    options = tuple({same_text(option): option for option in reversed(given) if option}.values())[::-1]
    if len(options) < 2:
        raise RowError("fewer than two options", f"{where}: problem {problem!r} has not two options, expected A) B) ….")
    if len(options) < len(given):
        ledger.mend("options that say the same were kept once", where)
    found = _SOLUTION.fullmatch(solution)
    if found is None or found[1] not in LETTERS[: len(given)]:
        raise RowError(
            "the answer is not among the options",
            f"{where}: solution {solution!r} is none of the {len(given)} options, expected <answer> A </answer> or so.",
        )
    answer = same_text(given[LETTERS.index(found[1])])
    return {
        "dataset": dataset,
        "modality": modality,
        "question": question,
        "options": options,
        "answer": LETTERS[[same_text(option) for option in options].index(answer)],
    }
