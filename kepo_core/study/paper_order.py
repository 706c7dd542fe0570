"""Do a study's methods stand in the paper's order? Spearman's ρ of their accuracies with Table 1's."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from kepo_core.analysis.claims import Outcomes
from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.experiment.methods import methods, paper_table

_RESAMPLES = 2000
#: The columns of Table 1 that are compared; the paper trains on MRI.
_IN_DOMAIN = "MRI"


def order_beside_paper(outcomes: Outcomes, in_domain: str) -> pd.DataFrame:
    """A row per part (MRI, "Avg.", "Avg. (OOD)"), with columns ``rows`` and ``ρ [95 %]``.

    Over the arms that are rows of Table 1; empty with fewer than three, or if ``in_domain`` is not MRI. The interval is
    a percentile bootstrap over each arm's runs: it says what other seeds would do to the order, with these rows.
    """
    named = {arm: row for arm in outcomes if arm in methods() and (row := methods()[arm].row)}
    if len(named) < 3 or in_domain != _IN_DOMAIN:
        return pd.DataFrame(columns=["rows", "ρ [95 %]"])
    parts, rng = [_IN_DOMAIN, AVG, AVG_OOD], np.random.default_rng(0)
    theirs = np.stack([paper_table().loc[[row]][parts].to_numpy(dtype=float)[0] for row in named.values()])
    runs = [_parts(outcomes, arm) for arm in named]  # each (runs, parts)
    drawn = np.stack([own[rng.integers(len(own), size=(_RESAMPLES, len(own)))].mean(1) for own in runs], axis=1)
    ours = np.stack([own.mean(0) for own in runs])
    table = {}
    for i, part in enumerate(parts):
        low, high = np.nanquantile(spearman(drawn[:, :, i], theirs[:, i]), [0.025, 0.975])
        value = float(spearman(ours[:, i], theirs[:, i]))
        table[part] = {"rows": len(named), "ρ [95 %]": f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"}
    return pd.DataFrame.from_dict(table, orient="index")


def spearman(samples: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's ρ of each sample (…, n) with the reference (n,), ties at their mean rank; NaN if one is constant."""
    ranks, wanted = (stats.rankdata(values, axis=-1) - (len(reference) + 1) / 2 for values in (samples, reference))
    with np.errstate(invalid="ignore"):
        return np.asarray(ranks @ wanted / np.sqrt((ranks**2).sum(-1) * (wanted**2).sum()))


def _parts(outcomes: Outcomes, arm: str) -> NDArray[np.float64]:
    """Each run's accuracy in MRI, on average and out of distribution: (runs, 3)."""
    rows = []
    for run in outcomes[arm].values():
        right = pd.Series([float(a.correct) for a in run.answers]).groupby([a.modality for a in run.answers]).mean()
        rows.append([right.get(_IN_DOMAIN, np.nan), right.mean(), right.drop(_IN_DOMAIN, errors="ignore").mean()])
    return np.array(rows, dtype=float)
