"""The notebooks themselves: their form, and nbval over each."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from kepo_core.cli import main
from kepo_core.params import Params

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("*.ipynb") if "-Copy" not in path.name)


def cell_sources(path: Path, kind: str = "code") -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_the_start_page_leads_to_every_notebook() -> None:
    page = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(.+?)\]\(\1\)", page, re.M) == [path.name for path in NOTEBOOKS]
    assert "LabApp.default_url=/lab/tree/notebooks/README.md" in (ROOT / "Makefile").read_text(encoding="utf-8")
    settings = json.loads((ROOT / "notebooks/.jupyter/labconfig/default_setting_overrides.json").read_text())
    assert settings["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"] == {"markdown": "Markdown Preview"}


def test_there_are_notebooks() -> None:
    assert {path.name[:2] for path in NOTEBOOKS} == {"00", "01", "02", "03", "04", "05", "06"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "outputs are committed"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    lines = [line for cell in code for line in cell.source.splitlines() if not line.startswith("%")]
    (parameters,) = (cell.source.splitlines() for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert len(lines) - len(parameters) < 180  # the list of parameters is as long as there are parameters
    assert any(f"{check}(globals())" in line for line in lines for check in ("check_names", "Params.from_notebook"))
    kinds = {type(node) for node in ast.walk(ast.parse("\n".join(lines)))}
    assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Lambda}, "a notebook defines functions"
    assert cell_sources(path, "markdown")[0].startswith(f"# {path.name[:2]} · ")


def test_parameters_cell_of_03_names_every_parameter_and_leaves_it_to_the_file() -> None:
    (cell,) = [source for source in cell_sources(ROOT / "notebooks/03_train_kepo.ipynb") if "params_file = " in source]
    scope: dict[str, object] = {}
    exec(cell, scope)
    scope.pop("__builtins__")
    assert scope == dict.fromkeys((field.name for field in dataclasses.fields(Params)), None)


LONG = [pytest.param(number, marks=pytest.mark.slow) for number in ("00", "02", "03")]  # test_main_job runs 03


@pytest.mark.parametrize("number", ["04 05", "01", "06", *LONG])  # 05 finds the runs that 04 has made
def test_nbval(number: str, smoke_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [path for path in NOTEBOOKS if path.name[:2] in number.split()]
    nbval = "-p nbval --nbval-lax --nbval-current-env -q -p no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *nbval.split()]
    environment = {**os.environ, "KEPO_PARAMS": str(smoke_file)}
    done = subprocess.run([*command, *map(str, paths)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{sum(len(cell_sources(path)) for path in paths)} passed" in done.stdout
    if "05" not in number:
        return
    study = smoke_file.parent / "results/studies/study-small"
    made = {path.name for path in study.glob("figures/*")}
    assert len(made) == 14 and made == {f"{Path(name).stem}.{kind}" for name in made for kind in ("png", "svg")}
    runs = len(list(study.parents[1].glob("*/status.json")))
    monkeypatch.setenv("KEPO_PARAMS", str(smoke_file))
    assert main(["report", "params/study-small.yaml"]) == 0  # from the runs that 04 has made
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "<p>4 of 4 runs have completed.</p>" in page and page.count('<p class="caption">') == 7
    linked = [study / href for href in re.findall(r'<a href="(\.\./\.\./[^"]+)"', page)]
    assert len(linked) == 4 and all(path.is_file() for path in linked)
    assert len(list(study.parents[1].glob("*/status.json"))) == runs, "nothing was run"
    assert main(["report", "--index", str(study.parents[1])]) == 0
    assert 'href="./studies/study-small/report.html"' in (study.parents[1] / "index.html").read_text(encoding="utf-8")
