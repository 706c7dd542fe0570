"""A study file → runs: methods × values × seeds over one parameter file, and the table that says what came of them.

```yaml
params: params/phantom.yaml        # all that is not said here
methods: [grpo, kepo-tau1]         # names from the table of methods
compared_with: grpo                # the one that all others are compared with
seeds: [0, 1, 2]
grid:                              # optional: every combination of these values, for every method
  learning_rate: [0.0001, 0.0003]
```
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kepo_core.data.records import Answer
from kepo_core.params import ParamError, Params, resolve
from kepo_core.params_io import read_yaml
from kepo_core.study.aggregate import (
    difference_over_runs_and_images,
    holm,
    mean_over_runs,
    probability_of_improvement,
    seeds_needed,
)
from kepo_core.study.methods import method
from kepo_core.study.statistics import AVG, AVG_OOD, accuracy_table

#: What decides which questions are asked; all runs of a study share them.
DATA = ("data_root", "data_seed", "split", "train_modality", "train_items", "eval_items", "eval_split", "items_file",
        "eval_samples")  # fmt: skip
_KEYS = {"params": str, "methods": list, "compared_with": str, "seeds": list, "grid": dict}


@dataclass(frozen=True)
class Study:
    """What a study file asks for. An *arm* is a method with one combination of the grid's values."""

    base: Params
    compared_with: str
    arms: dict[str, dict[int, Params]] = field(default_factory=dict)  # name → seed → parameters

    @property
    def runs(self) -> dict[str, Params]:
        """Every run by its name, "ARM seed N": all arms of one seed before the next, so that early tables compare."""
        seeds = dict.fromkeys(seed for runs in self.arms.values() for seed in runs)
        return {f"{arm} seed {seed}": runs[seed] for seed in seeds for arm, runs in self.arms.items()}


def read_study(file: str | Path) -> Study:
    """Read and check a study file; every run's parameters are validated before anything runs.

    Raises ``ParamError`` naming the file's entry, or the parameter, that does not fit.
    """
    path = resolve(file)
    given = read_yaml(path)
    for name, kind in _KEYS.items():
        if name not in given and name != "grid":
            raise ParamError(f"{path.name} has no {name}, expected {', '.join(_KEYS)} (grid may be left out)")
        if name in given and (not isinstance(given[name], kind) or not given[name]):
            raise ParamError(f"{name} in {path.name} is {given[name]!r}, expected a {kind.__name__} that is not empty")
    if unknown := sorted(set(given) - set(_KEYS)):
        raise ParamError(f"{unknown[0]} in {path.name} is unknown, expected {', '.join(_KEYS)}")
    base = Params.load(given["params"])
    grid: Mapping[str, Any] = given.get("grid", {})
    for name, values in {"seeds": given["seeds"], "methods": given["methods"], **grid}.items():
        if not isinstance(values, list) or not values or len(set(map(repr, values))) < len(values):
            raise ParamError(f"{name} in {path.name} is {values!r}, expected a list of different values")
    if fixed := [name for name in grid if name in (*DATA, "seed", "run_dir", "params_file", "results_dir")]:
        raise ParamError(
            f"grid in {path.name} has {fixed[0]}, which all runs of a study share: set it in {base.params_file}"
        )
    arms: dict[str, dict[int, Params]] = {}
    for entry in map(method, map(str, given["methods"])):
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            arm = ", ".join([entry.name, *(f"{name} {value}" for name, value in chosen.items())])
            changes = {**entry.overrides(base.replace(**chosen)), **chosen}
            arms[arm] = {seed: base.replace(**changes, seed=seed) for seed in given["seeds"]}
    if given["compared_with"] not in arms:
        raise ParamError(
            f"compared_with in {path.name} is {given['compared_with']!r}, expected one of {', '.join(arms)}"
        )
    return Study(base, given["compared_with"], arms)


Answers = Mapping[str, Mapping[int, Sequence[Answer]]]  # arm → seed → what the trained model answered


def results_table(answers: Answers, images: Mapping[str, str], in_domain: str) -> pd.DataFrame:
    """A row per arm, in per cent: in-domain accuracy and both averages, means over seeds with Student's t interval.

    The interval is that of other seeds of the same pretrained student on these very questions.
    """
    rows: dict[str, dict[str, object]] = {}
    for arm, runs in answers.items():
        table = accuracy_table({str(seed): given for seed, given in runs.items()}, images, in_domain)
        names = [name for name in (in_domain, AVG, AVG_OOD) if name in table.columns.unique(level=0)]
        rows[arm] = {"seeds": len(runs), **{name: str(mean_over_runs(table[name]["accuracy"])) for name in names}}
    return pd.DataFrame.from_dict(rows, orient="index")


def comparison_table(
    answers: Answers, compared_with: str, images: Mapping[str, str], confidence: float = 0.95
) -> pd.DataFrame:
    """A row per other arm: its difference from ``compared_with`` over the seeds that both have, in points.

    ``over seeds and questions``: ``difference_over_runs_and_images``. ``over seeds``: the paired differences of the
    seeds' averages with Student's t interval and test, p adjusted for the number of tests by Holm; no test with one
    seed, or with equal differences, whose spread cannot be told. ``beats it``: ``probability_of_improvement`` over
    modalities. ``seeds to tell``: ``seeds_needed`` for a difference as large and as spread as this one.
    """
    rows: dict[str, dict[str, object]] = {}
    p_values: dict[str, float] = {}
    for arm, runs in answers.items():
        seeds = [seed for seed in runs if seed in answers.get(compared_with, {})]
        if arm == compared_with or not seeds:
            continue
        order = answers[compared_with][seeds[0]]
        before, after = (_matrix([answers[name][seed] for seed in seeds], order) for name in (compared_with, arm))
        tasks = [answer.modality for answer in order]
        where = [images[answer.question_id] for answer in order]
        both = difference_over_runs_and_images(before, after, where, tasks, confidence)
        own = [[t == task for t in tasks] for task in dict.fromkeys(tasks)]
        theirs, ours = (np.stack([scores[:, of].mean(axis=1) for of in own], axis=1) for scores in (before, after))
        per_seed = (ours - theirs).mean(axis=1)
        spread = float(per_seed.std(ddof=1)) if len(seeds) > 1 else 0.0
        if spread > 1e-12:
            p_values[arm] = float(stats.ttest_1samp(per_seed, 0).pvalue)
        rows[arm] = {
            "seeds": len(seeds),
            "over seeds and questions": str(both) if len(seeds) > 1 else f"{both} (questions alone)",
            "over seeds": str(mean_over_runs(per_seed, confidence)),
            "p (t, Holm)": "–",
            "beats it": f"{probability_of_improvement(ours, theirs):.2f}",
            "seeds to tell": seeds_needed(spread, abs(both.value)) if spread > 1e-12 and both.value else "–",
        }
    for arm, p in zip(p_values, holm(list(p_values.values())), strict=True):
        rows[arm]["p (t, Holm)"] = f"{p:.2g}"
    return pd.DataFrame.from_dict(rows, orient="index")


def _matrix(runs: Sequence[Sequence[Answer]], order: Sequence[Answer]) -> np.ndarray:
    """Correctness (runs, items) in the order of ``order``'s questions and samples."""
    rows = []
    for given in runs:
        by_question = {(answer.question_id, answer.sample): float(answer.correct) for answer in given}
        keys = [(answer.question_id, answer.sample) for answer in order]
        if by_question.keys() != set(keys):
            raise ValueError("answers: two runs answered different questions, expected the same ones of all.")
        rows.append([by_question[key] for key in keys])
    return np.array(rows)
