import base64
import io
import re
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from kepo_core.cli import main
from kepo_core.pages import shell
from kepo_core.pages.report import clean_html, render, write_report
from kepo_core.params import Params
from kepo_core.runs.run import Run

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
    return written(tmp_path, cells)


def elements(page):
    """Tags and attributes as a browser reads them."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    return found


def written(tmp_path, cells):
    path = tmp_path / "notebook.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_hostile_output_does_not_survive_and_results_do(notebook):
    page = render(notebook, "run <b>1</b>")
    assert "<script" not in page
    assert not {name for _, attributes in elements(page) for name in attributes if name.startswith("on")}
    assert not {tag for tag, _ in elements(page)} & {"script", "link", "iframe", "object", "embed"}
    assert all(attributes.get("src", "data:image/").startswith("data:image/") for _, attributes in elements(page))
    assert "&lt;script&gt;" in page, "what the model wrote is shown as text"
    assert f"data:image/png;base64,{png()}" in page.replace("\n", "")
    assert re.search(r"<table[^>]*>.*<td>MRI</td>.*</table>", page, re.S)
    assert "<h1" in page
    assert "<em>marked</em>" in page
    assert "<title>run &lt;b&gt;1&lt;/b&gt;</title>" in page


def test_a_browser_runs_and_reports_nothing_of_a_hostile_page(notebook, tmp_path, opened):
    page = tmp_path / "report.html"
    page.write_text(render(notebook, "run"), encoding="utf-8")
    seen, console = opened(page)
    assert "<title>run</title>" in seen and "<script" not in seen and "model says &lt;script&gt;" in seen
    assert console == [], "nothing was refused, as nothing was tried"


def test_the_page_carries_the_gallerys_style_that_outputs_lose(notebook):
    page = render(notebook, "x")
    assert shell.source("cards.css") in page.split("</head>")[0]


def test_the_page_loads_nothing(notebook):
    page = render(notebook, "x")
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert not re.search(r"url\((?!['\"]?data:)", page)
    assert not re.search(r"<(script|link|iframe)\b", page)
    assert "script-src" not in page


def test_the_filter_keeps_tables_and_embedded_pictures():
    table = '<table><thead><tr><td colspan="2">a</td></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'
    assert clean_html(table) == table
    assert clean_html(b"<p>bytes</p>") == "<p>bytes</p>"
    picture = f'<img src="data:image/png;base64,{png()}" width="20">'
    assert "data:image/png" in clean_html(picture)
    assert "width" in clean_html(picture)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '<b title="<th ><script>alert(1)</script>">x</b>',
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
    tags = re.sub(r'"[^"]*"', '""', clean_html(text)) if "title=" in text else clean_html(text)
    assert not re.search(r"alert|http|data:|style|onload|display", tags, re.I)


def test_a_run_folder_gets_its_report(notebook, tmp_path):
    run = Run.allocate(Params(results_dir=str(tmp_path / "results"), data_root="</pre><script>x</script>"))
    notebook.rename(run.path / "notebook.ipynb")
    page = write_report(run, "failed", "ValueError: <script>").read_text()
    assert run.path.name in page
    assert "failed</strong>: ValueError: &lt;script&gt;" in page
    assert "tau: 1.0" in page
    assert "<script" not in page
    changed = page.split("Parameters that differ from the defaults")[1].split("</table>")[0]
    assert re.findall(r"<tr><th>(\w+)</th><td>", changed) == ["data_root"]
    assert "<td>phantom</td>" in changed
    assert run.provenance["versions"]["torch"] in page
    for folded in ("All parameters", "Provenance"):
        assert f"<details><summary>{folded}" in page, "closed"


def test_a_runs_accuracies_stand_on_top(notebook, tmp_path):
    run = Run.allocate(Params(results_dir=str(tmp_path / "results"), seed=3))
    notebook.rename(run.path / "notebook.ipynb")
    numbers = {"MRI before": 0.5, "MRI after": 0.98, "MRI low": 0.4, "MRI high": 0.55, "seed": 3, "CT after": 1.0}
    (run.path / "predictions.parquet").touch()
    run.finish(numbers)
    page = write_report(run, "completed").read_text()
    table = page.split("<caption>Accuracies")[1].split("</table>")[0]
    cells = re.findall(r"<t[dh]>([^<]+)<", table.split("<tbody>")[1])
    assert cells == ["MRI", "50.0 → 98.0 %", "+48.0 [+40.0, +55.0]"]
    assert "kepo-tau1, seed 3, begun 20" in page


# What the page is made of -------------------------------------------------------------------------------------------

FIGURE = {"image/png": png(), "text/plain": "figure"}


def test_code_is_folded_and_escaped(tmp_path):
    page = render(written(tmp_path, [new_code_cell("a = '<b>'\nb = 2")]), "x")
    assert "<summary>Code, 2 lines</summary>\n<pre>a = '&lt;b&gt;'\nb = 2</pre></details>" in page
    assert ("details", {"class": "code"}) in elements(page), "closed"


def test_pictures_and_tables_say_what_they_are(tmp_path):
    table = {"text/html": "<table><tr><td>1</td></tr></table>", "text/plain": "t"}
    outputs = [new_output("display_data", data=data) for data in (FIGURE, table)]
    named = new_code_cell("", outputs=[new_output("display_data", data=FIGURE, metadata={"alt": 'Curves of "loss"'})])
    cells = [new_markdown_cell("## `Training` <b>"), new_code_cell("", outputs=outputs), named]
    page = render(written(tmp_path, cells), "x")
    alts = [attributes.get("alt") for tag, attributes in elements(page) if tag == "img"]
    assert alts == ["Figure", 'Curves of "loss"']
    boxes = [attributes for _, attributes in elements(page) if attributes.get("class") == "rich scroll"]
    assert [box["aria-label"] for box in boxes] == ["Table"]
    assert {(box["tabindex"], box["role"]) for box in boxes} == {("0", "group")}


def test_any_executed_notebook_becomes_a_page_beside_it(tmp_path, capsys):
    path = written(tmp_path, [new_code_cell("1", outputs=[new_output("display_data", data=FIGURE)])])
    assert main(["report", str(path)]) == 0
    page = path.with_suffix(".html")
    assert capsys.readouterr().out == f"kepo: wrote {page}\n"
    assert f"<title>{path.stem}</title>" in page.read_text() and "<img" in page.read_text()
    for text in ("{}", "null", "[]", '{"cells": 3}', "no JSON"):
        path.write_text(text)
        assert main(["report", str(path)]) == 2
        assert "cannot be read as a notebook" in capsys.readouterr().err


def test_the_contents_lead_to_the_cells_that_begin_with_a_heading(tmp_path):
    cells = [new_markdown_cell("# One\n\ntext"), new_markdown_cell("text"), new_markdown_cell("## `Two` <i>\n\ntext")]
    page = render(written(tmp_path, cells), "x")
    assert page.count("<h1") == 1
    links = re.findall(r'<li><a href="#([^"]+)">([^<]+)</a></li>', page)
    assert [text for _, text in links] == ["One", "Two &lt;i&gt;"]
    targets = [attributes.get("id") for _, attributes in elements(page)]
    assert all(targets.count(place) == 1 for place, _ in links)


def tagged(text, tag):
    return new_markdown_cell(text, metadata={"tags": [tag]})


def test_results_come_before_how_they_were_made(tmp_path):
    said = [new_output("stream", name="stdout", text="words")]
    cells = [new_markdown_cell("# Title"), new_markdown_cell("## 1 · Data"), new_code_cell("", outputs=said)]
    for number, tag in enumerate(["training", "result", "rollouts", "warnings"], start=2):
        cells += [tagged(f"## {number} · The {tag}\n\ntext", tag), new_code_cell("", outputs=said)]
    cells += [tagged("## 6 · Not reached", "result"), new_code_cell("")]
    path = written(tmp_path, cells)
    page = render(path, "x")
    titles = ["The warnings", "The result", "The training", "The rollouts", "How it was made", "Title", "Data"]
    assert re.findall(r'<li><a href="#[^"]+">([^<]+)</a></li>', page) == [*titles, "Not reached"]
    assert render(path, "x") == page


def bar(percent):
    return f"trained: {percent:3d}%|{'█' * (percent // 5):20}| {percent}/100 [00:01<00:00, 41.30it/s, accuracy 0.81]\n"


def test_finished_bars_and_empty_tables_do_not_show(tmp_path):
    nothing = pd.DataFrame(columns=["claim", "verdict"])
    texts = [bar(50) + bar(100) + "50% | of all\n", bar(100), "done\n" + bar(40)]
    outputs = [new_output("stream", name="stdout", text=text) for text in texts[:2]]
    for table in (nothing, nothing.set_index("claim"), pd.DataFrame({"claim": ["kept"]})):
        outputs.append(new_output("display_data", data={"text/html": table.to_html(), "text/plain": "a table"}))
    cells = [new_code_cell("", outputs=outputs)]
    cells += [new_code_cell("", outputs=[new_output("stream", name="stdout", text=texts[2])])]
    page = render(written(tmp_path, cells), "x")
    assert page.count("trained:") == 1 and "40/100" in page, "where work stopped, the bar says how far it was"
    assert "50% | of all" in page and "done" in page
    assert page.count("<table") == 1 and "kept" in page
    assert page.count("<pre>") == 4, "no empty boxes: two cells of code, two outputs"


def test_an_interval_stays_on_one_line():
    frame = pd.DataFrame([[1.0, "98.0 [95.7, 99.1]"]], index=["us"])
    assert ">98.0 [95.7,&nbsp;99.1]<" in clean_html(frame.to_html())
    assert clean_html("<table><tbody><tr><td>a, b [c]</td></tr></tbody></table>").count("&nbsp;") == 0
