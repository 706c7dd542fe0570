"""What the gates of a study's arms let through, from the rollouts of their runs."""

from collections.abc import Mapping, Sequence

import pandas as pd

#: Column → what it is a share of.
SHARES = {
    "tokens": "weight over all tokens",
    "right": "right rollouts let through",
    "wrong": "wrong rollouts let through",
    "teacher": "of what is let through, by prompts that the teacher answers right",
}


def gate_table(rollouts: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """A row per arm whose gate opened at all, a column per entry of `SHARES`, means over its runs.

    ``teacher`` weighs by the gate and the number of tokens. Which prompts the teacher answers right is known from any
    run of the study whose gate asks it (``gate: teacher``), as all runs have one teacher; NaN without such a run.

    Args:
        rollouts: arm → the rollouts file of each of its runs, with the task's column ``accuracy``.
    """
    tables = [table for runs in rollouts.values() for table in runs]
    known = pd.concat([table[["id", "teacher_right"]] for table in tables]).dropna() if tables else pd.DataFrame()
    answers = known.groupby("id")["teacher_right"].mean() if len(known) else pd.Series(dtype=float)
    rows = {arm: pd.DataFrame([_shares(table, answers) for table in runs]).mean() for arm, runs in rollouts.items()}
    opened = {arm: row for arm, row in rows.items() if row.get("tokens", 0.0) > 0}
    return pd.DataFrame.from_dict(opened, orient="index", columns=list(SHARES))


def _shares(table: pd.DataFrame, answers: "pd.Series[float]") -> dict[str, float]:
    trained = table[~table["replaced"]]
    right, weight = trained["accuracy"] == 1, trained["gate"].astype(float) * trained["tokens"]
    told = trained["id"].map(answers)
    judged = weight[told.notna()].sum()
    return {
        "tokens": float(weight.sum() / trained["tokens"].sum()),
        "right": float((trained["gate"][right] > 0).mean()),
        "wrong": float((trained["gate"][~right] > 0).mean()),
        "teacher": float((weight * told).sum() / judged) if judged else float("nan"),
    }
