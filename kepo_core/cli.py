"""``kepo run`` executes a notebook into a run folder, ``kepo resume`` resumes it, ``kepo study run`` makes many runs.

``kepo data check`` checks data, ``kepo check-teacher`` a served teacher. ``kepo runs`` lists runs, ``kepo report``
renders pages of them, ``kepo export`` makes a folder for the Hub, ``kepo plan`` says what a run takes of a GPU. Exit
codes: 0 completed, 1 failed (the folder says why; or a plan does not fit), 2 refused (a parameter or the data are
wrong; nothing is left behind), 130 interrupted.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kepo_core.arguments import parser
from kepo_core.errors import DataError, ParamError
from kepo_core.exit_codes import COMPLETED, FAILED, INTERRUPTED, REFUSED
from kepo_core.params import Params, at_root, checked, resolve
from kepo_core.params_io import tagged_cell
from kepo_core.paths import shown


def main(argv: Sequence[str] | None = None) -> int:
    """The ``kepo`` command; returns its exit code."""
    # jsonschema, which reads notebooks, would build a parser of IRIs for 2.6 s; without that package it knows no IRIs.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    arguments = parser((__doc__ or "").splitlines()[0]).parse_args(argv)
    try:
        code = _obey(arguments)
        sys.stdout.flush()  # a closed pipe raises here, not at the interpreter's end
        return code
    except (ParamError, DataError) as error:
        print(f"kepo: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # the reader closed the pipe, as `head` does: no message can reach it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print(f"kepo: {error}", file=sys.stderr)
        return FAILED


def _obey(arguments: argparse.Namespace) -> int:
    if arguments.command == "params":
        print(Params.load(arguments.file).to_yaml(), end="")
        return COMPLETED
    if arguments.command == "resume":
        from kepo_core.experiment.execution import resume_run

        return resume_run(_run_folder(arguments.run))
    if arguments.command == "data":
        params = Params.load(arguments.file, {"data_columns": arguments.columns or None})
        return check_data(arguments.path, arguments.strict, arguments.html, params, arguments.quick)
    if arguments.command == "report":
        return write_reports(arguments.what, arguments.index)
    if arguments.command == "export":
        return export_run(arguments.run, arguments.folder)
    if arguments.command == "study":
        return run_study(arguments.file, arguments.slots, arguments.cluster)
    if arguments.command == "runs":
        return look_at_runs(arguments)
    overrides = {name: parse_value(value) for name, value in arguments.parameter}
    if arguments.command == "check-teacher":
        return check_teacher(Params.load(arguments.file, overrides))
    if arguments.command == "plan":
        return plan_run(arguments, overrides)
    from kepo_core.study.jobs import NOTEBOOK

    return run_notebook(arguments.notebook or NOTEBOOK, arguments.file, overrides, arguments.method)


def method_overrides(name: str, base: Params, overrides: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a row of the table of methods over ``base``; ``overrides`` come last."""
    from kepo_core.experiment.methods import method

    return {**method(name).overrides(base), **overrides}


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


def run_notebook(notebook: str, file: str | None, overrides: dict[str, Any], method: str | None = None) -> int:
    """Check path and parameters, then execute the notebook into a new run folder. Returns the exit code.

    ``method``: a row of the table of methods.

    Raises `ParamError` before anything is written if the path or a parameter is wrong.
    """
    path = resolve(notebook)
    if not path.is_file():
        raise ParamError(f"notebook {notebook} does not exist")
    from kepo_core.runs.provenance import notebook_code

    if not any("run.finish(" in source for source in notebook_code(path)):
        raise ParamError(
            f"notebook {notebook} makes no run (none of its cells calls run.finish): papermill {notebook} out.ipynb "
            "executes it"
        )
    cell = tagged_cell(path)
    if method:
        base = Params.load(file, {"teacher": overrides.get("teacher")}, cell=cell)
        overrides = method_overrides(method, base, overrides)
    params = Params.load(file, overrides, cell=cell)
    from kepo_core.experiment import execution

    return execution.run_notebook(path, params, cell)


def check_data(path: str, strict: bool, page: str | None, params: Params, quick: bool) -> int:
    """Print what is in the data at ``path``, and write it to the HTML file ``page`` if one is named.

    Each question is checked as in a run of ``params``; with ``quick``, no picture is decoded. Raises ``DataError`` if
    the data cannot be read or, under ``strict``, for the first row that cannot.
    """
    from kepo_core.data.check import check
    from kepo_core.data.table_files import is_hub
    from kepo_core.files import write_atomically
    from kepo_core.pages import shell

    try_with = None
    if not quick:
        from kepo_core.experiment.askable import Askable

        try_with = partial(Askable, params)
    root = path if is_hub(path) else resolve(path)
    checked = check(root, strict, params.data_columns, params.follow_links, try_with)
    print(_printable(checked.as_text()))
    if page:
        write_atomically(Path(page), shell.render("data_check.html.j2", title="Data check", checked=checked))
    return COMPLETED


def write_reports(what: Sequence[str], results: str | None) -> int:
    """Render the pages of runs (folders), studies (files) and executed notebooks; without any, the index of runs.

    Prints what it wrote. Raises `ParamError` or ``DataError`` if there is nothing to render.
    """
    from kepo_core.pages.index import write_index
    from kepo_core.pages.report import write_page, write_report
    from kepo_core.runs.run import Run

    for name in what:
        if name.endswith((".yaml", ".yml")):
            from kepo_core.study.report import write_study_report

            page = write_study_report(name)
        elif name.endswith(".ipynb"):
            page = write_page(resolve(name))
        else:
            run = Run.open(_run_folder(name))
            page = write_report(run, run.status["state"], run.status.get("error", ""))
        print(f"kepo: wrote {page}")
    if results is not None or not what:
        print(f"kepo: wrote {write_index(_results(results))}")
    return COMPLETED


def export_run(name: str, folder: str | None) -> int:
    """Write a completed run as a folder for the Hugging Face Hub. Raises `ParamError` if that is impossible."""
    from kepo_core.pages.export import export
    from kepo_core.runs.run import Run

    run = Run.open(_run_folder(name))
    written = export(run, Path(folder) if folder else run.path / "export")
    print(f"kepo: wrote {written}; nothing was uploaded: `hf upload OWNER/NAME {written}` does it")
    return COMPLETED


def _run_folder(name: str) -> str:
    """The folder of a run, given by its path or by a name as in `kepo runs`."""
    from kepo_core.runs import listing

    return str(listing.find(name, _results(None)))


def _results(folder: str | None) -> Path:
    """The given results folder, or else the project's."""
    return resolve(folder) if folder else at_root(Params.load().results_dir)


def run_study(file: str, slots: int, cluster_file: str | None = None) -> int:
    """Make the runs of a study file that are not completed yet, several at a time; print the results of all.

    They run on this machine, or on the cluster that ``cluster_file`` describes. Raises `ParamError` or ``DataError``
    before anything runs if a file or the data are wrong.
    """
    from kepo_core.experiment import execution, experiment
    from kepo_core.study import jobs, studies
    from kepo_core.study.progress_table import ProgressTable

    study = studies.read_study(file)
    executor: jobs.Executor
    if cluster_file is None:
        executor = jobs.LocalExecutor(slots, study.processes)
    else:
        from kepo_core.study.cluster import Cluster  # only this needs submitit

        executor = Cluster(cluster_file, study.base.results_dir, slots)
    print(f"kepo: {len(study.runs)} runs, {executor.count} at a time", flush=True)
    for ending in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # it also interrupts the runs
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as under nohup
            signal.signal(ending, execution.interrupt)
    try:
        data = experiment.load_data(study.base)
        with ProgressTable(executor.count) as table:
            runs, failures = jobs.run_all(study.runs, data.identity(), executor, table)
    except KeyboardInterrupt:
        print("kepo: interrupted; the same command resumes the study", file=sys.stderr)
        return INTERRUPTED
    print(f"\n{studies.as_text(study, runs, data.images)}")
    print(f"\nkepo: `kepo report {file}` writes this as a page")
    for name, reason in failures.items():
        print(f"kepo: {name} failed: {reason}", file=sys.stderr)
    return FAILED if failures else COMPLETED


def plan_run(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print what a run would take on each GPU; 0 if it fits in one of the ways to run it, else 1.

    Raises `ParamError` for a parameter, a number of GPUs or a model that cannot be planned with.
    """
    if arguments.gpus is not None:
        overrides["processes"] = arguments.gpus
    params = Params.load(arguments.file, overrides)
    if arguments.prompt_tokens is not None and arguments.prompt_tokens < 1:
        raise ParamError(f"--prompt-tokens must be at least 1, got {arguments.prompt_tokens}")
    from kepo_core.plan import plan

    text, fits = plan.as_text(*plan.read(params, arguments.prompt_tokens, plan.gpu_bytes(arguments.gpu)))
    print(f"{arguments.file} on {text}")
    return COMPLETED if fits else FAILED


def check_teacher(params: Params) -> int:
    """Try the served teacher that ``params`` name, print a line per trial, and fail if one fails.

    Raises `ParamError` if they name none.
    """
    if not params.teacher_url:
        raise ParamError(
            "teacher_url is empty, expected the address of a served teacher: -p teacher_url and teacher_top_k"
        )
    from kepo_core.experiment import models, serving

    text, sound = serving.report(params, models.load_processor(params.student))
    print(_printable(text))
    return COMPLETED if sound else FAILED


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)


def look_at_runs(arguments: argparse.Namespace) -> int:
    """``kepo runs``: list, show or compare run folders.

    Raises `ParamError` for a name that does not belong to exactly one run, and for an unknown parameter.
    """
    from kepo_core.runs import listing

    results = _results(arguments.results)
    if arguments.action == "show":
        text = listing.show(listing.find(arguments.run, results))
    elif arguments.action == "compare":
        text = listing.comparison([listing.find(name, results) for name in arguments.run])
    else:
        values = {name: checked(name, parse_value(value)) for name, value in arguments.parameter}
        runs = listing.overview(results, arguments.state, arguments.method, values)
        rows = [listing.as_row(run) for run in runs]
        text = listing.as_text(runs) if runs else f"no runs in {shown(results)}"
        text = json.dumps(rows, indent=2, ensure_ascii=False) if arguments.json else text
    print(_printable(text))
    return COMPLETED


if __name__ == "__main__":
    sys.exit(main())
