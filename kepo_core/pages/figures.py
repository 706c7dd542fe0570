"""Tables → axes. Nothing here reads a file or computes a statistic; every function draws on the axes it gets.

Colours are Okabe and Ito's eight, which are distinct under every common colour blindness. Lines also differ by marker
or dash.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from kepo_core.analysis.diagnosis import ACCEPTANCE
from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.data.images import load_image
from kepo_core.data.records import LETTERS, Question, categories
from kepo_core.files import in_place_of

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#7F7F7F"
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, BLACK, SKY, GREY)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (4, 1, 1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")

#: Text stays readable when a figure of 11 inches is shown at half its width.
_STYLE = {
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "legend.frameon": False,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "figure.dpi": 100,
    "text.parse_math": False,  # names of categories are data: a dollar sign in them does not start a formula
}


def use_style() -> None:
    """Set the style of all figures; a notebook calls this once."""
    sns.set_theme(context="notebook", style="ticks", palette=list(COLOURS), rc=_STYLE)


def show(figure: Figure, *, alt: str, folder: Path | None = None, name: str = "") -> None:
    """Display a figure with ``alt`` as its alternative text, and close it.

    With a ``folder`` (made if needed) the figure is also saved as ``name.png`` and ``name.svg``, with ``alt`` in their
    metadata; the same figure gives the same bytes.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, made in (("png", {"Software": None}), ("svg", {"Date": None})):
            with plt.rc_context({"svg.hashsalt": name}), in_place_of(folder / f"{name}.{kind}") as partial:
                metadata = {**made, "Description": alt}
                figure.savefig(partial, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    display(figure, metadata={"alt": alt})
    plt.close(figure)


def line(ax: Axes, k: int, x: Any, y: Any, band: tuple[Any, Any] | None = None, **style: Any) -> None:
    """The ``k``-th line of a figure, with its own colour and dash, and optionally a band between two edges."""
    colour, dash = COLOURS[k % len(COLOURS)], DASHES[(k + k // len(COLOURS)) % len(DASHES)]
    if band is not None:
        ax.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
    ax.plot(x, y, color=colour, linestyle=dash, linewidth=1.8, **style)


def points(ax: Axes, k: int, at: Any, table: Any, label: str, *, upright: bool = False) -> None:
    """The ``k``-th set of points of a figure, at the places ``at`` of the axis with names.

    The first three columns of ``table`` are values and the two ends of their intervals, as shares; drawn in per cent.
    """
    value, low, high = 100 * table.iloc[:, :3].to_numpy(float).T
    x, y, ends = (at, value, "yerr") if upright else (value, at, "xerr")
    style: Any = {ends: [value - low, high - value], "elinewidth": 1.4, "capsize": 2.5}
    ax.errorbar(x, y, label=label, **marker(k), **style)


def marker(k: int) -> dict[str, Any]:
    """Colour and marker of the ``k``-th set of points of a figure."""
    colour, marker = COLOURS[k % len(COLOURS)], MARKERS[(k + k // len(COLOURS)) % len(MARKERS)]
    return {"linestyle": "none", "color": colour, "marker": marker, "markersize": 6}


def nothing(ax: Axes, why: str) -> None:
    """Write the reason ``why`` into empty axes."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color="#666666")


def legend_over(ax: Axes, columns: int, **options: Any) -> None:
    """The legend of one axes, above them."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, **options)


def legend_above(axes: Any) -> None:
    """One legend above all panels, for panels that share their lines."""
    flat = _flat(axes)
    named = {label: drawn for ax in flat for drawn, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if named:
        options: dict[str, Any] = {"loc": "outside upper center", "ncols": min(4, len(named)), "handlelength": 3}
        flat[0].figure.legend(named.values(), named.keys(), **options)


def _flat(axes: Any) -> list[Axes]:
    return list(np.asarray(axes, dtype=object).ravel())


def curves(
    metrics: pd.DataFrame, names: Mapping[str, str], ax: Axes, *, smooth: int = 1, title: str = "", rate: bool = False
) -> Axes:
    """Metrics over training steps.

    Args:
        metrics: a row per logged step with the column ``step``; a metric may be missing in some rows. A metric that
            the method does not have is not drawn, nor one that is always 0, unless it is a rate.
        names: metric → label.
        smooth: each thick line is a centred running mean over ``smooth`` logged steps; raw values are drawn faint.
        rate: the metrics lie in [0, 1], and so does the axis.
    """
    drawn = [metric for metric in names if _has(metrics, metric, rate)]
    for k, metric in enumerate(drawn):
        part = metrics[["step", metric]].dropna()
        if smooth > 1:
            ax.plot(part["step"], part[metric], color=COLOURS[k % len(COLOURS)], alpha=0.25, linewidth=0.8)
        line(ax, k, part["step"], part[metric].rolling(smooth, center=True, min_periods=1).mean(), label=names[metric])
    ax.set(xlabel="step", title=title)
    if rate:
        ax.set_ylim(-0.03, 1.03)
    if drawn:
        ax.legend(loc="best", handlelength=3)
    else:
        nothing(ax, "not part of this method")
    return ax


def _has(metrics: pd.DataFrame, metric: str, rate: bool) -> bool:
    """Whether there is something to draw: a rate of 0 is a result, a loss term that is always 0 is switched off."""
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
    """Draw PANELS over training steps on four axes (an array of any shape), from ``diagnosis.training_table``."""
    smooth = max(1, len(metrics) // 12)
    for (title, names, rate), ax in zip(PANELS, _flat(axes), strict=True):
        curves(metrics, names, ax, smooth=smooth, title=title, rate=rate)


def accuracy_curves(table: pd.DataFrame, axes: Any, *, in_domain: str, ylabel: str = "accuracy (%), 95 % band") -> None:
    """Accuracy over training, in and out of domain on two axes, with bands if known, from ``arms.arm_courses``."""
    for part, ax in zip((in_domain, AVG_OOD), _flat(axes), strict=True):
        own = table[table["part"] == part].replace([-np.inf, np.inf], np.nan)
        for k, (arm, rows) in enumerate(own.groupby("arm", sort=False)):
            shares = 100 * rows[["value", "low", "high"]].clip(0, 1)
            style: Any = {"marker": MARKERS[k % len(MARKERS)], "markersize": 4, "label": str(arm)}
            line(ax, k, rows["step"], shares["value"], (shares["low"], shares["high"]), **style)
        ax.set(xlabel="step", ylabel=ylabel, title=part)
        if own.empty:
            nothing(ax, "no other modality")
    legend_above(axes)


def accuracies(table: pd.DataFrame, ax: Axes, *, in_domain: str) -> Axes:
    """Accuracy with its interval per modality, one colour and marker per model, from ``statistics.accuracy_table``.

    The training modality has an asterisk. The averages are set apart on the right.
    """
    columns = list(table.columns.unique(level=0))
    shifts = np.linspace(-0.3, 0.3, 2 * len(table) + 1)[1::2]
    for k, (model, row) in enumerate(table.iterrows()):
        intervals = row.unstack().loc[columns, ["accuracy", "low", "high"]]
        points(ax, k, _places(columns) + shifts[k], intervals, str(model), upright=True)
    style: Any = {"rotation": 30} if len(columns) < 15 else {"rotation": 90, "fontsize": 7, "va": "center"}
    ax.set_xticks(_places(columns), _starred(columns, in_domain), ha="right", rotation_mode="anchor", **style)
    ax.set(xlabel="* trained on", ylabel="accuracy (%), 95 % interval", ylim=(0, 102))
    ax.grid(visible=False, axis="x")
    legend_over(ax, len(table))
    return ax


def _places(names: Sequence[Any]) -> NDArray[np.floating[Any]]:
    """Positions of names along an axis, averages a little apart."""
    return np.array([i + (0.6 if name in (AVG, AVG_OOD) else 0.0) for i, name in enumerate(names)])


def _starred(names: Iterable[Any], in_domain: str) -> list[str]:
    return [f"{name}*" if name == in_domain else str(name) for name in names]


def differences(table: pd.DataFrame, ax: Axes, *, in_domain: str) -> Axes:
    """Paired differences with their intervals, from ``statistics.paired_differences``; 0 is no change.

    The training modality has an asterisk. A change whose interval excludes 0 is filled and coloured: blue for a gain,
    red for a loss.
    """
    places = _places(list(table.index))
    for place, (_, row) in zip(places, table.iterrows(), strict=True):
        value, low, high = (100 * float(row[part]) for part in ("difference", "low", "high"))
        colour, marker, fill = (
            (BLUE, ">", BLUE) if low > 0 else (RED, "<", RED) if high < 0 else ("#666666", "o", "white")
        )
        style: Any = {"color": colour, "marker": marker, "markerfacecolor": fill, "markersize": 7}
        ax.errorbar([value], [place], xerr=[[value - low], [high - value]], **style, elinewidth=1.6, capsize=3)
    ax.axvline(0, color=BLACK, linewidth=1)
    ax.set_yticks(places, _starred(table.index, in_domain))
    ax.invert_yaxis()
    ax.set(xlabel="change of accuracy (points), 95 % interval, paired by question (* trained on)")
    ax.grid(visible=False, axis="y")
    return ax


def count_map(table: pd.DataFrame, ax: Axes) -> Axes:
    """`survey.counts` as a map: one cell per modality and kind, darker for more, with its number."""
    names = [textwrap.fill(str(name), 14) for name in table.columns]
    style: Any = {"cmap": "Blues", "cbar": False, "linewidths": 1, "annot_kws": {"fontsize": 11}}
    sns.heatmap(np.log1p(table), annot=table.to_numpy(), fmt=",d", xticklabels=names, ax=ax, **style)
    ax.tick_params(axis="both", rotation=0)
    ax.set(xlabel="", ylabel="")
    return ax


def stacked_shares(table: pd.DataFrame, columns: Sequence[str], ax: Axes, *, title: str = "") -> Axes:
    """Percentages that add up to 100, one bar per row of ``table``; parts of 7 % or more carry their number."""
    colours = sns.color_palette("Blues", len(columns) + 1)[1:]
    table[list(columns)].plot.barh(stacked=True, ax=ax, color=colours, edgecolor="white", width=0.8)
    containers: Any = ax.containers
    for bars, colour in zip(containers, colours, strict=True):
        told = [f"{value:.0f}" if value >= 7 else "" for value in bars.datavalues]
        ax.bar_label(bars, told, label_type="center", fontsize=10, color="white" if colour[2] < 0.75 else "black")
    ax.set(xlabel="% of questions", ylabel="", xlim=(0, 100.5), ylim=(len(table) - 0.4, -0.6))
    ax.grid(visible=False)
    legend_over(ax, min(len(columns), 8), title=title)
    return ax


def picture_sizes(table: pd.DataFrame, ax: Axes) -> Axes:
    """Width against height of `survey.pictures`, logarithmic; squares lie on the line."""
    for k, name in enumerate(categories(table["modality"])):
        own = table[table["modality"] == name]
        ax.plot(own["width"], own["height"], **marker(k), alpha=0.6, label=name)
    sides = table[["width", "height"]].to_numpy()
    low, high = sides.min() / 2.1, sides.max() * 2.1
    ax.plot([low, high], [low, high], color="#BBBBBB", linewidth=1, zorder=0)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ax.set(xlabel="width (pixels)", ylabel="height (pixels)", title="Pictures")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_locator(LogLocator(base=2))
        axis.set_major_formatter(ScalarFormatter())
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(ax.lines) // 16)
    return ax


def prompt_histogram(lengths: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Prompt lengths in tokens, from `survey.prompt_lengths` for each kind of prompt."""
    tokens = {name: table["tokens"] for name, table in lengths.items()}
    longest = max(int(counts.max()) for counts in tokens.values())
    shortest = min(int(counts.min()) for counts in tokens.values())
    bins = np.linspace(shortest - 0.5, longest + 0.5, min(longest - shortest + 2, 60)).tolist()
    for k, (name, counts) in enumerate(tokens.items()):
        label = f"{name}: median {counts.median():.0f}, longest {counts.max()}"
        ax.hist(counts, bins, histtype="step", linewidth=1.8, color=COLOURS[k], linestyle=DASHES[k], label=label)
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
    lines = [part for text in (question.question, *options) for part in textwrap.wrap(text, width) or [""]]
    # Question texts are data: a dollar sign in them does not start a formula.
    style: Any = {"ha": "center", "va": "top", "fontsize": 10, "parse_math": False}
    ax.text(0.5, -0.05, "\n".join(lines), transform=ax.transAxes, **style)
    ax.set_axis_off()
    return ax


def picture_sheet(questions: Sequence[Question], axes: Any) -> None:
    """One question per axes of an array, row by row; unused axes are hidden."""
    flat = _flat(axes)
    for ax in flat[len(questions) :]:
        ax.set_visible(False)
    for question, ax in zip(questions, flat, strict=False):
        picture(question, ax)
