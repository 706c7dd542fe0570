"""Pictures are identified by what is decoded: copies under other names are one in splits, leaks and intervals."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from kepo_core.data import inspection
from kepo_core.data.images import load_image
from kepo_core.data.inspection import TWINS, Inspector, name_once
from kepo_core.data.ledger import Ledger, reason_of
from kepo_core.data.loading import load_questions, open_data
from kepo_core.data.source import QA_FOLDER
from kepo_core.data.splits import SPLITS, leaked, split_by_image
from kepo_core.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def same_bytes(image: Image.Image, path: Path) -> None:
    image.save(path.with_suffix(".png"))


def other_compression(image: Image.Image, path: Path) -> None:
    image.save(path.with_suffix(".png"), compress_level=0, pnginfo=None)


def other_format(image: Image.Image, path: Path) -> None:
    image.save(path.with_suffix(".bmp"))


def turned(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".tif"), exif=exif)


def opaque(image: Image.Image, path: Path) -> None:
    image.convert("RGBA").save(path.with_suffix(".webp"), lossless=True)


COPIES = [same_bytes, other_compression, other_format, turned, opaque]


def write(root: Path, images: list[str], modality: str = "MRI") -> None:
    (root / QA_FOLDER).mkdir(parents=True, exist_ok=True)
    rows = [
        {"question_id": f"{modality}{i}", "dataset": "Toy", "question_type": "Grading", "question": "What?",
         "gt_answer": "a", "option_A": "a", "option_B": "b", "image_path": name, "modality_type": modality}
        for i, name in enumerate(images)
    ]  # fmt: skip
    (root / QA_FOLDER / f"{modality}.json").write_text(json.dumps(rows))


def world(root: Path, copy, count: int = 30) -> list[str]:
    """``count`` pictures, each asked about under its own name and under a copy's name; returns the names."""
    (root / "Images/a").mkdir(parents=True)
    for i in range(count):
        picture(i).save(root / f"Images/a/{i:02}.png")
        copy(picture(i), root / f"Images/a/z{99 - i}")
    names = sorted(str(path.relative_to(root)) for path in (root / "Images").rglob("*.*"))
    write(root, names)
    return names


def number(path: Path) -> int:
    """Which picture of `world` a file shows."""
    return 99 - int(path.stem[1:]) if path.stem[0] == "z" else int(path.stem)


@pytest.mark.parametrize("copy", COPIES)
def test_copies_under_other_names_count_as_one(tmp_path: Path, copy) -> None:
    names = world(tmp_path, copy)
    source, ledger = open_data(tmp_path), Ledger()
    questions = load_questions(source)
    blind = split_by_image(questions, 0)
    shown = {q.id: number(q.image) for q in questions}
    assert {shown[q.id] for q in blind["train"]} & {shown[q.id] for q in blind["test"]}  # the splits leak
    assert leaked(blind["train"], blind["test"]) == []  # unnoticed
    named = name_once(questions, Inspector(source), ledger)
    parts = split_by_image(named, 0)
    assert not {shown[q.id] for q in parts["train"]} & {shown[q.id] for q in parts["test"]}
    assert {name: len(part) for name, part in parts.items()} == {"train": 36, "validation": 12, "test": 12}
    released = SPLITS["question"](named, 0)
    assert len(leaked(released["train"], released["test"])) == len(
        [q for q in released["test"] if shown[q.id] in {shown[p.id] for p in released["train"]}]
    ) > 0  # fmt: skip
    assert len({q.image_name for q in named}) == 30 and len(ledger.mended[TWINS]) == 30
    assert ledger.mended[TWINS][0] == f"{names[30]} shows what {names[29]} shows"
    assert [q.image for q in named] == [q.image for q in questions]  # each is read where its row says


def test_pictures_that_differ_in_a_pixel_or_in_shape_are_others(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    image = Image.new("RGB", (4, 6))
    image.save(tmp_path / "Images/a.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "Images/b.png")
    image.putpixel((0, 0), (0, 0, 1))
    image.save(tmp_path / "Images/c.png")
    (tmp_path / "Images/d.png").write_bytes(b"no picture")
    (tmp_path / "Images/e.png").write_bytes(b"no picture")
    write(tmp_path, [f"Images/{name}.png" for name in "abcde"])
    source, ledger = open_data(tmp_path), Ledger()
    assert len({q.image_name for q in name_once(load_questions(source), Inspector(source), ledger)}) == 5
    assert not ledger.mended[TWINS]


@pytest.mark.parametrize(
    "folders", [("a/Images", "b/Images", "Images"), ("Images/1/Images", "Images/2/Images", "x/Images")]
)
def test_pictures_below_several_folders_of_one_name_are_several(tmp_path: Path, folders: tuple[str, ...]) -> None:
    names = [f"Images/{folder}/x.png" for folder in folders]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True)
        picture(i).save(tmp_path / name)
    write(tmp_path, names)
    questions = load_questions(open_data(tmp_path))
    assert [q.image_name for q in questions] == names
    assert sum(len(part) for part in split_by_image(questions, 0).values()) == 3


def test_a_picture_is_decoded_once_and_again_when_it_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(tmp_path / "root", same_bytes, 3)
    decoded: list[str] = []
    real = inspection.decode
    monkeypatch.setattr(inspection, "decode", lambda file, path: decoded.append(path.name) or real(file, path))

    def twins() -> int:
        source, ledger = open_data(tmp_path / "root"), Ledger()
        name_once(load_questions(source), Inspector(source), ledger)
        return len(ledger.mended[TWINS])

    assert (twins(), len(decoded)) == (3, 6)
    assert (twins(), len(decoded)) == (3, 6)
    changed = tmp_path / "root/Images/a/00.png"
    picture(77).save(changed)
    os.utime(changed, (1, 1))
    assert (twins(), decoded[6:]) == (2, ["00.png"])
    (kept,) = (cache / "inspected").iterdir()
    kept.write_text("{ no JSON")
    assert (twins(), len(decoded)) == (2, 13)


@pytest.mark.parametrize("replace", ["write", "rename", "link"])
def test_a_picture_of_the_same_size_and_time_as_the_one_before_is_another(
    tmp_path: Path, cache: Path, replace: str
) -> None:
    """As from archives that set all times to the same, and formats that do not compress."""
    world(tmp_path / "root", same_bytes, 2)
    first, other = (tmp_path / f"root/Images/a/0{i}.png" for i in range(2))
    kept = tmp_path / "kept"

    def save(path: Path, i: int) -> None:
        picture(i).save(path, "BMP")
        os.utime(path, (0, 0))

    def names() -> list[str]:
        source = open_data(tmp_path / "root")
        return [q.image_name for q in name_once(load_questions(source), Inspector(source), Ledger())][:2]

    save(first, 70), save(other, 71), save(kept, 70)
    assert len(set(names())) == 2
    if replace == "write":
        save(other, 70)
    elif replace == "rename":
        kept.rename(other)
    else:
        other.unlink()
        other.hardlink_to(kept)
    assert len(set(names())) == 1


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x89PNG"]
)
def test_what_is_said_of_a_file_that_is_no_picture_is_the_same_in_every_process(
    tmp_path: Path, cache: Path, content: bytes
) -> None:
    world(tmp_path / "root", same_bytes, 1)
    spoilt = tmp_path / "root/Images/a/00.png"
    spoilt.write_bytes(content)
    problem = Inspector(open_data(tmp_path / "root"))(spoilt).problem
    assert problem == f"Image {spoilt}: cannot be decoded (no known format), expected a whole image file."
    with pytest.raises(DataError) as error:
        load_image(spoilt)
    assert str(error.value) == problem
    said = reason_of(ValueError(f"no\n{object()}"))
    assert said == "no <object object>" and reason_of(MemoryError()) == "MemoryError"


def test_without_a_place_to_write_everything_is_decoded_again(tmp_path: Path, cache: Path) -> None:
    world(tmp_path / "root", same_bytes, 2)
    cache.write_text("a file where a folder should be")
    source, ledger = open_data(tmp_path / "root"), Ledger()
    name_once(load_questions(source), Inspector(source), ledger)
    assert len(ledger.mended[TWINS]) == 2


def test_an_archive_is_inspected_without_being_unpacked(tmp_path: Path, cache: Path) -> None:
    world(tmp_path / "root", other_format, 4)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in (tmp_path / "root").rglob("*"):
            archive.write(path, path.relative_to(tmp_path / "root"))
    for _ in range(2):
        source, ledger = open_data(tmp_path / "a.zip"), Ledger()
        name_once(load_questions(source), Inspector(source), ledger)
        assert len(ledger.mended[TWINS]) == 4
    assert [path.name for path in cache.iterdir()] == ["inspected"]
