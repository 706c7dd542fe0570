"""An executed notebook → one self-contained HTML page that is safe to open.

Models write what they like, ``<script>`` included, and notebooks show it. Plain outputs are escaped; rich ones pass
an allow-list that keeps tables and embedded pictures; the page carries no script at all, loads nothing from anywhere,
and forbids both to the browser.
"""

import html
from pathlib import Path

import nbformat
import nh3
from nbconvert import HTMLExporter

from kepo_core.study import gallery
from kepo_core.study.runs import Run, write_atomically

_TAGS = nh3.ALLOWED_TAGS | {"tfoot"}
_ATTRIBUTES = {**nh3.ALLOWED_ATTRIBUTES, "*": {"class", "id", "title"}}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{head}
{body}
</main>
</body>
</html>
"""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1, h2, h3 { line-height: 1.2; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #888; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; white-space: pre-wrap; font-size: .82rem; background: #f6f6f6; padding: .5rem .75rem; }
.output_stderr pre { color: #555; background: #fafafa; }
.output_error pre { background: #fdecea; }
.anchor-link, .prompt { display: none; }
"""


def clean_html(text: str | bytes) -> str:
    """Rich output as the allow-list leaves it: tables and embedded pictures stay; scripts, styles and loads go."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return nh3.clean(
        text,
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


def render(notebook: Path, title: str, head: str = "") -> str:
    """The page for an executed notebook; ``head`` is trusted HTML that stands above it."""
    exporter = HTMLExporter(
        template_name="basic", sanitize_html=True, embed_images=True, exclude_input=True, exclude_anchor_links=True
    )
    exporter.register_filter("clean_html", clean_html)
    body, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4))
    return _PAGE.format(title=html.escape(title), style=_STYLE + gallery.STYLE, head=head, body=body)


def write_report(run: Run, state: str, error: str = "") -> Path:
    """Render ``notebook.ipynb`` of a run folder into ``report.html`` beside it, with its parameters on top."""
    sentence = f"<p><strong>{html.escape(state)}</strong>{': ' + html.escape(error) if error else ''}</p>"
    parameters = html.escape((run.path / "params.yaml").read_text(encoding="utf-8"))
    head = (
        f"<h1>{html.escape(run.path.name)}</h1>\n{sentence}\n"
        f"<details><summary>Parameters</summary><pre>{parameters}</pre></details>"
    )
    path = run.path / "report.html"
    write_atomically(path, render(run.path / "notebook.ipynb", run.path.name, head))
    return path
