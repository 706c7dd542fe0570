"""Run folders: one folder holds everything about one run, and its name says when, what and with which parameters.

Life of a folder. `Run.allocate` makes it (never over another one) with ``params.yaml``, ``provenance.json`` and a
``status.json`` that says ``running``. The notebook adds tables and figures and ends with `Run.finish`, which
stores the headline numbers. The last thing written is always ``status.json``:

- under ``kepo run`` the command owns the status: it renders the report first, then writes ``completed``, ``failed``
  (with the error's sentence) or ``interrupted``;
- in a bare papermill or Jupyter run the notebook owns it: `Run.finish` writes ``completed``, and a cell that raises
  writes ``failed`` (a later `Run.finish` of the mended notebook overrules it). A kernel cannot save its own notebook,
  so there is no ``notebook.ipynb`` and no ``report.html`` then.

A status that stays ``running`` although its process is gone means that the run was killed from outside. For other
machines to know, the command touches ``status.json`` as long as it is at work.

A completed run has ``SHA256SUMS`` of all its files but ``status.json``: whatever is changed later shows.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pandas as pd

from kepo_core.errors import ParamError
from kepo_core.files import in_place_of, in_turn, read_json, write_atomically, write_json
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import PLACES, Params, project_root
from kepo_core.params_io import read_yaml, short_hash
from kepo_core.runs import checksums, provenance

Owner = Literal["kepo run", "notebook"]
State = Literal["running", "completed", "failed", "interrupted"]

#: Seconds without a sign of life after which a run of another machine counts as killed.
SILENCE = 600


@dataclass(frozen=True)
class Run:
    """One run folder. ``path`` is absolute; ``params`` are the resolved parameters."""

    path: Path
    params: Params

    @classmethod
    def allocate(cls, params: Params, *, owner: Owner = "notebook") -> Self:
        """Make a new folder for ``params``: ``params.run_dir`` where it is set, else a named one in ``results_dir``.

        Raises `ParamError` if ``run_dir`` exists already, or if nothing can be written there; then nothing is left.
        """
        started = time.gmtime()
        path = _make_new(params, started)
        run = cls(path, params)
        try:
            write_atomically(path / "params.yaml", params.to_yaml())
            write_json(path / "provenance.json", provenance.collect(params))
            run._write_status("running", owner=owner, **_this_process(), started=_utc(started))
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise ParamError(f"results_dir {path.parent} cannot be written: {error.strerror}") from error
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing folder, for reading or for going on. Raises `ParamError` if it is none."""
        path = project_root() / path
        if not (path / "status.json").is_file():
            raise ParamError(f"run_dir {path} is no run folder: it has no status.json")
        return cls(path, Params.of_run(path / "params.yaml"))

    @classmethod
    def reopen(cls, path: str | Path) -> Self:
        """A run that ended early, set running again by the ``kepo`` command.

        Raises `ParamError` if it has completed, if its process is still at work, or if its parameters were edited.
        """
        run = cls.open(path)
        with in_turn(run.path / "params.yaml"):
            status, state = run.status, run.state
            if state == "completed":
                raise ParamError(f"run_dir {path} holds a completed run, and no run is ever overwritten")
            if state == "running":
                raise ParamError(f"run_dir {path} is at work in {run.worker}, expected a run that has ended")
            if run.is_edited:
                raise ParamError(
                    f"params.yaml in {path} was edited since the run began: put it back, or start a new run with "
                    f"kepo run {run.provenance.get('notebook', 'NOTEBOOK')} -f {path}/params.yaml"
                )
            started, resumed = status["started"], [*status.get("resumed", []), _utc(time.gmtime())]
            run._write_status("running", owner="kepo run", **_this_process(), started=started, resumed=resumed)
        made_by = run.provenance["code"]
        if made_by.get("package") != provenance.package_digest():  # it is a run of neither code alone
            run.remember(code={**made_by, "package": f"{made_by.get('package')} and {provenance.package_digest()}"})
        return run

    @classmethod
    def for_notebook(cls, params: Params) -> Self:
        """The folder of the notebook that calls this: the one that ``kepo run`` made, else a new one.

        Call it after data and models are loaded and checked, so that a bad path leaves no folder behind.
        """
        if not params.run_dir or not (project_root() / params.run_dir).exists():
            run = cls.allocate(params)
            _mark_failing_cells(run)
        else:
            run = cls.open(params.run_dir)
            if run.status["state"] != "running":
                raise ParamError(f"run_dir {params.run_dir} holds a finished run, and no run is ever overwritten")
            asked, given = ({**each.to_dict(), "run_dir": ""} for each in (run.params, params))
            if changed := [name for name in asked | given if asked.get(name) != given.get(name)]:
                raise ParamError(
                    f"{changed[0]} is {given.get(changed[0])!r} in the notebook but {asked.get(changed[0])!r} in its "
                    "run folder: a cell after the parameters cell sets it"
                )
        run.remember(hardware=provenance.hardware())
        return run

    # -- what a run leaves

    @property
    def provenance(self) -> dict[str, Any]:
        """``provenance.json`` as it is now; `ParamError` if it cannot be read."""
        return read_json(self.path / "provenance.json")

    @property
    def training_dir(self) -> Path:
        """Where the trainer works; its rollouts come from here however the run ends."""
        return self.path / "training"

    @property
    def evaluation_dir(self) -> Path:
        """Where answers are kept as they come, until the run has completed."""
        return self.path / "evaluation"

    def write_table(self, table: str, frame: pd.DataFrame) -> Path:
        """Write ``<table>.parquet`` at once."""
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
                f"{path} is no status, expected owner, pid, started and one of {', '.join(get_args(State))}"
            )
        return found

    @property
    def state(self) -> str:
        """The status's state, or ``killed`` where that says running and nobody is at work."""
        killed = self.status["state"] == "running" and not self.is_at_work
        state: str = self.status["state"]  # read again: it may have ended in between
        return "killed" if killed and state == "running" else state

    @property
    def is_at_work(self) -> bool:
        """Whether the process that makes it still exists, as far as can be told."""
        return bool(self.worker)

    @property
    def worker(self) -> str:
        """Who makes it, in words; "" where nobody does any more.

        Processes of this machine are looked up. Of others, and of this one before it was started anew, the age of
        ``status.json`` tells: `SILENCE`.
        """
        status = self.status
        pid, born, here = status["pid"], str(status.get("born", "")), provenance.machine()
        if not born or not here or born.rpartition("/")[0] == here:
            return f"process {pid}" if provenance.is_alive(pid, born) else ""
        silent = time.time() - (self.path / "status.json").stat().st_mtime
        if silent >= SILENCE:
            return ""
        return (
            "a process of another machine, or of this one before it was restarted (its last sign of life is "
            f"{max(0, silent) / 60:.0f} minutes old, and after {SILENCE // 60} it counts as killed)"
        )

    @property
    def is_edited(self) -> bool:
        """Whether ``params.yaml`` no longer holds the parameters that the run began with.

        Its values count as they stand there, too: a package that has got new parameters since edits nothing.
        """
        written = read_yaml(self.path / "params.yaml")
        as_written = short_hash({name: value for name, value in written.items() if name not in PLACES})
        return self.provenance.get("params_hash") not in (self.params.hash, as_written)

    @property
    def leftovers(self) -> list[Path]:
        """What serves to go on with a run, and goes when it has completed: checkpoints and half-done evaluations."""
        training = self.training_dir
        found = [*sorted(training.glob("checkpoint-*")), training / ".partial", self.evaluation_dir]
        return [path for path in found if path.exists()]

    @property
    def unsealed(self) -> list[Path]:
        """What ``SHA256SUMS`` leaves out: the status, which is written after it, and `leftovers`."""
        return [self.path / "status.json", *self.leftovers]

    @property
    def headline(self) -> dict[str, Any] | None:
        """What `finish` stored, or ``None`` before it."""
        path = self.path / "headline.json"
        if not path.is_file():
            return None
        return read_json(path)

    def finish(self, headline: Mapping[str, Any]) -> None:
        """The notebook's last act: store its headline numbers; in a bare run this also completes the status."""
        write_json(self.path / "headline.json", dict(headline))
        if self.status["owner"] == "notebook":
            self.conclude("completed")

    def fail(self, error: BaseException | str) -> None:
        """Write the status of a failed run, with the error as one sentence."""
        self.conclude("failed", error=error if isinstance(error, str) else f"{type(error).__name__}: {error}")

    def conclude(self, state: State, error: str = "") -> None:
        """Gather what training wrote batch by batch into ``rollouts.parquet``, then write the last status.

        A completed run gets its ``SHA256SUMS`` before that, and loses its `leftovers` after it: if it is killed in
        between, it can still be gone on with.
        """
        what = "the rollouts could not be gathered"
        try:
            rollouts = collect_rollouts(self.training_dir)
            if not rollouts.empty:
                self.write_table("rollouts", rollouts)
            if state == "completed":
                what = f"{checksums.NAME} could not be written"
                found = checksums.digests(self.path, self.unsealed)
                write_atomically(self.path / checksums.NAME, checksums.to_text(found))
        except (OSError, ValueError) as problem:  # a process that was killed can leave half a file
            state, told = ("failed" if state == "completed" else state), f"{error}; " if error else ""
            error = f"{told}{what}: {problem}"
        if state != "completed":
            (self.path / checksums.NAME).unlink(missing_ok=True)  # a notebook can fail after it had completed
        first_line = error.strip().splitlines()[0] if error.strip() else ""
        old = {
            key: value for key, value in self.status.items() if key in ("owner", "pid", "born", "started", "resumed")
        }
        extra = {"headline": self.headline or {}, "finished": _utc(time.gmtime())}
        self._write_status(state, **old, **extra, **({"error": first_line} if first_line else {}))
        for folder in self.leftovers if state == "completed" else ():
            shutil.rmtree(folder, ignore_errors=True)

    def _write_status(self, state: State, **entries: Any) -> None:
        write_json(self.path / "status.json", {"state": state, **entries})

    def remember(self, **entries: Any) -> None:
        """Put entries into ``provenance.json``."""
        write_json(self.path / "provenance.json", {**self.provenance, **entries})


def _make_new(params: Params, started: time.struct_time) -> Path:
    """A folder that did not exist before: ``run_dir``, or a named one; a second of the same second gets a suffix."""
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', started)}-{params.method_name}-{params.hash}"
    first = project_root() / (params.run_dir or f"{params.results_dir}/{name}")
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


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "born": provenance.birth(os.getpid())}


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
        if error := result.error_before_exec or result.error_in_exec:
            run.fail(error)

    register: Callable[[str, Callable[[Any], None]], None] = shell.events.register
    register("post_run_cell", after_cell)
