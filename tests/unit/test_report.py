import base64
import io
import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from kepo_core.params import Params
from kepo_core.study import gallery
from kepo_core.study.report import clean_html, render, write_report
from kepo_core.study.runs import Run

HOSTILE = '<script>alert("owned")</script><img src=x onerror=alert(1)><img src="http://example.org/track.png">'


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def notebook(tmp_path):
    table = pd.DataFrame({"modality": ["MRI"], "answer": [HOSTILE]}, index=[7])
    outputs = [
        new_output("stream", name="stdout", text=f"model says {HOSTILE}\n"),
        new_output("display_data", data={"text/html": table.to_html(escape=True), "text/plain": "table"}),
        new_output("display_data", data={"text/html": f"<p>raw {HOSTILE}</p>", "text/plain": "x"}),
        new_output("display_data", data={"text/markdown": f"*marked* {HOSTILE}", "text/plain": "x"}),
        new_output("display_data", data={"image/png": png(), "text/plain": "figure"}),
        new_output("display_data", data={"application/javascript": "alert(2)", "text/plain": "nothing"}),
        new_output("display_data", data={"image/svg+xml": "<svg><script>alert(3)</script></svg>", "text/plain": "s"}),
        new_output("error", ename="ValueError", evalue=HOSTILE, traceback=[f"Trace {HOSTILE}"]),
    ]
    cells = [new_markdown_cell(f"# Results {HOSTILE}"), new_code_cell("secret_code = 1", outputs=outputs)]
    path = tmp_path / "notebook.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_hostile_output_does_not_survive_and_results_do(notebook):
    page = render(notebook, "run <b>1</b>")
    assert "<script" not in page
    assert not re.search(r"<[^>]*\bonerror", page)
    assert not re.search(r"<(img|link|iframe|object|embed)[^>]*(src|href)=[\"'](?!data:image/)", page)
    assert "&lt;script&gt;" in page, "what the model wrote is shown as text"
    assert f"data:image/png;base64,{png()}" in page.replace("\n", "")
    assert re.search(r"<table[^>]*>.*<td>MRI</td>.*</table>", page, re.S)
    assert "<h1" in page
    assert "<em>marked</em>" in page
    assert "secret_code" not in page
    assert "<title>run &lt;b&gt;1&lt;/b&gt;</title>" in page


def test_the_page_carries_the_gallerys_style_that_outputs_lose(notebook):
    page = render(notebook, "x")
    assert gallery.STYLE in page.split("</head>")[0]


def test_the_page_loads_nothing(notebook):
    page = render(notebook, "x")
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert not re.search(r"url\((?!['\"]?data:)", page)
    assert not re.search(r"<(script|link|iframe)\b", page)


def test_the_filter_keeps_tables_and_embedded_pictures():
    table = '<table><thead><tr><th colspan="2">a</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'
    assert clean_html(table) == table
    assert clean_html(b"<p>bytes</p>") == "<p>bytes</p>"
    picture = f'<img src="data:image/png;base64,{png()}" width="20">'
    assert "data:image/png" in clean_html(picture)
    assert "width" in clean_html(picture)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<style>*{display:none}</style>",
        '<a href="javascript:alert(1)">x</a>',
        '<a href="data:text/html,<script>alert(1)</script>">x</a>',
        '<a href=" DATA:text/html,x">x</a>',
        '<img src="http://example.org/x.png">',
        '<img src="data:text/html,x">',
        '<div style="background:url(http://example.org)">x</div>',
        '<svg onload="alert(1)"></svg>',
    ],
)
def test_the_filter_drops_what_runs_or_loads(text):
    cleaned = clean_html(text)
    assert not re.search(r"alert|http|data:|style|onload|display", cleaned, re.I)


def test_a_run_folder_gets_its_report(notebook, tmp_path):
    run = Run.allocate(Params(results_dir=str(tmp_path / "results"), data_root="</pre><script>x</script>"))
    notebook.rename(run.path / "notebook.ipynb")
    page = write_report(run, "failed", "ValueError: <script>").read_text()
    assert run.path.name in page
    assert "failed</strong>: ValueError: &lt;script&gt;" in page
    assert "tau: 1.0" in page
    assert "<script" not in page
