"""The notebooks themselves: their form, and nbval over each."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from kepo_core.cli import main
from kepo_core.method.options import declared
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_takes_from_the_package_is_there(path: Path) -> None:
    """In cells, too, that are executed in slow tests alone."""
    tree = ast.parse(re.sub(r"^%.*", "", "\n".join(cell_sources(path)), flags=re.MULTILINE))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "kepo_core" in str(node.module)]
    exec(compile(ast.Module(imports, []), path.name, "exec"), names := {})  # type: ignore[arg-type]
    parts = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {(node.value.id, node.attr) for node in parts if node.value.id in names}  # type: ignore[attr-defined]
    assert imports and [f"{name}.{attribute}" for name, attribute in used if not hasattr(names[name], attribute)] == []


#: The parameters that stand in the first cell of these notebooks; all others are given by ``-p`` or ``-f``.
CELLS = {
    "01": "data_root data_seed split items_file train_modality train_items eval_items image_size image_fit student",
    "03": "data_root train_items eval_items student teacher method thinking distill tau explore rejection_budget "
    "group_size learning_rate epochs seed",
}


@pytest.mark.parametrize("number", CELLS)
def test_the_parameters_cell_is_what_is_declared(number: str) -> None:
    """After a change of a default or a description: copy the cell that this test expects."""
    path = next(path for path in NOTEBOOKS if path.name.startswith(number))
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    expected = ["# Any other that `kepo params` prints: -p NAME VALUE, or -f FILE."]
    for name in CELLS[number].split():
        default = declared(Params)[name].default
        value = json.dumps(default, ensure_ascii=False) if isinstance(default, str) else repr(default)
        expected.append(f"{name} = {value}  # {declared(Params)[name].metadata['help']}")
    assert cell.splitlines() == expected


def small(path: Path, given: dict[str, object], folder: Path) -> Path:
    """A copy of a notebook in which papermill has set parameters."""
    notebook = load_notebook_node(str(path))
    copy = folder / path.name
    nbformat.write(parameterize_notebook(notebook, given) if given else notebook, copy)
    return copy


LONG = [pytest.param(number, marks=pytest.mark.slow) for number in ("00", "02", "03")]  # test_main_job runs 03


@pytest.mark.parametrize("number", ["04 05", "01", "06", *LONG])  # 05 finds the runs that 04 has made
def test_nbval(number: str, smoke_file: Path, tmp_path: Path) -> None:
    smoke = yaml.safe_load(smoke_file.read_text())
    study_file = tmp_path / "study-small.yaml"
    study_file.write_text(f"params: {smoke_file}\n" + (ROOT / "params/study-small.yaml").read_text())
    study = {"study": str(study_file)}
    given = {"01": smoke, "02": {"params_file": str(smoke_file)}, "03": smoke, "04": study, "05": study}
    paths = [
        small(path, given.get(path.name[:2], {}), tmp_path) for path in NOTEBOOKS if path.name[:2] in number.split()
    ]
    nbval = "-p nbval --nbval-lax --nbval-current-env -q -p no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *nbval.split()]
    done = subprocess.run([*command, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{sum(len(cell_sources(path)) for path in paths)} passed" in done.stdout
    if "05" not in number:
        return
    made_in = smoke_file.parent / "results/studies/study-small"
    made = {path.name for path in made_in.glob("figures/*")}
    assert len(made) == 16 and made == {f"{Path(name).stem}.{kind}" for name in made for kind in ("png", "svg")}
    runs = len(list(made_in.parents[1].glob("*/status.json")))
    assert main(["report", str(study_file)]) == 0  # from the runs that 04 has made
    page = (made_in / "report.html").read_text(encoding="utf-8")
    assert "<p>4 of 4 runs have completed.</p>" in page and page.count('<img alt="') == 8
    linked = [made_in / href for href in re.findall(r'<a href="(\.\./\.\./[^"]+)"', page)]
    assert len(linked) == 4 and all(path.is_file() for path in linked)
    assert len(list(made_in.parents[1].glob("*/status.json"))) == runs, "nothing was run"
    assert main(["report", "--index", str(made_in.parents[1])]) == 0
    assert 'href="./studies/study-small/report.html"' in (made_in.parents[1] / "index.html").read_text(encoding="utf-8")
