"""Questions → the dataset that training reads: prompts as messages, images decoded when a row is read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from kepo_core.data.images import ReadPicture, load_image
from kepo_core.data.records import Question
from kepo_core.task.prompts import vqa_messages


def to_dataset(
    questions: Sequence[Question],
    thinking: bool,
    pictures: ReadPicture = load_image,
    target: Callable[[str], str] | None = None,
) -> Dataset:
    """One row per question, in their order, in the columns that the trainer and its reward functions read.

    ``prompt`` (chat messages of the plain prompt x), ``image`` (PIL, as ``pictures`` reads its
    path), ``question``, ``options`` (list of texts), ``answer`` (letter), ``id``, ``modality``; with ``target`` also
    ``completion``, the chat message to learn, which it makes from the letter. Prompts and images
    are made on access: 89,000 rows cost only their text and paths, and the image part of a message stays free of
    the empty ``text`` field that a stored table would give it. Reading a row raises ``DataError`` for a bad image.
    """
    table = Dataset.from_dict(
        {
            "id": [question.id for question in questions],
            "modality": [question.modality for question in questions],
            "question": [question.question for question in questions],
            "options": [list(question.options) for question in questions],
            "answer": [question.answer for question in questions],
            "image": [str(question.image) for question in questions],
        }
    )

    def decode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # A batch asks for the same row once per generation of its group: each picture is decoded once.
        images: dict[str, Image.Image] = {path: pictures(Path(path)) for path in set(rows["image"])}
        asked = zip(rows["question"], rows["options"], strict=True)
        prompts = [vqa_messages(question, options, thinking) for question, options in asked]
        made: dict[str, list[Any]] = {"prompt": prompts, "image": [images[path] for path in rows["image"]]}
        if target is not None:
            made["completion"] = [[{"role": "assistant", "content": target(letter)}] for letter in rows["answer"]]
        return rows | made

    return table.with_transform(decode)
