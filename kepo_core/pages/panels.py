"""Figures of a study's runs, and of one training step. As in ``figures``: tables → axes, no statistics.

Means over runs have a band from the lowest to the highest run, unless an interval is given.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from kepo_core.analysis.gating import SHARES
from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.data.records import AnswerOutcome
from kepo_core.pages.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    accuracy_curves,
    legend_above,
    legend_over,
    line,
    marker,
    nothing,
    points,
)

#: Outcome of an answer, from right to unreadable → colour and hatch; colours that look alike in grey have hatches.
OUTCOMES: dict[AnswerOutcome, tuple[str, str]] = {
    AnswerOutcome.CORRECT: (GREEN, ""),
    AnswerOutcome.WRONG: (ORANGE, ""),
    AnswerOutcome.AMBIGUOUS: (SKY, "//"),
    AnswerOutcome.MISSING: (RED, "\\\\"),
    AnswerOutcome.TRUNCATED: ("#555555", ".."),
}


def released_curves(table: pd.DataFrame, axes: Any, *, in_domain: str = "MRI") -> None:
    """Accuracies of the released runs over training, in and out of domain, from ``methods.released_curves``."""
    part = table["modality"].where(table["modality"] == in_domain, AVG_OOD)
    shares = table.assign(part=part, arm=table["run"], value=table["accuracy_percent"] / 100, low=np.nan, high=np.nan)
    means = shares.groupby(["part", "arm", "step"], sort=False)[["value", "low", "high"]].mean().reset_index()
    accuracy_curves(means, axes, in_domain=in_domain, ylabel="accuracy (%)")


def gains(table: pd.DataFrame, ax: Axes, *, compared_with: str, in_domain: str) -> Axes:
    """A line per arm: its difference from ``compared_with`` in and out of domain, from ``arms.arm_differences``."""
    arms, parts = list(table["arm"].unique()), [p for p in (in_domain, AVG_OOD) if (table["part"] == p).any()]
    for k, part in enumerate(parts):
        own = table[table["part"] == part].set_index("arm").reindex(arms)
        points(ax, k, _beside(len(arms), k, len(parts)), own[["value", "low", "high"]], part)
    ax.axvline(0, color=GREY, linewidth=1.2, zorder=1)
    ax.set_yticks(range(len(arms)), [textwrap.fill(arm, 44) for arm in arms])
    ax.set(xlabel=f"points more than {compared_with}, 95 % interval", ylim=(len(arms) - 0.4, -0.6))
    legend_over(ax, len(parts))
    return ax


def _beside(rows: int, k: int, sets: int) -> NDArray[np.floating[Any]]:
    """Positions of the ``k``-th of several sets of points that share their rows."""
    return np.arange(rows) + 0.16 * (2 * k - sets + 1)


def beside_paper(table: pd.DataFrame, paper: pd.DataFrame, axes: Any, *, in_domain: str) -> None:
    """A line per method on two axes: our accuracies with their intervals, and the paper's Table 1, which has none.

    ``table`` is ``statistics.accuracy_table``'s or ``arms.by_part``'s, ``paper`` the part "paper" of
    ``methods.beside_paper``'s. Compare the order of methods within each side, not levels: models and questions differ.
    The paper trained on MRI: with another ``in_domain``, its in-domain accuracies are not drawn.
    """
    left, right = axes
    rows = range(len(table))
    shown = [name for name in (in_domain, AVG_OOD) if name in table.columns.unique(level=0)]
    for k, name in enumerate(shown):
        at = _beside(len(table), k, len(shown))
        points(left, k, at, table[name], f"{name} (trained on)" if name == in_domain else name)
        if name in paper and in_domain == "MRI":
            right.plot(paper[name].to_numpy(dtype=float), at, **marker(k))
    left.set(xlabel="accuracy (%), 95 % interval", title="Here", xlim=(0, 103), ylim=(len(table) - 0.4, -0.6))
    left.set_yticks(rows, [str(name) for name in table.index])
    right.set(xlabel="accuracy (%)", title="The paper's Table 1", ylim=left.get_ylim())
    right.set_yticks(rows, np.where(paper.notna().any(axis=1), "", "not in it"))
    legend_above([left])


def metric_over_runs(
    runs: Mapping[str, Sequence[pd.DataFrame]], metric: str, ax: Axes, *, title: str = "", smooth: int = 1
) -> Axes:
    """A metric over training per method: mean over runs with their range.

    Args:
        runs: method → the training table (``diagnosis.training_table``) of each run; methods without the metric are
            skipped.
        metric: its name.
        title: above the axes.
        smooth: each run is smoothed by a centred running mean over ``smooth`` logged steps.
    """
    for k, (method, tables) in enumerate(runs.items()):
        lines = [
            table.set_index("step")[metric].rolling(smooth, center=True, min_periods=1).mean()
            for table in tables
            if metric in table and table[metric].notna().any()
        ]
        if not lines:
            continue
        together = pd.concat(lines, axis=1)
        edges = together.min(axis=1), together.max(axis=1)
        line(ax, k, together.index, together.mean(axis=1), edges, label=method)
    ax.set(xlabel="step", title=title or metric)
    if not ax.lines:
        nothing(ax, "in none of these runs")
    return ax


def gates(shares: pd.DataFrame, accuracies: pd.DataFrame, axes: Any) -> None:
    """What each arm's gate lets through, on the left, and what comes of it, on the right; a line per arm.

    Args:
        shares: `gating.gate_table`.
        accuracies: the part "Avg." of ``arms.arm_accuracies``, of the same arms.
    """
    heights = np.arange(len(shares))[::-1]
    for k, (name, label) in enumerate(SHARES.items()):
        axes[0].plot(100 * shares[name], heights, label=label, **marker(k))
    rows = accuracies.set_index("arm").loc[shares.index, ["value", "low", "high"]]
    points(axes[1], 0, heights, rows, "accuracy after training")
    for ax in axes:
        ax.set_yticks(heights, [textwrap.fill(str(name), 30) for name in shares.index])
        ax.grid(visible=False, axis="y")
    axes[0].set(xlabel="share (%); a weight can exceed 100 %")
    axes[1].set(xlabel="average accuracy (%), 95 % interval")
    legend_over(axes[0], 1)


def outcomes_over_training(rollouts: pd.DataFrame, ax: Axes, *, title: str = "", smooth: int = 1) -> Axes:
    """Outcomes of the student's own rollouts over training (no injected ones), as shares that add up to 100 %."""
    own = rollouts[~rollouts["injected"]]
    shares = 100 * own.groupby("step")["outcome"].value_counts(normalize=True).unstack(fill_value=0)
    shares = shares.rolling(smooth, center=True, min_periods=1).mean()
    present = [outcome for outcome in OUTCOMES if str(outcome) in shares]
    colours, hatches = zip(*(OUTCOMES[outcome] for outcome in present), strict=True)
    values = [shares[str(outcome)] for outcome in present]
    style: Any = {"colors": colours, "hatch": hatches, "edgecolor": "white", "linewidth": 0.3}
    ax.stackplot(shares.index, values, labels=[str(outcome) for outcome in present], **style)
    ax.set(xlabel="step", ylabel="share of rollouts (%)", ylim=(0, 100), title=title)
    ax.margins(x=0)
    ax.legend(loc="lower left", frameon=True, framealpha=0.9)
    return ax


def change_map(table: pd.DataFrame, ax: Axes, *, in_domain: str) -> Axes:
    """Change by training per method and modality, in points, from ``arms.arm_changes``: blue is a gain, red a loss.

    Each cell has the change ± half its 95 % interval; in brackets if the interval includes 0.
    """
    own = table[~table["part"].isin([AVG, AVG_OOD])]
    arms, modalities = own["arm"].unique(), own["part"].unique()
    values, low, high = (
        100 * own.pivot(index="arm", columns="part", values=name).loc[arms, modalities]
        for name in ("value", "low", "high")
    )
    sure = (low > 0) | (high < 0)
    told = [
        [f"{value:+.0f} ± {half:.0f}" if firm else f"({value:+.0f} ± {half:.0f})" for value, half, firm in row]
        for row in np.stack([values, (high - low) / 2, sure], axis=-1)
    ]
    bar, text = {"label": "points", "shrink": 0.8}, {"fontsize": 11, "color": "black"}  # on any of the light colours
    colours = {"cmap": "RdBu", "vmin": -60, "vmax": 60, "alpha": 0.6, "cbar_kws": bar}
    names = [f"{name}*" if name == in_domain else str(name) for name in values.columns]
    lines = [textwrap.fill(str(name), 30) for name in arms]
    style: Any = {"xticklabels": names, "yticklabels": lines, **colours}  # all of them, however many
    sns.heatmap(values, annot=np.array(told), fmt="", annot_kws=text, ax=ax, **style)
    ax.set_xticklabels(names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticklabels(lines, rotation=0)
    ax.set(xlabel="", ylabel="")
    ax.grid(visible=False)
    return ax


def step_map(rollouts: pd.DataFrame, ax: Axes) -> Axes:
    """One training step: a row per group, a cell per rollout in the loss.

    The fill is the answer's outcome, the number its advantage. A thick blue frame marks an open gate (the teacher
    guides the rollout). ▲ marks a rollout that was sampled with a hint and replaced a failed one. The text on the right
    is the result of exploration in a group where all failed.
    """
    trained = rollouts[~rollouts["replaced"]]
    groups = sorted(trained["group"].unique())
    for y, group in enumerate(groups):
        rows = trained[trained["group"] == group].sort_values("row").to_dict("records")
        for x, row in enumerate(rows):
            _cell(ax, x, y, row)
        first = rows[0]
        note = f"all failed: {first['exploration']}, draws: {first['draws']}" if first["exploration"] else ""
        ax.text(len(rows) - 0.35, y, note, va="center", fontsize=11, color="#444444")
    width = int(trained.groupby("group").size().max())
    ax.set(xlim=(-0.6, width + 2.4), ylim=(len(groups) - 0.5, -0.5), xlabel="rollout of the group", ylabel="prompt")
    ax.set_xticks(range(width), [str(i + 1) for i in range(width)])
    ax.set_yticks(range(len(groups)), [str(i + 1) for i in range(len(groups))])
    ax.grid(visible=False)
    handles: list[Any] = [
        Patch(facecolor=colour, hatch=hatch, alpha=0.55, label=str(outcome))
        for outcome, (colour, hatch) in OUTCOMES.items()
        if (trained["outcome"] == str(outcome)).any()
    ]
    handles += [
        Patch(fill=False, edgecolor=BLUE, linewidth=2.6, label="gate open: distilled"),
        Line2D([], [], linestyle="none", marker="^", color="black", label="drawn with a hint, injected"),
    ]
    legend_over(ax, len(handles), handles=handles)
    return ax


def _cell(ax: Axes, x: int, y: int, row: Mapping[str, Any]) -> None:
    colour, hatch = OUTCOMES[AnswerOutcome(row["outcome"])]
    fill: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "alpha": 0.55, "edgecolor": "white"}
    ax.add_patch(Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, **fill))
    if row["gate"]:
        ax.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor=BLUE, linewidth=2.6))
    mark = "▲ " if row["injected"] else ""
    ax.text(x, y, f"{mark}{row['advantage']:+.2f}", ha="center", va="center", fontsize=11)
