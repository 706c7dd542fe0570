"""The question files that Med-R1 publishes for OmniMedVQA → typed rows.

Layout: ``<modality>_<split>.json`` anywhere below the root (split: train, val or test), each a list of objects with
``image`` (relative to the release's folder), ``problem`` (question and options on one line: ``What is seen? A)a cyst,
B)Optic disc (OD).``) and ``solution`` (``<answer> B </answer>``). Source: Lai et al., "Med-R1", arXiv 2503.13939. The
pictures are those of the raw release, in whose folder the question files may lie (see ``source.Folder``).
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.omnimedvqa import leave_out, modality_name, read_rows, same_text, text_of, where_of
from kepo_core.data.records import LETTERS, MODALITIES, QUESTION_TYPES, Question
from kepo_core.data.source import Source, picture_name
from kepo_core.errors import DataError

_FILE = re.compile(r"(?P<name>.+)_(?P<split>train|val|validation|test)")
_SOLUTION = re.compile(r"<answer>\s*([A-Z])\s*</answer>")
_MARK = re.compile(r",\s*[A-Z]\)")
KEYS = ("image", "problem", "solution")
_TYPES = {re.sub(r"\W", "", name).lower(): name for name in QUESTION_TYPES}


def split_problem(problem: str) -> tuple[str, tuple[str, ...]]:
    """A problem's question and its options, without their letters.

    The marks come in alphabetical order: ``A)`` after a space (the last one before ``B)``), all others after a comma.
    So the end of an acronym, such as ``(ACJ OA).`` or ``(WHO A)``, is not a mark. Without marks: the whole text and no
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

    A file's name gives the modality of its rows; if it does not (``unknown_train.json``), they have the modality of
    the same data set in other files. Med-R1 also splits by question type. A question that is in a modality's file and
    in a type's file is read once, with the type from the file's name; all other question types are "". Skipped are a
    file with the name and rows of another (a backup), and a question that a file of another name has for the same
    modality and split. ``need_images=False`` accepts questions whose pictures are missing. ``ledger`` and errors as in
    ``omnimedvqa.load_raw``; also raises ``DataError`` for two files of one name and different rows.
    """
    ledger = ledger or Ledger()
    rows = _rows(source, ledger)
    homes, types = _modalities_of_datasets(rows), _question_types(rows, ledger)
    questions, homes_of = [], dict[tuple[Any, ...], PurePosixPath]()
    for file, index, row in rows:
        if _type_of_file(file) and _asked(row) in types:
            continue
        where = where_of(file, index, row)
        try:
            fields = _parse_row(row, where, file, homes, ledger)
            name = text_of(row, "image", where, ledger)
            image = source.locate(name, where, must_exist=need_images)
        except RowError as error:
            ledger.drop(error)
            continue
        split = file.stem.rpartition("_")[2]
        if homes_of.setdefault((fields["modality"], split, *_asked(row)), file) != file:
            ledger.leave_out("a question that is also in another file of its modality and split", where)
            continue
        question_type = types.get(_asked(row)) or _type_of_file(file)
        fields |= {"image": image, "image_name": picture_name(name), "question_type": question_type}
        questions.append(Question(id=f"{file.stem}:{index + 1}", **fields))
    if not questions:
        raise ledger.nothing(source.root, len(rows))
    ledger.read += len(questions)
    return questions


def split_of(question: Question) -> str:
    """One of "train", "validation" and "test": the file that a question of ``load_medr1`` came from."""
    found = _FILE.fullmatch(question.id.rpartition(":")[0])
    if found is None:
        raise DataError(
            f"split: 'given' needs a split of each question, but {question.id} has none and is in no *_train.json or "
            "*_test.json: set split to image or question."
        )
    return "validation" if found["split"].startswith("val") else found["split"]


_Row = tuple[PurePosixPath, int, Any]


def _rows(source: Source, ledger: Ledger) -> list[_Row]:
    """The rows of all question files, each file name once; rows of other files are counted as skipped."""
    rows: list[_Row] = []
    kept: dict[str, tuple[PurePosixPath, list[Any]]] = {}
    everything = source.question_files()
    files = sorted((f for f in everything if _FILE.fullmatch(f.stem)), key=lambda file: (len(file.parts), file))
    for file in files:
        own = read_rows(source, file)
        first, other = kept.setdefault(file.stem, (file, own))
        if first == file:
            continue
        if other != own:
            raise DataError(
                f"data_root {source.root}: {first} and {file} have the same name and different rows, expected one of "
                "them: questions are identified by the names of their files."
            )
        for index in range(len(own)):
            ledger.leave_out("in a second file of the same name and rows", f"{file}, row {index + 1}")
    if not files:
        raise DataError(
            f"data_root {source.root}: no *_train.json or *_test.json in it, expected Med-R1's question files."
        )
    for file, own in sorted(kept.values()):
        rows += ((file, index, row) for index, row in enumerate(own))
    for file in everything:
        if file not in files and "Images" not in file.parts:  # files among pictures describe the pictures
            leave_out(source, file, "in a file that is neither *_train, *_val nor *_test", set(KEYS), ledger)
    return rows


def _modality_of_file(file: PurePosixPath) -> str | None:
    found = _FILE.fullmatch(file.stem)
    return modality_name(found["name"]) if found else None


def _type_of_file(file: PurePosixPath) -> str:
    found = _FILE.fullmatch(file.stem)
    return _TYPES.get(re.sub(r"[\W_]+", "", found["name"]).lower(), "") if found else ""


def _asked(row: Any) -> tuple[str, ...]:
    """What makes two rows the same question."""
    if not isinstance(row, Mapping):
        return ()
    image, problem, solution = (str(row.get(key)).strip() for key in KEYS)
    found = _SOLUTION.fullmatch(solution)
    return picture_name(image), " ".join(problem.split()), found[1] if found else solution


def _question_types(rows: list[_Row], ledger: Ledger) -> dict[tuple[str, ...], str]:
    """The types of questions that are in a modality's file and in a type's file; the latter rows count as skipped."""
    own = {_asked(row) for file, _, row in rows if _modality_of_file(file)}
    types = {}
    for file, index, row in rows:
        if (question_type := _type_of_file(file)) and (asked := _asked(row)) in own:
            types[asked] = question_type
            ledger.leave_out("a question that is also in a modality's file", where_of(file, index, row))
    return types


def _dataset(row: Any) -> str:
    name = picture_name(str(row.get("image", "")).strip()) if isinstance(row, Mapping) else ""
    parts = PurePosixPath(name).parts
    return parts[1] if len(parts) > 2 and parts[0] == "Images" else ""


def _modalities_of_datasets(rows: list[_Row]) -> dict[str, set[str]]:
    homes: dict[str, set[str]] = {}
    for file, _, row in rows:
        modality = _modality_of_file(file)
        if modality is not None and (dataset := _dataset(row)):
            homes.setdefault(dataset, set()).add(modality)
    return homes


def _parse_row(
    row: Any, where: str, file: PurePosixPath, homes: Mapping[str, set[str]], ledger: Ledger
) -> dict[str, Any]:
    """The fields of a ``Question`` that the row gives."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"{where}: a {type(row).__name__}, expected an object with {', '.join(KEYS)}.")
    dataset, modality = _dataset(row), _modality_of_file(file)
    if modality is None:
        candidates = homes.get(dataset, set())
        if len(candidates) != 1:
            raise RowError(
                "unknown modality",
                f"{where}: {file.name} names none of {', '.join(MODALITIES)}, nor do other files of {dataset!r}.",
            )
        (modality,) = candidates
        ledger.mend("the file names no modality: taken from the data set", where)
    problem, solution = text_of(row, "problem", where, ledger), text_of(row, "solution", where, ledger)
    question, given = split_problem(problem)
    options = tuple({same_text(option): option for option in reversed(given) if option}.values())[::-1]
    if len(options) < 2:
        raise RowError("fewer than two options", f"{where}: problem {problem!r} has fewer than A) and B).")
    if odd := next(filter(_MARK.search, given), None):
        raise RowError(
            "an option's letter is out of order",
            f"{where}: option {odd!r} contains the mark of another, expected A), B), C) and so on in order.",
        )
    if len(options) < len(given):
        ledger.mend("options that say the same were kept once", where)
    found = _SOLUTION.fullmatch(solution)
    if found is None or found[1] not in LETTERS[: len(given)]:
        raise RowError(
            "the answer is not among the options",
            f"{where}: solution {solution!r} names none of the {len(given)} options, expected <answer> A </answer> or "
            "another letter.",
        )
    answer = same_text(given[LETTERS.index(found[1])])
    return {
        "dataset": dataset,
        "modality": modality,
        "question": question,
        "options": options,
        "answer": LETTERS[[same_text(option) for option in options].index(answer)],
    }
