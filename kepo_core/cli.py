"""``kepo run`` executes a notebook into a run folder, ``kepo resume`` goes on, ``kepo study run`` makes many runs.

``kepo data check`` looks at data. Exit codes: 0 completed, 1 failed (the folder says why), 2 refused (a parameter or
the data do not fit; nothing is left behind), 130 interrupted.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kepo_core.data.errors import DataError
from kepo_core.params import ParamError, Params, project_root, resolve

if TYPE_CHECKING:
    from kepo_core.study.runs import Run

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

#: Errors that a notebook raises before it computes anything, because what it was given does not fit.
_INPUT_ERRORS = ("ParamError", "DataError")


def main(argv: Sequence[str] | None = None) -> int:
    """The ``kepo`` command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "params":
            print(Params.load(arguments.file).to_yaml(), end="")
            return COMPLETED
        if arguments.command == "resume":
            return resume_run(arguments.run)
        if arguments.command == "data":
            return check_data(arguments.path, arguments.strict, arguments.html)
        if arguments.command == "study":
            return run_study(arguments.file, arguments.slots)
        overrides = {name: parse_value(value) for name, value in arguments.parameter}
        if arguments.method:
            overrides = method_overrides(arguments.method, arguments.file, overrides)
        return run_notebook(arguments.notebook, arguments.file, overrides)
    except (ParamError, DataError) as error:
        print(f"kepo: {error}", file=sys.stderr)
        return REFUSED


def method_overrides(name: str, file: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a row of the table of methods, under those that are given one by one."""
    from kepo_core.study.methods import method

    chosen = method(name)
    return {**chosen.overrides(Params.load(file, {"teacher": overrides.get("teacher")})), **overrides}


def parse_value(text: str) -> bool | int | float | str | None:
    """One ``-p`` value as papermill reads it: ``True``, ``False``, ``None``, a number, else a text."""
    words: dict[str, bool | None] = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def run_notebook(notebook: str | Path, file: str | Path | None, overrides: dict[str, Any]) -> int:
    """Validate, allocate the folder, execute, render, write the status; print the folder. Returns the exit code.

    Raises `ParamError` before anything is written if a parameter or the notebook's path is wrong.
    """
    path = resolve(notebook)
    if not path.is_file():
        raise ParamError(f"notebook {notebook} does not exist")
    file = file or overrides.get("params_file")
    params = Params.load(file, overrides)
    from kepo_core.study.provenance import (
        notebook_digest,  # what executes is imported once the parameters are known to fit
    )
    from kepo_core.study.runs import Run

    run = Run.allocate(params, owner="kepo run")
    run.remember(notebook=_from_root(path), notebook_sha256=notebook_digest(path))
    shown = _from_root(run.path)
    print(f"kepo: run folder {shown}", flush=True)
    given = {name: value for name, value in overrides.items() if value is not None}
    given |= {"params_file": params.params_file, "run_dir": shown}
    code = _execute_and_conclude(path, run, given, refusable=True)
    if code == REFUSED:
        shutil.rmtree(run.path)
    else:
        print(f"kepo: {run.status['state']}, everything about it is in {shown}", flush=True)
    return code


def resume_run(folder: str) -> int:
    """Execute the notebook of a run that ended early once more; training goes on from its newest checkpoint.

    Raises `ParamError` if ``folder`` holds no such run.
    """
    from kepo_core.study.runs import Run

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


def check_data(path: str, strict: bool, page: str | None) -> int:
    """Print what is in the data at ``path``, and write it to the HTML file ``page`` where one is named.

    Raises ``DataError`` if the data cannot be read at all or, under ``strict``, for the first row that cannot.
    """
    from kepo_core.data.check import check
    from kepo_core.study.runs import write_atomically

    checked = check(Path(path), strict)
    print(checked.as_text())
    if page:
        write_atomically(Path(page), checked.as_html())
    return COMPLETED


def run_study(file: str, slots: int) -> int:
    """Make the runs of a study file that have not completed yet, several at a time; print what came of all.

    Raises `ParamError` or ``DataError`` before anything runs if the file or the data do not fit.
    """
    from kepo_core.study import experiment, jobs, live, shelf, studies

    study = studies.read_study(file)
    places = jobs.slots(slots)
    print(f"kepo: {len(study.runs)} runs, {len(places)} at a time", flush=True)
    for ending in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # its runs are told, too
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as under nohup
            signal.signal(ending, _interrupt)
    try:
        data = experiment.load_data(study.base)
        runs, failures = jobs.run_all(study.runs, data.identity(), places, live.tell_job)
    except KeyboardInterrupt:
        print("kepo: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    answers: dict[str, dict[int, Any]] = {}
    for arm, seeds in study.arms.items():
        for seed in seeds:
            if (name := f"{arm} seed {seed}") in runs:
                answers.setdefault(arm, {})[seed] = list(shelf.read_answers(runs[name]).values())[-1]
    print(f"\n{studies.results_table(answers, data.images, study.base.train_modality).to_string()}")
    compared = studies.comparison_table(answers, study.compared_with, data.images)
    print(f"\nagainst {study.compared_with}, in points\n{compared.to_string()}")
    for name, reason in failures.items():
        print(f"kepo: {name} failed: {reason}", file=sys.stderr)
    return FAILED if failures else COMPLETED


def _execute_and_conclude(notebook: Path, run: "Run", given: dict[str, Any], *, refusable: bool) -> int:
    """Execute, then turn what happened into report, status and exit code.

    ``refusable``: parameters or data that do not fit end in REFUSED and no status, if nothing was computed yet.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

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


def _conclude(run: "Run", state: Any, error: str, code: int) -> int:
    """Render what there is, then write the status, which comes last whatever happens to the report."""
    from kepo_core.study.report import write_report

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
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from papermill import execute_notebook

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

    previous = signal.signal(signal.SIGTERM, _interrupt)
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
        signal.signal(signal.SIGTERM, previous)
        sockets.cleanup()


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _from_root(path: Path) -> str:
    """A path as the run folder may keep it: from the project's root where it lies below it."""
    root = project_root()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kepo", description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook into a new run folder")
    run.add_argument("notebook", help="a notebook with a cell tagged `parameters`")
    run.add_argument("-f", "--file", metavar="PARAMS_FILE", help="parameter file (default: params/phantom.yaml)")
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one parameter over the file's; repeatable",
    )
    run.add_argument("-m", "--method", metavar="NAME", help="a row of the README's table of methods")
    resume = commands.add_parser("resume", help="go on with a run that was interrupted, failed or killed")
    resume.add_argument("run", help="its folder")
    data = commands.add_parser("data", help="look at data").add_subparsers(dest="data_command", required=True)
    check = data.add_parser("check", help="say what is in a folder or zip of questions, and what was mended or dropped")
    check.add_argument("path", help="OmniMedVQA's folder or zip, or Med-R1's question files")
    check.add_argument("--strict", action="store_true", help="stop at the first row that would be dropped")
    check.add_argument("--html", metavar="FILE", help="write the tables as a page, too")
    study = commands.add_parser("study", help="many runs").add_subparsers(dest="study_command", required=True)
    many = study.add_parser("run", help="make the runs of a study file that have not completed yet")
    many.add_argument("file", help="a file such as params/study-small.yaml")
    many.add_argument("--slots", type=int, default=0, help="runs at a time (default: one on each GPU, or each core)")
    listing = commands.add_parser("params", help="print every parameter with its meaning, as a parameter file")
    listing.add_argument("-f", "--file", metavar="PARAMS_FILE", help="show this file's values")
    return parser


if __name__ == "__main__":
    sys.exit(main())
