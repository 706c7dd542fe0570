"""The raw-layout loader on small made-up files, one per irregularity of the real release."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kepo_core.data import omnimedvqa
from kepo_core.data.images import Pictures, load_image
from kepo_core.data.inspection import Decodable, Inspector
from kepo_core.data.ledger import Ledger
from kepo_core.data.records import MODALITIES
from kepo_core.data.source import open_source
from kepo_core.errors import DataError

ROW = {
    "dataset": "Toy",
    "question_id": "Toy_0001",
    "question_type": "Disease Diagnosis",
    "question": "What is seen?",
    "gt_answer": "a cyst",
    "image_path": "Images/Toy/a.png",
    "option_A": "nothing",
    "option_B": "a cyst",
    "option_C": "a tear",
    "option_D": "a mass",
    "modality_type": "MR (Mag-netic Resonance Imaging)",
}


def write_image(path: Path, size=(5, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


@pytest.fixture
def root(tmp_path):
    """A data root with one image and no rows."""
    root = tmp_path / "data"
    write_image(root / "Images/Toy/a.png")
    (root / omnimedvqa.QA_FOLDER).mkdir(parents=True)
    return root


def load_raw(root):
    return omnimedvqa.load_raw(open_source(root))


def load(root, *rows, name="Toy.json"):
    (root / omnimedvqa.QA_FOLDER / name).write_text(json.dumps(rows))
    return load_raw(root)


def changed(**fields):
    """ROW with fields replaced; a value of None removes the field."""
    return {key: value for key, value in (ROW | fields).items() if value is not None}


def test_a_plain_row_becomes_a_question(root):
    (question,) = load(root, ROW)
    assert question.id == "Toy_0001"
    assert question.modality == "MRI"
    assert question.options == ("nothing", "a cyst", "a tear", "a mass")
    assert question.answer == "B"
    assert question.letters == "ABCD"
    assert question.image == (root / "Images/Toy/a.png").resolve()


def test_files_are_read_in_name_order_and_rows_in_file_order(root):
    load(root, changed(question_id="z1"), changed(question_id="a2"), name="B.json")
    questions = load(root, changed(question_id="m3"), name="A.json")
    assert [question.id for question in questions] == ["m3", "z1", "a2"]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("MR (Mag-netic Resonance Imaging)", "MRI"),
        ("CT(Computed Tomography)", "CT"),
        ("X-Ray", "X-Ray"),
        ("ultrasound", "Ultrasound"),
        ("Dermoscopy", "Dermoscopy"),
        ("Fundus Photography", "Fundus"),
        ("OCT (Optical Coherence Tomography", "OCT"),
        ("OCT (Optical Coherence Tomography)", "OCT"),
        ("Microscopy Images", "Microscopy"),
        *((name, name) for name in MODALITIES),
    ],
)
def test_modality_strings(root, raw, name):
    (question,) = load(root, changed(modality_type=raw))
    assert question.modality == name


def test_a_row_may_say_modality_instead_of_modality_type(root):
    (question,) = load(root, changed(modality_type=None, modality="CT(Computed Tomography)"))
    assert question.modality == "CT"


@pytest.mark.parametrize("answer", ["A CYST", "a cyst.", " a  cyst ", "A cyst ."])
def test_answers_may_differ_in_case_spaces_and_full_stop(root, answer):
    (question,) = load(root, changed(gt_answer=answer))
    assert question.answer == "B"


def test_letters_close_up_over_missing_options(root):
    (question,) = load(root, changed(option_A=None, option_C=""))
    assert question.options == ("a cyst", "a mass")
    assert question.answer == "A"
    (question,) = load(root, {**ROW, "option_A": None})
    assert question.options == ("a cyst", "a tear", "a mass")


def test_a_row_has_as_many_options_as_there_are_letters(root):
    (question,) = load(root, changed(option_I="a tear of I", option_J="the tenth", gt_answer="The tenth"))
    assert question.options[4:] == ("a tear of I", "the tenth") and question.answer == "F"
    many = {f"option_{letter}": f"no. {number}" for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")}
    (question,) = load(root, changed(**many, gt_answer="no. 25"))
    assert len(question.options) == 26 and question.answer == "Z"
    with pytest.raises(DataError, match="'option_AA' is unknown, expected option_A to option_Z"):
        load(root, changed(option_AA="one more"))


@pytest.mark.parametrize("name", ["option_1", "option_100", "Option_E", "option E", "optionE", " option_E", "OPTION_e"])
def test_an_option_under_another_name_is_refused_and_counted(root, name):
    with pytest.raises(DataError, match=f"{name!r} is unknown"):
        load(root, ROW, changed(question_id="Toy_0002", **{name: "one more"}))
    ledger = Ledger(strict=False)
    assert len(omnimedvqa.load_raw(open_source(root), ledger)) == 1
    assert len(ledger.dropped["an option that has no letter"]) == 1


def test_equal_options_are_kept_once(root):
    (question,) = load(root, changed(option_A="A cyst."))
    assert question.options == ("A cyst.", "a tear", "a mass")
    assert question.answer == "A"


def test_text_beyond_ascii_and_a_byte_order_mark_are_read(root):
    path = root / omnimedvqa.QA_FOLDER / "Toy.json"
    path.write_text(json.dumps([changed(question="Größe in µm?")], ensure_ascii=False), encoding="utf-8-sig")
    (question,) = load_raw(root)
    assert question.question == "Größe in µm?"


def test_numbers_are_read_as_texts_and_counted(root):
    load(root, changed(option_A=0, option_B=10, gt_answer="10", option_C=0.5))
    ledger = Ledger()
    (question,) = omnimedvqa.load_raw(open_source(root), ledger)
    assert question.options[:3] == ("0", "10", "0.5")
    assert question.answer == "B"
    assert {f"option_{letter} is a number, read as text": 1 for letter in "ABC"}.items() <= {
        reason: len(where) for reason, where in ledger.mended.items()
    }.items()


def test_what_pandas_writes_for_a_missing_option_is_no_option(root):
    load(root, changed(option_C=float("nan"), question_type=float("nan")))
    ledger = Ledger()
    (question,) = omnimedvqa.load_raw(open_source(root), ledger)
    assert (question.options, question.question_type) == (("nothing", "a cyst", "a mass"), "")
    assert {"option_C is NaN, read as missing", "question_type is NaN, read as missing"} <= set(ledger.mended)


def test_a_byte_order_mark_inside_a_text_is_none_of_it(root):
    (question,) = load(root, changed(gt_answer="\ufeffa cyst", question="\ufeffWhat?"))
    assert (question.question, question.answer) == ("What?", "B")


def test_names_with_double_dots_and_spaces_are_no_way_out(root):
    write_image(root / "Images/A & B/x..y (1).PNG")
    (question,) = load(root, changed(image_path="Images/A & B/x..y (1).PNG"))
    assert question.image.name == "x..y (1).PNG"


BAD_ROWS = [
    (changed(gt_answer="a fracture"), "gt_answer 'a fracture' is not among the options"),
    (changed(option_A=None, option_B=None, option_C=None, option_D=None), "no options"),
    (changed(option_A=None, option_C=None, option_D=None), "a single option ('a cyst')"),
    (changed(modality_type="Endoscopy"), "modality_type 'Endoscopy' is unknown"),
    (changed(modality_type=None), "modality_type '' is unknown"),
    (changed(question=None), "question is missing or empty"),
    (changed(question=["What?"]), "question is a list"),
    (changed(option_B=True), "option_B is a bool"),
    (changed(option_B={"text": "a cyst"}), "option_B is a dict"),
    (changed(question=float("nan")), "question is nan, expected text"),
    (changed(option_A=float("inf")), "option_A is inf, expected text"),
    (changed(image_path=float("nan")), "image_path is nan, expected text"),
    (changed(gt_answer=float("nan"), option_D="nan"), "gt_answer is nan, expected text"),
    (changed(gt_answer=None), "gt_answer is missing or empty"),
    (changed(image_path="Images/Toy/b.png"), "image 'Images/Toy/b.png' is missing"),
    (changed(image_path="Images/Toy"), "image 'Images/Toy' is missing"),
    (changed(image_path="Images/../../a.png"), "leaves data_root"),
    (changed(image_path="/etc/hostname"), "leaves data_root"),
    (changed(image_path="C:\\a.png"), "leaves data_root"),
    (changed(image_path="Images/a\0.png"), "leaves data_root"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_a_bad_row_is_named(root, row, message):
    with pytest.raises(DataError) as error:
        load(root, changed(question_id="good"), row)
    assert str(error.value).startswith("Toy.json, row 2 (Toy_0001): ")
    assert message in str(error.value)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_without_id_is_named_by_its_position(root):
    with pytest.raises(DataError, match=r"^Toy\.json, row 1: question_id is missing"):
        load(root, changed(question_id=None))
    with pytest.raises(DataError, match=r"^Toy\.json, row 1: a str, expected an object"):
        load(root, "What is seen?")


def test_an_id_used_twice_is_refused(root):
    load(root, ROW, name="A.json")
    with pytest.raises(DataError, match=r"^B\.json, row 1 .*is already used by A\.json, row 1"):
        load(root, ROW, name="B.json")


@pytest.mark.parametrize("link_folder", [False, True])
def test_links_out_of_the_root_are_refused_and_links_inside_are_followed(root, tmp_path, link_folder):
    write_image(tmp_path / "outside/a.png")
    link = root / "Images/Linked"
    if link_folder:
        link.symlink_to(tmp_path / "outside")
    else:
        link.mkdir()
        (link / "a.png").symlink_to(tmp_path / "outside/a.png")
    with pytest.raises(DataError, match="is a link out of data_root"):
        load(root, changed(image_path="Images/Linked/a.png"))
    (root / "Images/same.png").symlink_to(root / "Images/Toy/a.png")
    (question,) = load(root, changed(image_path="Images/same.png"))
    assert question.image == (root / "Images/Toy/a.png").resolve()


def test_a_root_that_is_itself_a_link_is_fine(root, tmp_path):
    load(root, ROW)
    (tmp_path / "link").symlink_to(root)
    assert load_raw(tmp_path / "link") == load_raw(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"question_id": "x",', "Broken.json: not valid JSON"),
        (b"\xff\xfe[]", "Broken.json: not valid JSON"),
        (b'{"question_id": "x"}', "Broken.json: holds a dict, expected a list"),
    ],
)
def test_a_broken_file_is_named(root, content, message):
    (root / omnimedvqa.QA_FOLDER / "Broken.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        load_raw(root)
    assert message in str(error.value)


def test_a_wrong_or_empty_root_is_named(root, tmp_path):
    with pytest.raises(DataError, match=r"data_root .*: no QA_information/Open-access"):
        load_raw(tmp_path)
    with pytest.raises(DataError, match=r"data_root .* hold no rows"):
        load(root)


def test_images_are_squashed_only_when_asked(root):
    assert load_image(root / "Images/Toy/a.png").size == (5, 4)
    assert load_image(root / "Images/Toy/a.png", 8).size == (8, 8)


@pytest.mark.parametrize(("mode", "name"), [("L", "x.png"), ("RGBA", "x.png"), ("P", "x.gif"), ("1", "x.bmp")])
def test_images_come_as_rgb(tmp_path, mode, name):
    Image.new(mode, (3, 3)).save(tmp_path / name)
    assert load_image(tmp_path / name).mode == "RGB"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
def test_a_truncated_image_is_found_before_training(root, ending):
    path = root / f"Images/Toy/cut.{ending}"
    Image.effect_noise((64, 64), 50).save(path)
    rows = load(root, changed(image_path=f"Images/Toy/cut.{ending}"))
    assert Decodable(Ledger(), Inspector(open_source(root)))(rows[0])
    _truncate(path)
    with pytest.raises(DataError, match=r"^Question Toy_0001: Image .*cut.*cannot be decoded"):
        Decodable(Ledger(), Inspector(open_source(root)))(rows[0])
    ledger = Ledger(strict=False)
    decodable = Decodable(ledger, Inspector(open_source(root)))
    assert not decodable(rows[0]) and not decodable(rows[0])
    assert [len(found) for found in ledger.dropped.values()] == [2]


def test_a_file_that_is_no_image_or_is_gone_or_too_large_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        load_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png: missing"):
        load_image(tmp_path / "b.png")
    write_image(tmp_path / "c.png", (11, 10))
    monkeypatch.setattr("kepo_core.data.images.MAX_PIXELS", 109)
    with pytest.raises(DataError, match="11×10 pixels, expected at most 109"):
        load_image(tmp_path / "c.png")


def test_a_decompression_bomb_is_refused_without_decoding(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"^Image .*bomb.png: "):
        load_image(tmp_path / "bomb.png")


def test_the_longest_side_is_met_and_the_ratio_kept(tmp_path):
    for size, met in {(400, 100): (80, 20), (30, 60): (40, 80), (7, 1000): (1, 80)}.items():
        Image.new("L", size).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png", 80, "longest").size == met


@pytest.mark.parametrize(("ending", "kind"), [("png", "uint16"), ("tif", "uint16"), ("tif", "float32")])
def test_deep_grey_values_are_spread_and_not_cut_off(tmp_path, ending, kind):
    ramp = np.linspace(300, 4095, 64).reshape(8, 8).astype(kind)
    Image.fromarray(ramp).save(tmp_path / f"scan.{ending}")
    pixels = np.asarray(load_image(tmp_path / f"scan.{ending}"))
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) == 64
    Image.fromarray(np.full((3, 3), 700, kind)).save(tmp_path / f"flat.{ending}")
    assert not np.asarray(load_image(tmp_path / f"flat.{ending}")).any()


def test_a_second_epoch_decodes_nothing_as_far_as_memory_goes(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.new("RGB", (10, 10), (i, i, i)).save(path)
    read = []
    monkeypatch.setattr(
        "kepo_core.data.images.load_image", lambda path, *rest: read.append(path) or load_image(path, *rest)
    )
    pictures = Pictures(5, budget=3 * 75)
    for _ in range(3):
        assert [pictures(path).getpixel((2, 2)) for path in paths] == [(i, i, i) for i in range(4)]
        assert pictures(paths[0]).size == (5, 5)
    assert [read.count(path) for path in paths] == [1, 1, 1, 3]
