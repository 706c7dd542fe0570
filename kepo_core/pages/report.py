"""An executed notebook → one self-contained HTML page that is safe to open.

Models may write anything, ``<script>`` included, and notebooks show it. Plain outputs are escaped. Rich outputs pass an
allow-list that keeps tables and embedded pictures. The page has no script, loads nothing, and forbids both to the
browser. Code is folded; tables and pictures have labels for screen readers.

Results come first: a notebook tags the headings of sections that a reader needs before the others (`FIRST`).
"""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import nh3
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from kepo_core.errors import ParamError
from kepo_core.files import write_atomically
from kepo_core.pages import shell
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.runs.summary import accuracies, changed_parameters

#: Tags of the sections that a page shows first, in this order. A section is a cell that begins with "## " and the cells
#: below it.
FIRST = ("warnings", "result", "training", "rollouts")
_HOW = "## How it was made\n\nThe rest of the notebook, in the order in which it ran."

#: A line of tqdm's.
_BAR = re.compile(r"^.*\d+%\|[^|\n]*\| *\d+/\d+ \[.*\n?", re.MULTILINE)
_TAGS = nh3.ALLOWED_TAGS | {"tfoot"}
_ATTRIBUTES = {**nh3.ALLOWED_ATTRIBUTES, "*": {"class", "id", "title"}}


def clean_html(text: str | bytes) -> str:
    """Rich output after the allow-list: tables and embedded pictures stay; scripts, styles and loads go."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return nh3.clean(
        re.sub(r"(?<=\d,) (?=[-+.\d]+\]</td>)", "&nbsp;", text),  # an interval stays on one line
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=_without_loads,
        url_schemes={"http", "https", "mailto", "data"},
    )


def _without_loads(tag: str, attribute: str, value: str) -> str | None:
    """Only pictures may be embedded: a link may lead out, but the page loads nothing."""
    if tag == "img" and attribute == "src":
        return value if value.startswith("data:image/") else None
    return None if value.strip().lower().startswith("data:") else value


def arrange(notebook: NotebookNode) -> None:
    """Put the sections that are tagged as `FIRST` first, and drop empty outputs and progress bars that reached 100 %.

    A tagged section without outputs, as a run that failed leaves it, keeps its place.
    """
    sections: list[list[NotebookNode]] = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            sections.append([])
        sections[-1].append(cell)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_without_bars, cell.outputs) if not _is_empty(output)]
    start, rest = sections[0], sections[1:]
    first = sorted((section for section in rest if _rank(section) < len(FIRST)), key=_rank)
    if not first:
        return
    for section in rest:
        section[0].source = re.sub(r"^## \d+ · ", "## ", section[0].source)  # the numbers are of another order
    how = [new_markdown_cell(_HOW, id="how")]  # an id of its own: a random one would differ from page to page
    last = [section for section in rest if _rank(section) == len(FIRST)]
    notebook.cells = [cell for section in (*first, how, start, *last) for cell in section]


def _rank(section: list[NotebookNode]) -> int:
    tags = section[0].metadata.get("tags", []) if any(cell.get("outputs") for cell in section) else []
    return next((rank for rank, tag in enumerate(FIRST) if tag in tags), len(FIRST))


def _without_bars(output: NotebookNode) -> NotebookNode:
    if output.output_type == "stream":
        bars = _BAR.findall(output.text)
        if bars and "100%|" in bars[-1]:  # where work stopped, the bar says how far it was
            output.text = _BAR.sub("", output.text)
    return output


def _is_empty(output: NotebookNode) -> bool:
    if output.output_type == "stream":
        return not output.text.strip()
    return re.search(r"<tbody>\s*</tbody>", output.get("data", {}).get("text/html", "")) is not None


def render(notebook: Path, title: str, template: str = "report.html.j2", **values: Any) -> str:
    """The page for an executed notebook; ``values`` go to ``template``, which extends ``report.html.j2``.

    Raises `ParamError` if the file is not a notebook.
    """
    try:
        cells = nbformat.read(notebook, as_version=4)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, nbformat.ValidationError) as error:
        raise ParamError(f"{notebook} cannot be read as a notebook: {str(error).splitlines()[0]}") from error
    arrange(cells)
    exporter = HTMLExporter(
        raw_template=shell.source("notebook.html.j2"),
        sanitize_html=True,
        embed_images=True,
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    exporter.register_filter("clean_html", clean_html)
    return shell.render(template, title=title, body=exporter.from_notebook_node(cells)[0], **values)


def write_report(run: Run, state: str, error: str = "") -> Path:
    """Render ``notebook.ipynb`` of a run folder into ``report.html`` beside it; state and accuracies are on top.

    The same folder gives the same page. Raises `ParamError` if there is no executed notebook.
    """
    notebook = run.path / "notebook.ipynb"
    if not notebook.is_file():
        raise ParamError(f"{run.path} has no notebook.ipynb, expected a run of `kepo run`: other runs have no report")
    path = run.path / "report.html"
    text = (run.path / "params.yaml").read_text(encoding="utf-8")
    page = render(
        notebook,
        run.path.name,
        "run.html.j2",
        run=run,
        state=state,
        error=error,
        accuracies=accuracies(run.headline or {}),
        changed=changed_parameters(text),
        defaults=Params().to_dict(),
        parameters=text,
        provenance=json.dumps(run.provenance, indent=2, ensure_ascii=False),
    )
    write_atomically(path, page)
    return path


def write_page(notebook: Path) -> Path:
    """Render any executed notebook, for example papermill's, into an ``.html`` file beside it.

    Raises `ParamError` if the file is not a notebook.
    """
    path = notebook.with_suffix(".html")
    write_atomically(path, render(notebook, notebook.stem))
    return path
