"""Records → tables: accuracies with intervals, paired differences, exact tests. Pure functions.

Notation: x_i ∈ {0, 1} says whether question i was answered correctly, n the number of questions, K the number of
distinct images, M the number of modalities. No estimate is returned without its interval. Intervals speak of
which questions were drawn, for models as they are: other seeds and other pretrained students are not in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from kepo_core.data.records import MODALITIES, Answer, AnswerOutcome, Question

AVG = "Avg."
AVG_OOD = "Avg. (OOD)"

Interval = tuple[float, float]
Floats = NDArray[np.float64]
_OUTCOMES = tuple(str(outcome) for outcome in AnswerOutcome)


def z_value(confidence: float) -> float:
    """The two-sided normal quantile, 1.96 for 0.95."""
    return float(stats.norm.ppf(0.5 + confidence / 2))


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion p̂ = successes / n (Wilson 1927).

        (p̂ + z²/2n ± z √(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n)

    ``n`` may be an effective number and so need not be whole. Raises ``ValueError`` unless 0 ≤ successes ≤ n, n > 0.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"successes, n: {successes} of {n}, expected 0 ≤ successes ≤ n and n > 0.")
    z = z_value(confidence)
    p = successes / n
    centre = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # it holds p̂, which rounding at 0 and 1 would deny


def design_effect(values: ArrayLike, clusters: Sequence[str]) -> float:
    """How many times the variance of a mean grows because values of one cluster resemble each other; at least 1.

        deff = [ K/(K-1) Σ_k (Σ_{i∈k} (x_i - x̄))² ] / [ n/(n-1) Σ_i (x_i - x̄)² ]

    ``values`` (n,), ``clusters`` (n,) the cluster (image) of each. Both variances are those of the same mean, from
    the linearised cluster estimator and from independent sampling; n / deff is the effective number of values.
    1 when all values are equal, or each stands alone; below 1 it is taken as 1, so intervals never shrink by it.
    """
    x = np.asarray(values, dtype=float)
    if len(x) != len(clusters):
        raise ValueError(f"clusters: {len(clusters)} for {len(x)} values, expected one per value.")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    n, k = len(x), int(index.max()) + 1
    centred = x - x.mean()
    independent = n / max(n - 1, 1) * float(np.sum(centred**2))
    if independent == 0 or k == 1 or k == n:
        return 1.0
    clustered = k / (k - 1) * float(np.sum(np.bincount(index, weights=centred) ** 2))
    return max(1.0, clustered / independent)


def mean_interval(estimates: ArrayLike, intervals: Sequence[Interval]) -> tuple[float, float, float]:
    """Mean of M independent estimates θ_m with intervals (l_m, u_m) → (mean, low, high).

        low = θ̄ - √(Σ_m (θ_m - l_m)²) / M,   high = θ̄ + √(Σ_m (u_m - θ_m)²) / M

    Source: Zou & Donner 2008, "method of variance estimates recovery". Unlike a normal interval it keeps the
    asymmetry of its parts and has width even where every estimate is 0 or 1.
    """
    theta = np.asarray(estimates, dtype=float)
    low, high = np.asarray(intervals, dtype=float).T
    mean = float(theta.mean())
    down = float(np.sqrt(np.sum((theta - low) ** 2)) / len(theta))
    up = float(np.sqrt(np.sum((high - theta) ** 2)) / len(theta))
    return mean, mean - down, mean + up


@dataclass(frozen=True, slots=True)
class McNemar:
    """The exact McNemar test: ``gained`` questions were wrong before and right after, ``lost`` the reverse."""

    gained: int
    lost: int
    p_value: float


def mcnemar_exact(before: Sequence[Answer], after: Sequence[Answer]) -> McNemar:
    """Two-sided exact McNemar test of two models on the same questions, paired by question id.

    Under H₀ each discordant pair is gained or lost with probability ½, so the p-value is that of a binomial test
    (1 when there is none). It takes questions as independent; with several to an image it is somewhat too sure.
    Raises ``ValueError`` unless both answer exactly the same questions, each once.
    """
    x, y = _paired(before, after)
    gained, lost = int(np.sum((y - x) > 0)), int(np.sum((y - x) < 0))
    p = float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p)


def difference_interval(gained: float, lost: float, n: float, confidence: float = 0.95) -> Interval:
    """Interval for the difference of two paired proportions, (gained - lost) / n.

        d̃ = (g - l)/(n + 2),  ṽ = ((g + l + 2)/(n + 2) - d̃²)/(n + 2),  d̃ ± z √ṽ

    where g and l count discordant pairs. Source: Bonett & Price 2012 (adjusted Wald: one is added to each
    discordant cell, so it has width even where nothing changed). It is widened to hold the estimate where needed.
    """
    d = (gained - lost) / (n + 2)
    variance = ((gained + lost + 2) / (n + 2) - d**2) / (n + 2)
    half = z_value(confidence) * float(np.sqrt(variance))
    estimate = (gained - lost) / n
    return max(-1.0, min(d - half, estimate)), min(1.0, max(d + half, estimate))


def accuracy_table(
    answers: Mapping[str, Sequence[Answer]],
    images: Mapping[str, str] | None = None,
    in_domain: str = MODALITIES[0],
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Table 1's shape: a row per model; per modality, then "Avg." and "Avg. (OOD)", the accuracy with its interval.

    Columns are pairs (modality or average, one of ``accuracy``, ``low``, ``high``, ``n``), accuracies in [0, 1],
    modalities in the order of MODALITIES. "Avg." is the unweighted mean of the modalities' accuracies as in the
    paper, "Avg. (OOD)" that of all but ``in_domain``. A model without answers for a modality that others have gets
    NaN there and in both averages, which would not compare.
    Intervals: Wilson's per modality, with n / deff questions where ``images`` (question id → image) is given, so
    that questions sharing an image count as what they are; averages combine them by ``mean_interval``. Every
    answer stays in the denominator, unreadable ones included.
    """
    rows = {}
    for model, given in answers.items():
        cells = {}
        for modality, part in _by_modality(given).items():
            cells[modality] = _accuracy(part, images, confidence)
        rows[model] = cells
    columns = [m for m in MODALITIES if any(m in cells for cells in rows.values())]
    complete = {
        model: _averages(cells, "accuracy", in_domain) for model, cells in rows.items() if len(cells) == len(columns)
    }
    return _table({model: cells | complete.get(model, {}) for model, cells in rows.items()})


def type_table(
    answers: Mapping[str, Sequence[Answer]], images: Mapping[str, str] | None = None, confidence: float = 0.95
) -> pd.DataFrame:
    """Accuracy per question type over all modalities, in the shape and with the intervals of ``accuracy_table``.

    Types in alphabetical order; questions that came without a type are "(not given)". No averages: types are not
    equally many, and the paper has none over them.
    """
    types = sorted({answer.question_type for given in answers.values() for answer in given})
    rows = {
        model: {
            kind or "(not given)": _accuracy(part, images, confidence)
            for kind in types
            if (part := [answer for answer in given if answer.question_type == kind])
        }
        for model, given in answers.items()
    }
    return _table(rows, [kind or "(not given)" for kind in types])


def paired_differences(
    before: Sequence[Answer],
    after: Sequence[Answer],
    images: Mapping[str, str] | None = None,
    in_domain: str = MODALITIES[0],
    confidence: float = 0.95,
) -> pd.DataFrame:
    """What changed between two models on the same questions: a row per modality, then the two averages.

    Columns: ``before``, ``after`` (accuracies), ``difference`` with ``low`` and ``high`` (``difference_interval``;
    where ``images`` is given, with counts divided by the design effect of the differences), ``n``, ``gained``,
    ``lost`` and the exact McNemar ``p_value`` over the row's questions pooled. The averages are unweighted means
    over modalities (OOD: all but ``in_domain``), their interval by ``mean_interval``. Raises ``ValueError`` unless
    both answer the same questions.
    """
    _paired(before, after)
    later = {answer.question_id: answer for answer in after}
    rows: dict[str, dict[str, float]] = {}
    parts = _by_modality(before)
    for modality, part in parts.items():
        match = [later[answer.question_id] for answer in part]
        x, y = _paired(part, match)
        test = mcnemar_exact(part, match)
        deff = _deff(y - x, part, images)
        low, high = difference_interval(test.gained / deff, test.lost / deff, len(part) / deff, confidence)
        rows[modality] = {
            "before": float(x.mean()),
            "after": float(y.mean()),
            "difference": float((y - x).mean()),
            "low": low,
            "high": high,
            "n": len(part),
            "gained": test.gained,
            "lost": test.lost,
            "p_value": test.p_value,
        }
    for name, cell in _averages(rows, "difference", in_domain).items():
        members = [m for m in parts if name == AVG or m != in_domain]
        pooled = [answer for modality in members for answer in parts[modality]]
        test = mcnemar_exact(pooled, [later[answer.question_id] for answer in pooled])
        sides = {side: float(np.mean([rows[m][side] for m in members])) for side in ("before", "after")}
        rows[name] = sides | cell | {"gained": test.gained, "lost": test.lost, "p_value": test.p_value}
    return pd.DataFrame.from_dict(rows, orient="index").astype({"n": int, "gained": int, "lost": int})


def outcome_table(answers: Mapping[str, Sequence[Answer]]) -> pd.DataFrame:
    """How each model's answers ended: a row per model, a column per outcome (counts), then format and lengths.

    ``format_ok`` and ``finished`` are counts; ``tokens_median`` and ``tokens_q90`` are quantiles of the
    completions' lengths in tokens.
    """
    rows = {}
    for model, given in answers.items():
        tokens = np.array([answer.tokens for answer in given])
        counts = pd.Series([str(answer.outcome) for answer in given]).value_counts()
        rows[model] = {
            "n": len(given),
            **{outcome: int(counts.get(outcome, 0)) for outcome in _OUTCOMES},
            "format_ok": sum(answer.format_ok for answer in given),
            "finished": sum(answer.finished for answer in given),
            "tokens_median": float(np.median(tokens)),
            "tokens_q90": float(np.quantile(tokens, 0.9)),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def chance_levels(questions: Iterable[Question]) -> dict[str, float]:
    """Modality → the accuracy that guessing uniformly among each question's options is expected to have."""
    shares: dict[str, list[float]] = {}
    for question in questions:
        shares.setdefault(question.modality, []).append(1 / len(question.options))
    return {modality: sum(part) / len(part) for modality, part in shares.items()}


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """``accuracy_table``'s result in per cent for reading: each cell ``61.3 [55.7, 66.7]``, an empty one "–"."""

    def cell(row: pd.Series, column: str) -> str:
        value, low, high = (100 * float(row[(column, part)]) for part in ("accuracy", "low", "high"))
        return "–" if np.isnan(value) else f"{value:.1f} [{low:.1f}, {high:.1f}]"

    columns = list(table.columns.unique(level=0))
    return pd.DataFrame(
        [[cell(row, column) for column in columns] for _, row in table.iterrows()], index=table.index, columns=columns
    )


def _paired(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[Floats, Floats]:
    """Correctness (n,) of both, in the order of ``before``."""
    first = {answer.question_id: answer for answer in before}
    second = {answer.question_id: answer for answer in after}
    if not before:
        raise ValueError("before: no answers, expected at least one question to compare.")
    if len(first) != len(before) or len(second) != len(after):
        raise ValueError("before, after: a question occurs twice, expected each once.")
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(f"before, after: {len(odd)} questions occur on one side only (as {odd[0]}), expected none.")
    x = np.array([float(answer.correct) for answer in before])
    y = np.array([float(second[answer.question_id].correct) for answer in before])
    return x, y


def _by_modality(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    groups = {m: [answer for answer in answers if answer.modality == m] for m in MODALITIES}
    return {modality: part for modality, part in groups.items() if part}


def _deff(values: Floats, answers: Sequence[Answer], images: Mapping[str, str] | None) -> float:
    if images is None:
        return 1.0
    return design_effect(values, [str(images[answer.question_id]) for answer in answers])


def _accuracy(part: Sequence[Answer], images: Mapping[str, str] | None, confidence: float) -> dict[str, float]:
    x = np.array([answer.correct for answer in part], dtype=float)
    n_effective = len(x) / _deff(x, part, images)
    low, high = wilson_interval(x.mean() * n_effective, n_effective, confidence)
    return {"accuracy": float(x.mean()), "low": low, "high": high, "n": len(x)}


def _averages(cells: Mapping[str, Mapping[str, float]], value: str, in_domain: str) -> dict[str, dict[str, float]]:
    """The two averages over modalities of ``value``, each with low, high and the number of questions under it."""
    result: dict[str, dict[str, float]] = {}
    for name in (AVG, AVG_OOD):
        members = [cell for modality, cell in cells.items() if name == AVG or modality != in_domain]
        if members:
            mean, low, high = mean_interval([c[value] for c in members], [(c["low"], c["high"]) for c in members])
            result[name] = {value: mean, "low": low, "high": high, "n": sum(c["n"] for c in members)}
    return result


def _table(
    rows: Mapping[str, Mapping[str, Mapping[str, float]]], order: Sequence[str] = (*MODALITIES, AVG, AVG_OOD)
) -> pd.DataFrame:
    present = {column for cells in rows.values() for column in cells}
    columns = [c for c in order if c in present]
    index = pd.MultiIndex.from_product([columns, ["accuracy", "low", "high", "n"]])
    data = [[cells.get(c, {}).get(part, np.nan) for c, part in index] for cells in rows.values()]
    return pd.DataFrame(data, index=list(rows), columns=index)
