"""Run folders: one folder has everything about one run; its name has the time, the method and the parameters' hash.

Life of a folder. `Run.allocate` makes it (never over an existing one) with ``params.yaml``, ``provenance.json`` and a
``status.json`` with state ``running``. The notebook adds tables and figures and ends with `Run.finish`, which stores
the headline numbers. The last file written is always ``status.json``:

- under ``kepo run`` the command owns the status: it renders the report first, then writes ``completed``, ``failed``
  (with the error's message) or ``interrupted``;
- in a bare papermill or Jupyter run the notebook owns it: `Run.finish` writes ``completed``, and a cell that raises
  writes ``failed`` (a later `Run.finish` of the corrected notebook replaces it). A kernel cannot save its own notebook,
  so such a run has no ``notebook.ipynb`` and no ``report.html``.

The process that makes a run holds a lock on its ``.lock`` until the last status is written. The lock ends with the
process, however it ends: a status ``running`` without a lock means that the run was killed. Other machines see the lock
on every disk that shares locks, for example NFS, or Lustre mounted with ``flock``.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pandas as pd
from filelock import FileLock, Timeout

from kepo_core.errors import DataError, ParamError
from kepo_core.files import in_place_of, is_locked, json_line, locked, read_json, write_atomically, write_json
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import PLACES, Params, at_root
from kepo_core.params_io import read_yaml, short_hash
from kepo_core.runs import provenance

Owner = Literal["kepo run", "notebook"]
State = Literal["running", "completed", "failed", "interrupted"]

#: Errors of a run's parameters or data.
INPUT_ERRORS = (ParamError.__name__, DataError.__name__)
#: The file in a run's folder that its process locks.
_LOCK = ".lock"


def is_running(folder: Path) -> bool:
    """Whether a process is making the run in ``folder`` now, on this machine or on another that shares the disk."""
    return is_locked(folder / _LOCK)


@dataclass(frozen=True)
class Run:
    """One run folder. ``path`` is absolute; ``params`` are the resolved parameters.

    ``lock`` is held by the process that makes the run, at most as long as this object lives; readers have none.
    """

    path: Path
    params: Params
    lock: FileLock | None = field(default=None, repr=False, compare=False)

    @classmethod
    def allocate(cls, params: Params, *, owner: Owner = "notebook", method: str = "") -> Self:
        """Make a new folder for ``params``: ``params.run_dir`` if it is set, otherwise a named one in ``results_dir``.

        ``method`` is the run's name for its method, also in the folder's name; empty: ``params.method_name``. Raises
        `ParamError` if ``run_dir`` exists already, or if nothing can be written there; no folder is left then.
        """
        started, method = time.gmtime(), method or params.method_name
        path = _make_new(params, method, started)
        try:
            run = cls(path, params, locked(path / _LOCK))
            write_atomically(path / "params.yaml", params.to_yaml())
            write_json(path / "provenance.json", {"method": method, **provenance.collect(params)})
            run._write_status("running", owner=owner, pid=os.getpid(), started=_utc(started))
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise ParamError(f"results_dir {path.parent} cannot be written: {error.strerror}") from error
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing folder, for reading. Raises `ParamError` if it is not a run folder."""
        path = at_root(path)
        if not (path / "status.json").is_file():
            raise ParamError(f"run_dir {path} is not a run folder: it has no status.json")
        return cls(path, Params.of_run(path / "params.yaml"))

    @classmethod
    def reopen(cls, path: str | Path) -> Self:
        """Resume a run that ended early: set its status to ``running`` for the ``kepo`` command.

        Raises `ParamError` if it has completed, if a process is making it, or if its parameters were edited.
        """
        run = cls.open(path)
        try:
            run = replace(run, lock=locked(run.path / _LOCK))
        except Timeout as error:
            raise ParamError(f"run_dir {path} is made by {run.worker} now, expected a run that has ended") from error
        try:
            run._check_resumable()
            status = run.status
            resumed = [*status.get("resumed", []), _utc(time.gmtime())]
            run._write_status("running", owner="kepo run", pid=os.getpid(), started=status["started"], resumed=resumed)
        except BaseException:
            run.release()
            raise
        made_by = run.provenance["code"]
        if made_by.get("package") != provenance.package_digest():  # two versions of the code made it
            run.remember(code={**made_by, "package": f"{made_by.get('package')} and {provenance.package_digest()}"})
        return run

    def _check_resumable(self) -> None:
        """Raise `ParamError` for a run that has completed, or whose parameters were edited."""
        if self.status["state"] == "completed":
            raise ParamError(f"run_dir {self.path} is a completed run, and no run is ever overwritten")
        if self.is_edited:
            raise ParamError(
                f"params.yaml in {self.path} was edited since the run began: undo the edits, or start a new run with "
                f"kepo run {self.provenance.get('notebook', 'NOTEBOOK')} -f {self.path}/params.yaml"
            )

    @classmethod
    def for_notebook(cls, params: Params, method: str = "") -> Self:
        """The run folder of the calling notebook: the one that ``kepo run`` made, or a new one named by ``method``.

        Call it after data and models are loaded and checked: then a bad path leaves no folder behind.
        """
        if not params.run_dir or not at_root(params.run_dir).exists():
            run = cls.allocate(params, method=method)
            _mark_failing_cells(run)
        else:
            run = cls.open(params.run_dir)
            if run.status["state"] != "running":
                raise ParamError(f"run_dir {params.run_dir} is a finished run, and no run is ever overwritten")
            asked, given = ({**each.to_dict(), "run_dir": ""} for each in (run.params, params))
            if changed := [name for name in asked | given if asked.get(name) != given.get(name)]:
                raise ParamError(
                    f"{changed[0]} is {given.get(changed[0])!r} in the notebook but {asked.get(changed[0])!r} in its "
                    "run folder: remove the cell after the parameters cell that sets it"
                )
        run.remember(hardware=provenance.hardware())
        return run

    # -- what a run leaves

    @property
    def provenance(self) -> dict[str, Any]:
        """``provenance.json`` as it is now; `ParamError` if it cannot be read."""
        return read_json(self.path / "provenance.json")

    @property
    def method(self) -> str:
        """The run's method, as in its folder's name."""
        return str(self.provenance.get("method") or self.params.method_name)

    @property
    def training_dir(self) -> Path:
        """The trainer's folder; the rollouts are collected from here however the run ends."""
        return self.path / "training"

    @property
    def evaluation_dir(self) -> Path:
        """The folder of partial answers, until the run has completed."""
        return self.path / "evaluation"

    def write_table(self, table: str, frame: pd.DataFrame) -> Path:
        """Write ``<table>.parquet``, whole or not at all."""
        path = self.path / f"{table}.parquet"
        with in_place_of(path) as partial:
            frame.to_parquet(partial, index=False)
        return path

    # -- how a run ends

    @property
    def status(self) -> dict[str, Any]:
        """``status.json`` as it is now; `ParamError` if it cannot be read."""
        found = read_json(path := self.path / "status.json")
        kinds = [type(found.get(name)) for name in ("owner", "pid", "started")]
        if found.get("state") not in get_args(State) or kinds != [str, int, str]:
            raise ParamError(
                f"{path} is not a status, expected owner, pid, started and a state: {', '.join(get_args(State))}"
            )
        return found

    @property
    def state(self) -> str:
        """The status's state, or ``killed`` if that is ``running`` but no process is making the run."""
        killed = self.status["state"] == "running" and not is_running(self.path)
        state: str = self.status["state"]  # read again: it may have ended in between
        return "killed" if killed and state == "running" else state

    @property
    def worker(self) -> str:
        """The process that makes the run, in words."""
        return f"process {self.status['pid']}"

    @property
    def can_be_resumed(self) -> bool:
        """Whether `kepo resume` may complete it.

        It may not if the run's parameters or data were refused at its first start: they do not change. If a resumed run
        is refused, something outside of it has changed and can be repaired.
        """
        status = self.status
        refused = str(status.get("error", "")).startswith(tuple(f"{name}: " for name in INPUT_ERRORS))
        return status["state"] != "completed" and status["owner"] == "kepo run" and ("resumed" in status or not refused)

    @property
    def minutes(self) -> float:
        """Minutes from start to end, or until now, by the clock and including pauses."""
        status = self.status
        ended = datetime.fromisoformat(status["finished"]) if "finished" in status else datetime.now(UTC)
        return (ended - datetime.fromisoformat(status["started"])).total_seconds() / 60

    @property
    def is_edited(self) -> bool:
        """Whether ``params.yaml`` has other parameters than those that the run began with.

        New parameters of a newer package do not count as edits.
        """
        written = read_yaml(self.path / "params.yaml")
        as_written = short_hash({name: value for name, value in written.items() if name not in PLACES})
        return self.provenance.get("params_hash") not in (self.params.hash, as_written)

    @property
    def headline(self) -> dict[str, Any] | None:
        """The headline that `finish` stored, or ``None`` before it."""
        path = self.path / "headline.json"
        if not path.is_file():
            return None
        return read_json(path)

    def finish(self, headline: Mapping[str, Any]) -> None:
        """Store the headline numbers at the end of the notebook; in a bare run this also completes the status.

        Raises `ParamError` for numbers of another run, which a live notebook has if some of its cells were skipped.
        """
        if self.status["state"] == "completed":
            if json.loads(json_line(headline)) != self.headline:
                raise ParamError(f"{self.path.name} has completed with other numbers, and no run is ever overwritten")
            return
        if any(name.endswith(" after") for name in headline) and not (self.path / "predictions.parquet").is_file():
            raise ParamError(
                f"the headline has accuracies, but {self.path.name} has no predictions.parquet yet: execute the cells "
                "that evaluate its students"
            )
        write_json(self.path / "headline.json", dict(headline))
        if self.status["owner"] == "notebook":
            self.conclude("completed")

    def fail(self, error: BaseException | str) -> None:
        """Write the status of a failed run, with the error on one line."""
        self.conclude("failed", error=error if isinstance(error, str) else f"{type(error).__name__}: {error}")

    def conclude(
        self, state: State, error: str = "", render: Callable[[State, str], object] = lambda state, error: None
    ) -> None:
        """Collect the rollouts of training in ``rollouts.parquet``, then write the last status.

        ``render`` is called in between with the final state and error. A completed run's checkpoints and partial
        evaluations are deleted last: if the process is killed before, the run can be resumed.
        """
        try:
            rollouts = collect_rollouts(self.training_dir)
            if not rollouts.empty:
                self.write_table("rollouts", rollouts)
        except (OSError, ValueError) as problem:  # a process that was killed can leave half a file
            state = "failed" if state == "completed" else state
            error = f"{error}; " * bool(error) + f"the rollouts could not be collected: {problem}"
        render(state, error)
        kept = {name: value for name, value in self.status.items() if name in ("owner", "pid", "started", "resumed")}
        ended = {"headline": self.headline or {}, "finished": _utc(time.gmtime())}
        first_line = error.strip().partition("\n")[0]
        self._write_status(state, **kept, **ended, **({"error": first_line} if first_line else {}))
        if state == "completed":
            checkpoints = [*self.training_dir.glob("checkpoint-*"), *self.training_dir.glob("damaged-*")]
            for folder in (*checkpoints, self.training_dir / ".partial", self.evaluation_dir):
                shutil.rmtree(folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Release the lock: this process has stopped making the run."""
        if self.lock is not None:
            self.lock.release()

    def _write_status(self, state: State, **entries: Any) -> None:
        write_json(self.path / "status.json", {"state": state, **entries})

    def remember(self, **entries: Any) -> None:
        """Put entries into ``provenance.json``."""
        write_json(self.path / "provenance.json", {**self.provenance, **entries})


def _make_new(params: Params, method: str, started: time.struct_time) -> Path:
    """Make a folder: ``run_dir``, or a named one, with a numbered suffix if the name is taken in this second."""
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', started)}-{method}-{params.hash}"
    first = at_root(params.run_dir or f"{params.results_dir}/{name}")
    numbered = (first.with_name(f"{name}-{number}") for number in range(2, 1000) if not params.run_dir)
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        for path in (first, *numbered):
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise ParamError(f"results_dir {first.parent} cannot be written: {error.strerror}") from error
    if params.run_dir:
        raise ParamError(f"run_dir {params.run_dir} exists already, and no run is ever overwritten")
    raise ParamError(f"results_dir {first.parent} holds a thousand runs named {name}")


def _utc(moment: time.struct_time) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)


def _mark_failing_cells(run: Run) -> None:
    """In a live kernel, let a cell that raises write the failed status."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell: Any = get_ipython()  # type: ignore[no-untyped-call]
    if shell is None:
        return

    def after_cell(result: Any) -> None:
        error = result.error_before_exec or result.error_in_exec
        if error and run.status["state"] != "completed":  # a scratch cell below the last one may raise
            run.fail(error)

    register: Callable[[str, Callable[[Any], None]], None] = shell.events.register
    register("post_run_cell", after_cell)
