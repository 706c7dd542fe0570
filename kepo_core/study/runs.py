"""Run folders: one folder holds everything about one run, and its name says when, what and with which parameters.

Life of a folder. `Run.allocate` makes it (never over another one) with ``params.yaml``, ``provenance.json`` and a
``status.json`` that says ``running``. The notebook adds tables and figures and ends with `Run.finish`, which
stores the headline numbers. The last thing written is always ``status.json``:

- under ``kepo run`` the command owns the status: it renders the report first, then writes ``completed``, ``failed``
  (with the error's sentence) or ``interrupted``;
- in a bare papermill or Jupyter run the notebook owns it: `Run.finish` writes ``completed``, and a cell that raises
  writes ``failed`` (a later `Run.finish` of the mended notebook overrules it). A kernel cannot save its own notebook,
  so there is no ``notebook.ipynb`` and no ``report.html`` then.

A status that stays ``running`` although its process is gone means that the run was killed from outside.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pandas as pd

from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import ParamError, Params, project_root
from kepo_core.study import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Owner = Literal["kepo run", "notebook"]
State = Literal["running", "completed", "failed", "interrupted"]


@dataclass(frozen=True)
class Run:
    """One run folder. ``path`` is absolute; ``params`` are the resolved parameters."""

    path: Path
    params: Params

    @classmethod
    def allocate(cls, params: Params, *, owner: Owner = "notebook") -> Self:
        """Make a new folder for ``params``: ``params.run_dir`` where it is set, else a named one in ``results_dir``.

        Raises `ParamError` if ``run_dir`` exists already.
        """
        started = time.gmtime()
        if params.run_dir:
            path = project_root() / params.run_dir
            if path.exists():
                raise ParamError(f"run_dir {params.run_dir} exists already, and no run is ever overwritten")
            path.mkdir(parents=True)
        else:
            name = f"{time.strftime('%Y%m%dT%H%M%SZ', started)}-{params.method_name}-{params.hash}"
            path = _make_new(project_root() / params.results_dir, name)
        run = cls(path, params)
        write_atomically(path / "params.yaml", params.to_yaml())
        write_json(path / "provenance.json", provenance.collect(params))
        run._write_status("running", owner=owner, **_this_process(), started=_utc(started))
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing folder, for reading or for going on. Raises `ParamError` if it is none."""
        path = project_root() / path
        if not (path / "status.json").is_file():
            raise ParamError(f"run_dir {path} is no run folder: it has no status.json")
        return cls(path, Params.load(path / "params.yaml"))

    @classmethod
    def reopen(cls, path: str | Path) -> Self:
        """A run that ended early, set running again by the ``kepo`` command.

        Raises `ParamError` if it has completed, or if its process is still at work.
        """
        run = cls.open(path)
        status = run.status
        if status["state"] == "completed":
            raise ParamError(f"run_dir {path} holds a completed run, and no run is ever overwritten")
        if status["state"] == "running" and run.is_at_work:
            raise ParamError(f"run_dir {path} is at work in process {status['pid']}, expected a run that has ended")
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
            asked = {**run.params.to_dict(), "run_dir": "", "params_file": ""}
            given = {**params.to_dict(), "run_dir": "", "params_file": ""}
            if changed := [name for name in asked if asked[name] != given[name]]:
                raise ParamError(
                    f"{changed[0]} is {given[changed[0]]!r} in the notebook but {asked[changed[0]]!r} in its run "
                    "folder; parameter cells leave values to the parameter file (None)"
                )
        run.remember(hardware=provenance.hardware())
        return run

    # -- what a run leaves

    @property
    def provenance(self) -> dict[str, Any]:
        """``provenance.json`` as it is now."""
        found: dict[str, Any] = json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))
        return found

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
        partial = path.with_suffix(".partial")
        frame.to_parquet(partial, index=False)
        partial.replace(path)
        return path

    def save_figure(self, name: str, figure: "Figure") -> Path:
        """Write ``figures/<name>.png``."""
        path = self.path / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        return path

    # -- how a run ends

    @property
    def status(self) -> dict[str, Any]:
        """``status.json`` as it is now."""
        status: dict[str, Any] = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        return status

    @property
    def is_at_work(self) -> bool:
        """Whether the process that makes it still exists."""
        return provenance.is_alive(self.status["pid"], self.status.get("born", ""))

    @property
    def headline(self) -> dict[str, Any] | None:
        """What `finish` stored, or ``None`` before it."""
        path = self.path / "headline.json"
        if not path.is_file():
            return None
        headline: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return headline

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

        A completed run needs its checkpoints and half-done evaluations no more: they go.
        """
        try:
            rollouts = collect_rollouts(self.training_dir)
            if not rollouts.empty:
                self.write_table("rollouts", rollouts)
        except (OSError, ValueError) as problem:  # a process that was killed can leave half a file
            state, told = ("failed" if state == "completed" else state), f"{error}; " if error else ""
            error = f"{told}the rollouts could not be gathered: {problem}"
        first_line = error.strip().splitlines()[0] if error.strip() else ""
        old = {
            key: value for key, value in self.status.items() if key in ("owner", "pid", "born", "started", "resumed")
        }
        extra = {"headline": self.headline or {}, "finished": _utc(time.gmtime())}
        for checkpoint in self.training_dir.glob("checkpoint-*") if state == "completed" else ():
            shutil.rmtree(checkpoint)
        if state == "completed":
            shutil.rmtree(self.evaluation_dir, ignore_errors=True)
        self._write_status(state, **old, **extra, **({"error": first_line} if first_line else {}))

    def _write_status(self, state: State, **entries: Any) -> None:
        write_json(self.path / "status.json", {"state": state, **entries})

    def remember(self, **entries: Any) -> None:
        """Put entries into ``provenance.json``."""
        write_json(self.path / "provenance.json", {**self.provenance, **entries})


def write_atomically(path: Path, text: str) -> None:
    """Write the whole text or nothing: readers never see half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write one index
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Readable JSON, written atomically; numbers that are not finite become null."""
    write_atomically(path, json.dumps(_plain(data), indent=2, ensure_ascii=False) + "\n")


def json_line(row: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that are not finite become null."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Plain Python data: scalars of numpy and torch by their ``item``, non-finite numbers as ``None``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if not isinstance(value, str | int | float | None):
        if not callable(item := getattr(value, "item", None)):
            raise TypeError(f"{value!r} is no plain data and cannot be written as JSON")
        value = item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_new(parent: Path, name: str) -> Path:
    """A folder that did not exist before; a second run within the same second gets a suffix."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise ParamError(f"results_dir {parent} holds a thousand runs named {name}")


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
