"""Captions that say what is seen: the tables that a figure is drawn from → a few lines for its readers.

Each function takes what the figure's own function takes. They report numbers and orders, and judge nothing: whether a
difference is more than chance is said only where the table has intervals.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kepo_core.analysis.diagnosis import ACCEPTANCE
from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.data.records import MODALITIES


def accuracies(differences: pd.DataFrame, in_domain: str) -> str:
    """Of ``statistics.paired_differences``: where a model begins and ends, and what moved."""
    parts = [name for name in (in_domain, AVG_OOD) if name in differences.index]
    said = []
    for name in parts:
        row = 100 * differences.loc[name, ["before", "after", "difference", "low", "high"]].astype(float)
        said.append(
            f"{name} from {row['before']:.1f} to {row['after']:.1f} %, a change of {row['difference']:+.1f} points "
            f"[{row['low']:+.1f}, {row['high']:+.1f}]"
        )
    own = differences.drop(index=[AVG, AVG_OOD], errors="ignore")
    rose, fell = int((own["low"] > 0).sum()), int((own["high"] < 0).sum())
    return f"{_list(said)}. Of {len(own)} modalities, {rose} rose and {fell} fell by more than their 95 % interval."


def changes(table: pd.DataFrame) -> str:
    """Of ``arms.arm_changes``: per arm, in how many modalities accuracy moved by more than its interval, and most."""
    own = table[table["part"].isin(MODALITIES)].set_index("part")
    lines = [f"By more than their 95 % interval, of {own.index.nunique()} modalities:"]
    for arm, rows in own.groupby("arm", sort=False):
        values, low, high = (rows[name] for name in ("value", "low", "high"))
        lines.append(
            f"{arm}: {int((low > 0).sum())} rose, {int((high < 0).sum())} fell; most {values.idxmax()} "
            f"({100 * values.max():+.0f}), least {values.idxmin()} ({100 * values.min():+.0f})"
        )
    return "\n".join(lines)


def gains(table: pd.DataFrame, compared_with: str, in_domain: str) -> str:
    """Of ``arms.arm_differences``: which arms are above another by more than their interval, which below."""
    said = []
    for part in (in_domain, AVG_OOD):
        own = table[table["part"] == part]
        above, below = list(own["arm"][own["low"] > 0]), list(own["arm"][own["high"] < 0])
        said.append(f"{part}: above {compared_with}: {_list(above) or 'none'}; below: {_list(below) or 'none'}.")
    return "\n".join(["By more than their 95 % interval:", *said])


def beside_paper(beside: pd.DataFrame) -> str:
    """Of ``methods.beside_paper``: how many pairs of methods stand in the same order here and in the paper."""
    said = []
    for part in (AVG, AVG_OOD):
        both = beside[[("ours", part), ("paper", part)]].dropna().to_numpy(float)
        pairs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(both, 2)]
        if pairs:
            said.append(f"{part}: {sum(p > 0 for p in pairs)} of {len(pairs)}")
    if not said:
        return "Fewer than two of these methods are in the paper's table."
    return f"Pairs of methods that stand in the same order here and in the paper: {'; '.join(said)}."


def curves(table: pd.DataFrame, in_domain: str) -> str:
    """Of ``arms.arm_courses``: per arm, in domain and out of it, where accuracy begins, is highest, and ends."""
    courses: dict[str, list[str]] = {}
    for part in (in_domain, AVG_OOD):
        for arm, rows in table[table["part"] == part].groupby("arm", sort=False):
            courses.setdefault(str(arm), []).append(f"{part} {_course(rows.set_index('step')['value'])}")
    lines = [f"{arm}: {'; '.join(parts)}" for arm, parts in courses.items()]
    return "\n".join(lines) or "These runs kept no accuracy on the way (curve_steps)."


def released_curves(table: pd.DataFrame, in_domain: str = "MRI") -> str:
    """Of ``methods.released_curves``: the same of the authors' released runs, out of domain."""
    means = table[table["modality"] != in_domain].groupby(["run", "step"], sort=False)["accuracy_percent"].mean() / 100
    return "\n".join(
        f"{run}: {AVG_OOD} {_course(line.droplevel(0))}" for run, line in means.groupby(level="run", sort=False)
    )


def training(tables: Mapping[str, Sequence[pd.DataFrame]], titles: Mapping[str, str]) -> str:
    """Of training tables (``diagnosis.training_table``) per arm: each metric over the first and the last third."""
    said = []
    for metric, title in titles.items():
        lines = []
        for arm, runs in tables.items():
            thirds = [_thirds(run["step"], run[metric]) for run in runs if metric in run and run[metric].notna().any()]
            if thirds:
                cells = [
                    "–" if np.isnan(ends).all() else f"{np.nanmean(ends):.2f}" for ends in zip(*thirds, strict=True)
                ]
                lines.append(f"{arm + ' ' if len(tables) > 1 else ''}{cells[0]} → {cells[1]}")
        said += [f"{title}: {', '.join(lines)}"] if lines else []
    return "\n".join(["First third → last third of the steps:", *said]) if said else "Nothing was trained."


def _thirds(step: "pd.Series[float]", values: "pd.Series[float]") -> tuple[float, float]:
    """Means over the first and the last third of the steps; NaN where a third has no value."""
    third = (step.max() - step.min()) / 3
    return float(values[step <= step.min() + third].mean()), float(values[step >= step.max() - third].mean())


#: Of `training`, for a single run: what its four panels show first.
OF_ONE_RUN = {
    "kepo/accuracy": "right answers among own rollouts",
    "kepo/all_fail_rate": "groups where all failed",
    "kepo/gate_rate": "sequences past the gate",
    ACCEPTANCE: "hinted draws accepted",
}


def outcomes(rollouts: pd.DataFrame) -> str:
    """Of ``panels.outcomes_over_training``: right, wrong and unreadable answers, first and last third of the steps."""
    own = rollouts[~rollouts["injected"]]
    steps = own["step"].to_numpy(float)
    third = (steps.max() - steps.min()) / 3
    ends = (own[steps <= steps.min() + third], own[steps >= steps.max() - third])
    shares = [part["outcome"].value_counts(normalize=True) for part in ends]
    said = [f"{name} {100 * shares[0].get(name, 0.0):.0f} → {100 * shares[1].get(name, 0.0):.0f} %"
            for name in ("correct", "wrong") if any(name in share for share in shares)]  # fmt: skip
    other = [100 * share.drop(["correct", "wrong"], errors="ignore").sum() for share in shares]
    return f"First third → last third of the steps: {', '.join(said)}, unreadable {other[0]:.0f} → {other[1]:.0f} %."


def step(rollouts: pd.DataFrame) -> str:
    """Of ``panels.step_map``: what became of one step's groups."""
    trained = rollouts[~rollouts["replaced"]]
    firsts = trained.groupby("group").first()
    failed = int((firsts["exploration"].fillna("") != "").sum())
    return (
        f"Step {int(trained['step'].iloc[0])}: in {failed} of {len(firsts)} groups all had failed; "
        f"{int(trained['injected'].sum())} rollouts drawn with a hint were injected; the gate is open for "
        f"{int(trained['gate'].fillna(False).astype(bool).sum())} of {len(trained)} rollouts."
    )


def claims(table: pd.DataFrame) -> str:
    """Of ``claims.claims_table``: how many got which verdict."""
    if table.empty:
        return "None of the paper's claims can be put to these runs."
    counts = table["verdict"].value_counts()
    return f"Of {len(table)} claims: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}."


def _course(line: "pd.Series[float]") -> str:
    first, last, best = 100 * line.iloc[0], 100 * line.iloc[-1], 100 * line.max()
    return f"{first:.0f} → {last:.0f} % (highest {best:.0f}, at step {line.idxmax()})"


def _list(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
