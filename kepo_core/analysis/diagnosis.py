"""What a training run's logged numbers say: the table of them, a run's headline, and the known signs of failure.

Metric names are those of ``method.rollouts.GLOSSARY`` and TRL's own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.params import Params

ACCEPTANCE = "acceptance"

# Where a sign begins. They are rules of thumb to make a reader look, not tests.
FEW_RESCUES = 0.1  # share of explored groups that a hint rescued
MANY_UNREADABLE = 0.5  # share of explored groups whose hint could not be read
MOSTLY = 0.9  # share of groups, or of completions, that counts as nearly all
LARGE_FALL = 0.1  # of accuracy or of the format rate, between the best quarter of training and the last


def training_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Logged dictionaries (each with its ``step``) → one row per step, in order, with the column ``acceptance``.

    ``acceptance`` is accepted / draws of the step's hint-aware draws, NaN where nothing was drawn. Rows that hold
    no training metric (TRL's summary at the end) are left out; nulls become NaN.
    """
    kept = [dict(row) for row in rows if "loss" in row]
    table = pd.DataFrame(kept)
    if table.empty:
        return pd.DataFrame({"step": pd.Series(dtype=int)})
    numbers = [column for column in table if pd.api.types.is_numeric_dtype(table[column]) or table[column].isna().all()]
    table = table[numbers].astype({column: float for column in numbers if column != "step"})
    if "kepo/draws" in table:
        table[ACCEPTANCE] = table["kepo/accepted"] / table["kepo/draws"]
    return table.sort_values("step", kind="stable").reset_index(drop=True)


def read_training(path: Path) -> pd.DataFrame:
    """``training_table`` of a run's ``metrics.jsonl``."""
    with Path(path).open(encoding="utf-8") as file:
        return training_table(json.loads(line) for line in file if line.strip())


def headline(params: Params, differences: pd.DataFrame, metrics: pd.DataFrame) -> dict[str, Any]:
    """A run's few numbers: accuracies in [0, 1] before and after, their differences, and what KEPO's parts did.

    Args:
        params: of the run.
        differences: from ``statistics.paired_differences``, trained minus untrained.
        metrics: from `training_table`.
    """
    steps = 0 if metrics.empty else int(metrics["step"].max())
    numbers: dict[str, Any] = {"method": params.method_name, "seed": params.seed, "steps": steps}
    for row in (params.train_modality, AVG_OOD, AVG):
        if row in differences.index:
            cell = differences.loc[row].astype(float)
            names = ("before", "after", "difference", "low", "high")
            numbers |= {f"{row} {name}": round(cell[name], 4) for name in names}
            numbers[f"{row} p"] = float(f"{cell['p_value']:.3g}")
    for name in metrics.columns.intersection(["kepo/all_fail_rate", "kepo/gate_rate"]):
        numbers[f"mean {name}"] = round(float(metrics[name].mean()), 4)
    counted = ["kepo/explored_groups", "kepo/draws", "kepo/accepted", "kepo/rescued_groups"]
    for name in metrics.columns.intersection(counted, sort=False):
        numbers[f"total {name}"] = int(metrics[name].sum())
    return numbers


def warnings_for(metrics: pd.DataFrame, differences: pd.DataFrame | None = None, in_domain: str = "") -> list[str]:
    """The known failure signs that a run shows, each in one sentence with its numbers; empty when there is none.

    Args:
        metrics: from ``training_table``; a metric that the method does not log is not judged.
        differences: trained minus untrained, from ``statistics.paired_differences``.
        in_domain: the modality that was trained on, wherever there are ``differences``.
    """
    found = [] if metrics.empty else [*_hint_signs(metrics), *_reward_signs(metrics), *_divergence_signs(metrics)]
    return found if differences is None else [*found, *_transfer_signs(differences, in_domain)]


def _hint_signs(metrics: pd.DataFrame) -> Iterator[str]:
    """Reward 0 despite hints."""
    explored, draws = _total(metrics, "kepo/explored_groups"), _total(metrics, "kepo/draws")
    rescued, unreadable = _total(metrics, "kepo/rescued_groups"), _total(metrics, "kepo/unparsable_hints")
    if explored and unreadable / explored > MANY_UNREADABLE:
        yield (
            f"Hints could not be read: for {unreadable:.0f} of {explored:.0f} groups where every rollout failed the "
            "teacher wrote none in its tags (hint_max_tokens too small, or a teacher that does not know the prompt)."
        )
    if draws and rescued / explored < FEW_RESCUES:
        yield (
            f"Reward stays 0 despite hints: {draws:.0f} hint-aware draws rescued {rescued:.0f} of {explored:.0f} "
            "groups where every rollout failed (hints poor, or rejection_budget too small)."
        )


def _reward_signs(metrics: pd.DataFrame) -> Iterator[str]:
    """Nothing to learn from."""
    failing, level = _late(metrics, "kepo/all_fail_rate"), _late(metrics, "frac_reward_zero_std")
    accuracy, form = _late(metrics, "kepo/accuracy"), _late(metrics, "kepo/format")
    if failing is not None and failing > MOSTLY:
        yield f"No reward: in the last quarter of training every rollout failed in {failing:.0%} of the groups."
    elif level is not None and level > MOSTLY:
        yield (
            f"No signal: in the last quarter of training {level:.0%} of the groups had equal rewards, so their "
            "advantages are 0."
        )
    if accuracy is not None and form is not None and form > MOSTLY and accuracy < 1 - MOSTLY:
        yield f"Form without content: format {form:.0%} but accuracy {accuracy:.0%} in the last quarter of training."
    if "kepo/gate_rate" in metrics and "kepo/divergence" in metrics and metrics["kepo/gate_rate"].max() == 0:
        yield "The gate never opened: no sequence reached tau, so nothing was distilled."


def _divergence_signs(metrics: pd.DataFrame) -> Iterator[str]:
    """Training that comes apart."""
    for name in ("loss", "grad_norm", "kepo/loss_policy", "kepo/loss_distill"):
        if name in metrics and metrics[name].isna().any():
            step = int(metrics.loc[metrics[name].isna(), "step"].iloc[0])
            yield f"Divergence: {name} is not a finite number at step {step}."
            break
    for name, label in (("kepo/accuracy", "accuracy"), ("kepo/format", "format")):
        quarters = _quarters(metrics, name)
        if quarters and max(quarters) - quarters[-1] > LARGE_FALL:
            yield (
                f"Divergence: the rollouts' {label} fell from {max(quarters):.0%} in its best quarter of training to "
                f"{quarters[-1]:.0%} in the last (learning_rate too high, or training too long)."
            )
    cut = _late(metrics, "kepo/outcome/truncated")
    if cut is not None and cut > 1 - MOSTLY:
        yield (
            f"Completions run into the limit: {cut:.0%} of them were cut before an answer in the last quarter of "
            "training (max_completion_length too small, or the model no longer ends)."
        )


def _transfer_signs(differences: pd.DataFrame, in_domain: str) -> Iterator[str]:
    """In-domain up while out-of-domain falls; an interval has to leave out 0 for either."""
    numbers: dict[str, pd.Series] = {
        str(name): row for name, row in differences[["difference", "low", "high"]].iterrows()
    }

    def change(name: str) -> str:
        value, low, high = 100 * numbers[name]
        return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"

    gained = [name for name, row in numbers.items() if row["low"] > 0]
    lost = [name for name, row in numbers.items() if row["high"] < 0]
    if in_domain in gained and AVG_OOD in lost:
        yield (
            f"In-domain up, out-of-domain down: {in_domain} {change(in_domain)}, the other modalities on average "
            f"{change(AVG_OOD)}."
        )
    if in_domain in lost:
        yield f"Training hurt in-domain: {in_domain} {change(in_domain)}."
    fallen = [name for name in lost if name not in (in_domain, AVG, AVG_OOD)]
    if fallen:
        yield "Worse after training: " + ", ".join(f"{name} {change(name)}" for name in fallen) + "."


def _total(metrics: pd.DataFrame, name: str) -> float:
    return float(metrics[name].sum()) if name in metrics else 0.0


def _quarters(metrics: pd.DataFrame, name: str) -> list[float]:
    """Means of a metric over the four quarters of training; empty with fewer than eight logged steps."""
    values = metrics[name].dropna() if name in metrics else pd.Series(dtype=float)
    if len(values) < 8:
        return []
    bounds = [round(len(values) * k / 4) for k in range(5)]
    return [float(values.iloc[start:end].mean()) for start, end in pairwise(bounds)]


def _late(metrics: pd.DataFrame, name: str) -> float | None:
    quarters = _quarters(metrics, name)
    return quarters[-1] if quarters else None
