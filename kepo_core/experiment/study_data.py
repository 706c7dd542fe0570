"""From parameters to the questions of one experiment: read, split, sample, and check them before a model is called."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kepo_core.data.inspection import TWINS, Inspector, name_once
from kepo_core.data.items import read_items, write_items
from kepo_core.data.ledger import Ledger
from kepo_core.data.loading import load_questions, open_data
from kepo_core.data.phantom import ensure_phantom
from kepo_core.data.records import Question
from kepo_core.data.source import Source
from kepo_core.data.splits import fingerprint, image_key, leaked, study_split
from kepo_core.data.table_files import is_hub
from kepo_core.errors import DataError
from kepo_core.experiment.askable import Askable
from kepo_core.params import Params, resolve


@dataclass(frozen=True)
class StudyData:
    """Training questions of one modality, and test questions per modality."""

    root: Path
    train: list[Question]
    tests: dict[str, list[Question]]
    ledger: Ledger  # repaired and dropped rows

    @property
    def test(self) -> list[Question]:
        """All test questions, modality by modality."""
        return [question for questions in self.tests.values() for question in questions]

    @property
    def images(self) -> dict[str, str]:
        """Test question id → image, for statistics that account for shared images."""
        return {question.id: image_key(question) for question in self.test}

    def write_items(self, path: Path) -> None:
        """Write the file that ``items_file`` reads."""
        write_items(path, self.train, self.tests)

    def identity(self) -> dict[str, Any]:
        """Counts and content hashes, for the run's provenance."""
        return {
            "test_items_whose_image_is_trained_on": len(leaked(self.train, self.test)),
            "pictures_of_another_name": len(self.ledger.mended.get(TWINS, ())),
            "rows_dropped": {reason: len(rows) for reason, rows in self.ledger.dropped.items()},
            "train_items": len(self.train),
            "test_items": {modality: len(questions) for modality, questions in self.tests.items()},
            "train_sha256": fingerprint(self.train),
            "test_sha256": fingerprint(self.test),
        }


def load_data(params: Params) -> StudyData:
    """Read, split and sample the questions of ``params``; every image is decoded once.

    Unusable rows and images are dropped and counted in the result's ledger. Sampled questions are checked with the
    models' processors and tokenizers (`Askable`).

    Raises:
        DataError: a root, file, row or split that cannot be used; the message names it.
    """
    root: str | Path = params.data_root if is_hub(params.data_root) else resolve(params.data_root)
    if params.data_root == "phantom":
        root = ensure_phantom(seed=params.data_seed)
    source, ledger = open_data(root, params.data_columns, params.follow_links), Ledger(strict=False)
    questions = load_questions(source, ledger)
    try:
        train, tests = _choose(params, questions, source, ledger)
    except DataError as error:
        if not ledger.dropped:
            raise
        count, first = sum(map(len, ledger.dropped.values())), next(iter(ledger.dropped.values()))[0]
        raise DataError(f"{error} {count} rows were dropped; the first: {first}") from error
    if params.method != "none" and len(train) < params.prompts_per_step:
        raise DataError(
            f"data_root {params.data_root} has {len(train)} training questions of {params.train_modality}, expected at "
            f"least prompts_per_step ({params.prompts_per_step}), the questions of one step."
        )
    data = StudyData(source.root, train, tests, ledger)
    for question in (*data.train, *data.test):
        source.fetch(question.image)
    return data


def _choose(
    params: Params, questions: Sequence[Question], source: Source, ledger: Ledger
) -> tuple[list[Question], dict[str, list[Question]]]:
    """Training and test questions that the models can read: those of ``items_file``, or a new sample."""
    inspector = Inspector(source)
    named = name_once(questions, inspector, ledger)  # all of them: a picture's name must not depend on the sample
    if not params.items_file:
        can_be_asked = Askable(params, inspector, ledger)
        return study_split(
            named,
            params.train_modality,
            params.train_items,
            params.eval_items,
            params.data_seed,
            params.split,
            params.eval_split,
            can_be_asked,
            can_be_asked.in_evaluation,
        )
    train, tests = read_items(
        resolve(params.items_file), named, params.train_modality, params.train_items, params.eval_items
    )
    can_be_asked = Askable(params, inspector, Ledger())  # strict: all of these items, or an error
    for question in train:
        can_be_asked(question)
    for question in (question for rows in tests.values() for question in rows):
        can_be_asked.in_evaluation(question)
    return train, tests
