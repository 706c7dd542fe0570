"""Tables → axes. Nothing here reads a file or computes a statistic; every function draws on the axes it is given.

Colours are Okabe and Ito's eight, which stay apart under every common colour blindness; a line is told from its
neighbour by its marker or dash as well.
"""

import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from kepo_core.analysis.diagnosis import ACCEPTANCE
from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.data.images import load_image
from kepo_core.data.records import LETTERS, MODALITIES, Question
from kepo_core.files import in_place_of

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, BLACK, SKY, "#7F7F7F")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (4, 1, 1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")


def use_style() -> None:
    """The look of all figures, called once by a notebook: letters that can be read at half the width of 11 inches."""
    sns.set_theme(context="notebook", style="ticks", palette=list(COLOURS), rc={"axes.grid": True,
        "grid.color": "#E5E5E5", "axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False,
        "axes.titlesize": 13, "axes.labelsize": 12, "xtick.labelsize": 11, "ytick.labelsize": 11,
        "legend.fontsize": 11, "figure.dpi": 100})  # fmt: skip


def show(figure: Figure, caption: str = "", *, alt: str, folder: Path | None = None, name: str = "") -> None:
    """Display a figure with ``alt`` for those who cannot see it and ``caption`` below, and close it.

    With a ``folder`` (which is made) it is kept there as ``name.png`` and ``name.svg``, both texts in them; the same
    figure gives the same bytes.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"Description": f"{alt} {caption}".strip()}
        for kind, made in (("png", {"Software": None}), ("svg", {"Date": None})):
            with plt.rc_context({"svg.hashsalt": name}), in_place_of(folder / f"{name}.{kind}") as partial:
                figure.savefig(partial, format=kind, dpi=150, bbox_inches="tight", metadata={**made, **texts})
    display(figure, metadata={"alt": alt})
    plt.close(figure)
    if caption:
        as_html = f'<p class="caption">{html.escape(caption).replace(chr(10), "<br>")}</p>'
        display({"text/html": as_html, "text/plain": caption}, raw=True)


def curves(
    metrics: pd.DataFrame, names: Mapping[str, str], ax: Axes, *, smooth: int = 1, title: str = "", rate: bool = False
) -> Axes:
    """Metrics over training steps.

    Args:
        metrics: a row per logged step with the column ``step``; a metric may be missing in some rows, or altogether
            when the method does not have it; it is left out of the figure then, as is one that is 0 throughout
            unless it is a rate.
        names: metric → label.
        smooth: each thick line is a centred running mean over so many logged steps; the raw values stay, faint.
        rate: the metrics lie in [0, 1], which the axis then shows.
    """
    drawn = [(metric, label) for metric, label in names.items() if _has(metrics, metric, rate)]
    for k, (metric, label) in enumerate(drawn):
        part = metrics[["step", metric]].dropna()
        line = part[metric].rolling(smooth, center=True, min_periods=1).mean()
        colour = COLOURS[k % len(COLOURS)]
        if smooth > 1:
            ax.plot(part["step"], part[metric], color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(part["step"], line, color=colour, linestyle=DASHES[k % len(DASHES)], linewidth=1.8, label=label)
    ax.set(xlabel="step", title=title)
    if rate:
        ax.set_ylim(-0.03, 1.03)
    if drawn:
        ax.legend(loc="best", handlelength=3)
    else:
        ax.text(0.5, 0.5, "not part of this method", transform=ax.transAxes, ha="center", va="center", color="#666666")
    return ax


def _has(metrics: pd.DataFrame, metric: str, rate: bool) -> bool:
    """Whether there is something to draw: a rate of 0 says something, a term of the loss that is always 0 is off."""
    return metric in metrics and bool(metrics[metric].notna().any() and (rate or metrics[metric].any()))


#: The four panels of ``training_panels``: title, metric → label, whether the metrics are shares in [0, 1].
PANELS: tuple[tuple[str, Mapping[str, str], bool], ...] = (
    ("The student's own rollouts", {"kepo/accuracy": "right answer", "kepo/format": "exact format"}, True),
    (
        "Gate and exploration",
        {
            "kepo/gate_rate": "sequences past the gate",
            "kepo/all_fail_rate": "groups where all failed",
            ACCEPTANCE: "hinted draws accepted",
        },
        True,
    ),
    (
        "Terms of the loss",
        {"kepo/loss_policy": "policy", "kepo/loss_distill": "gated divergence", "kepo/loss_kl": "KL to reference"},
        False,
    ),
    ("Entropy of the next token (nats)", {"kepo/entropy": "entropy"}, False),
)


def training_panels(metrics: pd.DataFrame, axes: Any) -> None:
    """PANELS over training on four axes (in any array), from ``diagnosis.training_table``."""
    smooth = max(1, len(metrics) // 12)
    for (title, names, rate), ax in zip(PANELS, np.asarray(axes, dtype=object).ravel(), strict=True):
        curves(metrics, names, ax, smooth=smooth, title=title, rate=rate)


def accuracy_curves(table: pd.DataFrame, axes: Any, *, in_domain: str = MODALITIES[0]) -> None:
    """Accuracy over training with 95 % bands, in domain and out of it on two axes, from ``arms.arm_courses``."""
    for part, ax in zip((in_domain, AVG_OOD), np.asarray(axes, dtype=object).ravel(), strict=True):
        own = table[table["part"] == part].replace([-np.inf, np.inf], np.nan)  # nothing is known: no band
        for k, (label, frame) in enumerate(own.groupby("arm", sort=False)):
            colour, dash = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)]
            low, high = 100 * frame["low"].clip(0, 1), 100 * frame["high"].clip(0, 1)
            ax.fill_between(frame["step"], low, high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(
                frame["step"], 100 * frame["value"], color=colour, linestyle=dash,
                marker=MARKERS[k % len(MARKERS)], markersize=4, linewidth=1.8, label=str(label),
            )  # fmt: skip
        ax.set(xlabel="step", ylabel="accuracy (%), 95 % band", title=part)
    legend_above(axes)


def legend_above(axes: Any, columns: int = 4) -> None:
    """One legend for panels that share their lines, above them all."""
    flat = np.asarray(axes, dtype=object).ravel()
    named = {label: line for ax in flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if named:
        options: dict[str, Any] = {"loc": "outside upper center", "ncols": min(columns, len(named)), "handlelength": 3}
        flat[0].figure.legend(named.values(), named.keys(), **options)


def accuracies(
    table: pd.DataFrame, ax: Axes, *, chance: Mapping[str, float] | None = None, in_domain: str = MODALITIES[0]
) -> Axes:
    """Accuracy with its interval per modality, one colour and marker per model, from ``statistics.accuracy_table``.

    ``chance`` (modality → what guessing gets) is marked with a grey bar, the modality that was trained on with an
    asterisk. The averages stand apart on the right.
    """
    columns = list(table.columns.unique(level=0))
    x = np.array([i + (0.6 if column in (AVG, AVG_OOD) else 0.0) for i, column in enumerate(columns)])
    shifts = np.linspace(-0.3, 0.3, 2 * len(table) + 1)[1::2]
    for k, (model, row) in enumerate(table.iterrows()):
        values, low, high = (
            100 * row.xs(part, level=1)[columns].to_numpy(float) for part in ("accuracy", "low", "high")
        )
        ax.errorbar(
            x + shifts[k], values, yerr=[values - low, high - values], label=str(model), linestyle="none",
            color=COLOURS[k % len(COLOURS)], marker=MARKERS[k % len(MARKERS)], markersize=5.5,
            elinewidth=1.4, capsize=2.5,
        )  # fmt: skip
    for position, column in zip(x, columns, strict=True):
        if chance and column in chance:
            ax.hlines(100 * chance[column], position - 0.38, position + 0.38, color="#8C8C8C", linewidth=2.5, zorder=1)
    handles, names = ax.get_legend_handles_labels()
    if chance:
        handles, names = [*handles, Line2D([], [], color="#8C8C8C", linewidth=2.5)], [*names, "guessing"]
    if in_domain in columns:
        handles, names = [*handles, Line2D([], [], linestyle="none")], [*names, "* trained on"]
    labels = [f"{column}*" if column == in_domain else column for column in columns]
    ax.set_xticks(x, labels, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(ylabel="accuracy (%), 95 % interval", ylim=(0, 102))
    ax.grid(visible=False, axis="x")
    ax.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles))
    return ax


def differences(table: pd.DataFrame, ax: Axes, *, in_domain: str = MODALITIES[0]) -> Axes:
    """Paired differences with their intervals, from ``statistics.paired_differences``; 0 is no change.

    The modality that was trained on has an asterisk. A change whose interval leaves out 0 is drawn filled and
    coloured: blue for a gain, red for a loss.
    """
    y = np.array([i + (0.6 if name in (AVG, AVG_OOD) else 0.0) for i, name in enumerate(table.index)])
    for position, (_, row) in zip(y, table.iterrows(), strict=True):
        colour = BLUE if row["low"] > 0 else RED if row["high"] < 0 else "#666666"
        value, low, high = (100 * float(row[part]) for part in ("difference", "low", "high"))
        ax.errorbar(
            [value], [position], xerr=[[value - low], [high - value]], color=colour, elinewidth=1.6, capsize=3,
            marker=">" if row["low"] > 0 else "<" if row["high"] < 0 else "o", markersize=7,
            markerfacecolor="white" if colour == "#666666" else colour,
        )  # fmt: skip
    ax.axvline(0, color=BLACK, linewidth=1)
    ax.set_yticks(y, [f"{name}*" if name == in_domain else str(name) for name in table.index])
    ax.invert_yaxis()
    ax.set(xlabel="change of accuracy (points), 95 % interval, paired by question (* trained on)")
    ax.grid(visible=False, axis="y")
    return ax


def gains(table: pd.DataFrame, ax: Axes, *, compared_with: str, in_domain: str = MODALITIES[0]) -> Axes:
    """A line per arm: its difference from another in domain and out of it, from ``arms.arm_differences``."""
    arms, parts = list(table["arm"].unique()), [p for p in (in_domain, AVG_OOD) if (table["part"] == p).any()]
    y = np.arange(len(arms), dtype=float)
    for k, part in enumerate(parts):
        own = table[table["part"] == part].set_index("arm").reindex(arms)
        values, low, high = (100 * own[name].to_numpy(float) for name in ("value", "low", "high"))
        ax.errorbar(
            values, y + 0.16 * (2 * k - len(parts) + 1), xerr=[values - low, high - values], label=part,
            linestyle="none", color=COLOURS[k], marker=MARKERS[k], markersize=6, elinewidth=1.4, capsize=2.5,
        )  # fmt: skip
    ax.axvline(0, color="#8C8C8C", linewidth=1.2, zorder=1)
    ax.set_yticks(y, [textwrap.fill(name, 44) for name in arms])
    ax.set(xlabel=f"points more than {compared_with}, 95 % interval", ylim=(len(arms) - 0.4, -0.6))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
    return ax


def beside_paper(table: pd.DataFrame, paper: pd.DataFrame, axes: Any, *, in_domain: str = MODALITIES[0]) -> None:
    """A line per method on two axes: our accuracies with their intervals, and the paper's Table 1, which has none.

    ``table`` is ``statistics.accuracy_table``'s or ``arms.by_part``'s, ``paper`` the part "paper" of
    ``methods.beside_paper``'s. What is compared is the order of methods within each side: the two sides ask different
    questions of different models. The paper trained on MRI: where ``in_domain`` is another, its accuracies there are no
    others' counterpart.
    """
    left, right = axes
    y = np.arange(len(table), dtype=float)
    shown = [name for name in (in_domain, AVG_OOD) if name in table.columns.unique(level=0)]
    for k, name in enumerate(shown):
        label = f"{name} (trained on)" if name == in_domain else name
        style = {"color": COLOURS[k], "marker": MARKERS[k], "markersize": 6, "linestyle": "none", "label": label}
        at = y + 0.16 * (2 * k - len(shown) + 1)
        part = 100 * table[name].to_numpy(dtype=float)
        left.errorbar(part[:, 0], at, xerr=[part[:, 0] - part[:, 1], part[:, 2] - part[:, 0]], elinewidth=1.4,
                      capsize=2, **style)  # fmt: skip
        if name in paper and in_domain == MODALITIES[0]:
            right.plot(paper[name].to_numpy(dtype=float), at, **style)
    left.set(xlabel="accuracy (%), 95 % interval", title="Here", xlim=(0, 103), ylim=(len(table) - 0.4, -0.6))
    left.set_yticks(y, [str(name) for name in table.index])
    right.set(xlabel="accuracy (%)", title="The paper's Table 1", ylim=left.get_ylim())
    right.set_yticks(y, ["" if paper.notna().any(axis=1).iloc[i] else "not in it" for i in range(len(table))])
    legend_above([left])


def count_map(table: pd.DataFrame, ax: Axes) -> Axes:
    """`survey.counts` as a map: one cell per modality and kind, darker for more, with its number."""
    sns.heatmap(
        np.log1p(table), annot=table.to_numpy(), fmt=",d", cmap="Blues", cbar=False, linewidths=1, ax=ax,
        annot_kws={"fontsize": 11},
    )  # fmt: skip
    ax.set_xticklabels([textwrap.fill(str(name), 14) for name in table.columns], rotation=0)
    ax.set_yticklabels(table.index, rotation=0)
    ax.set(xlabel="", ylabel="")
    ax.grid(visible=False)
    return ax


def stacked_shares(table: pd.DataFrame, columns: Sequence[str], ax: Axes, *, title: str = "") -> Axes:
    """Percentages that add up to a whole, one bar per row of ``table``, each part with its name where there is room."""
    left = np.zeros(len(table))
    y = np.arange(len(table), dtype=float)
    for column, colour in zip(columns, sns.color_palette("Blues", len(columns) + 1)[1:], strict=True):
        values = table[column].to_numpy(float)
        ax.barh(y, values, left=left, color=colour, edgecolor="white", label=column)
        for position, value, start in zip(y, values, left, strict=True):
            if value >= 7:
                dark = colour[2] < 0.75
                ax.text(start + value / 2, position, f"{value:.0f}", ha="center", va="center", fontsize=10,
                        color="white" if dark else "black")  # fmt: skip
        left += values
    ax.set_yticks(y, list(table.index))
    ax.set(xlabel="% of questions", xlim=(0, 100.5), ylim=(len(table) - 0.4, -0.6))
    ax.grid(visible=False)
    ax.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(columns), 8))
    return ax


def picture_sizes(table: pd.DataFrame, ax: Axes) -> Axes:
    """Width against height of `survey.pictures`, logarithmic; squares lie on the line."""
    names = [m for m in MODALITIES if m in set(table["modality"])]
    for k, name in enumerate(names):
        own = table[table["modality"] == name]
        ax.plot(own["width"], own["height"], linestyle="none", marker="osD^vPX*"[k], markersize=6, alpha=0.6,
                color=(*COLOURS, SKY, "#666666")[k], label=name)  # fmt: skip
    sides = table[["width", "height"]].to_numpy()
    low, high = sides.min() / 2.1, sides.max() * 2.1
    ax.plot([low, high], [low, high], color="#BBBBBB", linewidth=1, zorder=0)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="width (pixels)",
           ylabel="height (pixels)", title="Pictures")  # fmt: skip
    ticks = [side for side in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if low < side < high]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(ScalarFormatter())
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def prompt_histogram(lengths: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """How many tokens prompts have, from `survey.prompt_lengths` per kind of prompt."""
    longest = max(int(table["tokens"].max()) for table in lengths.values())
    shortest = min(int(table["tokens"].min()) for table in lengths.values())
    bins = np.linspace(shortest - 0.5, longest + 0.5, min(longest - shortest + 2, 60)).tolist()
    for k, (name, table) in enumerate(lengths.items()):
        ax.hist(table["tokens"], bins=bins, histtype="step", linewidth=1.8, color=COLOURS[k], linestyle=DASHES[k],
                label=f"{name}: median {table['tokens'].median():.0f}, longest {table['tokens'].max()}")  # fmt: skip
    ax.set(xlabel="tokens of the prompt, image included", ylabel="questions", title="Prompts")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08))
    return ax


def picture(question: Question, ax: Axes, *, width: int = 28) -> Axes:
    """One question's picture with its modality above; the question and its options below, the right one marked."""
    ax.imshow(np.asarray(load_image(question.image)), interpolation="nearest")
    ax.set_title(question.modality, fontweight="bold")
    options = [
        f"{letter}) {text}{'  ✓' if letter == question.answer else ''}"
        for letter, text in zip(LETTERS, question.options, strict=False)
    ]
    lines = [line for text in (question.question, *options) for line in textwrap.wrap(text, width) or [""]]
    # Question texts are data: a dollar sign in them starts no formula.
    ax.text(
        0.5, -0.05, "\n".join(lines), transform=ax.transAxes, ha="center", va="top", fontsize=10, parse_math=False
    )  # fmt: skip
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def picture_sheet(questions: Sequence[Question], axes: Any) -> None:
    """Questions one by one on an array of axes, row by row; spare axes are hidden."""
    flat = list(np.asarray(axes, dtype=object).ravel())
    for ax in flat[len(questions) :]:
        ax.set_visible(False)
    for question, ax in zip(questions, flat, strict=False):
        picture(question, ax)
