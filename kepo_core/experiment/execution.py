"""A notebook executed into a run folder by papermill, and what its end means for folder and exit code."""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any, NoReturn

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError

from kepo_core.errors import ParamError
from kepo_core.exit_codes import COMPLETED, FAILED, INTERRUPTED, REFUSED
from kepo_core.experiment.methods import name_of
from kepo_core.files import holds_sockets
from kepo_core.pages.index import write_index
from kepo_core.pages.report import write_report
from kepo_core.params import Params, at_root, from_root, project_root
from kepo_core.params_io import tagged_cell
from kepo_core.paths import shown
from kepo_core.runs.provenance import notebook_digest
from kepo_core.runs.run import INPUT_ERRORS, Run


def run_notebook(notebook: Path, params: Params, cell: Mapping[str, Any]) -> int:
    """Allocate the folder, execute, render, write the status; print the folder. Returns the exit code.

    ``params`` override what the notebook's own parameters ``cell`` sets.
    """
    run = Run.allocate(params, owner="kepo run", method=name_of(params))
    run.remember(notebook=from_root(notebook), notebook_sha256=notebook_digest(notebook))
    print(f"kepo: run folder {shown(run.path)}", flush=True)
    given = {**params.differing(cell), "run_dir": from_root(run.path)}
    return _make(notebook, run, given, refusable=True)


def resume_run(folder: str) -> int:
    """Execute the notebook of a run that ended early once more; training continues from its newest checkpoint.

    Raises `ParamError` if ``folder`` holds no such run.
    """
    run = Run.open(folder)
    notebook = run.provenance.get("notebook")
    if not notebook or not at_root(notebook).is_file():
        raise ParamError(f"run_dir {folder} does not say which notebook made it, expected a folder of `kepo run`")
    cell = tagged_cell(at_root(notebook))
    run = Run.reopen(folder)
    print(f"kepo: resuming {shown(run.path)}", flush=True)
    given = {**run.params.differing(cell), "run_dir": from_root(run.path)}
    return _make(at_root(notebook), run, given, refusable=False)


def _make(notebook: Path, run: Run, given: dict[str, Any], *, refusable: bool) -> int:
    """Execute, write how it ended, and print that and what to do next. Returns the exit code.

    Where no status can be written (a full disk, a second Ctrl-C) it stays ``running``, and the run reads as killed.
    ``refusable``: parameters or data that do not fit end in REFUSED and no folder, if nothing was computed yet.
    """
    folder = shown(run.path)
    try:
        state, error = _execute(notebook, run, given, refusable=refusable)
        if state == "refused":
            run.release()  # an open lock would keep the folder on some network disks
            shutil.rmtree(run.path)
            print(f"kepo: refused, {folder} is removed again", flush=True)
            print(f"kepo: {error}", file=sys.stderr)  # last: it is what a study says of this run
            return REFUSED
        run.conclude(state, error, lambda *end: _write_report(run, *end))
        status = run.status
    except (KeyboardInterrupt, OSError, ParamError) as problem:
        with suppress(OSError):
            (run.path / "report.html").unlink(missing_ok=True)  # its end was not written
        if (run.path / "status.json").is_file():
            reason = str(problem) or "interrupted"
            said = f"its status could not be written ({reason}): `kepo resume {folder}` resumes it, where there is room"
        else:
            said = f"{folder} was deleted or moved while the run was made: start it again"
        print(f"kepo: {said}", file=sys.stderr)
        return INTERRUPTED if isinstance(problem, KeyboardInterrupt) else FAILED
    finally:
        run.release()
    _print_end(run, status)
    return {"completed": COMPLETED, "interrupted": INTERRUPTED}.get(status["state"], FAILED)


def _execute(notebook: Path, run: Run, given: dict[str, Any], *, refusable: bool) -> tuple[Any, str]:
    """Execute; returns the state that the run has come to, or ``refused``, and the error's sentence."""
    try:
        execute(notebook, run.path / "notebook.ipynb", given)
    except KeyboardInterrupt:
        return "interrupted", "stopped by the user"
    except PapermillExecutionError as error:
        sentence = error.evalue.strip() or error.ename
        if refusable and error.ename in INPUT_ERRORS and not (run.path / "metrics.jsonl").exists():
            return "refused", sentence
        return "failed", f"{error.ename}: {sentence}"
    except DeadKernelError:
        return "failed", "the kernel died (out of memory?)"
    except OSError as error:  # papermill could not write the notebook
        return "failed", f"the notebook could not be written: {error}"
    except BaseException as error:  # not foreseen: the folder says so, and the traceback is shown
        run.fail(error)
        raise
    if run.headline is None:
        return "failed", "the notebook ended before run.finish(headline)"
    return "completed", ""


def _print_end(run: Run, status: dict[str, Any]) -> None:
    """Write the index of runs, and print how the run ended and how it is resumed."""
    folder = shown(run.path)
    if "error" in status:
        print(f"kepo: {status['error']}", file=sys.stderr)
    if run.path.parent == at_root(run.params.results_dir):  # a run_dir of the user's may lie anywhere
        _draw("the index of runs", lambda: write_index(run.path.parent))
    resume = f"; `kepo resume {folder}` resumes it" if run.can_be_resumed else ""
    print(f"kepo: {status['state']}, everything about it is in {folder}{resume}", flush=True)


def _write_report(run: Run, state: str, error: str) -> None:
    if (run.path / "notebook.ipynb").is_file():
        _draw("the report", lambda: write_report(run, state, error))


def _draw(page: str, write: Callable[[], object]) -> None:
    """Write a page; where that fails, print why: the run stays as it is, and ``kepo report`` writes it again."""
    try:
        write()
    except (ValueError, OSError) as problem:
        print(f"kepo: {page} was not written: {problem}", file=sys.stderr)


def _is_no_warning_of_parameters(record: logging.LogRecord) -> bool:
    return "Passed unknown parameter" not in record.getMessage()


def _folder_for_sockets() -> tempfile.TemporaryDirectory[str]:
    """A new folder for one run alone, as runs at the same time must not meet: in /tmp where $TMPDIR is too long."""
    folder = tempfile.TemporaryDirectory(prefix="kepo-")
    if not holds_sockets(folder.name):
        with suppress(OSError):  # then TCP has to do
            return tempfile.TemporaryDirectory(prefix="kepo-", dir="/tmp")
    return folder


def execute(notebook: Path, output: Path, given: dict[str, Any], folder: Path | None = None) -> None:
    """Papermill, with this interpreter as the kernel and the kernel's output on screen as it comes.

    The kernel works in ``folder``. By default that is the project's root, wherever the command was given: a resumed run
    finds what the run found.
    """
    own = _folder_for_sockets()

    class ThisInterpreter(AsyncKernelManager):
        """No installed kernel is looked up, so none of another environment is found; sockets need no free port."""

        connection_file = f"{own.name}/kernel.json"
        if sys.platform != "win32" and holds_sockets(own.name):
            transport = "ipc"
            ip = f"{own.name}/kernel"
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
            # What the kernel starts (data loaders' workers) has sockets in there, and would stand still without.
            env={"TMPDIR": own.name} if not holds_sockets(tempfile.gettempdir()) else {},
        )

    previous = signal.signal(signal.SIGTERM, interrupt)
    # It warns of each parameter that the notebook's cell does not name; here they have been checked.
    logger = logging.getLogger("papermill")
    logger.addFilter(_is_no_warning_of_parameters)
    try:
        with chdir(folder := folder or project_root()):
            execute_notebook(
                os.path.relpath(notebook, folder),  # as papermill notes it in the executed notebook
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
        logger.removeFilter(_is_no_warning_of_parameters)
        if signal.getsignal(signal.SIGTERM) is interrupt:  # else it was sent, and the folder is told now
            signal.signal(signal.SIGTERM, previous)
        own.cleanup()


def interrupt(signum: int, frame: object) -> NoReturn:
    """A signal handler: end as Ctrl-C does. Once is enough, so that what is written then is written whole."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt
