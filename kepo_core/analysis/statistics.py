"""Records → tables: accuracies with intervals, paired differences, exact tests. Pure functions.

Notation: x_i ∈ {0, 1} says whether question i was answered correctly, n is the number of questions, K the number of
distinct images, M the number of modalities. Every estimate comes with its interval. Intervals cover the sampling of
questions, for given models: they do not cover other seeds or other pretrained students.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from kepo_core.analysis.intervals import design_effect, difference_interval, mean_interval, percent, wilson_interval
from kepo_core.data.records import Answer, AnswerOutcome, categories

AVG = "Avg."
AVG_OOD = "Avg. (OOD)"

_NUMBERS = ["accuracy", "low", "high", "n"]
Cells = dict[str, dict[str, float]]  # modality, type or average → its numbers


class McNemar(NamedTuple):
    """The exact McNemar test: ``gained`` questions were wrong before and right after, ``lost`` the reverse."""

    gained: int
    lost: int
    p_value: float


def mcnemar_exact(before: Sequence[Answer], after: Sequence[Answer]) -> McNemar:
    """Two-sided exact McNemar test of two models on the same questions, paired by question id.

    Under H₀ each discordant pair is gained or lost with probability ½: the p-value is that of a binomial test (1 if
    there are none). The test assumes independent questions; with several per image its p is somewhat too small. With
    several answers per question, one is gained or lost if its share of right answers rises or falls (a sign test).
    Raises ``ValueError`` unless both answer exactly the same questions, equally often.
    """
    return _mcnemar(_pairs(before, after))


def accuracy_table(
    answers: Mapping[str, Sequence[Answer]], images: Mapping[str, str] | None, in_domain: str
) -> pd.DataFrame:
    """Accuracies with intervals, in the form of Table 1: a row per model; modalities, then "Avg." and "Avg. (OOD)".

    Columns are pairs (modality or average, one of ``accuracy``, ``low``, ``high``, ``n``); accuracies are in [0, 1],
    modalities in the order of ``records.categories``. "Avg." is the unweighted mean of the modalities' accuracies, as
    in the paper; "Avg. (OOD)" is that of all except ``in_domain``, omitted if there is no other. A model without
    answers for a modality that others have gets NaN there and in both averages, which could not be compared.
    Intervals: Wilson's per modality, with n / deff questions if ``images`` (question id → image) is given, which
    accounts for questions that share an image and for several answers to one question (mean@k); averages combine them
    by ``mean_interval``. The denominator includes every answer, also unreadable ones.
    """
    rows = {model: _accuracies(given, "modality", images) for model, given in answers.items()}
    present = categories(answer.modality for given in answers.values() for answer in given)
    for model, found in rows.items():
        cells = {m: found[m] for m in present if m in found}
        rows[model] = cells | (_averages(cells, "accuracy", in_domain) if len(cells) == len(present) else {})
    return _table(rows, [*present, AVG, AVG_OOD])


def type_table(answers: Mapping[str, Sequence[Answer]], images: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Accuracy per question type over all modalities, in the form and with the intervals of ``accuracy_table``.

    Types are in alphabetical order; questions without a type are "(not given)". There are no averages, because types
    differ in size and the paper does not average over them.
    """
    rows = {model: _accuracies(given, "question_type", images) for model, given in answers.items()}
    return _table(rows, sorted({kind for cells in rows.values() for kind in cells}))


def paired_differences(
    before: Sequence[Answer],
    after: Sequence[Answer],
    images: Mapping[str, str] | None,
    in_domain: str,
) -> pd.DataFrame:
    """Differences between two models on the same questions: a row per modality, then the two averages.

    Columns: ``before``, ``after`` (accuracies), ``difference`` with ``low`` and ``high`` (``difference_interval``; if
    ``images`` is given, with counts divided by the design effect of the differences), ``n``, ``gained``, ``lost`` and
    the exact McNemar ``p_value`` over the row's pooled questions. The averages are unweighted means over modalities
    (OOD: all except ``in_domain``), with intervals by ``mean_interval``. Raises ``ValueError`` unless both answer the
    same questions.
    """
    pairs = _pairs(before, after, images)
    parts = {str(modality): part for modality, part in pairs.groupby("modality")}
    rows = {modality: _difference(parts[modality]) for modality in categories(parts)}
    for name, cell in _averages(rows, "difference", in_domain).items():
        members = [m for m in rows if m in parts and (name == AVG or m != in_domain)]
        sides = {side: float(np.mean([rows[m][side] for m in members])) for side in ("before", "after")}
        rows[name] = sides | cell | _mcnemar(pairs[pairs["modality"].isin(members)])._asdict()
    return pd.DataFrame.from_dict(rows, orient="index").astype({"n": int, "gained": int, "lost": int})


def compare(
    answers: Mapping[str, Sequence[Answer]],
    reference: str,
    images: Mapping[str, str] | None,
    in_domain: str,
) -> pd.DataFrame:
    """Every model minus the model ``reference``, for reading: a row each, differences in points.

    Columns: the in-domain modality and the two averages with 95 % intervals (``paired_differences``), questions gained
    and lost, and McNemar's exact p over all questions. Without answers of ``reference`` the table is empty.
    """
    rows: dict[str, dict[str, object]] = {}
    for model, given in answers.items():
        if model == reference or reference not in answers:
            continue
        found = paired_differences(answers[reference], given, images, in_domain)
        numbers = found[["difference", "low", "high"]].to_numpy(float)
        cells = {str(part): percent(*row, sign="+") for part, row in zip(found.index, numbers, strict=True)}
        parts = [name for name in (in_domain, AVG, AVG_OOD) if name in cells]
        test = mcnemar_exact(answers[reference], given)
        rows[model] = {
            **{part: cells[part] for part in parts},
            "gained": test.gained,
            "lost": test.lost,
            "McNemar p": f"{test.p_value:.2g}",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def outcome_table(answers: Mapping[str, Sequence[Answer]]) -> pd.DataFrame:
    """Outcomes of each model's answers: a row per model, a column per outcome (counts), then format and lengths.

    ``format_ok`` and ``finished`` are counts; ``tokens_median`` and ``tokens_q90`` are quantiles of the
    completions' lengths in tokens.
    """
    rows = {}
    for model, given in answers.items():
        tokens = np.array([answer.tokens for answer in given])
        outcomes = [answer.outcome for answer in given]
        rows[model] = {
            "n": len(given),
            **{str(outcome): outcomes.count(outcome) for outcome in AnswerOutcome},
            "format_ok": sum(answer.format_ok for answer in given),
            "finished": sum(answer.finished for answer in given),
            "tokens_median": float(np.median(tokens)),
            "tokens_q90": float(np.quantile(tokens, 0.9)),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table of ``accuracy_table`` in per cent, for reading: each cell ``61.3 [55.7, 66.7]``, an empty one "–"."""
    columns = list(table.columns.unique(level=0))
    cells = [
        [percent(*row[column][_NUMBERS[:3]]) if row[column].notna().any() else "–" for column in columns]
        for _, row in table.iterrows()
    ]
    return pd.DataFrame(cells, index=table.index, columns=columns)


def _pairs(before: Sequence[Answer], after: Sequence[Answer], images: Mapping[str, str] | None = None) -> pd.DataFrame:
    """A row per question and sample, in the order of ``before``: question, modality, cluster, before, after, change."""
    second = {(answer.question_id, answer.sample): answer for answer in after}
    first = {(answer.question_id, answer.sample): answer for answer in before}
    if not before:
        raise ValueError("before: no answers, expected at least one question to compare.")
    if len(first) != len(before) or len(second) != len(after):
        raise ValueError("before, after: a question occurs twice, expected each of its samples once.")
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"before, after: {len(odd)} questions occur on only one side (for example {odd[0][0]}), expected none."
        )
    pairs = pd.DataFrame(
        {
            "question": [answer.question_id for answer in before],
            "modality": [answer.modality for answer in before],
            "cluster": _clusters(before, images),
            "before": [float(answer.correct) for answer in before],
            "after": [float(second[key].correct) for key in first],
        }
    )
    return pairs.assign(change=pairs["after"] - pairs["before"])


def _mcnemar(pairs: pd.DataFrame) -> McNemar:
    change = pairs.groupby("question")["change"].sum()
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    p = float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p)


def _difference(pairs: pd.DataFrame) -> dict[str, float]:
    change = pairs["change"].to_numpy()
    deff = _deff(change, list(pairs["cluster"]))
    low, high = difference_interval((change > 0).sum() / deff, (change < 0).sum() / deff, len(change) / deff)
    return {
        "before": float(pairs["before"].mean()),
        "after": float(pairs["after"].mean()),
        "difference": float(change.mean()),
        "low": low,
        "high": high,
        "n": pairs["question"].nunique(),
        **_mcnemar(pairs)._asdict(),
    }


def _clusters(answers: Sequence[Answer], images: Mapping[str, str] | None) -> list[str]:
    """The cluster of each answer: its image, or without ``images`` its question."""
    return [answer.question_id if images is None else str(images[answer.question_id]) for answer in answers]


def _deff(values: np.ndarray, clusters: Sequence[str]) -> float:
    """The design effect; if it cannot be estimated (all values equal), each cluster counts as one value."""
    if np.ptp(values) == 0 or len(set(clusters)) == 1:
        return len(values) / len(set(clusters))
    return design_effect(values, clusters)


def _accuracies(answers: Sequence[Answer], by: str, images: Mapping[str, str] | None) -> Cells:
    """Modality or question type (``by``) → accuracy with interval and number of questions."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(getattr(answer, by) or "(not given)", []).append(answer)
    return {name: _accuracy(part, images) for name, part in groups.items()}


def _accuracy(part: Sequence[Answer], images: Mapping[str, str] | None) -> dict[str, float]:
    x = np.array([answer.correct for answer in part], dtype=float)
    n_effective = len(x) / _deff(x, _clusters(part, images))
    low, high = wilson_interval(x.mean() * n_effective, n_effective)
    return {"accuracy": float(x.mean()), "low": low, "high": high, "n": len({a.question_id for a in part})}


def _averages(cells: Cells, value: str, in_domain: str) -> Cells:
    """The two averages of ``value`` over modalities, each with low, high and its number of questions."""
    result: Cells = {}
    for name in (AVG, AVG_OOD):
        members = [cell for modality, cell in cells.items() if name == AVG or modality != in_domain]
        if members:
            mean, low, high = mean_interval([c[value] for c in members], [(c["low"], c["high"]) for c in members])
            result[name] = {value: mean, "low": low, "high": high, "n": sum(c["n"] for c in members)}
    return result


def _table(rows: Mapping[str, Cells], order: Sequence[str]) -> pd.DataFrame:
    columns = [name for name in order if any(name in cells for cells in rows.values())]
    index = pd.MultiIndex.from_product([columns, _NUMBERS])
    data = [[cells.get(name, {}).get(number, np.nan) for name, number in index] for cells in rows.values()]
    return pd.DataFrame(data, index=list(rows), columns=index)
