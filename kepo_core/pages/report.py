"""An executed notebook → one self-contained HTML page that is safe to open.

Models write what they like, ``<script>`` included, and notebooks show it. Plain outputs are escaped; rich ones pass
an allow-list that keeps tables and embedded pictures; the page carries no script at all, loads nothing from anywhere,
and forbids both to the browser. Code is folded; tables and pictures say what they are to those who cannot see them.
"""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import nh3
from nbconvert import HTMLExporter

from kepo_core.errors import ParamError
from kepo_core.files import write_atomically
from kepo_core.pages import shell
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.runs.summary import accuracies, changed_parameters

_TAGS = nh3.ALLOWED_TAGS | {"tfoot"}
_ATTRIBUTES = {**nh3.ALLOWED_ATTRIBUTES, "*": {"class", "id", "title"}}


def clean_html(text: str | bytes) -> str:
    """Rich output as the allow-list leaves it: tables and embedded pictures stay; scripts, styles and loads go."""
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
    """Pictures are embedded ones, and nothing else is: a link may lead out, a page may not load."""
    if tag == "img" and attribute == "src":
        return value if value.startswith("data:image/") else None
    return None if value.strip().lower().startswith("data:") else value


def render(notebook: Path, title: str, template: str = "report.html.j2", **values: Any) -> str:
    """The page for an executed notebook; ``values`` are for a ``template`` that extends that of reports.

    Raises `ParamError` if the file is no notebook.
    """
    try:
        cells = nbformat.read(notebook, as_version=4)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, nbformat.ValidationError) as error:
        raise ParamError(f"{notebook} cannot be read as a notebook: {str(error).splitlines()[0]}") from error
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
    """Render ``notebook.ipynb`` of a run folder into ``report.html`` beside it, with what the run is on top.

    The same folder gives the same page. Raises `ParamError` where there is no executed notebook.
    """
    notebook = run.path / "notebook.ipynb"
    if not notebook.is_file():
        raise ParamError(f"{run.path} has no notebook.ipynb, expected a run of `kepo run`: others keep their own")
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
    """Render any executed notebook, papermill's say, into an ``.html`` file beside it.

    Raises `ParamError` if the file is no notebook.
    """
    path = notebook.with_suffix(".html")
    write_atomically(path, render(notebook, notebook.stem))
    return path
