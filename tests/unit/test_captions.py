"""Captions say what the tables hold: each against a table small enough to read."""

import numpy as np
import pandas as pd

from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.experiment.methods import released_curves
from kepo_core.pages import captions


def intervals(rows: dict[str, dict[str, tuple[float, float, float]]]) -> pd.DataFrame:
    """Arm → part → (value, low, high), as ``arms`` has them."""
    cells = [(arm, part, *values) for arm, parts in rows.items() for part, values in parts.items()]
    return pd.DataFrame(cells, columns=["arm", "part", "value", "low", "high"])


def test_a_runs_accuracies() -> None:
    columns = ["before", "after", "difference", "low", "high"]
    rows = {
        "MRI": [0.5, 0.75, 0.25, 0.2, 0.3],
        "CT": [0.5, 0.4, -0.1, -0.2, -0.01],
        "OCT": [0.5, 0.52, 0.02, -0.1, 0.1],
        AVG: [0.5, 0.55, 0.05, 0.0, 0.1],
        AVG_OOD: [0.5, 0.46, -0.04, -0.1, 0.02],
    }
    said = captions.accuracies(pd.DataFrame.from_dict(rows, orient="index", columns=columns), "MRI")
    assert said == (
        "MRI from 50.0 to 75.0 %, a change of +25.0 points [+20.0, +30.0] and Avg. (OOD) from 50.0 to 46.0 %, a "
        "change of "
        "-4.0 points [-10.0, +2.0]. Of 3 modalities, 1 rose and 1 fell by more than their 95 % interval."
    )


def test_changes_and_gains_count_what_leaves_out_nothing() -> None:
    table = intervals({
        "kepo": {"MRI": (0.3, 0.1, 0.5), "CT": (0.1, -0.1, 0.3)},
        "grpo": {"MRI": (-0.2, -0.3, -0.1), "CT": (0.0, -0.1, 0.1)},
    })  # fmt: skip
    assert captions.changes(table).splitlines() == [
        "By more than their 95 % interval, of 2 modalities:",
        "kepo: 1 rose, 0 fell; most MRI (+30), least CT (+10)",
        "grpo: 0 rose, 1 fell; most CT (+0), least MRI (-20)",
    ]
    gains = table.replace("CT", AVG_OOD)
    assert captions.gains(gains, "sft", "MRI").splitlines() == [
        "By more than their 95 % interval:",
        "MRI: above sft: kepo; below: grpo.",
        "Avg. (OOD): above sft: none; below: none.",
    ]


def test_orders_here_and_in_the_paper() -> None:
    columns = pd.MultiIndex.from_product([["ours", "paper"], [AVG, AVG_OOD]])
    rows = [[1, 1, 10, 10], [2, 3, 20, 20], [3, 2, 30, 30], [9, 9, np.nan, np.nan]]
    table = pd.DataFrame(rows, index=list("abcd"), columns=columns)
    assert captions.beside_paper(table).endswith("paper: Avg.: 3 of 3; Avg. (OOD): 2 of 3.")
    assert "Fewer than two" in captions.beside_paper(table.tail(2))


def test_courses() -> None:
    frame = pd.DataFrame({"arm": "kepo", "part": "MRI", "step": [0, 10, 20], "value": [0.5, 0.9, 0.8]})
    table = pd.concat([frame, frame.assign(arm="grpo"), frame.assign(part=AVG_OOD, value=0.25)])
    both = captions.curves(table, "MRI")
    assert both.splitlines() == [
        "kepo: MRI 50 → 80 % (highest 90, at step 10); Avg. (OOD) 25 → 25 % (highest 25, at step 0)",
        "grpo: MRI 50 → 80 % (highest 90, at step 10)",
    ]
    assert "kept no accuracy" in captions.curves(table[:0], "MRI")
    lines = captions.released_curves(released_curves()).splitlines()
    assert len(lines) == 4 and lines[0].startswith("GRPO: Avg. (OOD) 70 → 77 % (highest 78, ")


def test_training_is_told_by_thirds_and_by_arm() -> None:
    one, two = (pd.DataFrame({"step": range(1, 5), "kepo/accuracy": [a, a, 0.5, 1.0]}) for a in (0.0, 0.5))
    titles = {"kepo/accuracy": "right", "kepo/gate_rate": "gate"}
    assert captions.training({"kepo": [one]}, titles) == "First third → last third of the steps:\nright: 0.00 → 0.75"
    both = captions.training({"kepo": [one, two], "sft": [pd.DataFrame({"step": [1]})]}, titles)
    assert both.endswith("right: kepo 0.25 → 0.75")
    assert captions.training({"zero-shot": []}, titles) == "Nothing was trained."
    early = pd.DataFrame({"step": range(1, 10), "kepo/accuracy": [0.5, 1.0, *[np.nan] * 7]})
    assert captions.training({"kepo": [early]}, titles).endswith("right: 0.75 → –")  # nothing is known of the end


def test_rollouts() -> None:
    rows = [
        {"step": step, "group": g, "outcome": outcome, "injected": False, "replaced": False,
         "gate": outcome == "correct", "exploration": "rescued" if g else ""}
        for step, g, outcome in [(1, 0, "correct"), (1, 0, "wrong"), (1, 1, "missing"), (1, 1, "wrong"),
                                 (2, 0, "wrong"), (3, 0, "correct"), (3, 0, "correct")]
    ]  # fmt: skip
    hinted = {**rows[0], "group": 1, "injected": True, "exploration": "rescued"}
    table = pd.DataFrame([*rows, hinted])
    table.loc[2, "replaced"] = True
    assert captions.outcomes(table) == (
        "First third → last third of the steps: correct 25 → 100 %, wrong 50 → 0 %, unreadable 25 → 0 %."
    )
    assert captions.step(table[table["step"] == 1]) == (
        "Step 1: in 1 of 2 groups all had failed; 1 rollouts drawn with a hint were injected; the gate is open for 2 "
        "of 4 "
        "rollouts."
    )


def test_verdicts_are_counted() -> None:
    table = pd.DataFrame({"verdict": ["held", "inconclusive", "held"]})
    assert captions.claims(table) == "Of 3 claims: 2 held, 1 inconclusive."
    assert "None" in captions.claims(pd.DataFrame())
