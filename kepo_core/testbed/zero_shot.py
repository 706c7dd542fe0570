"""Is version 4's world in the paper's regime? Its models, before anything is trained, beside Table 1's zero-shot rows.

``python -m kepo_core.testbed.zero_shot FOLDER`` measures the models in FOLDER/student, FOLDER/middle and
FOLDER/teacher, as far as they are there, on validation pictures. Nothing here looks at a trained row.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kepo_core.analysis.statistics import AVG, AVG_OOD, accuracy_table, format_table
from kepo_core.data.phantom import ensure_phantom
from kepo_core.data.records import Answer
from kepo_core.experiment.evaluation import evaluate
from kepo_core.experiment.experiment import StudyData, load_data
from kepo_core.experiment.methods import paper_table
from kepo_core.experiment.models import load_model, load_processor
from kepo_core.params import Params
from kepo_core.testbed.calibration import Calibration, Measured, priors, table
from kepo_core.testbed.school import VERSION

#: Whose rows of Table 1 the models are meant to come near.
SIZES = {"student": "2B", "middle": "8B", "teacher": "32B"}
MODES = {"thinking": True, "non-thinking": False}
#: What `Calibration` measures under these names, and the range that it is meant to lie in here.
TARGETS = {
    "student, samples in the format": (0.60, 0.98),
    "MRI training groups of 8 all wrong": (0.15, 1.0),
    "hints that can be read": (0.90, 1.0),
    "draws accepted (hint+answer)": (0.20, 0.70),
    "draws accepted (hint)": (0.20, 0.70),
    "own hint − another's (hint)": (0.05, 1.0),
}
#: What is measured, and the size and mode of the paper's row that it is meant to come near.
ROWS = {f"{pupil}, {mode}": (size, mode) for pupil, size in SIZES.items() for mode in MODES}


def params_of(folder: Path, root: Path, items: int) -> Params:
    """Those of an evaluation of the student and the teacher in ``folder`` on validation pictures."""
    models = {name: str(folder / name) for name in ("student", "teacher") if (folder / name).is_dir()}
    return Params.load(overrides={"data_root": str(root), "eval_split": "validation", "eval_items": items, **models})


def ask(folder: Path, data: StudyData, params: Params) -> dict[str, list[Answer]]:
    """Greedy answers of every model in ``folder``, thinking and not, by the names of ``ROWS``."""
    answers = {}
    for pupil in SIZES:
        if not (folder / pupil).is_dir():
            continue
        source = str(folder / pupil)
        model, processor = load_model(source, pupil, trained=False), load_processor(source, pupil)
        for mode, thinking in MODES.items():
            answers[f"{pupil}, {mode}"] = evaluate(
                model,
                processor,
                data.test,
                thinking=thinking,
                max_tokens=params.eval_max_tokens,
                batch_size=params.eval_batch_size,
            )
    return answers


def _paper(name: str) -> Any:
    size, mode = ROWS[name]
    table = paper_table().loc["Qwen3-VL"]
    return table.loc[(size, mode)]  # a row


def beside_paper(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Every row of ``accuracies`` (per cent, with intervals) above the paper's row of the same size and mode."""
    ours, rows = format_table(accuracies), {}
    for name in map(str, ours.index):
        rows[name] = ours.loc[name]
        rows[f"  Qwen3-VL {', '.join(ROWS[name])}"] = _paper(name).reindex(ours.columns)
    return pd.DataFrame(rows).T


def levels(accuracies: pd.DataFrame) -> list[Measured]:
    """Averages and MRI, which are to lie within 4 and 6 points of the paper's; the spread between modalities.

    The spread is the standard deviation of the modalities' accuracies, to lie within half and one and a half of the
    paper's. It has no interval.
    """
    measured = []
    modalities = [name for name in accuracies.columns.unique(level=0) if name not in (AVG, AVG_OOD)]
    for name in map(str, accuracies.index):
        row, paper = accuracies.loc[name], _paper(name)
        for column, margin in ((AVG, 0.04), ("MRI", 0.06)):
            value, low, high, n = (float(row[column][number]) for number in ("accuracy", "low", "high", "n"))
            aim = float(paper[column]) / 100
            measured.append(Measured(f"{name}, {column}", value, low, high, int(n), (aim - margin, aim + margin)))
        spread = float(np.std([row[m]["accuracy"] for m in modalities]))
        aim = float(np.std([float(paper[m]) / 100 for m in modalities]))
        aims = (0.5 * aim, 1.5 * aim)
        measured.append(Measured(f"{name}, spread", spread, spread, spread, len(modalities), aims))
    return measured


def cliff(params: Params, data: StudyData, groups: int) -> list[Measured]:
    """Format, groups that fail whole, and what hints do, on MRI training questions."""
    calibration = Calibration(params, data, groups)
    samples = calibration.groups_of_samples()
    found = [*calibration.sampling(samples), *calibration.hints(samples)]
    return [replace(m, target=TARGETS.get(m.what, (0.0, 1.0))) for m in found]


def overlap(answers: Mapping[str, Sequence[Answer]]) -> pd.DataFrame:
    """For every two models that think, in per cent: how often both are wrong, how often they would be if errors fell
    independently; and how often they give the same letter where both are wrong.
    """
    rows = {}
    thinking = {name.split(",")[0]: given for name, given in answers.items() if name.endswith(", thinking")}
    for first, second in combinations(thinking, 2):
        one, two = (np.array([not a.correct for a in thinking[name]]) for name in (first, second))
        same = np.array([a.letter == b.letter for a, b in zip(thinking[first], thinking[second], strict=True)])
        both = one & two
        rows[f"{first} and {second}"] = {
            "both wrong": 100 * both.mean(),
            "both wrong, if independent": 100 * one.mean() * two.mean(),
            "same letter, where both are wrong": 100 * same[both].mean(),
        }
    return pd.DataFrame(rows).T.round(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="kepo_core.testbed.zero_shot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds the models that `kepo_core.testbed.school` wrote, by name")
    parser.add_argument("--items", type=int, default=300, help="validation questions per modality")
    parser.add_argument("--groups", type=int, default=300, help="MRI training questions on which groups are sampled")
    given = parser.parse_args(arguments)
    root = ensure_phantom(version=VERSION)
    params = params_of(given.folder, root, given.items)
    data = load_data(params)
    answers = ask(given.folder, data, params)
    accuracies = accuracy_table(answers, data.images, params.train_modality)
    found = levels(accuracies)
    if (given.folder / "student").is_dir() and (given.folder / "teacher").is_dir():
        found += cliff(params, data, given.groups)
    for part in (beside_paper(accuracies), table([*found, *priors(root)]), overlap(answers)):
        print(part.to_string(), end="\n\n")


if __name__ == "__main__":
    main()
