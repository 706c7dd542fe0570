"""A study as one page: notebook 05 over the runs that have completed, rendered as a run's report is."""

from pathlib import Path

from papermill.exceptions import PapermillExecutionError

from kepo_core.errors import ParamError
from kepo_core.experiment import execution, experiment
from kepo_core.files import write_atomically
from kepo_core.pages import report
from kepo_core.params import from_root, project_root, resolve
from kepo_core.study import jobs, studies

#: Draws a study; with ``make_runs=False`` it trains nothing.
NOTEBOOK = "notebooks/05_figures.ipynb"


def write_study_report(file: str) -> Path:
    """Draw the study of ``file`` from its completed runs into ``results/studies/NAME``; returns its ``report.html``.

    Figures go into the folder ``figures`` beside it, as PNG and SVG. Nothing is run. Raises `ParamError` if the file is
    invalid, none of its runs has completed, or the notebook fails.
    """
    study = studies.read_study(file)
    runs = jobs.completed(study.runs, experiment.load_data(study.base).identity())
    if not runs:
        raise ParamError(
            f"none of the {len(study.runs)} runs of {file} has completed in {study.base.results_dir} with this code "
            f"and data: `kepo study run {file}` makes them"
        )
    study.folder.mkdir(parents=True, exist_ok=True)
    notebook = study.folder / "notebook.ipynb"
    try:
        given = {"study": from_root(resolve(file)), "make_runs": False}
        # In this folder: the notebook reads the file again, and names in it may be relative to here.
        execution.execute(project_root() / NOTEBOOK, notebook, given, Path.cwd())
    except PapermillExecutionError as error:
        raise ParamError(f"{NOTEBOOK} failed: {error.ename}: {error.evalue}; see {from_root(notebook)}") from error
    page = study.folder / "report.html"
    text = report.render(
        notebook,
        study.name,
        "study.html.j2",
        asked=study.runs,
        runs=runs,
        missing=[name for name in study.runs if name not in runs],
        file=resolve(file),
    )
    write_atomically(page, text)
    return page
