"""The survey counts what is there."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kepo_core.analysis import survey
from kepo_core.data.images import load_image
from kepo_core.data.records import Question
from kepo_core.errors import DataError
from kepo_core.pages import figures
from kepo_core.task.prompts import vqa_messages


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Two MRI pictures, asked about twice and once, and three CT pictures of which two are the same."""
    folder = tmp_path / "Images/Toy"
    folder.mkdir(parents=True)
    sizes = {"m0": (40, 20), "m1": (64, 64), "c0": (30, 90), "c1": (30, 90), "c2": (31, 90)}
    for name, size in sizes.items():
        Image.new("L" if name == "m0" else "RGB", size).save(folder / f"{name}.png")

    def ask(number: int, name: str, kind: str, options: tuple[str, ...], answer: str) -> Question:
        modality = "MRI" if name[0] == "m" else "CT"
        return Question(f"q{number}", "Toy", modality, kind, "What?", options, answer, folder / f"{name}.png")

    return [
        ask(0, "c0", "Grading", ("a", "b", "c", "d"), "D"), ask(1, "c1", "Grading", ("a", "b", "c", "d"), "D"),
        ask(2, "c2", "", ("a", "b"), "A"), ask(3, "m0", "Grading", ("a", "b"), "A"),
        ask(4, "m0", "Grading", ("a", "b", "c"), "B"), ask(5, "m1", "Diagnosis", ("a", "b"), "A"),
    ]  # fmt: skip


def test_counts_by_type_and_data_set(questions: list[Question]) -> None:
    table = survey.counts(questions)
    assert list(table.index) == ["MRI", "CT"] and list(table) == ["Grading", "(not given)", "Diagnosis"]
    assert table.loc["MRI"].tolist() == [2, 0, 1] and table.loc["CT"].tolist() == [2, 1, 0]
    assert survey.counts(questions, "dataset")["Toy"].tolist() == [3, 3]


def test_balance_of_options_and_letters(questions: list[Question]) -> None:
    table = survey.balance(questions)
    assert list(table) == ["questions", "2 options", "3 options", "4 options", "A", "B", "D", "best letter", "guessing"]
    assert table.loc["CT"].tolist() == pytest.approx([3, 100 / 3, 0, 200 / 3, 100 / 3, 0, 200 / 3, 200 / 3, 100 / 3])
    assert table.loc["MRI", "guessing"] == pytest.approx(100 * (1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_each_picture_once_and_the_same_bytes_are_seen(questions: list[Question]) -> None:
    table = survey.pictures(questions)
    assert len(table) == 5 and table["format"].unique().tolist() == ["PNG"]
    assert table.set_index("image").loc["m0.png", ["width", "height", "mode"]].tolist() == [40, 20, "L"]
    assert survey.duplicates(table)["image"].tolist() == ["c0.png", "c1.png"]
    questions[0].image.write_bytes(b"none")
    with pytest.raises(DataError, match=r"c0.png: cannot be read"):
        survey.pictures(questions)


def test_leaks_of_every_split_that_the_data_offer(questions: list[Question]) -> None:
    many = [replace(questions[3], id=f"x{i}", image=Path(f"/Images/{i // 4}.png")) for i in range(200)]
    table = survey.leaks(many, "MRI", seed=0)
    assert list(table.index) == ["image", "question"]
    assert table.loc["image"].tolist() == [120, 40, 0, 0]
    train, test, found, share = table.loc["question"]
    assert (train, test) == (120, 40) and 30 <= found <= 40 and share == 100 * found / 40
    given = [replace(q, id=f"CT_{'test' if i < 8 else 'train'}:{i}") for i, q in enumerate(many[:20])]
    assert survey.leaks(given, "MRI", seed=0).loc["given", "whose image is trained on"] == 0
    crossed = [replace(q, id=f"CT_{'test' if i % 2 else 'train'}:{i}") for i, q in enumerate(many[:20])]
    assert survey.leaks(crossed, "MRI", seed=0).loc["given", "whose image is trained on"] >= 8


def test_prompts_are_as_long_as_what_training_sends(questions: list[Question], processor) -> None:
    table = survey.prompt_lengths(questions, processor, thinking=True).set_index("id")
    q = questions[5]
    messages = vqa_messages(q.question, q.options, thinking=True)
    messages[0]["content"][0]["image"] = load_image(q.image)
    sent = processor.apply_chat_template([messages], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert table.loc["q5", "tokens"] == len(sent["input_ids"][0])
    assert table.loc["q5", "image"] == 16 and (table["text"] + table["image"] == table["tokens"]).all()
    larger = survey.prompt_lengths([q], processor, True, partial(load_image, image_size=128)).set_index("id")
    assert larger.loc["q5", "image"] == 64 and larger.loc["q5", "text"] == table.loc["q5", "text"]


def test_noise_is_half_of_wilsons_interval() -> None:
    table = survey.noise()
    assert table.loc[300, "70%"] == pytest.approx(5.16, abs=0.02) and table.loc[2400, "70%"] < table.loc[300, "70%"]


def test_figures_show_the_tables(questions: list[Question], processor) -> None:
    axes = Figure(figsize=(8, 8)).subplots(2, 2)
    figures.count_map(survey.counts(questions), axes[0, 0])
    assert sorted(text.get_text() for text in axes[0, 0].texts) == ["0", "0", "1", "1", "2", "2"]
    figures.stacked_shares(survey.balance(questions), ["A", "B", "D"], axes[0, 1])
    widths = np.array([bar.get_width() for bar in axes[0, 1].patches]).reshape(3, 2)
    assert widths.sum(0) == pytest.approx([100, 100]) and axes[0, 1].get_ylim()[0] > axes[0, 1].get_ylim()[1]
    figures.picture_sizes(survey.pictures(questions), axes[1, 0])
    assert [len(line.get_xdata()) for line in axes[1, 0].get_lines()] == [2, 3, 2]
    lengths = {"thinking": survey.prompt_lengths(questions, processor, thinking=True)}
    figures.prompt_histogram(lengths, axes[1, 1])
    assert "longest" in axes[1, 1].get_legend().get_texts()[0].get_text()
