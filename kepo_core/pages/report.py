"""An executed notebook → one self-contained HTML page that is safe to open.

Models write what they like, ``<script>`` included, and notebooks show it. Plain outputs are escaped; rich ones pass
an allow-list that keeps tables and embedded pictures; the page carries no script at all, loads nothing from anywhere,
and forbids both to the browser. Code is folded; tables and pictures say what they are to those who cannot see them.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import nh3
from nbconvert import HTMLExporter

from kepo_core.errors import ParamError
from kepo_core.files import write_atomically
from kepo_core.pages import gallery, shell
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.runs.summary import accuracies, changed_parameters

_TAGS = nh3.ALLOWED_TAGS | {"tfoot"}
_ATTRIBUTES = {**nh3.ALLOWED_ATTRIBUTES, "*": {"class", "id", "title"}}

_STYLE = """
.output_stderr pre { color: var(--muted); }
.output_error pre { background: var(--error); }
.output_png img, .output_svg img { background: #fff; }
.rich > div, .rich > p { max-width: 100%; }
.caption { color: var(--muted); max-width: 60rem; margin-top: .25rem; }
nav ul { columns: 16rem; padding-left: 1.2rem; margin: .5rem 0; }
"""

# nbconvert's own page shows code in full and gives neither tables nor pictures a name.
_TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{% block input_group -%}
<details class="code"><summary>Code, {{ cell.source.splitlines() | length }} lines</summary>
<pre>{{ cell.source | escape_html }}</pre></details>
{%- endblock input_group %}
{% block data_html scoped -%}
<div class="rich scroll"{% if '<table' in output.data['text/html'] %} tabindex="0" role="group"
 aria-label="{{ output.metadata.get('label', '') | escape_html }}"{% endif %}>
{{ output.data['text/html'] | clean_html }}
</div>
{%- endblock data_html %}
{% block data_svg scoped -%}
<div class="output_svg"><img alt="{{ output.metadata.get('alt', '') | escape_html }}"
 src="data:image/svg+xml;base64,{{ output.data['image/svg+xml'] | text_base64 | escape_html }}"></div>
{%- endblock data_svg %}
"""


def clean_html(text: str | bytes) -> str:
    """Rich output as the allow-list leaves it: tables and embedded pictures stay; scripts, styles and loads go.

    Headers of tables get their scope before the list is applied, so that nothing is added to what it let through.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return nh3.clean(
        _with_scopes(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=_without_loads,
        url_schemes={"http", "https", "mailto", "data"},
    )


def _with_scopes(text: str) -> str:
    """Headers in a table's head are those of columns, others of rows; an empty one is no header.

    An interval stays on one line, under its number where there is no room.
    """
    text = re.sub(r"(<td>[-+.\d]+ \[[-+.\d]+,) ([-+.\d]+\]</td>)", r"\1&nbsp;\2", text)
    text = re.sub(r"<th((?:\s[^<>]*)?)>(?:\s|&nbsp;)*</th>", r"<td\1></td>", text)
    parts = re.split(r"(<thead\b.*?</thead>)", text, flags=re.DOTALL)
    for i, part in enumerate(parts):
        wide = re.sub(r'<th(?=\s[^<>]*colspan="(?!1"))', '<th scope="colgroup"', part) if i % 2 else part
        parts[i] = re.sub(r"<th(?=[\s>])(?! scope=)", f'<th scope="{"col" if i % 2 else "row"}"', wide)
    return "".join(parts)


def _without_loads(tag: str, attribute: str, value: str) -> str | None:
    """Pictures are embedded ones, and nothing else is: a link may lead out, a page may not load."""
    if tag == "img" and attribute == "src":
        return value if value.startswith("data:image/") else None
    return None if value.strip().lower().startswith("data:") else value


def render(notebook: Path, title: str, head: str = "") -> str:
    """The page for an executed notebook; ``head`` is trusted HTML that stands above it, the page's ``h1`` in it.

    Raises `ParamError` if the file is no notebook.
    """
    try:
        cells = nbformat.read(notebook, as_version=4)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, nbformat.ValidationError) as error:
        raise ParamError(f"{notebook} cannot be read as a notebook: {str(error).splitlines()[0]}") from error
    contents = _name_parts(cells)
    exporter = HTMLExporter(raw_template=_TEMPLATE, sanitize_html=True, embed_images=True, exclude_anchor_links=True,
                            exclude_input_prompt=True, exclude_output_prompt=True)  # fmt: skip
    exporter.register_filter("clean_html", clean_html)
    body, _ = exporter.from_notebook_node(cells)
    return shell.page(title, f"<main>\n{head}\n{contents}\n{body}\n</main>", style=_STYLE + gallery.STYLE)


def _name_parts(notebook: nbformat.NotebookNode) -> str:
    """Give headings a place to jump to and outputs the name of theirs; the table of contents.

    Headings move down one level, under the page's own. A picture is told by ``alt`` in its metadata
    (`figures.show`); else it goes, as tables do, by the heading that it stands under.
    """
    entries: list[str] = []
    heading, fenced = "", False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            lines = cell.source.splitlines()
            for i, line in enumerate(lines):
                fenced ^= line.startswith("```")
                if not fenced and (found := re.match(r"(#{1,5}) +(.+)", line)):
                    heading = re.sub(r"[`*]", "", found[2])
                    entries.append(f'<li><a href="#part-{len(entries) + 1}">{html.escape(heading)}</a></li>')
                    lines[i] = f'#{found[1]} <span id="part-{len(entries)}"></span>{found[2]}'
            cell.source = "\n".join(lines)
        for output in cell.get("outputs", []):
            if output.output_type in ("display_data", "execute_result"):
                where = f"under the heading “{heading}”"
                output.metadata |= {"alt": output.metadata.get("alt", f"Figure {where}"), "label": f"Table {where}"}
    return f'<nav aria-label="Contents"><ul>{"".join(entries)}</ul></nav>' if entries else ""


def write_report(run: Run, state: str, error: str = "") -> Path:
    """Render ``notebook.ipynb`` of a run folder into ``report.html`` beside it, with what the run is on top.

    The same folder gives the same page. Raises `ParamError` where there is no executed notebook.
    """
    notebook = run.path / "notebook.ipynb"
    if not notebook.is_file():
        raise ParamError(f"{run.path} has no notebook.ipynb, expected a run of `kepo run`: others keep their own")
    path = run.path / "report.html"
    write_atomically(path, render(notebook, run.path.name, _head(run, state, error)))
    return path


def write_page(notebook: Path) -> Path:
    """Render any executed notebook, papermill's say, into an ``.html`` file beside it.

    Raises `ParamError` if the file is no notebook.
    """
    path = notebook.with_suffix(".html")
    write_atomically(path, render(notebook, notebook.stem, f"<h1>{html.escape(notebook.stem)}</h1>"))
    return path


def _head(run: Run, state: str, error: str) -> str:
    """Name, end, accuracies, and what made the run: parameters that differ from defaults, the others folded."""
    text = (run.path / "params.yaml").read_text(encoding="utf-8")
    changed, defaults = changed_parameters(text), Params().to_dict()
    rows = [(name, value, defaults.get(name, "")) for name, value in changed.items()]
    numbers = [(row.name, row.change, row.difference) for row in accuracies(run.headline or {})]
    what = f"{run.method}, seed {run.params.seed}, begun {run.status['started']}"
    parts = [
        f"<h1>{html.escape(run.path.name)}</h1>",
        f"<p><strong>{html.escape(state)}</strong>{': ' + html.escape(error) if error else ''}</p>",
        f"<p>{html.escape(what)}</p>",
        table("Accuracies", ("accuracy", "before → after", "difference (points), 95 % interval"), numbers),
        table("Parameters that differ from the defaults", ("parameter", "here", "default"), rows)
        or "<p>All parameters have their default values.</p>",
        folded("All parameters", text),
        folded("Provenance: code, versions, data, hardware", json.dumps(run.provenance, indent=2, ensure_ascii=False)),
    ]
    return "\n".join(filter(None, parts))


def table(caption: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A small table of texts, the first column its rows' headers; "" without rows. All cells are escaped."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(first))}</th>'
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<table class="texts"><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def folded(summary: str, text: str) -> str:
    """A text that opens on a click, escaped."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
