"""Two layouts are recognised; mended and dropped rows are counted; `kepo data check` shows them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from kepo_core.cli import main
from kepo_core.data import check as data_check
from kepo_core.data import inspection, loading
from kepo_core.data.check import check
from kepo_core.data.inspection import TWINS, Decodable
from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.loading import layout_of, load_questions
from kepo_core.data.medr1 import load_medr1, split_of, split_problem
from kepo_core.data.records import AnswerOutcome
from kepo_core.data.source import QA_FOLDER, open_source
from kepo_core.data.splits import split_as_given
from kepo_core.errors import DataError
from kepo_core.task.prompts import vqa_messages
from kepo_core.task.rewards import score

MEDR1 = Path(__file__).parents[3] / "shared/data/medr1_splits"

# Options on one line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "question", "options"),
    [
        ("What is seen? A)a cyst, B)a tear", "What is seen?", ("a cyst", "a tear")),
        ("Is it? A)No., B)Yes", "Is it?", ("No.", "Yes")),
        ("What? A) Epithelium (RPE), B)Lens", "What?", ("Epithelium (RPE)", "Lens")),
        ("Which? A)Joint (ACJ OA)., B)Degeneration (AMD), C)Brain (MB), D)x", "Which?",
         ("Joint (ACJ OA).", "Degeneration (AMD)", "Brain (MB)", "x")),
        ("Which of B) and C)? A)one, two, B)three", "Which of B) and C)?", ("one, two", "three")),
        ("Grade (WHO A)? A)I, B)II, C)III", "Grade (WHO A)?", ("I", "II", "III")),
        ("Out of order? A)x, C)y", "Out of order?", ("x, C)y",)),
        ("No options", "No options", ()),
    ],
)  # fmt: skip
def test_a_problem_is_split_at_its_marks_alone(problem: str, question: str, options: tuple[str, ...]) -> None:
    assert split_problem(problem) == (question, options)


# Med-R1's files ---------------------------------------------------------------------------------------------------


def row(image: str = "Images/Toy/a.png", **fields: object) -> dict[str, object]:
    return {"image": image, "problem": "What is seen? A)a cyst, B)a tear, C)a mass", "solution": "<answer> B </answer>",
            **fields}  # fmt: skip


@pytest.fixture
def medr1(tmp_path: Path) -> Path:
    root = tmp_path / "medr1"
    (root / "Images/Toy").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(root / "Images/Toy/a.png")
    return root


def write(root: Path, name: str, *rows: object) -> None:
    (root / name).write_text(json.dumps(rows), encoding="utf-8")


def test_rows_become_questions_of_their_files_modality_and_split(medr1: Path) -> None:
    write(medr1, "OCT (Optical Coherence Tomography_test.json", row())
    write(medr1, "MR (Mag-netic Resonance Imaging)_train.json", row(), row())
    assert layout_of(open_source(medr1)) == "medr1"
    one, two, three = load_questions(medr1)
    assert (one.modality, split_of(one), two.modality, split_of(three)) == ("MRI", "train", "MRI", "test")
    assert (one.question, one.options, one.answer) == ("What is seen?", ("a cyst", "a tear", "a mass"), "B")
    assert one.image == (medr1 / "Images/Toy/a.png").resolve() and one.dataset == "Toy"
    assert len({one.id, two.id, three.id}) == 3


def test_a_file_of_unknown_modality_takes_it_from_its_data_set(medr1: Path) -> None:
    write(medr1, "unknown_train.json", row(problem="Bright? A)yes, B)no"), row("Images/Other/b.png"))
    write(medr1, "X-Ray_train.json", row())
    ledger = Ledger(strict=False)
    questions = load_questions(medr1, ledger)
    assert [question.modality for question in questions] == ["X-Ray", "X-Ray"]
    assert [len(found) for found in ledger.mended.values()] == [1] and list(ledger.dropped) == ["unknown modality"]


def test_a_data_set_is_the_same_however_its_pictures_paths_are_written(medr1: Path) -> None:
    write(medr1, "CT_test.json", row("a.png"), row("Images/Dir/1.png"))
    write(medr1, "MRI_train.json", row("Images\\E\\1.png"))
    write(medr1, "unknown_train.json", row("/Images/E/2.png"), row("\\Images\\Dir\\2.png"), row("b.png"))
    ledger = Ledger(strict=False)
    questions = load_medr1(open_source(medr1), ledger, need_images=False)
    assert [(q.dataset, q.modality) for q in questions if q.id.startswith("unknown")] == [("E", "MRI"), ("Dir", "CT")]
    assert counted(ledger) == {"unknown modality": 1}


@pytest.mark.parametrize(
    ("broken", "reason", "sentence"),
    [
        (["no"], "not an object", "X-Ray_train.json, row 2: a list, expected an object"),
        (row(solution="<answer> D </answer>"), "the answer is not among the options", "names none of the 3 options"),
        (row(solution="B"), "the answer is not among the options", "expected <answer> A </answer>"),
        (row(problem="What is seen?"), "fewer than two options", "has fewer than A) and B)"),
        (row(problem="What? A)same, B)Same."), "fewer than two options", "has fewer than A) and B)"),
        (row(problem="Which? A)a, B)b, D)d"), "an option's letter is out of order", "'b, D)d' contains the mark"),
        (row(problem="Which? A)a, C)c, B)b"), "an option's letter is out of order", "'a, C)c' contains the mark"),
        (row(problem=3.5j.imag), "fewer than two options", "has fewer than A) and B)"),
        (row(problem=float("nan")), "problem is not text", "problem is nan, expected text"),
        (row(solution=float("nan")), "solution is not text", "solution is nan, expected text"),
        (row(solution=True), "solution is not text", "solution is a bool, expected text"),
        (row(problem=["x"]), "problem is not text", "problem is a list"),
        (row("Images/Toy/none.png"), "image missing", "is missing under data_root"),
        (row("Images/../../a.png"), "image path leaves data_root", "leaves data_root"),
        ({"image": "Images/Toy/a.png", "problem": "What? A)a, B)b"}, "no solution", "solution is missing"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_dropped_and_counted_or_raises(
    medr1: Path, broken: object, reason: str, sentence: str
) -> None:
    write(medr1, "X-Ray_train.json", row(), broken)
    ledger = Ledger(strict=False)
    assert len(load_questions(medr1, ledger)) == 1 == ledger.read
    assert {why: len(rows) for why, rows in ledger.dropped.items()} == {reason: 1}
    with pytest.raises(RowError, match=r"X-Ray_train\.json, row 2") as raised:
        load_questions(medr1)
    assert sentence in str(raised.value)


def test_equal_options_are_kept_once_and_the_answer_moves_along(medr1: Path) -> None:
    write(medr1, "CT_test.json", row(problem="What? A)Yes, B)no, C)yes., D)maybe", solution="<answer> C </answer>"))
    ledger = Ledger(strict=False)
    (question,) = load_questions(medr1, ledger)
    texts = [option.casefold().rstrip(".") for option in question.options]
    assert sorted(texts) == ["maybe", "no", "yes"] and texts[question.letters.index(question.answer)] == "yes"
    assert list(ledger.mended) == ["options that say the same were kept once"]


def test_a_data_set_without_a_usable_row_says_why(medr1: Path) -> None:
    write(medr1, "CT_test.json", row("Images/Toy/none.png"))
    with pytest.raises(DataError, match=r"none of its 1 rows can be used; the first: CT_test.json, row 1: image"):
        load_questions(medr1, Ledger(strict=False))


def counted(ledger: Ledger) -> dict[str, int]:
    return {reason: len(rows) for reason, rows in ledger.dropped.items()}


def test_a_backup_beside_the_files_gives_no_question_twice(medr1: Path) -> None:
    write(medr1, "CT_test.json", row(), row())
    for folder in ("Backup", "copies/old"):
        (medr1 / folder).mkdir(parents=True)
        write(medr1 / folder, "CT_test.json", row(), row())
    ledger = Ledger(strict=False)
    questions = load_questions(medr1, ledger)
    assert [q.id for q in questions] == ["CT_test:1", "CT_test:2"] and ledger.read == 2
    assert counted(ledger) == {"in a second file of the same name and rows": 4}
    assert "Backup/CT_test.json, row 1" in ledger.dropped["in a second file of the same name and rows"]


@pytest.mark.parametrize("copy", ["CT copy_test.json", "backup_CT_test.json", "CT(Computed Tomography)_test.json"])
def test_a_copy_of_another_name_gives_no_question_twice(medr1: Path, copy: str) -> None:
    """But the same question in another split is a leak, and must be reported."""
    write(medr1, "CT_test.json", row())
    write(medr1, copy, row())
    write(medr1, "CT_train.json", row())
    ledger = Ledger(strict=False)
    questions = load_questions(medr1, ledger)
    assert len(questions) == 2 and {split_of(question) for question in questions} == {"train", "test"}
    assert counted(ledger) == {"a question that is also in another file of its modality and split": 1}


@pytest.mark.parametrize("other", [[row()], [row(), row(solution="<answer> A </answer>")], []])
def test_two_files_of_one_name_and_different_rows_are_refused_before_anything_runs(medr1: Path, other: list) -> None:
    write(medr1, "CT_test.json", row(), row())
    (medr1 / "old").mkdir()
    write(medr1 / "old", "CT_test.json", *other)
    with pytest.raises(DataError, match=r"CT_test\.json and old/CT_test\.json have the same name and different rows"):
        load_questions(medr1, Ledger(strict=False))


def test_splits_by_modality_and_by_question_type_are_the_same_questions(medr1: Path) -> None:
    """As Med-R1 publishes both, side by side, with other parts."""
    lung, bone = row(problem="Lung? A)yes, B)no"), row(problem="Bone? A)yes, B)no")
    for folder in ("modality", "question_type"):
        (medr1 / folder).mkdir()
    write(medr1 / "modality", "CT_train.json", lung, row())
    write(medr1 / "modality", "X-Ray_test.json", bone)
    lung_again = row("\\Images\\Toy\\a.png", problem="Lung?  A)yes, B)no ", solution="<answer>B</answer> ")
    write(
        medr1 / "question_type",
        "Lesion Grading_test.json",
        lung_again,
        row("Images/Toy/a.png", problem="New? A)x, B)y"),
    )
    write(medr1 / "question_type", "disease_diagnosis_train.json", bone)
    ledger = Ledger(strict=False)
    questions = load_questions(medr1, ledger)
    assert {q.id: (q.modality, q.question_type, split_of(q)) for q in questions} == {
        "CT_train:1": ("CT", "Lesion Grading", "train"),
        "CT_train:2": ("CT", "", "train"),
        "X-Ray_test:1": ("X-Ray", "Disease Diagnosis", "test"),
    }
    assert counted(ledger) == {"a question that is also in a modality's file": 2, "unknown modality": 1}


def test_whatever_a_layout_reads_ids_are_unique(medr1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(medr1, "CT_test.json", row())
    twice = load_questions(medr1) * 2
    monkeypatch.setattr(loading, "load_medr1", lambda *_: twice)
    with pytest.raises(DataError, match="1 ids are used twice, 'CT_test:1' first"):
        load_questions(medr1)


def test_files_for_validation_are_read_and_others_are_counted(medr1: Path) -> None:
    write(medr1, "CT_train.json", *[row()] * 5)
    write(medr1, "CT_val.json", row())
    write(medr1, "MRI_validation.json", row())
    write(medr1, "CT_test.json", row())
    write(medr1, "CT_holdout.json", row(), row())
    (medr1 / "more").mkdir()
    write(medr1 / "more", "CT.json", row())
    (medr1 / "info.json").write_text('{"version": 1}')
    (medr1 / "Images/Toy/a.json").write_text("[1]")
    ledger = Ledger(strict=False)
    questions = load_questions(medr1, ledger)
    parts = split_as_given(questions)
    assert {name: len(part) for name, part in parts.items()} == {"train": 5, "validation": 2, "test": 1}
    assert counted(ledger) == {
        "in a file that is neither *_train, *_val nor *_test": 3,
        "a file without questions": 1,
    }


def test_more_than_eight_options_are_read_and_asked(medr1: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten, or so", "eleven"]
    listed = ", ".join(f"{letter}){word}" for letter, word in zip("ABCDEFGHIJK", words, strict=True))
    write(medr1, "CT_test.json", row(problem=f"How many? {listed}", solution="<answer> J </answer>"))
    (question,) = load_questions(medr1)
    assert question.options == tuple(words) and question.answer == "J" and question.letters == "ABCDEFGHIJK"
    text = vqa_messages(question.question, question.options, thinking=True)[0]["content"][1]["text"]
    assert "\nI) nine\nJ) ten, or so\nK) eleven\n" in text
    found = score("<answer>J</answer>", question.answer, question.options, thinking=False, finished=True)
    assert found.outcome is AnswerOutcome.CORRECT


# Which layout -----------------------------------------------------------------------------------------------------


def test_a_wrong_root_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(DataError, match="neither QA_information/Open-access"):
        layout_of(open_source(tmp_path))
    with pytest.raises(DataError, match="does not exist, expected a folder"):
        load_questions(tmp_path / "nowhere")
    (tmp_path / "down/OmniMedVQA" / QA_FOLDER).mkdir(parents=True)
    with pytest.raises(DataError, match=r"did you mean .*down/OmniMedVQA\?\."):
        load_questions(tmp_path / "down")
    (tmp_path / "down/OmniMedVQA" / QA_FOLDER / "a.json").write_text("[]")
    (tmp_path / "down/OmniMedVQA/Images/x").mkdir(parents=True)
    with pytest.raises(DataError, match=r"did you mean .*down/OmniMedVQA\?\."):
        load_questions(tmp_path / "down/OmniMedVQA/Images/x")
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("kepo: data_root")


def test_json_cut_in_the_middle_is_one_sentence(medr1: Path) -> None:
    write(medr1, "CT_test.json", row())
    (medr1 / "MRI_test.json").write_text('[{"image": "Images/Toy/a.png", "prob')
    with pytest.raises(DataError, match=r"^MRI_test.json: not valid JSON"):
        load_questions(medr1)


# kepo data check --------------------------------------------------------------------------------------------------


def raw_row(number: int, **fields: object) -> dict[str, object]:
    return {
        "dataset": "Toy", "question_id": f"Toy_{number}", "question_type": "Disease Diagnosis", "question": "What?",
        "gt_answer": "a cyst", "image_path": "Images/Toy/a.png", "option_A": "nothing", "option_B": "a cyst",
        "modality_type": "MRI", **fields,
    }  # fmt: skip


def test_the_check_counts_what_was_mended_and_dropped(medr1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (medr1 / QA_FOLDER).mkdir(parents=True)
    evil = "<script>alert(1)</script>"
    rows = [
        raw_row(1), raw_row(2, gt_answer="A cyst."), raw_row(3, option_C="A Cyst"), raw_row(4, image_path="gone.png"),
        raw_row(5, modality_type=None, modality="MR (Mag-netic Resonance Imaging)"), raw_row(6, gt_answer=evil),
        raw_row(7, option_A=None, option_C="a tear"), raw_row(1),
    ]  # fmt: skip
    write(medr1 / QA_FOLDER, "Toy.json", *rows)
    (medr1 / QA_FOLDER).with_name("Restricted-access").mkdir()
    write((medr1 / QA_FOLDER).with_name("Restricted-access"), "Far.json", raw_row(1, image_path="far/away.png"))
    checked = check(medr1)
    assert checked.layout == "raw" and checked.ledger.read == 5
    assert {why: len(found) for why, found in checked.ledger.mended.items()} == {
        "the answer differs from its option in case, spaces or a full stop": 1,
        "options that say the same were kept once": 1,
        "modality instead of modality_type": 1,
        "modality 'MR (Mag-netic Resonance Imaging)' read as MRI": 1,
        "an empty option between others was skipped": 1,
    }
    assert {why: len(found) for why, found in checked.ledger.dropped.items()} == {
        "image missing": 1, "the answer is not among the options": 1, "question_id used before": 1,
        "restricted: its picture is not part of the release": 1,
    }  # fmt: skip
    page = medr1 / "check.html"
    assert main(["data", "check", str(medr1), "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "OmniMedVQA's raw release" in text and "image missing" in text
    assert evil not in page.read_text() and "&lt;script&gt;" in page.read_text()
    assert main(["data", "check", str(medr1), "--strict"]) == 2
    assert "Toy.json, row 4 (Toy_4): image 'gone.png' is missing" in capsys.readouterr().err


@pytest.fixture
def spoilt(medr1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten good rows, and one for each fault that only decoding, the processor or the tokenizer shows."""
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    (medr1 / QA_FOLDER).mkdir(parents=True)
    for i in range(14):
        Image.effect_noise((40, 30), 50 + i).save(medr1 / f"Images/Toy/{i}.png")
    whole = (medr1 / "Images/Toy/10.png").read_bytes()
    (medr1 / "Images/Toy/10.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (300, 1)).save(medr1 / "Images/Toy/11.png")
    (medr1 / "Images/Toy/13.png").write_bytes((medr1 / "Images/Toy/0.png").read_bytes())
    rows = [raw_row(i, image_path=f"Images/Toy/{i}.png") for i in range(14)]
    rows[12]["question"] = "<|image_pad|>?"
    write(medr1 / QA_FOLDER, "Toy.json", *rows)
    return medr1


def test_the_check_tries_what_a_run_tries(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(spoilt)]) == 0
    said = capsys.readouterr().out
    for reason in ("image cannot be decoded", "the processor refuses its image", "a special token in its text", TWINS):
        assert reason in said, reason
    assert " 11 " in said.splitlines()[4] and "not decoded" not in said
    assert "Images/Toy/13.png shows what Images/Toy/0.png shows" in said
    assert main(["data", "check", "--quick", str(spoilt)]) == 0
    said = capsys.readouterr().out
    assert " 14 " in said.splitlines()[4] and "pictures were not decoded" in said.splitlines()[0]
    assert main(["data", "check", "--strict", str(spoilt)]) == 2
    assert "Question Toy_10: Image" in capsys.readouterr().err


def test_the_check_asks_what_the_given_parameters_ask(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yaml").write_text("image_size: 64\n")
    assert main(["data", "check", "-f", str(tmp_path / "p.yaml"), str(spoilt)]) == 0
    said = capsys.readouterr().out
    assert "the processor refuses" not in said and "image cannot be decoded" in said  # squashed to 64×64
    (spoilt / "Images").rename(tmp_path / "elsewhere")
    (spoilt / "Images").symlink_to(tmp_path / "elsewhere")
    assert main(["data", "check", "--quick", str(spoilt)]) == 2
    (tmp_path / "p.yaml").write_text("follow_links: true\n")
    assert main(["data", "check", "--quick", "-f", str(tmp_path / "p.yaml"), str(spoilt)]) == 0


def test_a_check_shows_how_far_it_is(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[str] = []
    for module in (inspection, data_check):
        monkeypatch.setattr(module, "tqdm", lambda items, label, *_, **__: bars.append(label) or items)
    check(spoilt, try_with=lambda inspector, ledger: Decodable(ledger, inspector))
    assert bars == ["pictures", "questions"]


def test_pictures_that_nobody_gave_are_not_missed(medr1: Path) -> None:
    write(medr1, "CT_test.json", row("Images/Far/away.png"))
    for file in (medr1 / "Images/Toy").iterdir():
        file.unlink()
    (medr1 / "Images/Toy").rmdir()
    (medr1 / "Images").rmdir()
    checked = check(medr1)
    assert checked.ledger.read == 1 and "pictures were not looked for" in checked.as_text()


@pytest.mark.skipif(not MEDR1.is_dir(), reason="these files are not part of the package")
def test_the_three_published_files() -> None:
    checked = check(MEDR1)
    assert checked.ledger.read == 1110 + 848
    assert {why: len(rows) for why, rows in checked.ledger.dropped.items()} == {"unknown modality": 1}
    assert all(q.answer in q.letters and 2 <= len(q.options) <= 4 for q in checked.questions)
    assert {q.modality for q in checked.questions} == {"Microscopy", "OCT"}
    assert not any(
        ") " in option[-2:] or option.startswith((",", ")")) for q in checked.questions for option in q.options
    )
    tail = [q for q in checked.questions if any("(RPE)" in option for option in q.options)]
    assert tail and all(len(q.options) == 4 for q in tail)


@pytest.mark.skipif(not MEDR1.is_dir(), reason="these files are not part of the package")
def test_every_published_option_behind_its_letter_is_read_as_that_letter() -> None:
    """Bacteria (``E. coli``), stains (``H&E``), grades: letters there are not options."""
    for question in check(MEDR1).questions:
        text = question.options[question.letters.index(question.answer)]
        for said in (f"{question.answer}) {text}", f"{question.answer}. {text}", f"{question.answer}: {text}"):
            found = score(f"<answer>{said}</answer>", question.answer, question.options, thinking=False, finished=True)
            assert found.outcome is AnswerOutcome.CORRECT, said
