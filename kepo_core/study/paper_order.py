"""Do a study's methods stand in the paper's order? Spearman's ρ of their accuracies with Table 1's."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kepo_core.analysis.claims import Outcomes
from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.data.records import categories
from kepo_core.experiment.methods import methods, paper_table

_RESAMPLES = 2000


def order_beside_paper(outcomes: Outcomes, in_domain: str) -> pd.DataFrame:
    """A row per part (``in_domain``, "Avg.", "Avg. (OOD)"), with columns ``rows`` and ``ρ [95 %]``.

    Over the arms that are rows of Table 1; empty with fewer than three. The interval is a percentile bootstrap over
    each arm's runs: it says what other seeds would do to the order, with these rows.
    """
    named = {arm: row for arm in outcomes if arm in methods() and (row := methods()[arm].row)}
    if len(named) < 3:
        return pd.DataFrame(columns=["rows", "ρ [95 %]"])
    paper, rng = paper_table(), np.random.default_rng(0)
    theirs = np.stack([paper.loc[[row]][["MRI", AVG, AVG_OOD]].to_numpy(dtype=float)[0] for row in named.values()])
    runs = [_parts(outcomes, arm, in_domain) for arm in named]  # each (runs, parts)
    drawn = np.stack([own[rng.integers(len(own), size=(_RESAMPLES, len(own)))].mean(1) for own in runs], axis=1)
    ours = np.stack([own.mean(0) for own in runs])
    table = {}
    for i, part in enumerate((in_domain, AVG, AVG_OOD)):
        low, high = np.nanquantile([spearman(sample, theirs[:, i]) for sample in drawn[:, :, i]], [0.025, 0.975])
        table[part] = {
            "rows": len(named),
            "ρ [95 %]": f"{spearman(ours[:, i], theirs[:, i]):+.2f} [{low:+.2f}, {high:+.2f}]",
        }
    return pd.DataFrame.from_dict(table, orient="index")


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's ρ of two arrays (n,), ties at their mean rank; NaN if one of them does not vary."""
    ranks = pd.DataFrame({"first": first, "second": second}).rank()
    if ranks.nunique().min() < 2:
        return float("nan")
    return float(np.corrcoef(ranks.to_numpy().T)[0, 1])


def _parts(outcomes: Outcomes, arm: str, in_domain: str) -> NDArray[np.float64]:
    """Each run's accuracy in domain, on average and out of distribution: (runs, 3)."""
    rows = []
    for run in outcomes[arm].values():
        right = pd.Series([float(a.correct) for a in run.answers]).groupby([a.modality for a in run.answers]).mean()
        present = categories(right.index)
        rows.append([right[in_domain], right[present].mean(), right[[m for m in present if m != in_domain]].mean()])
    return np.array(rows)
