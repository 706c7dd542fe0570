"""Reuse of runs: find the runs of a results folder by parameters, code and data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kepo_core.analysis.answers import from_table
from kepo_core.data.records import Answer
from kepo_core.errors import ParamError
from kepo_core.params import Params, at_root
from kepo_core.runs import provenance
from kepo_core.runs.run import Run


@dataclass(frozen=True)
class Origin:
    """What a run's results depend on besides parameters: this package, the notebook's code, and the data."""

    package: str
    notebook: str
    data: Mapping[str, Any]


def origin(notebook: Path, data: Mapping[str, Any]) -> Origin:
    """The origin of runs that ``notebook`` would make now on ``data`` (`StudyData.identity`)."""
    return Origin(provenance.package_digest(), provenance.notebook_digest(notebook), data)


def completed(params: Params, origin: Origin) -> Run | None:
    """The newest completed run of ``params`` and ``origin``."""
    return _newest(params, origin, lambda run: run.state == "completed" and "data" in run.provenance)


def broken_off(params: Params, origin: Origin) -> Run | None:
    """The newest run of ``params`` and ``origin`` that was interrupted or killed, and can be resumed."""
    left = ("interrupted", "killed")
    return _newest(params, origin, lambda run: run.state in left and run.status["owner"] == "kepo run")


def at_work(params: Params, origin: Origin) -> Run | None:
    """A run of ``params`` and ``origin`` that another process is making now."""
    return _newest(params, origin, lambda run: run.state == "running")


def failed(run: Run) -> str:
    """Why a run failed; "" if it did not fail, or if its folder was deleted."""
    try:
        status = run.status
    except ParamError:
        return ""
    return str(status.get("error") or "it failed") if status["state"] == "failed" else ""


def _newest(params: Params, origin: Origin, fits: Callable[[Run], bool]) -> Run | None:
    """The newest run that fits: names begin with the time, so it is the last one with the parameters' hash.

    A run that stopped before it read its data has not recorded them, and fits any data. Unreadable folders (deleted
    at this moment, for example) are skipped; `kepo runs list` shows them.
    """
    for path in sorted(at_root(params.results_dir).glob(f"*-{params.hash}*"), reverse=True):
        try:
            run = Run.open(path)
            found = run.provenance
            made = (found["code"].get("package"), found.get("notebook_sha256"), found.get("data", origin.data))
            if made == (origin.package, origin.notebook, origin.data) and run.params.hash == params.hash and fits(run):
                return run
        except (ParamError, OSError, ValueError, KeyError):
            continue
    return None


def read_answers(run: Run) -> dict[str, list[Answer]]:
    """A run's ``predictions.parquet``: model → its answers, in order; the last model is the trained one, if any."""
    return from_table(pd.read_parquet(run.path / "predictions.parquet"))


def read_curve(run: Run) -> dict[int, list[Answer]]:
    """A run's ``curve.parquet``: optimiser step → the answers after it; empty without ``curve_steps``."""
    path = run.path / "curve.parquet"
    return from_table(pd.read_parquet(path), "step") if path.exists() else {}
