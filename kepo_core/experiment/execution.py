"""A notebook executed into a run folder by papermill, and what its end means for folder and exit code."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError

from kepo_core.errors import ParamError
from kepo_core.exit_codes import COMPLETED, FAILED, INTERRUPTED, REFUSED
from kepo_core.pages.index import write_index
from kepo_core.pages.report import write_report
from kepo_core.params import Params, from_root, project_root, resolve
from kepo_core.params_io import tagged_cell
from kepo_core.runs.provenance import notebook_digest
from kepo_core.runs.run import Run

#: Errors that a notebook raises before it computes anything, because what it was given does not fit.
_INPUT_ERRORS = ("ParamError", "DataError")
#: Seconds between two signs of life; after ``run.SILENCE`` without one, other machines take a run for killed.
_SIGN_OF_LIFE = 30.0


def run_notebook(notebook: Path, params: Params, cell: Mapping[str, Any]) -> int:
    """Allocate the folder, execute, render, write the status; print the folder. Returns the exit code.

    ``params`` override what the notebook's own parameters ``cell`` sets.
    """
    run = Run.allocate(params, owner="kepo run")
    run.remember(notebook=from_root(notebook), notebook_sha256=notebook_digest(notebook))
    shown = from_root(run.path)
    print(f"kepo: run folder {shown}", flush=True)
    given = {**params.differing(cell), "run_dir": shown}
    return _make(notebook, run, given, refusable=True)


def resume_run(folder: str) -> int:
    """Execute the notebook of a run that ended early once more; training goes on from its newest checkpoint.

    Raises `ParamError` if ``folder`` holds no such run.
    """
    run = Run.open(folder)
    notebook = run.provenance.get("notebook")
    if not notebook or not resolve(notebook).is_file():
        raise ParamError(f"run_dir {folder} does not say which notebook made it, expected a folder of `kepo run`")
    run = Run.reopen(folder)
    shown = from_root(run.path)
    print(f"kepo: going on in {shown}", flush=True)
    given = {**run.params.differing(tagged_cell(resolve(notebook))), "run_dir": shown}
    return _make(resolve(notebook), run, given, refusable=False)


def _make(notebook: Path, run: Run, given: dict[str, Any], *, refusable: bool) -> int:
    """Execute and conclude, then say how it ended and what to do next. Returns the exit code.

    Where even the status cannot be written (a full disk, a folder that was deleted), none that looks like an end is.
    """
    shown = from_root(run.path)
    go_on = f"`kepo resume {shown}` goes on with it"
    try:
        with _signs_of_life(run):
            code = _execute_and_conclude(notebook, run, given, refusable=refusable)
        if code == REFUSED:
            shutil.rmtree(run.path)
            print(f"kepo: refused, {shown} is removed again", flush=True)
        else:
            state, next_step = run.status["state"], "" if code == COMPLETED else f"; {go_on}"
            print(f"kepo: {state}, everything about it is in {shown}{next_step}", flush=True)
    except KeyboardInterrupt:  # once more, while the folder was concluded
        _withdraw_report(run)
        print(f"kepo: interrupted before its status was written; {go_on}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ParamError) as problem:
        _withdraw_report(run)
        if (run.path / "status.json").is_file():
            print(f"kepo: its status could not be written ({problem}): make room, then {go_on}", file=sys.stderr)
        else:
            print(f"kepo: {shown} was deleted or moved while the run was made: start it anew", file=sys.stderr)
        return FAILED
    return code


@contextmanager
def _signs_of_life(run: Run) -> Iterator[None]:
    """Touches the run's status now and then: other machines see that somebody is at work (`Run.worker`)."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_SIGN_OF_LIFE):
            with suppress(OSError):  # the folder was deleted, or a shared disk is away for a moment
                os.utime(run.path / "status.json")

    threading.Thread(target=touch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _execute_and_conclude(notebook: Path, run: Run, given: dict[str, Any], *, refusable: bool) -> int:
    """Execute, then turn what happened into report, status and exit code.

    ``refusable``: parameters or data that do not fit end in REFUSED and no status, if nothing was computed yet.
    """
    try:
        execute(notebook, run.path / "notebook.ipynb", given)
    except KeyboardInterrupt:
        return _conclude(run, "interrupted", "stopped by the user", INTERRUPTED)
    except PapermillExecutionError as error:
        sentence = error.evalue.strip() or error.ename
        if refusable and error.ename in _INPUT_ERRORS and not (run.path / "metrics.jsonl").exists():
            print(f"kepo: {sentence}", file=sys.stderr)
            return REFUSED
        return _conclude(run, "failed", f"{error.ename}: {sentence}", FAILED)
    except DeadKernelError:
        return _conclude(run, "failed", "the notebook's process died, for want of memory perhaps", FAILED)
    except OSError as error:  # papermill could not write the notebook
        return _conclude(run, "failed", f"the notebook could not be written: {error}", FAILED)
    except BaseException as error:  # not foreseen: the folder says so, and the traceback is shown
        run.fail(error)
        raise
    if run.headline is None:
        return _conclude(run, "failed", "the notebook ended before run.finish(headline)", FAILED)
    return _conclude(run, "completed", "", COMPLETED)


def _conclude(run: Run, state: Any, error: str, code: int) -> int:
    """Render what there is, then write the status, which comes last whatever happens to the report.

    Returns ``code``, or FAILED if the run could not be concluded as ``state``. The index of all runs is brought up to
    date behind it.
    """
    try:
        if (run.path / "notebook.ipynb").is_file():
            write_report(run, state, error)
    except (ValueError, OSError) as problem:
        state, code = ("failed", FAILED) if state == "completed" else (state, code)
        error = f"{error}; " * bool(error) + f"the report could not be rendered: {problem}"
    finally:
        run.conclude(state, error)
    status = run.status
    if status["state"] != state:  # the end itself failed, on a full disk say
        _withdraw_report(run)
        code = FAILED
    if "error" in status:
        print(f"kepo: {status['error']}", file=sys.stderr)
    if run.path.parent == project_root() / run.params.results_dir:  # a run_dir of the user's may lie anywhere
        try:
            write_index(run.path.parent)
        except (ParamError, OSError) as problem:
            print(f"kepo: the index of runs was not written: {problem}", file=sys.stderr)
    return code


def _withdraw_report(run: Run) -> None:
    """It says an end that the run did not come to."""
    with suppress(OSError):  # where nothing can be written, perhaps nothing can be deleted
        (run.path / "report.html").unlink(missing_ok=True)


def execute(notebook: Path, output: Path, given: dict[str, Any]) -> None:
    """Papermill, with this interpreter as the kernel and the kernel's output on screen as it comes."""
    sockets = tempfile.TemporaryDirectory(prefix="kepo-")  # of this run alone: runs at the same time must not meet

    class ThisInterpreter(AsyncKernelManager):
        """No installed kernel is looked up, so none of another environment is found; sockets need no free port."""

        if sys.platform != "win32":
            transport = "ipc"
            ip = f"{sockets.name}/kernel"
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        execute_notebook(
            from_root(notebook),
            str(output),
            parameters=given,
            kernel_name="python3",
            language="python",
            kernel_manager_class=ThisInterpreter,
            coalesce_streams=True,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:  # else it was sent, and the folder is told now
            signal.signal(signal.SIGTERM, previous)
        sockets.cleanup()


def interrupt(signum: int, frame: object) -> NoReturn:
    """A signal handler: end as Ctrl-C does. Once is enough, so that what is written then is written whole."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt
