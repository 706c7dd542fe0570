"""Records → tables: accuracies with intervals, paired differences, exact tests. Pure functions.

Notation: x_i ∈ {0, 1} says whether question i was answered correctly, n the number of questions, K the number of
distinct images, M the number of modalities. No estimate is returned without its interval. Intervals speak of
which questions were drawn, for models as they are: other seeds and other pretrained students are not in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from kepo_core.analysis.intervals import design_effect, difference_interval, mean_interval, wilson_interval
from kepo_core.data.records import MODALITIES, Answer, AnswerOutcome, Question

AVG = "Avg."
AVG_OOD = "Avg. (OOD)"

Floats = NDArray[np.float64]
_OUTCOMES = tuple(str(outcome) for outcome in AnswerOutcome)


@dataclass(frozen=True, slots=True)
class McNemar:
    """The exact McNemar test: ``gained`` questions were wrong before and right after, ``lost`` the reverse."""

    gained: int
    lost: int
    p_value: float


def mcnemar_exact(before: Sequence[Answer], after: Sequence[Answer]) -> McNemar:
    """Two-sided exact McNemar test of two models on the same questions, paired by question id.

    Under H₀ each discordant pair is gained or lost with probability ½, so the p-value is that of a binomial test
    (1 when there is none). It takes questions as independent; with several to an image it is somewhat too sure. Where
    questions are asked several times, one is gained or lost whose share of right answers rose or fell (a sign test).
    Raises ``ValueError`` unless both answer exactly the same questions, each as often.
    """
    x, y = _paired(before, after)
    _, question = np.unique([answer.question_id for answer in before], return_inverse=True)
    change = np.bincount(question, weights=y - x)
    gained, lost = int(np.sum(change > 0)), int(np.sum(change < 0))
    p = float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p)


def bootstrap_difference(
    before: Sequence[Answer],
    after: Sequence[Answer],
    images: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(difference, low, high) of the average over modalities, after − before, by bootstrap over images.

    Whole images with all their questions are drawn with replacement within each modality (percentile interval), so it
    assumes nothing of how answers to one image resemble each other. ``images``: question id → image; without it every
    question stands alone. Raises ``ValueError`` unless both answer the same questions.
    """
    rng = np.random.default_rng(seed)
    later = {(answer.question_id, answer.sample): answer for answer in after}
    _paired(before, after)
    estimates, drawn = [], []
    for part in _by_modality(before).values():
        x, y = _paired(part, [later[answer.question_id, answer.sample] for answer in part])
        _, index = np.unique(_clusters(part, images), return_inverse=True)
        sums, sizes = np.bincount(index, weights=y - x), np.bincount(index)
        # How often each image is drawn: a multinomial count is a draw with replacement.
        times = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
        estimates.append(float((y - x).mean()))
        drawn.append((times @ sums) / (times @ sizes))
    low, high = np.quantile(np.mean(drawn, axis=0), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(np.mean(estimates)), float(low), float(high)


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
    that questions sharing an image count as what they are, as do several answers to one question (mean@k); averages
    combine them by ``mean_interval``. Every answer stays in the denominator, unreadable ones included.
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
    later = {(answer.question_id, answer.sample): answer for answer in after}
    rows: dict[str, dict[str, float]] = {}
    parts = _by_modality(before)
    for modality, part in parts.items():
        match = [later[answer.question_id, answer.sample] for answer in part]
        x, y = _paired(part, match)
        test = mcnemar_exact(part, match)
        deff = _deff(y - x, part, images)
        up, down = float(np.sum(y > x)), float(np.sum(y < x))
        low, high = difference_interval(up / deff, down / deff, len(part) / deff, confidence)
        rows[modality] = {
            "before": float(x.mean()),
            "after": float(y.mean()),
            "difference": float((y - x).mean()),
            "low": low,
            "high": high,
            "n": len({answer.question_id for answer in part}),
            "gained": test.gained,
            "lost": test.lost,
            "p_value": test.p_value,
        }
    for name, cell in _averages(rows, "difference", in_domain).items():
        members = [m for m in parts if name == AVG or m != in_domain]
        pooled = [answer for modality in members for answer in parts[modality]]
        test = mcnemar_exact(pooled, [later[answer.question_id, answer.sample] for answer in pooled])
        sides = {side: float(np.mean([rows[m][side] for m in members])) for side in ("before", "after")}
        rows[name] = sides | cell | {"gained": test.gained, "lost": test.lost, "p_value": test.p_value}
    return pd.DataFrame.from_dict(rows, orient="index").astype({"n": int, "gained": int, "lost": int})


def compare(
    answers: Mapping[str, Sequence[Answer]],
    reference: str,
    images: Mapping[str, str] | None = None,
    in_domain: str = MODALITIES[0],
) -> pd.DataFrame:
    """Every model against the one called ``reference``, for reading: a row each, differences in points.

    The two averages and the in-domain modality with 95 % intervals (``paired_differences``), "Avg." by
    ``bootstrap_difference`` too, questions gained and lost, and McNemar's exact p over all questions. Without answers
    of ``reference`` there are no rows.
    """
    rows = {}
    for model, given in answers.items():
        if model == reference or reference not in answers:
            continue
        differences = paired_differences(answers[reference], given, images, in_domain)
        cells = {
            name: _points(*differences.loc[name, ["difference", "low", "high"]].astype(float))
            for name in (in_domain, AVG, AVG_OOD)
            if name in differences.index
        }
        cells[f"{AVG}, bootstrap"] = _points(*bootstrap_difference(answers[reference], given, images))
        test = mcnemar_exact(answers[reference], given)
        rows[model] = {**cells, "gained": test.gained, "lost": test.lost, "McNemar p": f"{test.p_value:.2g}"}
    return pd.DataFrame.from_dict(rows, orient="index")


def _points(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


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
    """Correctness (n,) of both, in the order of ``before``; several answers to a question pair by their numbers."""
    first = {(answer.question_id, answer.sample): answer for answer in before}
    second = {(answer.question_id, answer.sample): answer for answer in after}
    if not before:
        raise ValueError("before: no answers, expected at least one question to compare.")
    if len(first) != len(before) or len(second) != len(after):
        raise ValueError("before, after: a question occurs twice, expected each sample of it once.")
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(f"before, after: {len(odd)} questions occur on one side only (as {odd[0][0]}), expected none.")
    x = np.array([float(answer.correct) for answer in before])
    y = np.array([float(second[answer.question_id, answer.sample].correct) for answer in before])
    return x, y


def _by_modality(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    groups = {m: [answer for answer in answers if answer.modality == m] for m in MODALITIES}
    return {modality: part for modality, part in groups.items() if part}


def _clusters(answers: Sequence[Answer], images: Mapping[str, str] | None) -> list[str]:
    """What each answer shares with others: its image, or at least its question."""
    return [answer.question_id if images is None else str(images[answer.question_id]) for answer in answers]


def _deff(values: Floats, answers: Sequence[Answer], images: Mapping[str, str] | None) -> float:
    """The design effect; where the values cannot show one, the answers of an image (a question) count as one."""
    clusters = _clusters(answers, images)
    if np.ptp(values) == 0 or len(set(clusters)) == 1:
        return len(answers) / len(set(clusters))
    return design_effect(values, clusters)


def _accuracy(part: Sequence[Answer], images: Mapping[str, str] | None, confidence: float) -> dict[str, float]:
    x = np.array([answer.correct for answer in part], dtype=float)
    n_effective = len(x) / _deff(x, part, images)
    low, high = wilson_interval(x.mean() * n_effective, n_effective, confidence)
    return {"accuracy": float(x.mean()), "low": low, "high": high, "n": len({a.question_id for a in part})}


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
