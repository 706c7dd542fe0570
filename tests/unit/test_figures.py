"""Figures show the numbers they are given: what stands on the axes is read back and compared."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kepo_core.analysis.intervals import wilson_interval
from kepo_core.data.records import MODALITIES, Question
from kepo_core.pages import figures, panels


@pytest.fixture
def ax():
    return Figure().subplots()


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_curves_are_smoothed_around_each_step_and_keep_the_raw_values(ax):
    metrics = pd.DataFrame({"step": [1, 2, 3, 4], "a": [0.0, 3.0, np.nan, 6.0], "zero": [0.0] * 4})
    figures.curves(metrics, {"a": "A", "zero": "Z", "missing": "M"}, ax, smooth=3)
    raw, line = ax.get_lines()
    assert list(raw.get_xdata()) == [1, 2, 4]
    assert list(raw.get_ydata()) == [0, 3, 6]
    assert list(line.get_ydata()) == pytest.approx([1.5, 3.0, 4.5])
    assert texts(ax) == ["A"]
    assert ax.get_xlabel() == "step"


def test_a_rate_of_zero_is_shown_and_a_part_that_is_off_is_said_to_be(ax):
    metrics = pd.DataFrame({"step": [1, 2], "zero": [0.0, 0.0]})
    figures.curves(metrics, {"zero": "Z"}, ax, rate=True)
    assert texts(ax) == ["Z"]
    assert ax.get_ylim() == pytest.approx((-0.03, 1.03))
    other = Figure().subplots()
    figures.curves(metrics, {"zero": "Z", "missing": "M"}, other)
    assert other.texts[0].get_text() == "not part of this method"


def test_lines_differ_in_more_than_colour(ax):
    metrics = pd.DataFrame({"step": [1, 2]} | {name: [0.1, 0.2] for name in "abcdef"})
    figures.curves(metrics, {name: name for name in "abcdef"}, ax)
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in ax.get_lines()}) == 6
    assert len({line.get_color() for line in ax.get_lines()}) == 6


def test_an_accuracy_of_one_or_none_can_be_drawn(ax):
    for n in (300, 268.4, 7):
        cells = {"MRI": wilson_interval(n, n), "CT": wilson_interval(0, n)}
        table = pd.DataFrame(
            {(name, part): [value] for name, (low, high) in cells.items()
             for part, value in (("accuracy", float(name == "MRI")), ("low", low), ("high", high))}
        )  # fmt: skip
        table.columns = pd.MultiIndex.from_tuples(table.columns)
        figures.accuracies(table, ax, in_domain="MRI")


def test_the_four_panels(ax):
    axes = Figure().subplots(2, 2)
    metrics = pd.DataFrame({"step": range(1, 25), "kepo/accuracy": 0.5, "kepo/loss_policy": 0.1})
    figures.training_panels(metrics, axes)
    assert [ax.get_title() for ax in axes.ravel()] == [title for title, _, _ in figures.PANELS]
    assert texts(axes[0, 0]) == ["right answer"]
    assert texts(axes[1, 0]) == ["policy"]


def table():
    columns = pd.MultiIndex.from_product([["MRI", "CT", "Avg.", "Avg. (OOD)"], ["accuracy", "low", "high", "n"]])
    return pd.DataFrame(
        [[0.5, 0.4, 0.7, 9, 0.3, 0.2, 0.4, 9, 0.4, 0.3, 0.5, 18, 0.3, 0.2, 0.4, 9],
         [0.8, 0.7, 0.9, 9, np.nan, np.nan, np.nan, 9, 0.8, 0.7, 0.9, 18, np.nan, np.nan, np.nan, 9]],
        index=["before", "after"], columns=columns,
    )  # fmt: skip


def test_accuracies_stand_at_their_value_with_their_interval(ax):
    figures.accuracies(table(), ax, in_domain="MRI")
    before, after = ax.containers
    assert list(before.lines[0].get_ydata()) == pytest.approx([50, 30, 40, 30])
    low, high = before.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((40, 70))
    assert after.lines[0].get_ydata()[0] == pytest.approx(80)
    assert before.lines[0].get_marker() != after.lines[0].get_marker()
    assert texts(ax) == ["before", "after"] and ax.get_xlabel() == "* trained on"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["MRI*", "CT", "Avg.", "Avg. (OOD)"]
    positions = ax.get_xticks()
    assert positions[2] - positions[1] > positions[1] - positions[0]


def test_differences_tell_gains_from_losses_by_shape_and_colour(ax):
    frame = pd.DataFrame(
        {"difference": [0.3, -0.2, 0.01], "low": [0.2, -0.3, -0.1], "high": [0.4, -0.15, 0.12]},
        index=["MRI", "CT", "Avg."],
    )
    figures.differences(frame, ax, in_domain="MRI")
    lines = [container.lines[0] for container in ax.containers]
    assert [line.get_xdata()[0] for line in lines] == pytest.approx([30, -20, 1])
    assert [line.get_marker() for line in lines] == [">", "<", "o"]
    assert [line.get_color() for line in lines] == [figures.BLUE, figures.RED, "#666666"]
    assert ax.containers[1].lines[2][0].get_segments()[0][:, 0] == pytest.approx([-30, -15])
    assert ax.yaxis_inverted()


def question(tmp_path: Path, modality: str, text="Is $x_{? above $5"):
    path = tmp_path / f"{modality}.png"
    Image.new("RGB", (8, 6), (200, 0, 0)).save(path)
    return Question(modality, "d", modality, "t", text, ("one", "two"), "B", path)


def test_the_sheet_shows_what_it_is_given_in_that_order(tmp_path):
    figure = Figure()
    axes = figure.subplots(2, 4)
    asked = [question(tmp_path, modality) for modality in MODALITIES[1:]]
    figures.picture_sheet(asked, axes)
    assert [ax.get_title() for ax in axes.ravel()[:7]] == list(MODALITIES[1:])
    assert not axes[1, 3].get_visible()
    assert axes[0, 0].get_images()[0].get_array().shape == (6, 8, 3)
    assert axes[0, 0].texts[0].get_text().splitlines()[-2:] == ["A) one", "B) two  ✓"]
    figure.savefig(tmp_path / "sheet.png")  # a dollar sign is a dollar sign, not broken mathematics


def test_the_style_can_be_used():
    figures.use_style()


def test_ours_and_the_papers_stand_line_by_line():
    columns = pd.MultiIndex.from_product([["MRI", "Avg. (OOD)"], ["accuracy", "low", "high", "n"]])
    table = pd.DataFrame([[0.5, 0.4, 0.7, 9, 0.6, 0.5, 0.65, 9], [0.8, 0.7, 0.9, 9, 0.7, 0.6, 0.8, 9]],
                         index=["grpo", "rloo"], columns=columns)  # fmt: skip
    paper = pd.DataFrame({"MRI": [79.0, np.nan], "Avg. (OOD)": [73.67, np.nan]}, index=["grpo", "rloo"])
    figure = Figure()
    left, right = figure.subplots(1, 2)
    panels.beside_paper(table, paper, (left, right), in_domain="MRI")
    mri, ood = (container.lines[0] for container in left.containers)
    assert list(mri.get_xdata()) == [50, 80] and list(ood.get_xdata()) == [60, 70]
    (bars,) = left.containers[0].lines[2]
    assert [list(ends[:, 0]) for ends in bars.get_segments()] == [pytest.approx([40, 70]), pytest.approx([70, 90])]
    assert right.get_lines()[0].get_xdata()[0] == 79 and np.isnan(right.get_lines()[0].get_xdata()[1])
    assert [label.get_text() for label in left.get_yticklabels()] == ["grpo", "rloo"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["", "not in it"]
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[0] > left.get_ylim()[1]  # the first on top
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MRI (trained on)", "Avg. (OOD)"]
