"""``results/index.html``: all run folders as one page that sorts and filters, and reads without JavaScript as well.

Everything that comes from a folder is escaped, its name included. The page's one script is the one below; the page's
policy names its hash, so that the browser runs no other.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.errors import ParamError
from kepo_core.files import write_atomically
from kepo_core.pages import shell
from kepo_core.runs.summary import Accuracy, Summary, summarize

_TITLE = "Runs"
_COLUMNS = ("run", "begun (UTC)", "state", "method", "seed", "parameters", "trained on", AVG_OOD, AVG, "minutes")

_STYLE = """
main { max-width: 100rem; }
th, td { text-align: left; vertical-align: top; }
tbody th { font-weight: normal; white-space: normal; min-width: 9rem; max-width: 16rem; overflow-wrap: break-word; }
td.texts { min-width: 6rem; max-width: 16rem; overflow-wrap: break-word; }
td.line { white-space: nowrap; }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: left; }
th button::after { content: " ↕"; color: var(--muted); }
th[aria-sort=ascending] button::after { content: " ↑"; color: inherit; }
th[aria-sort=descending] button::after { content: " ↓"; color: inherit; }
input { font: inherit; width: min(20rem, 100%); box-sizing: border-box; padding: .25rem .5rem; }
.state { font-weight: bold; }
.completed { color: var(--good); }
.failed, .killed, .unreadable { color: var(--bad); }
:root { --good: #00694d; --bad: #a83f00; }
@media screen and (prefers-color-scheme: dark) { :root { --good: #5fd3ae; --bad: #ff9d66; } }
@media print { @page { size: landscape; } label, [role=status] { display: none; } th button::after { content: ""; } }
"""

_SCRIPT = """
"use strict";
const body = document.querySelector("tbody"), rows = [...body.rows], said = document.querySelector("[role=status]");
const field = document.querySelector("input"), heads = [...document.querySelectorAll("thead th")];
function value(row, column) { const cell = row.cells[column]; return cell.dataset.value ?? cell.textContent.trim(); }
function order(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const x = Number(a), y = Number(b);
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
}
heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const last = row => value(row, column) === "";
    body.append(...rows.sort((a, b) => last(a) - last(b)
      || order(value(a, column), value(b, column)) * (down && !last(a) ? -1 : 1)));
  });
});
function filter() {
  const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  said.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} runs`;
}
field.addEventListener("input", filter);
document.querySelector("label").hidden = false;
filter();
"""


def write_index(results: Path) -> Path:
    """Write ``index.html`` into the folder of run folders, the newest run first. 200 runs take a tenth of a second.

    Raises `ParamError` if ``results`` is no folder, or holds an ``index.html`` that is somebody else's.
    """
    if not results.is_dir():
        raise ParamError(f"results_dir {results} is no folder, expected the one that holds run folders")
    path = results / "index.html"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ParamError(f"{path} was not written by `kepo report` and is not overwritten: move it away")
    folders = (folder for folder in results.iterdir() if (folder / "status.json").is_file())
    studies = sorted(page.parent.name for page in results.glob("studies/*/report.html"))
    write_atomically(path, render_index(sorted(map(summarize, folders), key=_newest_first, reverse=True), studies))
    return path


def _newest_first(run: Summary) -> tuple[str, str]:
    return run.started, run.name


_MARK = f"<main>\n<h1>{_TITLE}</h1>"


def render_index(runs: Sequence[Summary], studies: Sequence[str] = ()) -> str:
    """The page, a row per run in the order given, under links to the pages of ``studies`` (folder names)."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in _COLUMNS)
    pages_of = (
        f'<a href="./studies/{html.escape(quote(name))}/report.html">{html.escape(name)}</a>' for name in studies
    )
    body = (
        f"{_MARK}\n"
        + (f"<p>Studies: {', '.join(pages_of)}</p>\n" if studies else "")
        + "<p>Accuracies before → after training, with the difference in points and its 95 % interval over questions. "
        "Parameters: the hash, and what differs from the defaults.</p>\n"
        '<p><label hidden>Filter by words <input type="search"></label></p>\n'
        f'<p role="status">{len(runs)} runs</p>\n'
        '<div class="scroll" tabindex="0" role="group" aria-label="Table of runs">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(map(_row, runs))}\n</tbody></table></div>\n"
        "</main>"
    )
    return shell.page(_TITLE, body, style=_STYLE, script=_SCRIPT)


def _row(run: Summary) -> str:
    name = html.escape(run.name)
    link = f'<a href="./{html.escape(quote(run.name))}/report.html">{name}</a>' if run.has_report else name
    own = {row.name: row for row in run.accuracies}
    trained_on = next((row for row in run.accuracies if row.name not in (AVG, AVG_OOD)), None)
    state = f'<span class="state {html.escape(run.state)}">{html.escape(run.state)}</span>'
    begun = run.started[:16].replace("T", " ")
    changed = ", ".join(f"{key} {value}" for key, value in run.changed.items())
    cells = [
        f'<td class="line" data-value="{html.escape(run.started)}">{html.escape(begun)}</td>',
        f'<td class="texts">{state}{": " + html.escape(run.error) if run.error else ""}</td>',
        _cell(run.method),
        _cell("" if run.seed is None else str(run.seed)),
        f'<td class="texts"><code>{html.escape(run.params_hash)}</code> {html.escape(changed)}</td>',
        _accuracy(trained_on, named=True),
        _accuracy(own.get(AVG_OOD)),
        _accuracy(own.get(AVG)),
        _cell("" if run.minutes is None else f"{run.minutes:.1f}"),
    ]
    return f'<tr><th scope="row">{link}</th>{"".join(cells)}</tr>'


def _cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"


def _accuracy(row: Accuracy | None, named: bool = False) -> str:
    """Sorted by the accuracy after training."""
    if row is None:
        return '<td data-value=""></td>'
    name = f"{html.escape(row.name)}: " if named else ""
    return f'<td class="line" data-value="{row.after}">{name}{row.change}<br>{row.difference}</td>'
