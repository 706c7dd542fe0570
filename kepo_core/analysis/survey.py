"""A look at a set of questions before training: counts, balance, pictures, leaks, lengths, noise.

Functions take questions and return a table; `figures` plots them.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from PIL import Image

from kepo_core.analysis.intervals import wilson_interval
from kepo_core.data.images import ReadPicture, load_image
from kepo_core.data.records import Question, categories
from kepo_core.data.splits import SPLITS, leaked
from kepo_core.errors import DataError
from kepo_core.task.prompts import vqa_messages


def counts(questions: Iterable[Question], by: str = "question_type") -> pd.DataFrame:
    """Questions per modality (rows, in the order of `categories`) and per ``question_type`` or ``dataset`` (columns).

    The most frequent columns come first. A missing value is "(not given)".
    """
    table = pd.DataFrame([(q.modality, getattr(q, by) or "(not given)") for q in questions], columns=["modality", by])
    counted = pd.crosstab(table["modality"], table[by])
    ordered = counted.loc[categories(counted.index)]
    return ordered[ordered.sum().sort_values(ascending=False, kind="stable").index]


def balance(questions: Sequence[Question]) -> pd.DataFrame:
    """Per modality, in per cent: questions with 2, 3, … options, right answers by letter, and accuracy of guessing.

    ``best letter`` is the accuracy of always answering the most frequent right letter, ``guessing`` that of a random
    option.
    """
    asked = pd.DataFrame(
        [(q.modality, q.answer, len(q.options), 1 / len(q.options)) for q in questions],
        columns=["modality", "letter", "options", "guessing"],
    )
    modality = asked["modality"]
    letters = 100 * pd.crosstab(modality, asked["letter"], normalize="index")
    options = 100 * pd.crosstab(modality, asked["options"], normalize="index").rename(columns="{} options".format)
    numbers = {"best letter": letters.max(axis=1), "guessing": 100 * asked.groupby("modality")["guessing"].mean()}
    table = modality.value_counts().rename("questions").to_frame().join([options, letters]).assign(**numbers)
    return table.loc[categories(table.index)]


def pictures(questions: Iterable[Question]) -> pd.DataFrame:
    """One row per file: modality, image (path in the common folder), width, height (pixels), mode, format, kB, sha256.

    Only headers are decoded; sha256 is of the file's bytes. Raises ``DataError`` for a picture that cannot be read.
    """
    rows = []
    files = {q.image: q for q in questions}
    folder = os.path.commonpath([path.parent for path in files]) if files else ""
    for path, question in files.items():
        try:
            with Image.open(path) as image:
                facts = {"width": image.width, "height": image.height, "mode": image.mode, "format": image.format}
            content = path.read_bytes()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"Image {path}: cannot be read ({error}), expected an image file.") from error
        rows.append(
            {"modality": question.modality, "image": path.relative_to(folder).as_posix(), **facts,
             "kB": len(content) / 1000, "sha256": hashlib.sha256(content).hexdigest()}
        )  # fmt: skip
    return pd.DataFrame(rows)


def duplicates(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `pictures` whose files are identical byte for byte, grouped."""
    return table[table.duplicated("sha256", keep=False)].sort_values(["sha256", "image"])[
        ["sha256", "modality", "image"]
    ]


def leaks(questions: Sequence[Question], train_modality: str, seed: int) -> pd.DataFrame:
    """For each way to split (rows): numbers of training and test questions of the training modality, and of test
    questions whose image is in the training part. Ways that the data do not support are skipped.
    """
    rows = []
    for name, split in SPLITS.items():
        try:
            parts = split(questions, seed)
        except DataError:
            continue  # "given", for data without given parts
        train, test = ([q for q in parts[part] if q.modality == train_modality] for part in ("train", "test"))
        found = len(leaked(train, test))
        rows.append(
            {"split": name, f"train {train_modality}": len(train), f"test {train_modality}": len(test),
             "whose image is trained on": found, "per cent": 100 * found / max(len(test), 1)}
        )  # fmt: skip
    return pd.DataFrame(rows).set_index("split")


def prompt_lengths(
    questions: Iterable[Question], processor: Any, thinking: bool, pictures: ReadPicture = load_image
) -> pd.DataFrame:
    """Tokens of each question's plain prompt x for ``processor``: one row each, ``text``, ``image`` and ``tokens``."""
    rows = []
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    for q in questions:
        messages = vqa_messages(q.question, q.options, thinking)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = processor(text=[text], images=[[pictures(q.image)]])["input_ids"][0]
        image = sum(int(token == image_token) for token in ids)
        rows.append({"id": q.id, "modality": q.modality, "text": len(ids) - image, "image": image, "tokens": len(ids)})
    return pd.DataFrame(rows)


def noise(sizes: Iterable[int] = (100, 300, 1000, 2400), levels: Iterable[float] = (0.5, 0.7, 0.9)) -> pd.DataFrame:
    """Half the width of Wilson's 95 % interval in points, by number of independent questions (rows) and accuracy."""
    rows = {}
    for n in sizes:
        intervals = {f"{level:.0%}": wilson_interval(level * n, n) for level in levels}
        rows[n] = {name: 50 * (high - low) for name, (low, high) in intervals.items()}
    return pd.DataFrame(rows).T.rename_axis("questions")
