"""A notebook executed into a run folder by papermill, and what its end means for folder and exit code."""

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError

from kepo_core.exit_codes import COMPLETED, FAILED, INTERRUPTED, REFUSED
from kepo_core.params import ParamError, Params, project_root, resolve
from kepo_core.study.provenance import notebook_digest
from kepo_core.study.report import write_report
from kepo_core.study.runs import Run

#: Errors that a notebook raises before it computes anything, because what it was given does not fit.
_INPUT_ERRORS = ("ParamError", "DataError")


def run_notebook(notebook: Path, params: Params, overrides: dict[str, Any]) -> int:
    """Allocate the folder, execute, render, write the status; print the folder. Returns the exit code.

    ``params`` are ``overrides`` over their parameter file, checked.
    """
    run = Run.allocate(params, owner="kepo run")
    run.remember(notebook=_from_root(notebook), notebook_sha256=notebook_digest(notebook))
    shown = _from_root(run.path)
    print(f"kepo: run folder {shown}", flush=True)
    given = {name: value for name, value in overrides.items() if value is not None}
    given |= {"params_file": params.params_file, "run_dir": shown}
    code = _execute_and_conclude(notebook, run, given, refusable=True)
    if code == REFUSED:
        shutil.rmtree(run.path)
    else:
        print(f"kepo: {run.status['state']}, everything about it is in {shown}", flush=True)
    return code


def resume_run(folder: str) -> int:
    """Execute the notebook of a run that ended early once more; training goes on from its newest checkpoint.

    Raises `ParamError` if ``folder`` holds no such run.
    """
    run = Run.open(folder)
    notebook = run.provenance.get("notebook")
    if not notebook or not resolve(notebook).is_file():
        raise ParamError(f"run_dir {folder} does not say which notebook made it, expected a folder of `kepo run`")
    run = Run.reopen(folder)
    shown = _from_root(run.path)
    print(f"kepo: going on in {shown}", flush=True)
    given = {"params_file": f"{shown}/params.yaml", "run_dir": shown}
    code = _execute_and_conclude(resolve(notebook), run, given, refusable=False)
    print(f"kepo: {run.status['state']}, everything about it is in {shown}", flush=True)
    return code


def _execute_and_conclude(notebook: Path, run: Run, given: dict[str, Any], *, refusable: bool) -> int:
    """Execute, then turn what happened into report, status and exit code.

    ``refusable``: parameters or data that do not fit end in REFUSED and no status, if nothing was computed yet.
    """
    try:
        _execute(notebook, run.path / "notebook.ipynb", given)
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
    except BaseException as error:  # not foreseen: the folder says so, and the traceback is shown
        run.fail(error)
        raise
    if run.headline is None:
        return _conclude(run, "failed", "the notebook ended before run.finish(headline)", FAILED)
    return _conclude(run, "completed", "", COMPLETED)


def _conclude(run: Run, state: Any, error: str, code: int) -> int:
    """Render what there is, then write the status, which comes last whatever happens to the report."""
    try:
        if (run.path / "notebook.ipynb").is_file():
            write_report(run, state, error)
    except (ValueError, OSError) as problem:
        state, code = ("failed", FAILED) if state == "completed" else (state, code)
        error = f"{error}; " * bool(error) + f"the report could not be rendered: {problem}"
    finally:
        run.conclude(state, error)
    if error:
        print(f"kepo: {run.status['error']}", file=sys.stderr)
    return code


def _execute(notebook: Path, output: Path, given: dict[str, Any]) -> None:
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
            _from_root(notebook),
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


def _from_root(path: Path) -> str:
    """A path as the run folder may keep it: from the project's root where it lies below it."""
    root = project_root()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
