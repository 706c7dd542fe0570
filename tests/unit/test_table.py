"""Your own data: tables, ``datasets`` folders and Hub names give the same questions, and name unusable rows."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kepo_core.cli import main
from kepo_core.data.images import load_image
from kepo_core.data.ledger import Ledger
from kepo_core.data.loading import layout_of, load_questions, open_data
from kepo_core.data.records import Question
from kepo_core.data.source import Folder
from kepo_core.data.splits import image_key, split_as_given, split_by_image
from kepo_core.data.table import Tables
from kepo_core.data.table_files import _Mapped, parse_columns
from kepo_core.errors import DataError

OPTIONS = ["red", "green", "blue, or so"]


def colour(i: int) -> tuple[int, int, int]:
    return ((40 * i) % 256, 80, 200)


def png(i: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), colour(i)).save(content, "PNG")
    return content.getvalue()


def rows() -> list[dict[str, Any]]:
    """Ten questions about nine pictures: the last two ask about the same one."""
    return [
        {"id": f"q{i}", "image": f"pics/{min(i, 8)}.png", "question": "Which colour?", "options": OPTIONS,
         "answer": OPTIONS[i % 3] if i % 2 else "ABC"[i % 3], "category": ("birds", "ants")[i % 2],
         "question_type": "colour", "split": "test" if i > 6 else "train"}
        for i in range(10)
    ]  # fmt: skip


def in_bytes() -> list[dict[str, Any]]:
    """The same, with pictures as in ``datasets``."""
    return [row | {"image": {"bytes": png(min(i, 8)), "path": None}} for i, row in enumerate(rows())]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "cache"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the nine pictures."""
    (tmp_path / "own/pics").mkdir(parents=True)
    for i in range(9):
        (tmp_path / f"own/pics/{i}.png").write_bytes(png(i))
    return tmp_path / "own"


def lists_as(write: Callable[[list[str]], str]) -> pd.DataFrame:
    return pd.DataFrame([row | {"options": write(row["options"])} for row in rows()])


def dataset(given: list[dict[str, Any]]) -> Any:
    from datasets import ClassLabel, Dataset, Image

    made = Dataset.from_list(given).cast_column("image", Image())
    return made.cast_column("category", ClassLabel(names=["ants", "birds"]))


def saved_in_two(own: Path) -> None:
    from datasets import DatasetDict

    given = [{name: value for name, value in row.items() if name != "split"} for row in in_bytes()]
    DatasetDict({"train": dataset(given[:7]), "test": dataset(given[7:])}).save_to_disk(str(own))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "csv": lambda own: lists_as(" | ".join).to_csv(own / "t.csv", index=False),
    "csv with json": lambda own: lists_as(json.dumps).to_csv(own / "t.csv", index=False),
    "csv as pandas writes lists": lambda own: pd.DataFrame(rows()).to_csv(own / "t.csv", index=False),
    "csv of a spreadsheet": lambda own: lists_as("|".join).to_csv(own / "t.CSV", index=False, encoding="utf-8-sig"),
    "json lines": lambda own: pd.DataFrame(rows()).to_json(own / "t.jsonl", orient="records", lines=True),
    "parquet": lambda own: pd.DataFrame(rows()).to_parquet(own / "t.parquet"),
    "parquet with pictures": lambda own: dataset(in_bytes()).to_parquet(str(own / "t.parquet")),
    "datasets": lambda own: dataset(in_bytes()).save_to_disk(str(own)),
    "datasets in two": saved_in_two,
}


def essence(questions: list[Question]) -> list[tuple[Any, ...]]:
    return [(q.id, q.modality, q.question_type, q.question, q.options, q.answer, q.split) for q in questions]


EXPECTED = [(f"q{i}", ("birds", "ants")[i % 2], "colour", "Which colour?", tuple(OPTIONS), "ABC"[i % 3],
             "test" if i > 6 else "train") for i in range(10)]  # fmt: skip


def as_csv(own: Path, mark: str = ",", before: str = "", encoding: str = "utf-8", end: str = "\n") -> None:
    text = lists_as("|".join).to_csv(index=False, sep=mark)
    (own / "t.csv").write_bytes((before + text).replace("\n", end).encode(encoding))


#: Written by other programs and by spreadsheets in other languages.
WRITERS |= {
    "csv in UTF-16": lambda own: as_csv(own, encoding="utf-16"),
    "csv in UTF-16 without a mark": lambda own: as_csv(own, encoding="utf-16-le"),
    "csv in UTF-32": lambda own: as_csv(own, encoding="utf-32"),
    "csv with semicolons": lambda own: as_csv(own, ";"),
    "csv with semicolons, as Excel is told": lambda own: as_csv(own, ";", "sep=;\n", "utf-8-sig", "\r\n"),
    "csv with tabs, as Excel writes Unicode": lambda own: as_csv(own, "\t", encoding="utf-16", end="\r\n"),
    "csv with empty lines first": lambda own: as_csv(own, before="\n\n"),
    "csv with empty rows first": lambda own: as_csv(own, before=",,,,,,,\n"),
    "csv with old Macs' lines": lambda own: as_csv(own, end="\r"),
    "csv with two byte order marks": lambda own: as_csv(own, before="\ufeff\ufeff"),
    "csv with empty columns": lambda own: lists_as("|".join).assign(x="", y="").rename(
        columns={"x": "", "y": ""}).to_csv(own / "t.csv"),
    "csv with arrays": lambda own: lists_as(
        lambda texts: str(np.array(texts, dtype=object))).to_csv(own / "t.csv", index=False),
    "csv with letters": lambda own: lists_as(
        lambda texts: " | ".join(f"{a}) {b}" for a, b in zip("ABC", texts, strict=True))).to_csv(own / "t.csv"),
    "json lines in UTF-16": lambda own: (own / "t.jsonl").write_text(
        "\n".join(map(json.dumps, rows())), encoding="utf-16"),
    "a json list": lambda own: (own / "t.jsonl").write_text(json.dumps(rows())),
    "an indented json list": lambda own: (own / "t.jsonl").write_text(json.dumps(rows(), indent=1)),
}  # fmt: skip


@pytest.mark.parametrize("how", WRITERS)
def test_the_same_questions_and_pictures_however_they_are_written(own: Path, how: str) -> None:
    WRITERS[how](own)
    ledger = Ledger()
    source = open_data(own)
    questions = load_questions(source, ledger)
    assert essence(questions) == EXPECTED and ledger.read == 10 and layout_of(source) == "table"
    for i, question in enumerate(questions):
        source.fetch(question.image)
        assert load_image(question.image).getpixel((0, 0)) == colour(min(i, 8))
    assert len({q.image for q in questions}) == 9 == len({image_key(q) for q in questions})


def test_pictures_in_a_table_reach_the_cache_when_they_are_fetched_and_once(own: Path, cache: Path) -> None:
    WRITERS["datasets"](own)
    source = open_data(own)
    questions = load_questions(source)
    assert not (cache / "pictures").exists()
    for question in questions[-2:]:  # about one picture
        source.fetch(question.image)
    (kept,) = (cache / "pictures").iterdir()
    assert kept.read_bytes() == png(8) and questions[-1].image == kept.resolve()


def test_a_split_is_the_same_wherever_the_data_lie(own: Path, tmp_path: Path) -> None:
    WRITERS["csv"](own)
    parts = split_by_image(load_questions(own))
    shutil.move(own, tmp_path / "elsewhere")
    moved = split_by_image(load_questions(tmp_path / "elsewhere"))
    assert {name: essence(part) for name, part in parts.items()} == {n: essence(part) for n, part in moved.items()}
    assert sum(map(len, parts.values())) == 10


def test_only_what_must_be_there_must_be_there(own: Path) -> None:
    pd.DataFrame(rows())[["image", "question", "options", "answer"]].to_json(
        own / "t.jsonl", orient="records", lines=True
    )
    questions = load_questions(own)
    assert [(q.id, q.modality, q.question_type, q.split) for q in questions[:1]] == [("t.jsonl:1", "all", "", "")]
    with pytest.raises(DataError, match=r"split: .* t.jsonl:1 has none"):
        split_as_given(questions)


def test_columns_of_other_names_are_mapped_and_options_may_have_one_each(own: Path) -> None:
    table = pd.DataFrame(rows()).rename(
        columns={"image": "file", "question": "stem", "answer": "key", "category": "c,d"}
    )
    table = table.drop(columns="options").assign(**dict(zip("PQR", OPTIONS, strict=True)), S="", images=1)
    table.rename(columns={"c,d": "kind"}).to_csv(own / "t.csv", index=False)
    columns = "image=file, question = stem, options=P+Q+R+S, answer=key,category=kind"
    assert essence(load_questions(open_data(own / "t.csv", columns))) == EXPECTED
    assert main(["data", "check", str(own), "--columns", columns]) == 0
    assert main(["data", "check", str(own)]) == 2


def test_what_is_missing_is_named_with_what_was_found(own: Path) -> None:
    pd.DataFrame({"picture": ["a"], "question": ["?"], "choices": ["a | b"]}).to_csv(own / "t.csv", index=False)
    with pytest.raises(DataError) as error:
        open_data(own)
    assert str(error.value) == (
        f"data_root {own}: t.csv has no column image, options, answer; its columns are picture, question, choices. "
        "Expected image, question, options, answer; set data_columns for columns of other names: image=NAME, "
        "options=NAME, answer=NAME."
    )
    with pytest.raises(
        DataError, match=r"t.csv has no column label, kind; its columns are picture, question, choices\."
    ):
        open_data(own, "image=picture, options=choices, answer=label, category=kind")


@pytest.mark.parametrize("text", ["question", "question=", "=a", "title=a", "image=a, image=b"])
def test_names_of_columns_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"data_columns: .* is not understood, expected some of image, question"):
        parse_columns(text)


def test_columns_are_named_for_tables_alone(own: Path) -> None:
    with pytest.raises(DataError, match="neither QA_information"):
        load_questions(own)
    with pytest.raises(DataError, match="data_columns: 'answer=a' names columns, but there is no table in"):
        open_data(own, "answer=a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": ["pics/1.png", "pics/2.png"]}, "several pictures"),
        ({"image": []}, "no image"),
        ({"image": None}, "no image"),
        ({"image": "pics/none.png"}, "image missing"),
        ({"image": "../secret.png"}, "image path leaves data_root"),
        ({"image": "/etc/hostname"}, "image path leaves data_root"),
        ({"image": "iVBORw0KGgo" * 1000}, "image missing"),
        ({"image": "a\0b"}, "image path leaves data_root"),
        ({"image": {"bytes": None, "path": "../secret.png"}}, "image path leaves data_root"),
        ({"question": " "}, "no question"),
        ({"options": ["one"]}, "a single option"),
        ({"options": [f"no. {n}" for n in range(27)]}, "more options than letters"),
        ({"options": {"A": "x"}}, "options are not a list"),
        ({"options": [["a"], "b"]}, "option is not text"),
        ({"answer": 1}, "the answer is a number"),
        ({"answer": 1.0}, "the answer is a number"),
        ({"answer": " 1 ", "options": ["1", "2", "3"]}, "the answer is a number"),
        ({"answer": "-0.5", "options": ["-0.5", "2", "3"]}, "the answer is a number"),
        ({"answer": "D"}, "the answer is not among the options"),
        ({"answer": "purple"}, "the answer is not among the options"),
        ({"options": ["B", "A"], "answer": "A"}, "the answer is one option's letter and another's text"),
        ({"category": ""}, "no category"),
        ({"category": "Avg. (OOD)"}, "category Avg."),
        ({"split": "holdout"}, "unknown split"),
        ({"id": None}, "no id"),
        ("no object", "not a cell for each column"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_counted(own: Path, change: Any, reason: str) -> None:
    (own.parent / "secret.png").write_bytes(png(0))
    given = [rows()[0] | change if isinstance(change, dict) else change, *rows()[1:]]
    (own / "t.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    ledger = Ledger(strict=False)
    assert essence(load_questions(open_data(own), ledger)) == EXPECTED[1:]
    assert {why: len(told) for why, told in ledger.dropped.items()} == {reason: 1}
    with pytest.raises(DataError, match=r"t\.jsonl, row 1: "):
        load_questions(open_data(own))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_number_is_no_answer_in_any_kind_of_table(own: Path, ending: str) -> None:
    table = pd.DataFrame([row | {"options": "1|2|3 of 4", "answer": 1} for row in rows()[:3]])
    write = {"csv": lambda path: table.to_csv(path, index=False), "parquet": table.to_parquet,
             "jsonl": lambda path: table.to_json(path, orient="records", lines=True)}[ending]  # fmt: skip
    write(own / f"t.{ending}")
    with pytest.raises(DataError, match=r"answer is the number 1, .* expected the letter of an option, or its text"):
        load_questions(own)
    table["answer"] = ["B", "3 of 4", "a"]
    write(own / f"t.{ending}")
    assert [question.answer for question in load_questions(own)] == ["B", "C", "A"]


def write_parts(own: Path, **parts: list[dict[str, Any]]) -> None:
    for name, given in parts.items():
        (own / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")


def test_ids_that_restart_in_each_table_get_its_name_and_no_row_is_lost(own: Path) -> None:
    given = [{name: value for name, value in row.items() if name != "split"} for row in rows()]
    again = [row | {"id": f"q{i}"} for i, row in enumerate(given[6:])]
    write_parts(own, train=[*given[:6], given[2]], test=again)
    ledger = Ledger(strict=False)
    questions = load_questions(open_data(own), ledger)
    assert [q.id for q in questions] == [*(f"test.jsonl:q{i}" for i in range(4)),
                                         *(f"train.jsonl:q{i}" for i in range(6))]  # fmt: skip
    assert [q.question_type for q in questions] == ["colour"] * 10 and ledger.read == 10
    assert {why: len(told) for why, told in ledger.dropped.items()} == {"a duplicate row": 1}
    assert {why: len(told) for why, told in ledger.mended.items()} == {
        "two tables share an id: the table's name was put in front of all ids": 10
    }
    write_parts(own, test=[row | {"id": f"r{row['id']}"} for row in again])
    assert {q.id for q in load_questions(own)} == {*(f"rq{i}" for i in range(4)), *(f"q{i}" for i in range(6))}


def test_an_id_of_different_rows_of_one_table_is_refused_by_its_name(own: Path) -> None:
    write_parts(own, train=[*rows()[:5], rows()[5] | {"id": "q1"}])
    with pytest.raises(DataError, match=r"1 ids are used by different rows of one table \(q1\), expected one row each"):
        load_questions(open_data(own), Ledger(strict=False))


def test_a_comma_without_quotation_marks_moves_no_text_into_anothers_place(own: Path) -> None:
    lines = [
        "image,question,options,answer",
        "pics/0.png,Which, if any?,a | b,A",
        'pics/1.png,"Which, if any?",a | b,A',
    ]
    (own / "t.csv").write_text("\n".join([*lines, "pics/2.png,Which?,a | b", ""]), encoding="utf-8")
    ledger = Ledger(strict=False)
    (question,) = load_questions(open_data(own), ledger)
    assert question.question == "Which, if any?" and question.id == "t.csv:2"
    assert len(ledger.dropped["not a cell for each column"]) == 2


def test_a_letter_is_that_of_the_option_as_it_was_given(own: Path) -> None:
    """Also if an empty option before it, or one with the same text, is skipped."""
    given = [("|a|b", "C", "B"), ("a|A.|b", "C", "B"), ("x|y|I", "I", "C"), ("a|b", "b", "B")]
    pd.DataFrame(
        [{"image": "pics/0.png", "question": "?", "options": o, "answer": a} for o, a, _ in given]
    ).to_csv(own / "t.csv", index=False)  # fmt: skip
    assert [q.answer for q in load_questions(own)] == [right for *_, right in given]


def test_options_with_letters_of_their_own_do_not_get_two_and_no_answer_means_another(own: Path) -> None:
    """A letter may be an option's place or precede its text: if these are two options, it is not an answer."""
    given = [
        ("A) x | B) y", "B", ("x", "y"), "B"),
        ("(A) x | (B) y | (C) z", "(C) z", ("x", "y", "z"), "C"),
        ("A: x | B: y", "x", ("x", "y"), "A"),
        ("A. baumannii | B. cereus", "B", ("A. baumannii", "B. cereus"), "B"),
        ("C. albicans | E. coli | A. fumigatus", "E. coli", ("C. albicans", "E. coli", "A. fumigatus"), "B"),
        ("B) y | A) x", "B", (), ""),
        ("C. albicans | E. coli | A. fumigatus", "A", (), ""),
        ("x | B: a type | y", "b", ("x", "B: a type", "y"), "B"),
        ("x | y | (B) z", "B", (), ""),
    ]  # fmt: skip
    table = [
        {"image": "pics/0.png", "question": f"{i}?", "options": o, "answer": a} for i, (o, a, *_) in enumerate(given)
    ]
    pd.DataFrame(table).to_csv(own / "t.csv", index=False)
    ledger = Ledger(strict=False)
    read = {q.question: (q.options, q.answer) for q in load_questions(open_data(own), ledger)}
    assert read == {
        f"{i}?": tuple(right) for i, (*_, options, letter) in enumerate(given) if (right := (options, letter))[0]
    }
    assert {reason: len(found) for reason, found in ledger.dropped.items()} == {
        "the answer is one option's letter and another's text": 3
    }
    assert len(ledger.mended["options came with letters: these were removed"]) == 3


def memory_of_files() -> float:
    """Megabytes of files mapped into this process's memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("ending", ["parquet", "datasets"])
def test_pictures_in_a_table_are_read_without_keeping_them_in_memory(
    own: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    given = [row | {"id": str(i), "image": bytes([i % 256, i // 256]) * 15_000}
             for i, row in enumerate(rows() * 150)]  # fmt: skip
    data = Dataset.from_list(given)
    data.to_parquet(str(own / "t.parquet")) if ending == "parquet" else data.save_to_disk(str(own))
    monkeypatch.setattr(_Mapped, "_MOST", 2**21)
    source = open_data(own)
    before = memory_of_files()
    questions = load_questions(source)
    assert len(questions) == 1500 and memory_of_files() - before < 20  # of 45
    assert all(source.content(q.image) == row["image"] for q, row in zip(questions, given, strict=True))
    assert memory_of_files() - before < 20


def test_looking_at_a_picture_in_a_table_does_not_choose_its_column_each_time(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    WRITERS["datasets"](own)
    source = open_data(own)
    questions = load_questions(source)
    calls = []
    choose = Dataset.select_columns
    monkeypatch.setattr(Dataset, "select_columns", lambda self, names: calls.append(names) or choose(self, names))
    assert [source.content(q.image) for q in questions] == [png(min(i, 8)) for i in range(10)]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"", "t.csv has no column image, question, options, answer; its columns are none"),
        ("t.csv", b"image,question,options,answer\n", "its question files hold no rows"),
        ("t.csv", "image,question,options,answer\nä".encode("latin-1"), "t.csv, line 2: byte 0xe4 is not UTF-8"),
        ("t.csv", "image,question\na,b\n\n,ö".encode("cp1252"), "t.csv, line 4: byte 0xf6 is not UTF-8"),
        ("t.csv", b"PK\x03\x04\x80", "t.csv, line 1: byte 0x80 is not UTF-8"),  # a workbook
        ("t.csv", b"image,image,question\n", "t.csv: two columns are called 'image'"),
        ("t.csv", b'image,question\n"a', "t.csv, line 2: the row that begins here cannot be read"),
        ("t.csv", b'a,b\n1,2\n\n3,"x\n' + b"5,6\n" * 40_000, "t.csv, line 4: the row that begins here cannot be read"),
        ("t.csv", b'a,b\n1,2\n1,"x" y\n', "t.csv, line 3: the row that begins here cannot be read"),
        ("t.csv", b"a,b\n1," + b"x" * 140_000, "longer than 131,072 characters; put texts with ','"),
        ("t.jsonl", b'{"image": 1}\n{', "t.jsonl, line 2: not valid JSON"),
        ("t.jsonl", b"[" * 100_000, "t.jsonl: cannot be read"),
        ("t.jsonl", b'{"a":' * 100_000, "t.jsonl, line 1: not valid JSON"),
        ("t.jsonl", b'[{"image": 1}, 2', "t.jsonl: not valid JSON"),
        ("t.jsonl", "ä".encode("latin-1"), "t.jsonl: not valid JSON"),
        ("t.parquet", b"PAR1 no more", "t.parquet: cannot be loaded by the datasets library"),
        ("state.json", b"{}", "cannot be loaded by the datasets library"),
        ("state.json", b'{"_data_files": [{"filename": "../x.arrow"}]}', "it names files outside of its folder"),
        ("dataset_dict.json", b'{"splits": ["../.."]}', "cannot be loaded by the datasets library"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_sentence(own: Path, name: str, content: bytes, sentence: str) -> None:
    (own / name).write_bytes(content)
    if name == "state.json":
        (own / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError) as error:
        load_questions(own)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "tables/t.csv", "sub/Train.JSONL"])
def test_a_table_in_a_folder_inside_is_pointed_at(own: Path, name: str) -> None:
    (own / name).parent.mkdir()
    (own / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"did you mean {(own / name).parent}\\?"):
        load_questions(own)


def test_marks_in_a_columns_name_separate_nothing(own: Path) -> None:
    name = "options; a; b; c; d"
    table = lists_as("|".join).rename(columns={"options": name})
    table.to_csv(own / "t.csv", index=False, quoting=csv.QUOTE_ALL)
    assert essence(load_questions(open_data(own, f"options={name}"))) == EXPECTED


def test_the_benchmarks_layouts_come_first(own: Path) -> None:
    problem = {"image": "pics/1.png", "problem": "What? A)a, B)b", "solution": "<answer> A </answer>"}
    (own / "CT_train.json").write_text(json.dumps([problem]))
    WRITERS["csv"](own)
    assert layout_of(open_data(own)) == "medr1" and isinstance(open_data(own), Folder)
    assert not isinstance(open_data(own), Tables)


def test_several_tables_of_a_folder_are_parts_by_their_names(own: Path) -> None:
    table = lists_as("|".join).drop(columns=["split", "id"])
    table[:4].to_csv(own / "train-00000-of-00002.csv", index=False)
    table[4:6].to_csv(own / "train-00001-of-00002.csv", index=False)
    table[6:8].to_csv(own / "dev.csv", index=False)
    table[8:].to_csv(own / "Test.csv", index=False)
    (own / "._test.csv").write_bytes(b"\0")  # as macOS leaves them
    parts = split_as_given(load_questions(own))
    assert {name: len(part) for name, part in parts.items()} == {"train": 6, "validation": 2, "test": 2}
    assert parts["test"][0].id == "Test.csv:1"


def test_what_lies_beside_tables_and_is_not_read_is_counted(own: Path) -> None:
    WRITERS["csv"](own)
    (own / "more").mkdir()
    for name in ("more/t.csv", "more/t.parquet", "t.tsv", "t.json", "t.jsonl.gz", "more/rows.json"):
        (own / name).write_text("[]")
    ledger = Ledger(strict=False)
    assert essence(load_questions(open_data(own), ledger)) == EXPECTED
    assert ledger.dropped == {
        "a table in a subfolder, where none is read": ["more/t.csv", "more/t.parquet"],
        "a file of a kind that is not read": ["more/rows.json", "t.json", "t.jsonl.gz", "t.tsv"],
    }
    load_questions(open_data(own / "t.csv"), alone := Ledger(strict=False))
    assert not alone.dropped


@pytest.mark.parametrize(("link", "target"), [("t.csv", "blobs/0a1b"), ("table", "own/t.csv")])
def test_a_table_may_be_a_link_as_the_hubs_cache_has_them(own: Path, link: str, target: str) -> None:
    WRITERS["csv"](own)
    (own.parent / "blobs").mkdir()
    (own / "t.csv").rename(own.parent / target)
    (own / link).symlink_to(own.parent / target)
    assert essence(load_questions(open_data(own / link))) == EXPECTED


def test_without_a_validation_part_some_of_training_is_set_aside(own: Path) -> None:
    WRITERS["csv"](own)
    parts = split_as_given(load_questions(own))
    assert {q.id for q in parts["test"]} == {"q7", "q8", "q9"}
    assert (len(parts["train"]), len(parts["validation"])) == (5, 2)


# The Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache after a download of ``someone/shapes``, without network."""
    from datasets import load_dataset

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = [{name: value for name, value in row.items() if name != "split"} for row in in_bytes()]
    dataset(given).to_parquet(str(tmp_path / "train.parquet"))
    made = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "made"))
    folder = Path(made["train"].cache_files[0]["filename"]).parent
    kept = tmp_path / "hf/someone___shapes/default/0.0.0" / folder.name
    shutil.copytree(folder, kept)
    (kept / "parquet-train.arrow").rename(kept / "shapes-train.arrow")
    return tmp_path


@pytest.mark.parametrize("root", ["hf:someone/shapes", "hf:someone/shapes:train"])
def test_a_hub_name_is_loaded_through_the_library(hub: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    (hub / "someone/shapes").mkdir(parents=True)  # a folder of that name is not meant
    source = open_data(root)
    questions = load_questions(source)
    assert [q[:-1] for q in essence(questions)] == [q[:-1] for q in EXPECTED]
    assert {q.split for q in questions} == {"train"} and {q.dataset for q in questions} == {"shapes"}
    source.fetch(questions[3].image)
    assert questions[3].image.read_bytes() == png(3) and str(source.root) == root
    assert main(["data", "check", root]) == 0

    from kepo_core.experiment import experiment
    from kepo_core.params import Params

    params = Params(
        data_root=root, train_modality="birds", train_items=8, eval_items=1, data_seed=1, prompts_per_step=2,
        prompts_per_device=2,
    )  # fmt: skip
    data = experiment.load_data(params)
    assert data.train and all(q.image.is_file() for q in (*data.train, *data.test))


@pytest.mark.parametrize(
    ("root", "sentence"),
    [
        ("hf:nobody/nothing", "Couldn't reach 'nobody/nothing' on the Hub"),
        ("hf:someone/shapes:tset", 'Unknown split "tset"'),
        ("hf:shapes", "not understood, expected hf:OWNER/NAME or hf:OWNER/NAME:SPLIT"),
        ("hf:../../x", "not understood"),
    ],
)
def test_a_hub_name_that_cannot_be_had_is_one_sentence(hub: Path, root: str, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        open_data(root)
    assert str(error.value).startswith(f"data_root {root}: ") and sentence in str(error.value)


def test_a_data_set_with_code_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library raises if it finds a script in the repository; nothing tells it to trust one."""
    from datasets import load

    def factory(path: str, *_: Any, **options: Any) -> Any:
        assert path.startswith("hf://datasets/") and not options.get("trust_remote_code")
        raise RuntimeError("Dataset scripts are no longer supported, but found shapes.py")

    monkeypatch.setattr(load, "dataset_module_factory", factory)
    with pytest.raises(DataError, match=r"hf:someone/shapes: cannot be loaded .*scripts are no longer supported"):
        open_data("hf:someone/shapes")


def test_a_picture_beside_a_downloaded_table_is_read_and_no_other_file(tmp_path: Path) -> None:
    """A table may name files by absolute paths: those of the download are meant."""
    from kepo_core.data.table_files import Part

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/1.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    (tmp_path / "hf/link.png").symlink_to(tmp_path / "secret.png")
    others = ["secret.png", "hf/../secret.png", "hf/link.png", "hf/none.png", "hf/\0", "hf/" + 300 * "x"]
    places = [tmp_path / name for name in ("hf/1.png", *others)]
    given = [rows()[0] | {"image": {"bytes": None, "path": str(path)}} for path in places]
    part = Part("train", list(given[0]), given)
    source = Tables(Path("hf:someone/x"), tmp_path / "none", [part], "", [tmp_path / "hf"])
    ledger = Ledger(strict=False)
    (question,) = load_questions(source, ledger)
    assert sum(map(len, ledger.dropped.values())) == len(others) and len(question.image_name) == 64
