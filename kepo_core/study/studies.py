"""A study file → runs: methods × values × seeds over one parameter file, and the table that says what came of them.

```yaml
params: params/phantom.yaml        # optional: what is not set here (without it: the defaults)
methods: [grpo, kepo-tau1]         # names from the table of methods
compared_with: grpo                # the one that all others are compared with
seeds: [0, 1, 2]
set: {curve_steps: 10}             # optional: of all runs, over the parameter file
grid:                              # optional: every combination of these values, for every method
  learning_rate: [0.0001, 0.0003]
students:                          # optional: several pretrained students, each with its teacher
  - {student: "models/seed1/student", teacher: "models/seed1/teacher"}
```
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kepo_core.analysis.aggregate import (
    Estimate,
    holm,
    interquartile_mean,
    mean_over_runs,
    mean_over_runs_and_images,
    probability_of_improvement,
    seeds_needed,
)
from kepo_core.analysis.answers import correctness
from kepo_core.analysis.claims import Outcome, claims_table
from kepo_core.analysis.statistics import AVG, AVG_OOD, accuracy_table
from kepo_core.data.records import MODALITIES, Answer
from kepo_core.errors import ParamError
from kepo_core.experiment.methods import KEPO, method
from kepo_core.params import Params, checked, project_root, resolve
from kepo_core.params_io import read_yaml
from kepo_core.runs import shelf
from kepo_core.runs.run import Run

#: What decides which questions are asked; all runs of a study share them.
DATA = ("data_root", "data_seed", "split", "train_modality", "train_items", "eval_items", "eval_split", "items_file",
        "eval_samples")  # fmt: skip
_NEEDED = {"methods": list, "compared_with": str, "seeds": list}
_KEYS = {"params": str, **_NEEDED, "set": dict, "grid": dict, "students": list}

#: A run within its arm: the number of the pretrained student it begins from, and its seed.
Key = tuple[int, int]


@dataclass(frozen=True)
class Study:
    """What a study file asks for. An *arm* is a method with one combination of the grid's values."""

    name: str  # its file's, without the ending
    base: Params
    compared_with: str
    arms: dict[str, dict[Key, Params]] = field(default_factory=dict)  # name → (student, seed) → parameters

    @property
    def runs(self) -> dict[str, Params]:
        """Every run by its name: all arms of one seed before the next, so that early tables compare."""
        keys = dict.fromkeys(key for runs in self.arms.values() for key in runs)
        return {self.run_name(arm, key): runs[key] for key in keys for arm, runs in self.arms.items()}

    @property
    def folder(self) -> Path:
        """Where its figures and its page go."""
        return project_root() / self.base.results_dir / "studies" / self.name

    @property
    def processes(self) -> int:
        """The most that any run trains in."""
        return max(params.processes for params in self.runs.values())

    def run_name(self, arm: str, key: Key) -> str:
        """What a run is called: its arm and seed, and its student where there are several."""
        several = len({key[0] for runs in self.arms.values() for key in runs}) > 1
        return f"{arm} seed {key[1]}" + (f" of student {key[0] + 1}" if several else "")


def read_study(file: str | Path) -> Study:
    """Read and check a study file; every run's parameters are validated before anything runs.

    Raises ``ParamError`` naming the file's entry, or the parameter, that does not fit.
    """
    path = resolve(file)
    given = read_yaml(path)
    for name, kind in _KEYS.items():
        if name not in given and name in _NEEDED:
            raise ParamError(f"{path.name} has no {name}, expected {', '.join(_NEEDED)}")
        if name in given and (not isinstance(given[name], kind) or not given[name]):
            raise ParamError(f"{name} in {path.name} is {given[name]!r}, expected a {kind.__name__} that is not empty")
    if unknown := sorted(set(given) - set(_KEYS)):
        raise ParamError(f"{unknown[0]} in {path.name} is unknown, expected {', '.join(_KEYS)}")
    base = Params.load(given.get("params"), given.get("set"))
    grid: dict[str, Any] = given.get("grid", {})
    students: list[dict[str, Any]] = given.get("students", [{}])
    _check_lists(path.name, {name: given[name] for name in ("seeds", "methods", "students") if name in given}, grid)
    _check_names(path.name, given.get("set", {}), grid, students)
    arms = _arms(base, list(map(str, given["methods"])), given["seeds"], grid, students)
    if given["compared_with"] not in arms:
        raise ParamError(
            f"compared_with in {path.name} is {given['compared_with']!r}, expected one of {', '.join(arms)}"
        )
    return Study(path.stem, base, given["compared_with"], arms)


def _check_lists(file: str, lists: Mapping[str, Any], grid: Mapping[str, Any]) -> None:
    for name, values in {**lists, **grid}.items():
        if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
            raise ParamError(f"{name} in {file} is {values!r}, expected a list of different values")


def _check_names(file: str, everywhere: Mapping[str, Any], grid: Mapping[str, Any], students: Sequence[Any]) -> None:
    """Nothing is said twice, or where it would have no effect."""
    places = ("seed", "run_dir", "results_dir")
    if fixed := [name for name in everywhere if name in (*KEPO, *places[:2])]:
        raise ParamError(f"set in {file} has {fixed[0]}, which methods and seeds decide: choose a method, or use grid")
    if fixed := [name for name in grid if name in (*DATA, *places)]:
        raise ParamError(f"grid in {file} has {fixed[0]}, which all runs of a study share: write it under set")
    for name, values in grid.items():
        checked(name, values[0], f" (under grid in {file})")
    for number, pair in enumerate(students, start=1):
        if not isinstance(pair, dict) or set(pair) - {"student", "teacher"} or (len(students) > 1 and not pair):
            raise ParamError(f"students in {file}: entry {number} is {pair!r}, expected student and teacher")
        if twice := sorted(set(pair) & set(grid)):
            raise ParamError(f"{twice[0]} stands under grid and under students in {file}, expected one of them")


def _arms(
    base: Params,
    methods: Sequence[str],
    seeds: Sequence[int],
    grid: Mapping[str, Any],
    students: Sequence[Mapping[str, Any]],
) -> dict[str, dict[Key, Params]]:
    arms: dict[str, dict[Key, Params]] = {}
    for entry, values in itertools.product(map(method, methods), itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        arm = arms.setdefault(", ".join([entry.name, *(f"{name} {value}" for name, value in chosen.items())]), {})
        for (number, pair), seed in itertools.product(enumerate(students), seeds):
            own = base.replace(**pair, **chosen, seed=seed)
            arm[number, seed] = own.replace(**{**entry.overrides(own), **chosen})
    return arms


Answers = Mapping[str, Mapping[Key, Sequence[Answer]]]  # arm → run → what the trained model answered


def results_table(answers: Answers, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """A row per arm, in per cent: in-domain accuracy, both averages and ``interquartile_mean`` over modalities.

    Means over seeds with Student's t interval: that of other seeds of the same pretrained student on these very
    questions. With several students their means are what counts, and the interval is that of other students.
    """
    rows: dict[str, dict[str, object]] = {}
    for arm, runs in answers.items():
        table = accuracy_table({str(key): given for key, given in runs.items()}, images, in_domain)
        accuracies = table.xs("accuracy", axis=1, level=1)
        names = [name for name in (in_domain, AVG, AVG_OOD) if name in accuracies]
        per_student = _by_student(accuracies.to_numpy(float), list(runs))
        columns = list(accuracies.columns)
        cells = {name: str(mean_over_runs(per_student[:, columns.index(name)])) for name in names}
        modalities = [i for i, name in enumerate(columns) if name not in (AVG, AVG_OOD)]
        rows[arm] = {"runs": len(runs), **cells, "IQM": str(interquartile_mean(per_student[:, modalities]))}
    return pd.DataFrame.from_dict(rows, orient="index")


def comparison_table(
    answers: Answers, compared_with: str, images: Mapping[str, str], confidence: float = 0.95
) -> pd.DataFrame:
    """A row per other arm: its difference from ``compared_with`` over the runs that both have, in points.

    ``over runs and questions``: ``mean_over_runs_and_images``. ``over runs``: the paired differences of the runs'
    averages (of the students' means, with several students) with Student's t interval and test, p adjusted for the
    number of tests by Holm; no test with one run, or with equal differences, whose spread cannot be told. ``beats it``:
    ``probability_of_improvement`` over modalities. ``runs to tell``: ``seeds_needed`` for a difference as large and as
    spread as this one.
    """
    rows: dict[str, dict[str, object]] = {}
    p_values: dict[str, float] = {}
    for arm, runs in answers.items():
        keys = [key for key in runs if key in answers.get(compared_with, {})]
        if arm == compared_with or not keys:
            continue
        order = answers[compared_with][keys[0]]
        before, after = (_matrix([answers[name][key] for key in keys], order) for name in (compared_with, arm))
        tasks = [answer.modality for answer in order]
        where = [images[answer.question_id] for answer in order]
        both = mean_over_runs_and_images(after - before, where, tasks, confidence, [key[0] for key in keys])
        own = [[t == task for t in tasks] for task in dict.fromkeys(tasks)]
        by_task = (np.stack([scores[:, of].mean(axis=1) for of in own], axis=1) for scores in (before, after))
        theirs, ours = (_by_student(scores, keys) for scores in by_task)
        change = (ours - theirs).mean(axis=1)
        over_runs = mean_over_runs(change, confidence)
        if not np.isnan(over_runs.p):
            p_values[arm] = over_runs.p
        deviation = float(change.std(ddof=1)) if len(change) > 1 else 0.0
        rows[arm] = {
            "runs": len(keys),
            "over runs and questions": str(both) if len(keys) > 1 else f"{both} (questions alone)",
            "over runs": str(over_runs),
            "p (t, Holm)": "–",
            "beats it (%)": str(probability_of_improvement(ours, theirs, confidence)),
            "runs to tell": _enough(deviation, abs(over_runs.value)),
        }
    for arm, p in zip(p_values, holm(list(p_values.values())), strict=True):
        rows[arm]["p (t, Holm)"] = f"{p:.2g}"
    return pd.DataFrame.from_dict(rows, orient="index")


def _enough(deviation: float, difference: float) -> str:
    if deviation <= 1e-12 or not difference:
        return "–"
    runs = seeds_needed(deviation, difference)
    return str(runs) if runs < 10_000 else "10,000 or more"


def differences(answers: Answers, compared_with: str, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """A row per other arm: its difference from ``compared_with`` in domain and out of it, by the runs that both have.

    Columns: (``in_domain`` or "Avg. (OOD)", one of ``difference``, ``low``, ``high``), as shares in [-1, 1];
    ``mean_over_runs_and_images``.
    """
    rows: dict[str, dict[tuple[str, str], float]] = {}
    for arm, runs in answers.items():
        keys = [key for key in runs if key in answers.get(compared_with, {})]
        if arm == compared_with or not keys:
            continue
        for part in (in_domain, AVG_OOD):
            order = [a for a in runs[keys[0]] if (a.modality == in_domain) == (part == in_domain)]
            if order:
                before = answers[compared_with]
                change = [correctness(runs[key], order) - correctness(before[key], order) for key in keys]
                e = _estimate(change, order, keys, images)
                cells = {(part, "difference"): e.value, (part, "low"): e.low, (part, "high"): e.high}
                rows.setdefault(arm, {}).update(cells)
    return pd.DataFrame.from_dict(rows, orient="index")


def accuracies(answers: Answers, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """``statistics.accuracy_table`` over several runs: a row per arm, intervals over runs and questions together.

    Columns are pairs (modality or average, one of ``accuracy``, ``low``, ``high``), in [0, 1] but for the intervals,
    which may reach beyond.
    """
    rows: dict[str, dict[tuple[str, str], float]] = {}
    for arm, runs in answers.items():
        everything = next(iter(runs.values()))
        present = [m for m in MODALITIES if any(a.modality == m for a in everything)]
        parts = {m: [m] for m in present} | {AVG: present, AVG_OOD: [m for m in present if m != in_domain]}
        for part, modalities in parts.items():
            order = [a for a in everything if a.modality in modalities]
            if order:
                e = _estimate([correctness(given, order) for given in runs.values()], order, list(runs), images)
                cells = {(part, "accuracy"): e.value, (part, "low"): e.low, (part, "high"): e.high}
                rows.setdefault(arm, {}).update(cells)
    return pd.DataFrame.from_dict(rows, orient="index")


def changes(found: Mapping[str, Mapping[Key, Outcome]], images: Mapping[str, str]) -> pd.DataFrame:
    """What training changed: `differences` from each run's own untrained student, per modality, of arms that train."""
    rows: dict[str, dict[tuple[str, str], float]] = {}
    for arm, runs in found.items():
        if not all(run.before for run in runs.values()):
            continue
        everything = next(iter(runs.values())).before
        for modality in [m for m in MODALITIES if any(a.modality == m for a in everything)]:
            order = [a for a in everything if a.modality == modality]
            change = [correctness(run.answers, order) - correctness(run.before, order) for run in runs.values()]
            e = _estimate(change, order, list(runs), images)
            cells = {(modality, "difference"): e.value, (modality, "low"): e.low, (modality, "high"): e.high}
            rows.setdefault(arm, {}).update(cells)
    return pd.DataFrame.from_dict(rows, orient="index")


def _estimate(
    values: Sequence[np.ndarray], order: Sequence[Answer], keys: Sequence[Key], images: Mapping[str, str]
) -> Estimate:
    """Of runs' ``values`` (items,) about the questions of ``order``, over runs (students, with several) and images."""
    where, tasks = [images[a.question_id] for a in order], [a.modality for a in order]
    return mean_over_runs_and_images(np.stack(values), where, tasks, students_R=[key[0] for key in keys])


def outcomes(study: Study, runs: Mapping[str, Run]) -> dict[str, dict[Key, Outcome]]:
    """What the completed ``runs`` (by name) left: arm → run → answers and curve. Arms without any are left out."""
    found: dict[str, dict[Key, Outcome]] = {}
    for arm, keys in study.arms.items():
        for key in keys:
            if run := runs.get(study.run_name(arm, key)):
                answers = list(shelf.read_answers(run).values())
                before = answers[0] if len(answers) > 1 else []
                found.setdefault(arm, {})[key] = Outcome(answers[-1], shelf.read_curve(run), before)
    return found


def answers_of(found: Mapping[str, Mapping[Key, Outcome]]) -> dict[str, dict[Key, Sequence[Answer]]]:
    """The trained models' answers alone."""
    return {arm: {key: outcome.answers for key, outcome in runs.items()} for arm, runs in found.items()}


def spoken_of(found: Mapping[str, Mapping[Key, Outcome]]) -> str:
    """Whom the intervals over runs speak of, as far as runs have completed."""
    students = {key[0] for keys in found.values() for key in keys}
    if len(students) > 1:
        return f"other students like these {len(students)}"
    return "other seeds of the one pretrained student, not of other students"


def as_text(study: Study, runs: Mapping[str, Run], images: Mapping[str, str]) -> str:
    """What came of a study's completed runs (by name), for reading: accuracies, differences, the paper's claims."""
    found, in_domain = outcomes(study, runs), study.base.train_modality
    answers = answers_of(found)
    lines = [
        f"Accuracy in per cent; intervals over runs speak of {spoken_of(found)}.",
        results_table(answers, images, in_domain).to_string(),
        f"\nAgainst {study.compared_with}, in points",
        comparison_table(answers, study.compared_with, images).to_string(),
    ]
    table = claims_table(found, images, in_domain)
    if not table.empty:
        lines += ["\nThe paper's claims, out of distribution", table.to_string(index=False)]
    return "\n".join(lines)


def _by_student(values_RM: np.ndarray, keys: Sequence[Key]) -> np.ndarray:
    """Rows averaged over the runs of each student, where there are several; else the rows as they are."""
    students = np.array([key[0] for key in keys])
    if len(set(students)) < 2:
        return values_RM
    return np.stack([values_RM[students == student].mean(axis=0) for student in sorted(set(students))])


def _matrix(runs: Sequence[Sequence[Answer]], order: Sequence[Answer]) -> np.ndarray:
    """Correctness (runs, items) in the order of ``order``'s questions and samples."""
    if any(len(given) != len(order) for given in runs):
        raise ValueError("answers: two runs answered different questions, expected the same ones of all.")
    return np.stack([correctness(given, order) for given in runs])
