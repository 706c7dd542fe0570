"""Folders and the untouched archive: every fault is reported in one sentence, and nothing leaves its root."""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from kepo_core.data import source
from kepo_core.data.check import check
from kepo_core.data.images import load_image
from kepo_core.data.inspection import Decodable, Inspector
from kepo_core.data.ledger import Ledger
from kepo_core.data.loading import load_questions, open_data
from kepo_core.data.source import Archive, open_source
from kepo_core.errors import DataError
from kepo_core.experiment import experiment
from kepo_core.params import Params

SPACES = "Images/Adam Challenge/A & B..1.PNG"


def row(number: int, image: str, modality: str = "MRI", **fields: object) -> dict[str, object]:
    return {
        "dataset": "Toy", "question_id": f"Toy_{number:04}", "question_type": "Disease Diagnosis", "question": "What?",
        "gt_answer": "a cyst", "image_path": image, "option_A": "nothing", "option_B": "a cyst",
        "modality_type": modality, **fields,
    }  # fmt: skip


def picture(ending: str = "png", grey: int = 7) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (grey, grey, grey)).save(content, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    return content.getvalue()


def members(count: int = 3) -> dict[str, bytes]:
    """A small release, as in the archive: in a folder of its own."""
    files = {f"OmniMedVQA/Images/Toy/{i}.{ending}": picture(ending, i)
             for i, ending in zip(range(count), ["png", "tif", "bmp", "jpg"] * count, strict=False)}  # fmt: skip
    rows = [row(i, name.removeprefix("OmniMedVQA/")) for i, name in enumerate(files)]
    rows.append(row(count, SPACES))
    return {
        **files,
        f"OmniMedVQA/{SPACES}": picture("png", 99),
        "OmniMedVQA/QA_information/Open-access/Toy.json": json.dumps(rows).encode(),
        "OmniMedVQA/QA_information/Restricted-access/Far.json": json.dumps([row(9, "far/away.png")]).encode(),
        "OmniMedVQA/README.md": b"#",
    }


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder: Path) -> list[str]:
    """Everything except the results of inspections."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.parent.name != "inspected")


# The archive ------------------------------------------------------------------------------------------------------


def test_the_archive_is_read_in_place_and_like_the_folder(tmp_path: Path, cache: Path) -> None:
    archive = zipped(tmp_path / "OmniMedVQA.zip", members())
    with zipfile.ZipFile(archive) as whole:
        whole.extractall(tmp_path / "folder")
    ledgers = [Ledger(), Ledger()]
    zip_rows, folder_rows = (load_questions(path, ledger) for path, ledger in
                             zip([archive, tmp_path / "folder/OmniMedVQA"], ledgers, strict=True))  # fmt: skip
    assert [q.id for q in zip_rows] == [q.id for q in folder_rows] and len(zip_rows) == 4
    assert ledgers[0].table().equals(ledgers[1].table())
    assert check(archive).ledger.read == 4
    assert not cache.exists()  # looking unpacks nothing
    opened, ledger = open_source(archive), Ledger()
    decodable = Decodable(ledger, Inspector(opened))
    assert decodable(zip_rows[0]) and decodable(zip_rows[3]) and not cache.exists()
    opened.fetch(zip_rows[0].image)
    opened.fetch(zip_rows[3].image)
    assert files_in(cache) == ["0.png", "A & B..1.PNG"]  # nothing else, and nothing half
    assert load_image(zip_rows[3].image).getpixel((0, 0)) == (99, 99, 99)
    before = zip_rows[0].image.stat().st_mtime_ns
    opened.fetch(zip_rows[0].image)
    assert zip_rows[0].image.stat().st_mtime_ns == before


def test_another_archive_of_the_same_name_has_its_own_pictures(tmp_path: Path, cache: Path) -> None:
    first = load_questions(zipped(tmp_path / "a.zip", members()))[0]
    other = members() | {"OmniMedVQA/Images/Toy/0.png": picture("png", 200)}
    assert load_questions(zipped(tmp_path / "a.zip", other))[0].image != first.image


def test_a_picture_that_cannot_be_unpacked_is_left_out(tmp_path: Path, cache: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"x.txt": b"", **members()})
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("OmniMedVQA/Images/Toy/0.png")
    content = bytearray(path.read_bytes())
    middle = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    content[middle : middle + 4] = b"\xff\x00\xff\x00"
    path.write_bytes(content)
    questions, ledger = load_questions(path), Ledger(strict=False)
    assert not Decodable(ledger, Inspector(open_source(path)))(questions[0])
    (sentence,) = ledger.dropped["image cannot be decoded"]
    assert "a.zip: member 'OmniMedVQA/Images/Toy/0.png' cannot be unpacked" in sentence
    assert not files_in(cache)


def test_a_picture_that_the_archive_lacks_is_missed(tmp_path: Path) -> None:
    files = members()
    del files["OmniMedVQA/Images/Toy/1.tif"]
    ledger = Ledger(strict=False)
    assert len(load_questions(zipped(tmp_path / "a.zip", files), ledger)) == 3
    assert len(ledger.dropped["image missing"]) == 1


def link(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("OmniMedVQA/Images/Toy/link.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")


def climb(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("OmniMedVQA/../../evil.json", "[]")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "not a whole zip archive"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no archive"), "not a whole zip archive"),
        (climb, "member 'OmniMedVQA/../../evil.json' leads outside"),
        (link, "member 'OmniMedVQA/Images/Toy/link.png' is a link"),
        (lambda path: zipped(path, {"a.txt": b"x"}), "no QA_information/Open-access/*.json in it"),
    ],
)
def test_a_wrong_archive_is_one_sentence(tmp_path: Path, spoil, sentence: str) -> None:
    path = zipped(tmp_path / "a.zip", members())
    spoil(path)
    with pytest.raises(DataError) as error:
        load_questions(path)
    assert str(error.value).startswith(f"data_root {path}: ") and sentence in str(error.value)


def test_json_cut_in_the_middle_of_an_archive_and_members_too_large_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "OmniMedVQA/QA_information/Open-access/Toy.json"
    files = members()
    with pytest.raises(DataError, match=r"^Toy.json: not valid JSON"):
        load_questions(zipped(tmp_path / "a.zip", files | {name: files[name][:80]}))
    monkeypatch.setattr(source, "MAX_MEMBER", 100)
    with pytest.raises(DataError, match=r"b.zip: member .*Toy.json' unpacks to [\d,]+ bytes, expected at most 100"):
        load_questions(zipped(tmp_path / "b.zip", files))


def test_rows_cannot_reach_out_of_the_archive(tmp_path: Path, cache: Path) -> None:
    name = "OmniMedVQA/QA_information/Open-access/Toy.json"
    rows = [row(1, "../../etc/passwd"), row(2, "/etc/passwd"), row(3, "Images/Toy/0.png")]
    ledger = Ledger(strict=False)
    (left,) = load_questions(zipped(tmp_path / "a.zip", members() | {name: json.dumps(rows).encode()}), ledger)
    assert left.id == "Toy_0003" and len(ledger.dropped["image path leaves data_root"]) == 2
    assert left.image.is_relative_to(cache)


# The folder -------------------------------------------------------------------------------------------------------


def test_question_files_may_lie_below_the_pictures(tmp_path: Path) -> None:
    """Med-R1's files in a folder of the release."""
    (tmp_path / "Images/Toy").mkdir(parents=True)
    (tmp_path / "Images/Toy/a.png").write_bytes(picture())
    splits = tmp_path / "Splits/modality"
    splits.mkdir(parents=True)
    problem = {"problem": "What? A)a, B)b", "solution": "<answer> A </answer>"}
    (splits / "CT_test.json").write_text(json.dumps([{"image": "Images/Toy/a.png", **problem}]))
    (question,) = load_questions(splits)
    assert question.image == tmp_path / "Images/Toy/a.png"


def test_spaces_ampersands_double_dots_and_upper_case_endings_are_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(zipped(tmp_path / "a.zip", members())) as archive:
        archive.extractall(tmp_path)
    questions = load_questions(tmp_path / "OmniMedVQA")
    assert questions[3].image == tmp_path / "OmniMedVQA" / SPACES
    assert [load_image(q.image).size for q in questions] == [(6, 4)] * 4  # png, tif, bmp


# As other machines write them ---------------------------------------------------------------------------------------


def macos(files: dict[str, bytes]) -> dict[str, bytes]:
    """As macOS packs them: a file of resource forks before each file."""
    twins = {f"__MACOSX/{name.rpartition('/')[0]}/._{name.rpartition('/')[2]}": b"\0\5\x16\7" for name in files}
    return twins | files | {f"{name.rpartition('/')[0]}/._{name.rpartition('/')[2]}": b"\0\5" for name in files}


def backslashes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.replace("/", "\\"): content for name, content in files.items()}


@pytest.mark.parametrize("packed", [macos, backslashes, lambda files: backslashes(macos(files))])
def test_archives_of_macos_and_windows_are_read_like_any_other(tmp_path: Path, cache: Path, packed) -> None:
    plain = load_questions(zipped(tmp_path / "a.zip", members()))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name, content in packed(members()).items():
            info = zipfile.ZipInfo("x")
            info.filename = name  # with backslashes: ZipFile would write slashes
            archive.writestr(info, content)
    source, ledger = open_source(tmp_path / "b.zip"), Ledger()
    questions = load_questions(source, ledger)
    assert [(q.id, q.image_name) for q in questions] == [(q.id, q.image_name) for q in plain]
    source.fetch(questions[3].image)
    assert load_image(questions[3].image).getpixel((0, 0)) == (99, 99, 99)


def test_a_member_that_climbs_by_backslashes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(zipped(tmp_path / "a.zip", members()), "a") as archive:
        archive.writestr("OmniMedVQA\\..\\..\\evil.json", b"[]")
    with pytest.raises(DataError, match="leads outside, expected paths inside"):
        load_questions(tmp_path / "a.zip")


def test_a_copy_deeper_in_the_archive_is_not_taken_for_the_release(tmp_path: Path) -> None:
    copy = {f"a backup/{name}": b"[]" if name.endswith(".json") else content for name, content in members().items()}
    assert len(load_questions(zipped(tmp_path / "a.zip", copy | members()))) == 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name, content in members().items():
        path = root / Path(name).relative_to("OmniMedVQA")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


TOY = "QA_information/Open-access/Toy.json"


@pytest.mark.parametrize(
    "written",
    ["Images\\Toy\\0.png", "/Images/Toy/0.png", "\\Images\\Toy\\0.png", "./Images/Toy/0.png", "Images//Toy/0.png"],
)
def test_a_picture_is_found_however_its_path_is_written(
    folder: Path, tmp_path: Path, cache: Path, written: str
) -> None:
    (folder / TOY).write_text(json.dumps([row(1, written)]))
    zip_file = zipped(tmp_path / "a.zip", {str(path.relative_to(folder)): path.read_bytes()
                                           for path in folder.rglob("*") if path.is_file()})  # fmt: skip
    for root in (folder, zip_file):
        (question,) = load_questions(root)
        assert question.image_name == "Images/Toy/0.png" and question.image.name == "0.png"


@pytest.mark.parametrize(
    "written", ["..\\..\\a.png", "Images\\..\\..\\a.png", "/etc/hostname", "\\\\server\\a.png", "C:a/b", "D:\\a"]
)
def test_no_way_of_writing_a_path_leads_out(folder: Path, tmp_path: Path, written: str) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (folder / TOY).write_text(json.dumps([row(1, written), row(2, SPACES)]))
    ledger = Ledger(strict=False)
    assert [q.id for q in load_questions(folder, ledger)] == ["Toy_0002"]
    assert list(ledger.dropped)[:1] in (["image path leaves data_root"], ["image missing"])


def test_names_with_accents_are_found_however_they_are_composed(folder: Path) -> None:
    (folder / "Images/Toy/Bru\u0308cke.png").write_bytes(picture())  # as macOS writes it
    (folder / TOY).write_text(json.dumps([row(1, "Images/Toy/Br\u00fccke.png")]))
    (question,) = load_questions(folder)
    assert question.image.is_file() and question.image_name == "Images/Toy/Br\u00fccke.png"


def test_what_macos_leaves_in_a_folder_is_no_question_file(folder: Path) -> None:
    (folder / TOY).with_name("._Toy.json").write_bytes(b"\0\5\x16\7")
    ledger = Ledger(strict=False)
    assert len(load_questions(folder, ledger)) == 4 and list(ledger.dropped) == [
        "restricted: its picture is not part of the release"
    ]


LINES = "\n".join(json.dumps(row(i, f"Images/Toy/{i}.{ending}")) for i, ending in enumerate(["png", "tif", "bmp"]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Toy.jsonl", LINES.encode()),
        ("Toy.JSONL", f"{LINES}\n\n".encode()),
        ("Toy.json", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
        ("Toy.json", f"[{LINES.replace(chr(10), ',')}]".encode("utf-16")),
        ("TOY.JSON", f"[{LINES.replace(chr(10), ',')}]".encode("utf-8-sig")),
        ("Toy.jsonl", LINES.encode("utf-16-le")),
    ],
)
def test_json_lines_and_any_unicode_are_read(folder: Path, name: str, content: bytes) -> None:
    (folder / TOY).unlink()
    (folder / TOY).with_name(name).write_bytes(content)
    assert [q.id for q in load_questions(folder)] == ["Toy_0000", "Toy_0001", "Toy_0002"]


def test_a_broken_line_is_named(folder: Path) -> None:
    (folder / TOY).with_name("Lines.jsonl").write_text(f"{LINES}\n{{")
    with pytest.raises(DataError, match=r"^Lines\.jsonl, line 4: not valid JSON"):
        load_questions(folder)


def test_med_r1s_files_may_be_json_lines(folder: Path) -> None:
    problem = {"problem": "What? A)a, B)b", "solution": "<answer> A </answer>", "image": "Images\\Toy\\0.png"}
    (folder / "splits").mkdir()
    (folder / "splits/CT_test.jsonl").write_text(f"{json.dumps(problem)}\n{json.dumps(problem)}\n")
    assert [q.id for q in load_questions(folder / "splits")] == ["CT_test:1", "CT_test:2"]


def test_rows_in_other_folders_of_the_release_are_counted(folder: Path) -> None:
    for name in ("Open-access/more/Toy.json", "Closed/Toy.jsonl"):
        path = folder / "QA_information" / name
        path.parent.mkdir()
        path.write_text(json.dumps(row(1, "x.png")) if name.endswith("l") else json.dumps([row(1, "x.png")] * 2))
    (folder / "QA_information/notes.json").write_text("{}")
    ledger = Ledger(strict=False)
    assert len(load_questions(folder, ledger)) == 4
    assert {reason: len(rows) for reason, rows in ledger.dropped.items()} == {
        "outside of QA_information/Open-access": 3,
        "a file without questions": 1,
        "restricted: its picture is not part of the release": 1,
    }


@pytest.mark.parametrize("packed", [False, True])
def test_files_beside_the_release_that_no_reader_takes_are_counted(folder: Path, tmp_path: Path, packed: bool) -> None:
    counted = ["QA_information/Open-access/more.ndjson", "QA_information/Open-access/old.json.gz", "table.CSV",
               "tables/rows.parquet"]  # fmt: skip
    for name in [*counted, "Images/Toy/sizes.csv", ".git/x.csv", "._table.csv", "README.md"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ledger = Ledger(strict=False)
    assert len(load_questions(open_data(zipped(tmp_path / "a.zip", files) if packed else folder), ledger)) == 4
    assert ledger.dropped["a file of a kind that is not read"] == counted


@pytest.mark.parametrize("name", ["rows.tsv", "rows.xlsx", "rows.json", "rows"])
def test_a_root_of_a_kind_that_is_not_read_says_which_are(tmp_path: Path, name: str) -> None:
    if name.endswith("xlsx"):  # an archive itself
        zipped(tmp_path / name, {"xl/workbook.xml": b"<a/>"})
    else:
        (tmp_path / name).write_text("[]")
    with pytest.raises(
        DataError, match=r"expected a folder .*, a table \(\.csv, \.jsonl, \.parquet\), OmniMedVQA\.zip"
    ) as error:
        open_data(tmp_path / name)
    assert "whole zip" not in str(error.value)


def hub_cache(folder: Path, tmp_path: Path, what: str) -> None:
    """Store files as the Hub's cache does: links to content elsewhere, named by its hash."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in (folder / what).rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))


def linked_folder(folder: Path, tmp_path: Path, what: str) -> None:
    (folder / what).rename(tmp_path / "elsewhere")
    (folder / what).symlink_to(tmp_path / "elsewhere")


@pytest.mark.parametrize("linked", [hub_cache, linked_folder])
@pytest.mark.parametrize("what", ["Images", "Images/Toy", "QA_information"])
def test_links_that_leave_the_root_are_followed_where_a_parameter_says_so(
    folder: Path, tmp_path: Path, linked, what: str
) -> None:
    before = load_questions(folder)
    linked(folder, tmp_path, what)
    with pytest.raises(DataError, match=r"(is a link out of data_root, expected .* or follow_links: True)"):
        load_questions(folder)
    questions = load_questions(open_data(folder, follow_links=True))
    assert [(q.id, q.image_name, load_image(q.image).size) for q in questions] == [
        (q.id, q.image_name, (6, 4)) for q in before
    ]
    data = study_params(folder, follow_links=True)
    assert data.follow_links and not study_params(folder).follow_links


@pytest.mark.parametrize("follow", [False, True])
def test_a_picture_that_is_a_link_to_itself_is_missing(folder: Path, follow: bool) -> None:
    (folder / "Images/Toy/0.png").unlink()
    (folder / "Images/Toy/0.png").symlink_to("0.png")
    ledger = Ledger(strict=False)
    assert len(load_questions(open_data(folder, follow_links=follow), ledger)) == 3
    assert len(ledger.dropped["image missing"]) == 1


@pytest.mark.parametrize("name", ["loop", "loop.csv", "loop.zip"])
def test_a_root_that_is_a_link_to_itself_does_not_exist(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(name)
    with pytest.raises(DataError, match="does not exist, expected a folder"):
        open_data(tmp_path / name)


def test_a_link_back_is_walked_once(folder: Path) -> None:
    (folder / "QA_information/Open-access/loop").symlink_to(folder)
    assert len(load_questions(open_data(folder, follow_links=True))) == 4


# A study over them ------------------------------------------------------------------------------------------------


def study_members() -> dict[str, bytes]:
    files = {f"Images/Toy/{i}.png": picture("png", i) for i in range(60)}
    rows = [row(i, name, "MRI" if i < 40 else "CT") for i, name in enumerate(files)]
    return {**files, "QA_information/Open-access/Toy.json": json.dumps(rows).encode()}


def study_params(root: Path, **changes: object) -> Params:
    return Params.load(
        overrides={
            "data_root": str(root),
            "train_items": 10,
            "eval_items": 3,
            "prompts_per_step": 2,
            "prompts_per_device": 2,
            **changes,
        }
    )


def test_a_study_unpacks_what_it_draws_and_draws_another_for_what_is_broken(tmp_path: Path, cache: Path) -> None:
    data = experiment.load_data(study_params(zipped(tmp_path / "a.zip", study_members())))
    assert len(files_in(cache)) == 16 == len({*data.train, *data.test})
    broken = {f"Images/Toy/{data.train[0].image.name}": b"no picture"}
    again = experiment.load_data(study_params(zipped(tmp_path / "b.zip", study_members() | broken)))
    assert [q.id for q in again.train[:9]] == [q.id for q in data.train[1:]] and len(again.train) == 10
    assert [q.id for q in again.test] == [q.id for q in data.test]
    assert again.identity()["rows_dropped"] == {"image cannot be decoded": 1}


def test_others_get_the_very_same_items(tmp_path: Path, cache: Path) -> None:
    root = zipped(tmp_path / "a.zip", study_members())
    data = experiment.load_data(study_params(root, data_seed=5))
    data.write_items(tmp_path / "items.csv")
    lines = (tmp_path / "items.csv").read_text().splitlines()
    assert lines[0] == "part,modality,id,image" and len(lines) == 17
    assert lines[-1].startswith("eval,CT,Toy_00") and "Images/Toy/" in lines[-1]
    given = {"items_file": str(tmp_path / "items.csv")}
    same = experiment.load_data(study_params(root, **given))
    assert (same.train, same.tests) == (data.train, data.tests)
    (tmp_path / "items.csv").write_text((tmp_path / "items.csv").read_text(), encoding="utf-8-sig")  # as Excel saves
    assert experiment.load_data(study_params(root, **given)).train == data.train
    fewer = experiment.load_data(study_params(root, **given, train_items=4, eval_items=1))
    assert fewer.train == data.train[:4] and {m: len(rows) for m, rows in fewer.tests.items()} == {"MRI": 1, "CT": 1}
    gone = {name: content for name, content in study_members().items() if not name.endswith(data.train[2].image.name)}
    with pytest.raises(DataError, match=f"items.csv, line 4: question {data.train[2].id} is not in data_root"):
        experiment.load_data(study_params(zipped(tmp_path / "b.zip", gone), **given))
    broken = {f"Images/Toy/{data.train[2].image.name}": b"no picture"}
    with pytest.raises(DataError, match=f"Question {data.train[2].id}: Image .* cannot be decoded"):
        experiment.load_data(study_params(zipped(tmp_path / "c.zip", study_members() | broken), **given))


def test_items_have_the_names_of_their_pictures_that_the_first_run_gave_them(tmp_path: Path, cache: Path) -> None:
    """Also if the file that gave a picture its name was not sampled."""
    twins = {f"Images/Toy/{i}.png": picture("png", i // 2) for i in range(60)}
    root = zipped(tmp_path / "a.zip", study_members() | twins)
    data = experiment.load_data(study_params(root))
    data.write_items(tmp_path / "items.csv")
    same = experiment.load_data(study_params(root, items_file=str(tmp_path / "items.csv")))
    assert (same.train, same.images, same.identity()) == (data.train, data.images, data.identity())
    fewer = experiment.load_data(study_params(root, items_file=str(tmp_path / "items.csv"), train_items=4))
    assert fewer.train == data.train[:4]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("part,id\ntrain,Toy_0001\ntrain,Toy_0001\neval,Toy_0002\n", "line 3: question Toy_0001 appears twice"),
        ("part,id\ntrain,Toy_0050\neval,Toy_0002\n", "line 2: question Toy_0050 is CT, expected train_modality MRI"),
        ("part,id\ntest,Toy_0001\n", "line 2: part 'test' and id 'Toy_0001', expected train or eval"),
        ("part,id\ntrain\n", "line 2: part 'train' and id None"),
        ("part,id\ntrain,Toy_0001\n", "no train or no eval items"),
        ("", "no train or no eval items"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_of_items_is_one_sentence(tmp_path: Path, cache: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "i.csv").write_text(text)
    root = zipped(tmp_path / "a.zip", study_members())
    with pytest.raises(DataError) as error:
        experiment.load_data(study_params(root, items_file=str(tmp_path / "i.csv")))
    assert str(error.value).startswith("items_file ") and sentence in str(error.value)


def test_the_released_splits_leak_is_counted(tmp_path: Path, cache: Path) -> None:
    files = study_members()
    rows = json.loads(files["QA_information/Open-access/Toy.json"])
    twice = [*rows, *(r | {"question_id": "again" + str(r["question_id"])} for r in rows)]
    root = zipped(tmp_path / "a.zip", files | {"QA_information/Open-access/Toy.json": json.dumps(twice).encode()})
    leaks = {
        split: experiment.load_data(study_params(root, split=split, train_items=99, eval_items=99)).identity()[
            "test_items_whose_image_is_trained_on"
        ]
        for split in ("image", "question")
    }
    assert leaks["image"] == 0 < leaks["question"]


def test_the_cache_is_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "here"))
    assert source.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("KEPO_CACHE")
    assert source.cache_dir() == Path("~/.cache/kepo").expanduser()
    assert isinstance(open_source(zipped(tmp_path / "a.zip", members())), Archive) and os.sep in str(source.cache_dir())
