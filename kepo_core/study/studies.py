"""A study file → runs (methods × values × seeds over one parameter file), and tables of their results.

```yaml
params: params/phantom.yaml        # optional parameter file (without it: the defaults)
methods: [grpo, kepo-tau1]         # names from the table of methods
compared_with: grpo                # the arm that all others are compared with
seeds: [0, 1, 2]
set: {curve_steps: 10}             # optional: parameters of all runs, over the parameter file
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

from kepo_core.analysis.arms import comparison_table, results_table
from kepo_core.analysis.claims import Key, Outcome, Outcomes, claims_table
from kepo_core.errors import ParamError
from kepo_core.experiment.methods import KEPO, method
from kepo_core.params import Params, at_root, checked, resolve
from kepo_core.params_io import read_yaml
from kepo_core.runs import shelf
from kepo_core.runs.run import Run
from kepo_core.study.paper_order import order_beside_paper

#: Parameters that decide which questions are asked; all runs of a study share them.
DATA = ("data_root", "data_columns", "data_seed", "split", "train_modality", "train_items", "eval_items", "eval_split",
        "items_file", "eval_samples")  # fmt: skip
_NEEDED = {"methods": list, "compared_with": str, "seeds": list}
_KEYS = {"params": str, **_NEEDED, "set": dict, "grid": dict, "students": list}


@dataclass(frozen=True)
class Study:
    """A study file's runs. An *arm* is a method with one combination of the grid's values."""

    name: str  # of its file, without the ending
    base: Params
    compared_with: str
    arms: dict[str, dict[Key, Params]] = field(default_factory=dict)  # name → (student, seed) → parameters

    @property
    def runs(self) -> dict[str, Params]:
        """Every run by its name: all arms of one seed before the next seed, so early tables compare arms."""
        keys = dict.fromkeys(key for runs in self.arms.values() for key in runs)
        return {self.run_name(arm, key): runs[key] for key in keys for arm, runs in self.arms.items()}

    @property
    def folder(self) -> Path:
        """The folder of its figures and its page."""
        return at_root(self.base.results_dir) / "studies" / self.name

    @property
    def processes(self) -> int:
        """The largest number of training processes of its runs."""
        return max(params.processes for params in self.runs.values())

    def run_name(self, arm: str, key: Key) -> str:
        """A run's name: its arm and seed, and its student if the study has several."""
        several = len({key[0] for runs in self.arms.values() for key in runs}) > 1
        return f"{arm} seed {key[1]}" + (f" of student {key[0] + 1}" if several else "")


def read_study(file: str | Path) -> Study:
    """Read and check a study file; every run's parameters are validated before anything runs.

    Raises ``ParamError`` naming the invalid entry of the file, or the invalid parameter.
    """
    path = resolve(file)
    given = read_yaml(path)
    for name, kind in _KEYS.items():
        if name not in given and name in _NEEDED:
            raise ParamError(f"{path.name} has no {name}, expected {', '.join(_NEEDED)}")
        if name in given and (not isinstance(given[name], kind) or not given[name]):
            raise ParamError(f"{name} in {path.name} is {given[name]!r}, expected a non-empty {kind.__name__}")
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
    """Refuse a parameter that is set twice, or where it has no effect."""
    places = ("seed", "run_dir", "results_dir")
    if fixed := [name for name in everywhere if name in (*KEPO, *places[:2])]:
        raise ParamError(f"set in {file} has {fixed[0]}, which methods and seeds decide: choose a method, or use grid")
    if fixed := [name for name in grid if name in (*DATA, *places)]:
        raise ParamError(f"grid in {file} has {fixed[0]}, which all runs of a study share: write it under set")
    for name, values in grid.items():
        checked(name, values[0], f"under grid in {file}")
    for number, pair in enumerate(students, start=1):
        if not isinstance(pair, dict) or set(pair) - {"student", "teacher"} or (len(students) > 1 and not pair):
            raise ParamError(f"students in {file}: entry {number} is {pair!r}, expected student and teacher")
        if twice := sorted(set(pair) & set(grid)):
            raise ParamError(f"{twice[0]} is under grid and under students in {file}, expected only one of them")


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


def outcomes(study: Study, runs: Mapping[str, Run]) -> dict[str, dict[Key, Outcome]]:
    """Results of the completed ``runs`` (by name): arm → run → answers and curve. Arms without any are skipped."""
    found: dict[str, dict[Key, Outcome]] = {}
    for arm, keys in study.arms.items():
        for key in keys:
            if run := runs.get(study.run_name(arm, key)):
                answers = list(shelf.read_answers(run).values())
                before = answers[0] if len(answers) > 1 else []
                found.setdefault(arm, {})[key] = Outcome(answers[-1], shelf.read_curve(run), before)
    return found


def population(found: Outcomes) -> str:
    """The population that intervals over the completed runs generalise to."""
    students = {key[0] for keys in found.values() for key in keys}
    if len(students) > 1:
        return f"other students like these {len(students)}"
    return "other seeds of the one pretrained student, not to other students"


def as_text(study: Study, runs: Mapping[str, Run], images: Mapping[str, str]) -> str:
    """Results of a study's completed runs (by name) as text: accuracies, differences, the paper's claims."""
    found, in_domain = outcomes(study, runs), study.base.train_modality
    lines = [
        f"Accuracy in per cent; intervals generalise to {population(found)}.",
        results_table(found, images, in_domain).to_string(),
        f"\nAgainst {study.compared_with}, in points",
        comparison_table(found, study.compared_with, images, in_domain).to_string(),
    ]
    table = claims_table(found, images, in_domain)
    if not table.empty:
        lines += ["\nThe paper's claims, out of distribution", table.to_string(index=False)]
    order = order_beside_paper(found, in_domain)
    if not order.empty:
        lines += ["\nThe order of the rows beside the paper's Table 1, Spearman's ρ over seeds", order.to_string()]
    return "\n".join(lines)
