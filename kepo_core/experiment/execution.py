"""Execute a notebook into a run folder with papermill; set status and exit code by how it ends."""

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

    ``params`` override the notebook's parameters ``cell``.
    """
    run = Run.allocate(params, owner="kepo run", method=name_of(params))
    run.remember(notebook=from_root(notebook), notebook_sha256=notebook_digest(notebook))
    print(f"kepo: run folder {shown(run.path)}", flush=True)
    given = {**params.differing(cell), "run_dir": from_root(run.path)}
    return _make(notebook, run, given, refusable=True)


def resume_run(folder: str) -> int:
    """Execute the notebook of a run that ended early again; training continues from its newest checkpoint.

    Raises `ParamError` if ``folder`` is not such a run.
    """
    run = Run.open(folder)
    notebook = run.provenance.get("notebook")
    if not notebook or not at_root(notebook).is_file():
        raise ParamError(f"run_dir {folder} does not name its notebook, expected a folder of `kepo run`")
    cell = tagged_cell(at_root(notebook))
    run = Run.reopen(folder)
    print(f"kepo: resuming {shown(run.path)}", flush=True)
    given = {**run.params.differing(cell), "run_dir": from_root(run.path)}
    return _make(at_root(notebook), run, given, refusable=False)


def _make(notebook: Path, run: Run, given: dict[str, Any], *, refusable: bool) -> int:
    """Execute, write the status, and print it and the next step. Returns the exit code.

    If the status cannot be written (full disk, second Ctrl-C), it stays ``running``, and the run counts as killed.
    ``refusable``: invalid parameters or data return REFUSED and delete the folder, if nothing was computed yet.
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
            said = f"the status could not be written ({reason}): `kepo resume {folder}` resumes it"
        else:
            said = f"{folder} was deleted or moved during the run: start it again"
        print(f"kepo: {said}", file=sys.stderr)
        return INTERRUPTED if isinstance(problem, KeyboardInterrupt) else FAILED
    finally:
        run.release()
    _print_end(run, status)
    return {"completed": COMPLETED, "interrupted": INTERRUPTED}.get(status["state"], FAILED)


def _execute(notebook: Path, run: Run, given: dict[str, Any], *, refusable: bool) -> tuple[Any, str]:
    """Execute; returns the run's final state, or ``refused``, and the error's message."""
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
    except BaseException as error:  # unexpected: note it in the folder and show the traceback
        run.fail(error)
        raise
    if run.headline is None:
        return "failed", "the notebook ended before run.finish(headline)"
    return "completed", ""


def _print_end(run: Run, status: dict[str, Any]) -> None:
    """Write the index of runs, and print the run's state and how to resume it."""
    folder = shown(run.path)
    if "error" in status:
        print(f"kepo: {status['error']}", file=sys.stderr)
    if run.path.parent == at_root(run.params.results_dir):  # a run_dir may be anywhere
        _draw("the index of runs", lambda: write_index(run.path.parent))
    resume = f"; `kepo resume {folder}` resumes it" if run.can_be_resumed else ""
    print(f"kepo: {status['state']}, everything about it is in {folder}{resume}", flush=True)


def _write_report(run: Run, state: str, error: str) -> None:
    if (run.path / "notebook.ipynb").is_file():
        _draw("the report", lambda: write_report(run, state, error))


def _draw(page: str, write: Callable[[], object]) -> None:
    """Write a page; if that fails, print why: the run is unaffected, and ``kepo report`` writes the page again."""
    try:
        write()
    except (ValueError, OSError) as problem:
        print(f"kepo: {page} was not written: {problem}", file=sys.stderr)


def _is_no_warning_of_parameters(record: logging.LogRecord) -> bool:
    return "Passed unknown parameter" not in record.getMessage()


def _folder_for_sockets() -> tempfile.TemporaryDirectory[str]:
    """A new folder for this run's sockets only; in /tmp if $TMPDIR is too long."""
    folder = tempfile.TemporaryDirectory(prefix="kepo-")
    if not holds_sockets(folder.name):
        with suppress(OSError):  # TCP is used then
            return tempfile.TemporaryDirectory(prefix="kepo-", dir="/tmp")
    return folder


def execute(notebook: Path, output: Path, given: dict[str, Any], folder: Path | None = None) -> None:
    """Run papermill with this interpreter as the kernel; the kernel's output is printed at once.

    The kernel's working directory is ``folder``, by default the project's root, wherever the command was given: a
    resumed run finds the same files.
    """
    own = _folder_for_sockets()

    class ThisInterpreter(AsyncKernelManager):
        """Starts this interpreter, not an installed kernel, which may be of another environment; needs no free port."""

        connection_file = f"{own.name}/kernel.json"
        if sys.platform != "win32" and holds_sockets(own.name):
            transport = "ipc"
            ip = f"{own.name}/kernel"
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
            # Processes of the kernel (data loaders' workers) have sockets in TMPDIR, and would hang without room.
            env={"TMPDIR": own.name} if not holds_sockets(tempfile.gettempdir()) else {},
        )

    previous = signal.signal(signal.SIGTERM, interrupt)
    # Papermill warns of each parameter that the notebook's cell does not name; they are checked already.
    logger = logging.getLogger("papermill")
    logger.addFilter(_is_no_warning_of_parameters)
    try:
        with chdir(folder := folder or project_root()):
            execute_notebook(
                os.path.relpath(notebook, folder),  # papermill writes it into the executed notebook
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
        if signal.getsignal(signal.SIGTERM) is interrupt:  # else it arrived, and the status is written next
            signal.signal(signal.SIGTERM, previous)
        own.cleanup()


def interrupt(signum: int, frame: object) -> NoReturn:
    """A signal handler: end like Ctrl-C. Further signals are ignored, so files are written whole."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt
