"""Figures over the runs of a study, and of one training step. As in ``figures``: tables → axes, nothing is computed.

Means over runs are drawn with the range from the lowest to the highest run, unless an interval is given.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from kepo_core.data.records import MODALITIES, AnswerOutcome
from kepo_core.pages.figures import BLUE, COLOURS, DASHES, GREEN, MARKERS, ORANGE, RED, SKY, legend_above

_GREY = "#8C8C8C"
#: How an answer ended, from right to unreadable: colours that stay apart, with hatches where they are close in grey.
OUTCOMES: dict[AnswerOutcome, tuple[str, str]] = {
    AnswerOutcome.CORRECT: (GREEN, ""),
    AnswerOutcome.WRONG: (ORANGE, ""),
    AnswerOutcome.AMBIGUOUS: (SKY, "//"),
    AnswerOutcome.MISSING: (RED, "\\\\"),
    AnswerOutcome.TRUNCATED: ("#555555", ".."),
}


def released_curves(table: pd.DataFrame, axes: Any, *, in_domain: str = "MRI") -> None:
    """The released runs' accuracies over training, in and out of domain, from ``methods.released_curves``."""
    parts = (table["modality"] == in_domain, table["modality"] != in_domain)
    for of, title, ax in zip(parts, (in_domain, "Avg. (OOD)"), np.asarray(axes, dtype=object).ravel(), strict=True):
        means = table[of].groupby(["run", "step"], sort=False)["accuracy_percent"].mean()
        for k, (run, line) in enumerate(means.groupby(level="run", sort=False)):
            ax.plot(
                line.index.get_level_values("step"), line, label=str(run), color=COLOURS[k], linestyle=DASHES[k],
                marker=MARKERS[k], markersize=3.5, linewidth=1.6,
            )  # fmt: skip
        ax.set(xlabel="step", ylabel="accuracy (%)", title=title)
    legend_above(axes)


def metric_over_runs(
    runs: Mapping[str, Sequence[pd.DataFrame]], metric: str, ax: Axes, *, title: str = "", smooth: int = 1
) -> Axes:
    """A metric over training per method: mean over runs with their range.

    Args:
        runs: method → the training table (``diagnosis.training_table``) of each run; methods without the metric are
            left out.
        metric: its name.
        title: above the axes.
        smooth: a centred running mean over so many logged steps, of every run.
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
        colour = COLOURS[k % len(COLOURS)]
        ax.fill_between(
            together.index, together.min(axis=1), together.max(axis=1), color=colour, alpha=0.15, linewidth=0
        )
        ax.plot(
            together.index, together.mean(axis=1), color=colour, linestyle=DASHES[k % len(DASHES)], linewidth=1.8,
            label=method,
        )  # fmt: skip
    ax.set(xlabel="step", title=title or metric)
    if not ax.lines:
        ax.text(0.5, 0.5, "in none of these runs", transform=ax.transAxes, ha="center", va="center", color="#666666")
    return ax


def outcomes_over_training(rollouts: pd.DataFrame, ax: Axes, *, title: str = "", smooth: int = 1) -> Axes:
    """How the student's own rollouts ended over training, as shares that add up to 100 %, without injected ones."""
    own = rollouts[~rollouts["injected"]]
    shares = own.groupby("step")["outcome"].value_counts(normalize=True).unstack(fill_value=0)
    shares = shares.rolling(smooth, center=True, min_periods=1).mean()
    bottom = np.zeros(len(shares))
    for outcome, (colour, hatch) in OUTCOMES.items():
        values = 100 * shares.get(str(outcome), pd.Series(0.0, index=shares.index)).to_numpy(float)
        if values.any():
            ax.fill_between(
                shares.index, bottom, bottom + values, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.3,
                label=str(outcome),
            )  # fmt: skip
        bottom = bottom + values
    ax.set(xlabel="step", ylabel="share of rollouts (%)", ylim=(0, 100), title=title)
    ax.margins(x=0)
    ax.legend(loc="lower left", frameon=True, framealpha=0.9)
    return ax


def change_map(table: pd.DataFrame, ax: Axes, *, in_domain: str = "MRI") -> Axes:
    """What training changed per method and modality, in points, from ``arms.arm_changes``: blue rose, red fell.

    Each cell says how much, ± half its 95 % interval; in brackets where the interval holds 0.
    """
    own = table[table["part"].isin(MODALITIES)]
    arms, modalities = list(own["arm"].unique()), list(own["part"].unique())
    values, low, high = (
        100 * own.pivot(index="arm", columns="part", values=name).loc[arms, modalities].to_numpy(float)
        for name in ("value", "low", "high")
    )
    shown = ax.imshow(values, cmap="RdBu", vmin=-60, vmax=60, aspect="auto", alpha=0.85)
    for (y, x), value in np.ndenumerate(values):
        text = f"{value:+.0f} ± {(high[y, x] - low[y, x]) / 2:.0f}"
        sure = low[y, x] > 0 or high[y, x] < 0
        colour = "white" if abs(value) > 50 else "black"
        ax.text(x, y, text if sure else f"({text})", ha="center", va="center", fontsize=11, color=colour)
    names = [f"{name}*" if name == in_domain else str(name) for name in modalities]
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(arms)), [textwrap.fill(name, 30) for name in arms])
    ax.grid(visible=False)
    ax.figure.colorbar(shown, ax=ax, label="points", shrink=0.8)
    return ax


def step_map(rollouts: pd.DataFrame, ax: Axes) -> Axes:
    """How one step works, drawn from its rollouts: a row per group, a cell per rollout that is trained on.

    The fill is the answer's outcome, the number its advantage; a thick blue frame marks the open gate (the teacher
    guides it); ▲ was drawn with a hint and took the place of a failed one. The text on the right says what became of a
    group where all had failed.
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
    present = [o for o in OUTCOMES if (trained["outcome"] == str(o)).any()]
    handles: list[Any] = [
        Patch(facecolor=OUTCOMES[outcome][0], hatch=OUTCOMES[outcome][1], alpha=0.55, label=str(outcome))
        for outcome in present
    ]
    handles += [
        Patch(fill=False, edgecolor=BLUE, linewidth=2.6, label="gate open: distilled"),
        Line2D([], [], linestyle="none", marker="^", color="black", label="drawn with a hint, injected"),
    ]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles))
    return ax


def _cell(ax: Axes, x: int, y: int, row: Mapping[str, Any]) -> None:
    colour, hatch = OUTCOMES[AnswerOutcome(row["outcome"])]
    fill: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "alpha": 0.55, "edgecolor": "white"}
    ax.add_patch(Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, **fill))
    if row["gate"]:
        ax.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor=BLUE, linewidth=2.6))
    mark = "▲ " if row["injected"] else ""
    ax.text(x, y, f"{mark}{row['advantage']:+.2f}", ha="center", va="center", fontsize=11)
