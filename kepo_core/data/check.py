"""``kepo data check``: what a data set holds, what was mended to read it, and what was dropped and why."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from kepo_core.data.inspection import Inspector, name_once
from kepo_core.data.ledger import Ledger
from kepo_core.data.loading import layout_of, load_questions, open_data
from kepo_core.data.records import LETTERS, Question, categories
from kepo_core.data.source import Folder
from kepo_core.data.splits import image_key

LAYOUTS = {"raw": "OmniMedVQA's raw release", "medr1": "Med-R1's question files", "table": "a table of your own"}


@dataclass(frozen=True)
class Checked:
    """What was found at ``root``; ``with_images`` is False if there is no folder of pictures.

    ``tried``: whether pictures were decoded and all other checks of a run were made.
    """

    root: Path
    layout: str
    with_images: bool
    questions: list[Question]
    ledger: Ledger
    tried: bool = False

    def tables(self) -> dict[str, pd.DataFrame]:
        """By title: what was read, mended and dropped, and counts per modality."""
        rows = []
        most = max((len(question.options) for question in self.questions), default=2)
        for modality in categories(question.modality for question in self.questions):
            own = [question for question in self.questions if question.modality == modality]
            pictures = Counter(image_key(question) for question in own)
            rows.append(
                {
                    "modality": modality,
                    "questions": len(own),
                    "data sets": len({question.dataset for question in own}),
                    "pictures": len(pictures),
                    "pictures with several questions": sum(count > 1 for count in pictures.values()),
                }
                | {f"answer {letter}": sum(q.answer == letter for q in own) for letter in LETTERS[:most]}
                | {f"{n} options": sum(len(q.options) == n for q in own) for n in range(2, most + 1)}
            )
        return {"What was read, mended and dropped": self.ledger.table(), "Questions": pd.DataFrame(rows)}

    def heading(self) -> str:
        """The layout, and a note if pictures were not looked for or not decoded."""
        pictures = "" if self.tried else "; pictures were not decoded"
        if not self.with_images:
            pictures = "; no Images folder: pictures were not looked for"
        return f"{self.root.name}: {LAYOUTS[self.layout]}{pictures}"

    def as_text(self) -> str:
        """For a terminal."""
        parts = [f"{title}\n{table.to_string(index=False)}" for title, table in self.tables().items()]
        return "\n\n".join([self.heading(), *parts])


def check(
    root: str | Path,
    strict: bool = False,
    columns: str = "",
    follow_links: bool = False,
    try_with: Callable[[Inspector, Ledger], Callable[[Question], bool]] | None = None,
) -> Checked:
    """Read everything at ``root``. ``strict`` raises ``DataError`` for the first row that would be dropped.

    ``columns`` and ``follow_links`` are the parameters ``data_columns`` and ``follow_links``. ``try_with`` makes the
    check that a run applies to each question (``experiment.askable``); without it no picture is decoded.
    """
    source, ledger = open_data(root, columns, follow_links), Ledger(strict=strict)
    layout = layout_of(source)
    with_images = layout != "medr1" or not isinstance(source, Folder) or source.has_images
    questions = load_questions(source, ledger, need_images=with_images)
    if try_with and with_images:
        inspector = Inspector(source)
        usable = try_with(inspector, ledger)
        named = tqdm(name_once(questions, inspector, ledger), "questions", delay=1)
        questions = [question for question in named if usable(question)]
        ledger.read = len(questions)
    return Checked(source.root, layout, with_images, questions, ledger, bool(try_with) and with_images)
