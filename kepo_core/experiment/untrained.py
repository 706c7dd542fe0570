"""The untrained student's answers, shared by the runs of a results folder: a study asks it once, not once a run."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kepo_core.experiment.models import read_config, resolve
from kepo_core.experiment.study_data import StudyData
from kepo_core.files import in_place_of
from kepo_core.method.options import MethodOptions
from kepo_core.params import PLACES, Params, TrainingParams, at_root
from kepo_core.params_io import short_hash
from kepo_core.runs import provenance
from kepo_core.runs.run import Run

#: Parameters that no answer of the untrained student depends on; nor on ``seed``, if decoding is greedy.
_OTHERS = {
    *(field.name for owner in (MethodOptions, TrainingParams) for field in dataclasses.fields(owner)),
    *("method", "gkd_lambda", "hint_context", "train_items", "curve_steps", "curve_items"),
    *("teacher", "teacher_url", "teacher_top_k", "teacher_quantization"),
    *PLACES,
} - {"precision", "processes", "accelerate_config"}


@contextmanager
def shared(run: Run, data: StudyData, kept: Path) -> Iterator[None]:
    """Begin with the answers of an earlier run, and leave them to later ones.

    An earlier run's are copied to ``kept``, unless this run has begun to write that file. What ``kept`` holds in the
    end is copied for others.
    """
    file = shared_file(run, data)
    _copy(file, kept)
    yield
    _copy(kept, file)


def shared_file(run: Run, data: StudyData) -> Path:
    """Where the runs of ``results_dir`` keep these answers: the name follows from all that they depend on.

    That is the package, libraries and hardware, the student's files, the test questions, and every parameter of the
    evaluation.
    """
    params, made = run.params, run.provenance
    depends = {
        "asked": {name: value for name, value in params.to_dict().items() if name not in _OTHERS},
        "seed": params.seed if params.eval_temperature else 0,
        "made by": [made["code"]["package"], made["versions"], provenance.hardware()],
        "student": _files(params),
        "questions": data.identity()["test_sha256"],
    }
    return at_root(params.results_dir) / ".untrained" / f"{short_hash(depends)}.jsonl"


def _copy(source: Path, target: Path) -> None:
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with in_place_of(target) as partial:
            shutil.copyfile(source, partial)


def _files(params: Params) -> Any:
    """What tells the student's files from others: names, sizes and times in a folder; the commit of a Hub's model."""
    folder = Path(resolve(params.student, "student"))
    if not folder.is_dir():
        return getattr(read_config(params.student), "_commit_hash", None)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
