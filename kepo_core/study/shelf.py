"""The shelf: what the runs of a results folder have computed already, found by parameters, code and data."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from kepo_core.data.records import Answer, AnswerOutcome
from kepo_core.params import Params, project_root
from kepo_core.study import provenance
from kepo_core.study.runs import Run


def completed(params: Params, notebook: Path, data: dict[str, Any]) -> Run | None:
    """The newest run that ``notebook`` completed with ``params``, this code and ``data`` (`StudyData.identity`)."""
    return _newest(params, notebook, lambda run: run.status["state"] == "completed", data)


def broken_off(params: Params, notebook: Path) -> Run | None:
    """The newest run of these that was interrupted or killed, and so can be gone on with."""

    def left(run: Run) -> bool:
        state = run.status["state"]
        return run.status["owner"] == "kepo run" and (state == "interrupted" or (state == "running" and _gone(run)))

    return _newest(params, notebook, left)


def at_work(params: Params, notebook: Path) -> Run | None:
    """A run of these that another process computes right now."""
    return _newest(params, notebook, lambda run: run.status["state"] == "running" and not _gone(run))


def _gone(run: Run) -> bool:
    return not provenance.is_alive(run.status["pid"])


def _newest(params: Params, notebook: Path, fits: Any, data: dict[str, Any] | None = None) -> Run | None:
    """Names begin with the time, so the last of those that end in the parameters' hash is the newest."""
    for path in sorted((project_root() / params.results_dir).glob(f"*-{params.hash}*"), reverse=True):
        if not (path / "status.json").is_file():
            continue
        run = Run.open(path)
        origin = run.provenance
        same = (
            run.params.hash == params.hash
            and origin["code"].get("package") == provenance.package_digest()
            and origin.get("notebook_sha256") == provenance.file_digest(notebook)
            and (data is None or origin.get("data") == data)
        )
        if same and fits(run):
            return run
    return None


def read_answers(run: Run) -> dict[str, list[Answer]]:
    """A run's ``predictions.parquet``: model → its answers, in order; the last model is the one that came of it."""
    table = pd.read_parquet(run.path / "predictions.parquet")
    names = [field.name for field in fields(Answer)]
    answers: dict[str, list[Answer]] = {}
    for row in table.to_dict("records"):
        row["outcome"] = AnswerOutcome(row["outcome"])
        answers.setdefault(str(row["model"]), []).append(Answer(**{str(name): row[name] for name in names}))
    return answers


def minutes(run: Run) -> float:
    """From the run's start to its end by the clock, pauses included."""
    started, finished = (pd.Timestamp(run.status[name]) for name in ("started", "finished"))
    return float((finished - started).total_seconds() / 60)
