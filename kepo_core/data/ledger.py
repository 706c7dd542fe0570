"""Counts of what was read from a data set, what was mended in its rows, and what was dropped."""

import re
from collections import defaultdict
from dataclasses import dataclass, field

import pandas as pd

from kepo_core.errors import DataError


class RowError(DataError):
    """A row that cannot be used; ``reason`` is the kind of problem, the message names the row."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def reason_of(error: BaseException) -> str:
    """A library's error message on one line, the same in every process: without memory addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split())) or type(error).__name__


@dataclass
class Ledger:
    """Counts mended and dropped rows by reason. ``strict``: a row that would be dropped raises instead."""

    strict: bool = True
    read: int = 0
    mended: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason → where
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason → sentences
    _ids: dict[str, str] = field(default_factory=dict, repr=False)  # question id → where

    def mend(self, reason: str, where: str) -> None:
        """Note that the row at ``where`` was read differently from how it is written."""
        self.mended[reason].append(where)

    def claim(self, question_id: str, where: str) -> None:
        """Note that the row at ``where`` has this id. Raises ``RowError`` if another row has it."""
        first = self._ids.setdefault(question_id, where)
        if first != where:
            raise RowError(
                "question_id used before",
                f"{where}: question_id {question_id!r} is already used by {first}, expected a unique one.",
            )

    def drop(self, error: RowError) -> None:
        """Note that a row was dropped; under ``strict`` raise its error."""
        if self.strict:
            raise error
        self.dropped[error.reason].append(str(error))

    def leave_out(self, reason: str, where: str) -> None:
        """Note that the row at ``where`` was skipped on purpose; raises nothing, strict or not."""
        self.dropped[reason].append(where)

    def nothing(self, root: object, rows: int) -> DataError:
        """The error of a data set in which no row can be used; it quotes the first problem."""
        if not rows:
            return DataError(f"data_root {root}: its question files hold no rows, expected at least one.")
        first = next(iter(self.dropped.values()))[0]
        return DataError(f"data_root {root}: none of its {rows} rows can be used; the first: {first}")

    def table(self) -> pd.DataFrame:
        """One row per reason: what was done, why, to how many rows, and the first of them."""
        rows = [{"rows": "read", "why": "", "how many": self.read, "the first": ""}]
        for done, reasons in (("mended", self.mended), ("dropped", self.dropped)):
            for reason, found in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
                rows.append({"rows": done, "why": reason, "how many": len(found), "the first": found[0]})
        return pd.DataFrame(rows)
