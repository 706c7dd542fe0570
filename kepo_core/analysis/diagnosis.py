"""The logged numbers of a training run: their table, the run's headline, and likely causes of failure.

Metric names are those of ``method.rollouts.GLOSSARY`` and TRL's own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.params import Params

ACCEPTANCE = "acceptance"

# Thresholds of the signs. They are rules of thumb that tell a reader where to look, not tests.
FEW_RESCUES = 0.1  # share of explored groups that a hint rescued
MANY_UNREADABLE = 0.5  # share of explored groups whose hint could not be read
MOSTLY = 0.9  # share of groups, or of completions, that counts as nearly all
LARGE_FALL = 0.1  # drop of accuracy or format rate from the best quarter of training to the last
GROWTH = 3.0  # divergence of the last quarter, as a multiple of the smallest quarter's
NOTABLE = {"kepo/divergence": 0.1, "kepo/loss_kl": 1.0}  # nats per token; growth below this is ignored
HALF_LOST = 0.5  # share of weights with a gradient that an optimiser step leaves unchanged


@dataclass(frozen=True)
class Sign:
    """A known cause of failing training: its name, the run's numbers that suggest it, and what to look at next."""

    cause: str
    seen: str
    look_at: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.seen}. Look at: {self.look_at}."


def as_table(signs: Sequence[Sign]) -> pd.DataFrame:
    """A row per sign: cause, what was seen, what to look at."""
    rows = [{name.replace("_", " "): text for name, text in asdict(sign).items()} for sign in signs]
    return pd.DataFrame(rows, columns=["cause", "seen", "look at"])


def training_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Logged dictionaries (each with its ``step``) → one row per step, in order, with the column ``acceptance``.

    ``acceptance`` is the share of the step's hint-aware draws that were accepted, NaN without draws. Rows without
    training metrics (TRL's summary at the end) are dropped; nulls become NaN.
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
    """A run's main numbers: accuracies in [0, 1] before and after, their differences, and counts of KEPO's parts.

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


def signs_of(metrics: pd.DataFrame, differences: pd.DataFrame | None = None, in_domain: str = "") -> list[Sign]:
    """The signs of known causes of failure in a run; empty if it shows none.

    Args:
        metrics: from ``training_table``, of a whole run or of its steps so far; metrics that the method does not log
            are skipped.
        differences: trained minus untrained, from ``statistics.paired_differences``.
        in_domain: the training modality; required with ``differences``.
    """
    kinds = (_hint_signs, _reward_signs, _divergence_signs, _length_signs, _precision_signs)
    found = [] if metrics.empty else [sign for kind in kinds for sign in kind(metrics)]
    return found if differences is None else [*found, *_transfer_signs(differences, in_domain)]


def _hint_signs(metrics: pd.DataFrame) -> Iterator[Sign]:
    """Hints that do not lead to rewards."""
    explored, draws = _total(metrics, "kepo/explored_groups"), _total(metrics, "kepo/draws")
    rescued, unreadable = _total(metrics, "kepo/rescued_groups"), _total(metrics, "kepo/unparsable_hints")
    if explored and unreadable / explored > MANY_UNREADABLE:
        yield Sign(
            "Hints cannot be read",
            f"for {unreadable:.0f} of {explored:.0f} groups where every rollout failed the teacher wrote no hint "
            "inside <hint> tags",
            "what the teacher writes (kepo check-teacher, notebook 06); hint_max_tokens, which may cut it off; whether "
            "this teacher follows the prompt",
        )
    if draws and rescued / explored < FEW_RESCUES:
        yield Sign(
            "Hints are not accepted",
            f"{draws:.0f} hint-aware draws rescued {rescued:.0f} of {explored:.0f} groups where every rollout failed",
            "the column hint of rollouts.parquet (are hints true, and do they help); hint_context; rejection_budget; "
            "whether exploration_reward can be above 0 at all",
        )


def _reward_signs(metrics: pd.DataFrame) -> Iterator[Sign]:
    """Nothing to learn from."""
    failing, level = _late(metrics, "kepo/all_fail_rate"), _late(metrics, "frac_reward_zero_std")
    accuracy, form = _late(metrics, "kepo/accuracy"), _late(metrics, "kepo/format")
    entropy = _late(metrics, "kepo/entropy")
    if failing is not None and failing > MOSTLY:
        yield Sign(
            "No reward",
            f"in the last quarter of training every rollout failed in {failing:.0%} of the groups",
            "some completions and their rewards (does the reward read what the prompt asks for); whether the untrained "
            "student ever succeeds; explore, if it is off",
        )
    elif level is not None and level > MOSTLY and not (accuracy is not None and accuracy > MOSTLY):
        spread = "" if entropy is None else f"; the entropy is {entropy:.2f} nats per token"
        yield Sign(
            "Rewards are equal within groups",
            f"in the last quarter of training in {level:.0%} of the groups, whose advantages are then 0{spread}",
            "accuracy (near 1 the questions are too easy, near 0 too hard: use explore); a larger group_size; a higher "
            "temperature, if the entropy is near 0",
        )
    if accuracy is not None and form is not None and form > MOSTLY and accuracy < 1 - MOSTLY:
        yield Sign(
            "The format was learned before the answer",
            f"format {form:.0%} but accuracy {accuracy:.0%} in the last quarter of training",
            "the weight of the format reward (reward_weights), if format earns most of the reward; whether the parser "
            "reads right answers as right",
        )
    if "kepo/gate_rate" in metrics and "kepo/divergence" in metrics and metrics["kepo/gate_rate"].max() == 0:
        yield Sign(
            "The gate never opened",
            "it let no sequence through, so nothing was distilled",
            "gate; the largest value of gate_reward in rollouts.parquet, compared with tau; explore, which adds "
            "sequences that may pass",
        )


def _divergence_signs(metrics: pd.DataFrame) -> Iterator[Sign]:
    """Training that diverges."""
    smaller = "learning_rate; max_grad_norm; the steps before it in metrics.jsonl"
    for name in ("loss", "grad_norm", "kepo/loss_policy", "kepo/loss_distill"):
        if name in metrics and not (finite := np.isfinite(metrics[name].astype(float))).all():
            step = int(metrics.loc[~finite, "step"].iloc[0])
            yield Sign("Training diverged", f"{name} is not a finite number at step {step}", smaller)
            break
    for name, label in (("kepo/accuracy", "accuracy"), ("kepo/format", "format")):
        quarters = _quarters(metrics, name)
        if quarters and max(quarters) - quarters[-1] > LARGE_FALL:
            yield Sign(
                "Training undid what it had learned",
                f"the rollouts' {label} fell from {max(quarters):.0%} in its best quarter of training to "
                f"{quarters[-1]:.0%} in the last",
                "learning_rate, which may be too high; fewer epochs; a larger beta, which keeps the student close to "
                "where it began",
            )
    for name, other in (("kepo/divergence", "the teacher"), ("kepo/loss_kl", "the reference")):
        quarters = _quarters(metrics, name)
        if quarters and quarters[-1] > max(NOTABLE[name], GROWTH * min(quarters)):
            yield Sign(
                f"The divergence from {other} explodes",
                f"{name} rose from {min(quarters):.2f} nats per token in its smallest quarter of training to "
                f"{quarters[-1]:.2f} in the last",
                "learning_rate, which may be too high; distill_coef and beta, which may be too low; whether "
                "completions of the last steps are still language",
            )


def _length_signs(metrics: pd.DataFrame) -> Iterator[Sign]:
    """Completions that are cut off, before an answer if the task logs that, otherwise anywhere."""
    by_task = _late(metrics, "kepo/outcome/truncated")
    cut = _late(metrics, "completions/clipped_ratio") if by_task is None else by_task
    if cut is not None and cut > (1 - MOSTLY if by_task is not None else HALF_LOST):
        before = " before an answer" if by_task is not None else ""
        yield Sign(
            "Completions are cut off",
            f"{cut:.0%} of them reach the limit{before} in the last quarter of training",
            "max_completion_length; whether the model still ends its answers (their last tokens); "
            "mask_truncated_completions",
        )


def _precision_signs(metrics: pd.DataFrame) -> Iterator[Sign]:
    """Updates that are lost in rounding."""
    lost = metrics["kepo/unmoved_weights"].mean() if "kepo/unmoved_weights" in metrics else 0.0
    if lost > HALF_LOST:
        yield Sign(
            "The learning rate is too small for the weights' precision",
            f"on average, rounding left {lost:.0%} of the weights with a gradient unchanged by an optimiser step",
            "learning_rate; the dtype of the student's weights: load them in float32 and set bf16, which computes in "
            "bfloat16",
        )


def _transfer_signs(differences: pd.DataFrame, in_domain: str) -> Iterator[Sign]:
    """In-domain up while out-of-domain falls; both intervals must exclude 0."""
    numbers: dict[str, pd.Series] = {
        str(name): row for name, row in differences[["difference", "low", "high"]].iterrows()
    }

    def change(name: str) -> str:
        value, low, high = 100 * numbers[name]
        return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"

    gained = [name for name, row in numbers.items() if row["low"] > 0]
    lost = [name for name, row in numbers.items() if row["high"] < 0]
    if in_domain in gained and AVG_OOD in lost:
        yield Sign(
            "In-domain up, out-of-domain down",
            f"{in_domain} {change(in_domain)}, the other modalities on average {change(AVG_OOD)}",
            "both curves (curve_steps), for an earlier stop; learning_rate; beta",
        )
    if in_domain in lost:
        yield Sign("Training hurt in-domain", f"{in_domain} {change(in_domain)}", "the signs above; learning_rate")
    fallen = [name for name in lost if name not in (in_domain, AVG, AVG_OOD)]
    if fallen:
        yield Sign(
            "Worse after training",
            ", ".join(f"{name} {change(name)}" for name in fallen),
            "predictions.parquet: which of its questions are wrong now, and how (notebook 05)",
        )


def _total(metrics: pd.DataFrame, name: str) -> float:
    return float(metrics[name].sum()) if name in metrics else 0.0


def _quarters(metrics: pd.DataFrame, name: str) -> list[float]:
    """Means of a metric over the four quarters of training; empty if fewer than eight steps logged it."""
    values = metrics[name].dropna() if name in metrics else pd.Series(dtype=float)
    if len(values) < 8:
        return []
    bounds = [round(len(values) * k / 4) for k in range(5)]
    return [float(values.iloc[start:end].mean()) for start, end in pairwise(bounds)]


def _late(metrics: pd.DataFrame, name: str) -> float | None:
    quarters = _quarters(metrics, name)
    return quarters[-1] if quarters else None
