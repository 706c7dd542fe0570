"""Figures over runs: what is drawn is what the tables say."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kepo_core.analysis import gating
from kepo_core.experiment.methods import released_curves
from kepo_core.pages import figures, panels


@pytest.fixture
def axes():
    return Figure(figsize=(12, 5), layout="constrained").subplots(1, 2)


def test_the_released_runs_end_where_their_notebook_says(axes) -> None:
    panels.released_curves(released_curves(), axes)
    ends = {line.get_label(): line.get_ydata()[-1] for line in axes[1].lines}
    assert ends == pytest.approx({"GRPO": 76.9, "KEPO-KE τ = 0": 77.2, "KEPO-KE τ = 0, teacher 235B": 76.9,
                                  "KEPO-KE τ = 1": 76.5}, abs=0.06)  # fmt: skip
    assert all(len(line.get_xdata()) == 19 for ax in axes for line in ax.lines)


def test_a_metric_is_a_mean_over_runs_with_their_range(axes) -> None:
    made = [pd.DataFrame({"step": [1, 2], "kepo/gate_rate": values}) for values in ([0.2, 0.4], [0.4, 0.8])]
    runs = {"sft": [pd.DataFrame({"step": [1], "loss": [1.0]})], "kepo": made}
    panels.metric_over_runs(runs, "kepo/gate_rate", axes[0])
    (line,) = axes[0].lines
    assert line.get_label() == "kepo" and line.get_ydata() == pytest.approx([0.3, 0.6])
    low, high = (f(axes[0].collections[0].get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    assert (low, high) == (0.2, 0.8)
    panels.metric_over_runs({"sft": []}, "kepo/gate_rate", axes[1])
    assert axes[1].texts[0].get_text() == "in none of these runs"


def rollouts() -> pd.DataFrame:
    row = {"step": 1, "group": 0, "row": 0, "outcome": "wrong", "advantage": -0.5, "gate": False, "injected": False,
           "replaced": False, "exploration": "", "draws": 0}  # fmt: skip
    rescued = {**row, "group": 1, "exploration": "rescued", "draws": 3}
    return pd.DataFrame([
        row,
        {**row, "row": 1, "outcome": "correct", "advantage": 0.5, "gate": True},
        {**rescued, "row": 2, "outcome": "missing"},
        {**rescued, "row": 3, "outcome": "correct", "advantage": 0.5, "gate": True, "injected": True},
        {**rescued, "row": 3, "advantage": np.nan, "replaced": True},
    ])  # fmt: skip


def test_a_step_shows_every_rollout_that_is_trained_on_and_no_other(axes) -> None:
    panels.step_map(rollouts(), axes[0])
    texts = [text.get_text() for text in axes[0].texts if text.get_text()]
    assert texts == ["-0.50", "+0.50", "-0.50", "▲ +0.50", "all failed: rescued, draws: 3"]
    framed = [patch for patch in axes[0].patches if not patch.get_fill()]
    assert [tuple(np.round(patch.get_xy(), 2)) for patch in framed] == [(0.56, -0.44), (0.56, 0.56)]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()][:3] == ["correct", "wrong", "missing"]


def test_outcomes_add_up_without_injected_rollouts(axes) -> None:
    panels.outcomes_over_training(pd.concat([rollouts(), rollouts().assign(step=2)]), axes[0])
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in axes[0].collections]
    assert tops == pytest.approx([25, 75, 100])  # of four own ones: one right, two wrong, one unreadable


def estimates(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["arm", "part", "value", "low", "high"])


def test_a_change_whose_interval_holds_0_is_in_brackets(axes) -> None:
    rows = [("kepo", "MRI", 0.2, 0.1, 0.3), ("kepo", "CT", -0.02, -0.08, 0.04), ("kepo", "Avg.", 0.1, 0.0, 0.2)]
    panels.change_map(estimates(*rows), axes[0], in_domain="MRI")
    assert [text.get_text() for text in axes[0].texts] == ["+20 ± 10", "(-2 ± 6)"]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["MRI*", "CT"]


def test_accuracy_curves_and_gains_draw_their_tables(axes) -> None:
    rows = [("kepo", "MRI", 0.5, 0.4, 0.6), ("kepo", "MRI", 0.75, 0.7, 1.2), ("kepo", "CT", 0.1, 0.1, 0.2)]
    figures.accuracy_curves(estimates(*rows).assign(step=[0, 5, 0]), axes, in_domain="MRI")
    assert axes[0].lines[0].get_ydata().tolist() == [50, 75] and not axes[1].lines
    assert axes[0].collections[0].get_paths()[0].vertices[:, 1].max() == 100
    table = estimates(("kepo", "MRI", 0.1, 0.0, 0.2), ("kepo", "CT", 0.3, 0, 1), ("kepo", "Avg. (OOD)", -0.1, -0.2, 0))
    ax = panels.gains(table, Figure().subplots(), compared_with="grpo", in_domain="MRI")
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() in "os"] == [[10], [-10]]


def test_a_figure_is_kept_the_same_every_time_and_says_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(figures, "display", lambda *what, **how: shown.append((*what, how)))
    for folder in ("one", "two"):
        figure = plt.figure()
        panels.step_map(rollouts(), figure.subplots())
        figures.show(figure, alt="a < b", folder=tmp_path / folder, name="step")
    for name in ("step.png", "step.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert re.search(b"a (<|&lt;) b", (tmp_path / "one" / name).read_bytes())
    assert len(list((tmp_path / "one").iterdir())) == 2 and not plt.get_fignums()
    assert [how for _, how in shown] == [{"metadata": {"alt": "a < b"}}] * 2


def passed(gate: list[float], teacher: list[float] | None = None) -> pd.DataFrame:
    """Four rollouts of two questions, two tokens each but for the last, which has six; one was replaced."""
    row = {"replaced": False, "tokens": 2, "accuracy": 1.0}
    rows = [{**row, "id": "a"}, {**row, "id": "a", "accuracy": 0.0}, {**row, "id": "b", "accuracy": 0.0},
            {**row, "id": "b", "tokens": 6}, {**row, "id": "b", "replaced": True}]  # fmt: skip
    told = [np.nan] * 5 if teacher is None else [teacher[row["id"] == "b"] for row in rows]
    return pd.DataFrame(rows).assign(gate=[*gate, 0.0], teacher_right=told)


def test_what_a_gate_lets_through_by_hand(axes) -> None:
    """The teacher answers question a right and b not, as the run that asked it knows; its rows weigh 2 and 4."""
    runs = {
        "grpo": [passed([0, 0, 0, 0])],
        "reward": [passed([1, 0, 0, 1]), passed([1, 0, 0, 0])],
        "aligned": [passed([1, 0.5, 0.5, 0.5])],
        "teacher": [passed([1, 1, 0, 0], [1.0, 0.0])],
    }
    table = gating.gate_table(runs)
    assert list(table.index) == ["reward", "aligned", "teacher"]  # GRPO has no gate
    assert table.loc["reward"].tolist() == pytest.approx([(8 + 2) / 24, 0.75, 0.0, (2 / 8 + 1) / 2])
    assert table.loc["aligned"].tolist() == pytest.approx([7 / 12, 1.0, 1.0, 3 / 7])
    assert table.loc["teacher"].tolist() == pytest.approx([4 / 12, 0.5, 0.5, 1.0])
    without = gating.gate_table({name: tables for name, tables in runs.items() if name != "teacher"})
    assert without["teacher"].isna().all() and gating.gate_table({}).empty
    accuracies = pd.DataFrame({"arm": ["teacher", "grpo", "reward", "aligned"], "value": [0.4, 0.1, 0.2, 0.3],
                               "low": 0.0, "high": 1.0})  # fmt: skip
    panels.gates(table, accuracies, axes)
    drawn = {line.get_label(): line.get_xdata().tolist() for line in axes[0].lines}
    assert drawn[gating.SHARES["right"]] == pytest.approx([75.0, 100.0, 50.0])
    assert axes[1].lines[0].get_xdata().tolist() == pytest.approx([20.0, 30.0, 40.0])
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["reward", "aligned", "teacher"]
