"""A folder of questions, in whichever layout it is → typed rows."""

import json
from pathlib import Path

from kepo_core.data.errors import DataError
from kepo_core.data.ledger import Ledger
from kepo_core.data.medr1 import KEYS, load_medr1
from kepo_core.data.omnimedvqa import QA_FOLDER, load_raw
from kepo_core.data.records import Question


def layout_of(root: Path) -> str:
    """Either "raw" (OmniMedVQA's release) or "medr1" (Med-R1's question files), told from the files themselves.

    Raises ``DataError`` where ``root`` is no folder or holds neither.
    """
    if not root.is_dir():
        raise DataError(f"data_root {root} is not a folder, expected OmniMedVQA's release or Med-R1's question files.")
    if any((root / QA_FOLDER).glob("*.json")):
        return "raw"
    for file in sorted(root.rglob("*.json")):
        try:
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, OSError):
            continue  # reading it names what is wrong, if it is one of the files
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and set(KEYS) <= set(rows[0]):
            return "medr1"
    raise DataError(
        f"data_root {root}: neither {QA_FOLDER.as_posix()}/*.json (OmniMedVQA's release) nor *_train.json and "
        f"*_test.json with {', '.join(KEYS)} (Med-R1's files) are in it, expected one of them."
    )


def load_questions(root: Path, ledger: Ledger | None = None, need_images: bool = True) -> list[Question]:
    """All questions below ``root``, in either layout; see ``load_raw`` and ``load_medr1``."""
    root = Path(root).expanduser().resolve()
    if layout_of(root) == "raw":
        return load_raw(root, ledger)
    return load_medr1(root, ledger, need_images)
