"""The index of runs: what it says of each, that nothing of a folder becomes markup, and that its script alone runs."""

import base64
import hashlib
import re
import shutil
import time

import pytest

from kepo_core.analysis.statistics import AVG, AVG_OOD
from kepo_core.files import read_json, write_json
from kepo_core.pages.index import write_index
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.runs.summary import accuracies, changed_parameters, summarize

EVIL = "<script>document.title='owned'<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def make(results, name, after=None, state="completed", report=True, **changes):
    """A run folder as `kepo run` leaves it."""
    run = Run.allocate(Params(results_dir=str(results), **changes), owner="kepo run")
    headline = {} if after is None else {"MRI before": 0.5, "MRI after": after, "MRI low": 0.1, "MRI high": 0.2}
    write_json(run.path / "headline.json", headline)
    run.conclude(state, "" if state == "completed" else f"ValueError: {EVIL}")
    if report:
        (run.path / "report.html").touch()
    status = run.status | {"started": "2026-01-02T03:04:05Z", "finished": "2026-01-02T03:07:05Z"}
    write_json(run.path / "status.json", status)
    return run.path.rename(results / name)


def digest(script):
    """As a policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def rows(page):
    return re.findall(r'<tr><th scope="row">.*?</tr>', page, re.DOTALL)


def test_a_run_is_told_in_a_line(results):
    make(results, "one", after=0.98, tau=0.0, seed=3)
    (row,) = rows(write_index(results).read_text())
    assert '<a href="./one/report.html">one</a>' in row
    cells = [re.sub(r"<[^>]+>", "|", cell).strip("|") for cell in re.findall(r"<td.*?</td>", row)]
    assert cells[:4] == ["2026-01-02| 03:04", "completed", "kepo-tau0", "3"]
    params_hash = Params(tau=0.0, seed=3).hash
    accuracy = "MRI: |50.0 → 98.0 %|||+48.0 [+10.0, +20.0]"
    assert cells[4:] == [f"{params_hash}| tau 0.0, seed 3", accuracy, "", "", "3.0"]
    assert 'data-value="0.980000"' in row


def test_nothing_of_a_folder_becomes_markup(results):
    make(results, EVIL.replace("/", ""), state="failed", student=EVIL)
    page = write_index(results).read_text()
    assert page.count("<script") == 1
    assert "<img" not in page
    (row,) = rows(page)
    assert row.count("&lt;script&gt;") == 3  # name, error, parameter
    assert re.findall(r'href="([^"]*)"', row)[0].startswith("./%3Cscript%3Edocument")


def test_the_policy_allows_the_pages_own_script_and_nothing_else(results):
    make(results, "one")
    page = write_index(results).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith(f"script-src 'sha256-{digest(script)}'")
    assert not re.search(r"\son\w+=", page)


def test_folders_that_are_broken_or_killed_or_none_are_told_apart(results):
    killed = make(results, "killed", report=False)
    ended = {"state": "running", "owner": "kepo run", "pid": 1, "started": "2026-01-02T03:04:05Z"}
    write_json(killed / "status.json", ended)
    for name, text in {"half": "{", "list": "[]", "empty": "{}"}.items():
        (results / name).mkdir()
        (results / name / "status.json").write_text(text)
    (results / "reference").mkdir()
    other = make(results, "other", report=False)  # of a version with other parameters
    (other / "params.yaml").write_text("gone: 3\nseed: 2\n")
    states = {folder.name: summarize(folder).state for folder in results.iterdir()}
    assert states == {"killed": "killed", "other": "completed", "reference": "unreadable",
                      **dict.fromkeys(("half", "list", "empty"), "unreadable")}  # fmt: skip
    page = write_index(results).read_text()
    assert len(rows(page)) == 5, "a folder without a status is no run"
    assert "href" not in page
    assert "half/status.json cannot be read: Expecting property name" in page
    assert dict(summarize(other).changed) == {"gone": 3, "seed": 2}


def test_parameters_that_differ_are_found_line_by_line():
    changed = {"tau": 0.0, "student": "a: 'b' # c", "explore": False}
    places = {"results_dir": "elsewhere", "save_steps": 0}
    assert changed_parameters(Params.load(None, {**changed, **places}).to_yaml()) == changed
    assert changed_parameters(Params().to_yaml()) == {}


def test_headlines_of_other_notebooks_have_no_accuracies():
    assert (
        accuracies({"MRI before": "0.5", "MRI after": "0.7"}) == accuracies({"MRI before": 0.5, "MRI after": [1]}) == ()
    )
    assert accuracies({"tau": 1, "loss after": 2.0, "MRI after": None, "MRI before": 0.5}) == ()
    (row,) = accuracies({"Avg. before": 0.25, "Avg. after": 0.5})
    assert (row.change, row.difference) == ("25.0 → 50.0 %", "+25.0")


def test_it_fits_a_screen_of_1280_pixels(results, opened):
    long = {"data_root": "/a/very/long/path/without/spaces/to/OmniMedVQA.zip", "train_modality": "Dermoscopy"}
    for name, state in {"gkd-lambda0.5-nothink": "completed", "kepo-ke-opposite-gate": "failed"}.items():
        folder = make(results, f"20261201T013902Z-{name}-3dd20188", state=state, **long)
        whole = {"before": 0.5, "after": 1.0, "low": 0.402, "high": 0.6}
        headline = {f"{row} {part}": x for row in ("Dermoscopy", AVG, AVG_OOD) for part, x in whole.items()}
        write_json(folder / "status.json", read_json(folder / "status.json") | {"headline": headline})
    path = write_index(results)
    page = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text())  # its policy allows no script but its own
    measure = """<script>const box = document.querySelector(".scroll"); box.style = "width: 1232px; max-width: none";
    document.title = `${box.scrollWidth} pixels`;</script>"""
    path.write_text(page.replace("</body>", f"{measure}</body>"))
    seen, _ = opened(path)
    assert "<title>1232 pixels</title>" in seen, "1280 less the margins"


def test_two_hundred_runs_are_quick(results):
    first = make(results, "0", after=0.9)
    for number in range(1, 200):
        shutil.copytree(first, results / str(number))
    write_index(results)
    began = time.process_time()
    assert len(rows(write_index(results).read_text())) == 200
    assert time.process_time() - began < 1  # a tenth of it on an idle machine


def test_it_sorts_and_filters_in_a_browser_and_a_hostile_folder_stays_text(results, opened):
    for name, after, seed in (("b", 0.9, 10), ("c", 0.1, 9), ("d", None, 1)):
        make(results, name, after=after, seed=seed)
    make(results, EVIL.replace("/", ""), after=0.5, state="failed", seed=2)
    click = "document.querySelectorAll('th button')[{}].click();"
    told = """document.body.append(rows.filter(r => !r.hidden).map(r => r.cells[4].textContent).join() + ' ' +
    heads.map(h => h.getAttribute('aria-sort')).filter(Boolean) + '|');"""
    script = "".join(f"{click.format(column)}{told}" for column in (4, 4, 6, 6))
    script += "field.value = 'FAILED kepo'; field.dispatchEvent(new Event('input'));"
    script += f"{told} document.body.append(said.textContent + '|');"
    script += (
        "const evil = document.createElement('script'); evil.textContent = 'document.title = 1'; field.after(evil);"
    )
    path = write_index(results)
    (own,) = re.findall(r"<script>(.*?)</script>", path.read_text(), re.DOTALL)
    page = path.read_text().replace(own, own + script).replace(digest(own), digest(own + script))
    path.write_text(page)
    page, console = opened(path)
    assert any("script-src" in line for line in console)  # the one that was added is refused
    said = page.split("</script>")[-1]
    assert said.split("</body>")[0].strip().split("|")[:-1] == [
        "1,2,9,10 ascending", "10,9,2,1 descending", "9,2,10,1 ascending", "10,2,9,1 descending", "2 descending",
        "1 of 4 runs",
    ]  # fmt: skip
    assert "<title>Runs</title>" in page
    assert "&lt;img src=x" in page
    assert "<img" not in page
