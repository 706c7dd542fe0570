"""Every command from every folder: below the project's root, and outside it in a folder that looks like it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kepo_core import paths
from kepo_core.cli import main
from kepo_core.data import phantom
from kepo_core.experiment.execution import execute
from kepo_core.experiment.own_task import new_folder
from kepo_core.params import Params, resolve
from kepo_core.runs.run import Run

PACKAGE = Path(__file__).parents[2]
READ = """
from pathlib import Path
from kepo_core.params import Params, resolve
from kepo_core.runs.run import Run
params = Params.from_notebook(globals())
assert resolve(params.data_root).is_dir(), params.data_root
run = Run.for_notebook(params)
"""
#: The first attempt is stopped, as by Ctrl-C.
WORK = """
tries = Path(run.path / "tries")
tries.touch()
assert tries.stat().st_size or not params.data_root.endswith("unlucky") or tries.write_text("1") and False
run.finish({"tau": params.tau})
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own with one notebook, which is the one of this package for whoever works outside of it."""
    root = tmp_path / "project"
    for folder in ("params", "notebooks", "kepo_core", "data"):
        (root / folder).mkdir(parents=True)
    (root / "params/phantom.yaml").touch()
    cells = [new_code_cell("data_root = 'data'\ntau = None\nrun_dir = ''"), new_code_cell(READ), new_code_cell(WORK)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells), root / "notebooks/tiny.ipynb")
    monkeypatch.setattr(paths, "__file__", str(root / "kepo_core/paths.py"))
    return root


@pytest.fixture(params=["project/notebooks", "home"])
def here(request: pytest.FixtureRequest, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where commands are given; it has ``results`` and ``data`` of its own."""
    folder = tmp_path / request.param
    for name in ("results", "data"):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


Kepo = Callable[..., str]


@pytest.fixture
def kepo(capsys: pytest.CaptureFixture[str]) -> Kepo:
    """A `kepo` command that ends with exit code ``code``; what it said."""

    def kepo(*arguments: object, code: int = 0) -> str:
        ended = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert ended == code, said.out + said.err
        return said.out + said.err

    return kepo


def test_a_run_is_made_shown_and_resumed(
    project: Path, here: Path, kepo: Kepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "data/unlucky").mkdir()
    said = kepo("run", "notebooks/tiny.ipynb", "-p", "data_root", "data/unlucky", code=1)
    assert "AssertionError" in said and not any((here / "results").iterdir())
    (folder,) = (project / "results").glob("2*")
    assert folder.name in kepo("runs") and folder.name in kepo("runs", "show", folder.name)
    command = re.search(r"`kepo resume (.*)` resumes it", said)
    assert command is not None
    monkeypatch.chdir(project.parent)  # data_root was meant from where the run began
    assert "completed" in kepo("resume", command[1] if here.is_relative_to(project) else folder)
    assert Run.open(folder).params.data_root == paths.from_root(here / "data/unlucky")
    assert json.loads((folder / "provenance.json").read_text())["notebook"] == "notebooks/tiny.ipynb"
    monkeypatch.chdir(here)
    assert str(project / "results/index.html") in kepo("report")
    assert str(folder / "report.html") in kepo("report", folder.name)
    monkeypatch.chdir(folder)
    assert "nothing, it has completed" in kepo("runs", "show", ".")


def test_an_empty_list_says_where_it_looked(project: Path, here: Path, kepo: Kepo) -> None:
    where = "results" if here.is_relative_to(project) else project / "results"
    assert kepo("runs") == f"no runs in {where}\n"
    assert kepo("runs", "list", "--results", "results") == f"no runs in {paths.shown(here / 'results')}\n"


def test_files_that_are_named_are_found(project: Path, here: Path, kepo: Kepo) -> None:
    (project / "params/one.yaml").write_text("tau: 0.5\n")
    assert "tau: 0.5" in kepo("params", "-f", "params/one.yaml")
    assert "one.yaml on" in kepo("plan", "params/one.yaml")
    phantom.write_phantom(project / "set", seed=0, images={"MRI": 1})
    assert "MRI" in kepo("data", "check", "set")
    assert "teacher_url is empty" in kepo("check-teacher", "-f", "params/one.yaml", code=2)


@pytest.mark.parametrize("name", ["data_root", "items_file", "student", "teacher", "accelerate_config"])
def test_a_path_means_the_same_to_a_process_that_works_elsewhere(
    project: Path, here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "data/mine").mkdir()
    for params in (Params.load(None, {name: "data/mine"}), Params.from_notebook({name: "data/mine"})):
        monkeypatch.chdir(project)
        assert resolve(getattr(params, name)) == here / "data/mine"
        monkeypatch.chdir(here)
    assert getattr(Params.load(None, {name: "nowhere/at-all"}), name) == "nowhere/at-all"


def test_the_names_of_the_package_are_no_paths(here: Path) -> None:
    for name in ("phantom", "embedded:student"):
        (here / name).mkdir()
    params = Params.load(None, {"data_root": "phantom", "student": "embedded:student"})
    assert (params.data_root, params.student) == ("phantom", "embedded:student")


def test_results_go_where_they_are_meant(project: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert Run.allocate(Params(results_dir="~/results")).path.parent == here / "results"
    assert Run.allocate(Params()).path.parent == project / "results"
    assert new_folder("results").parent == project / "results"


def test_the_path_of_a_newcomer(project: Path, tmp_path: Path) -> None:
    """From a folder below the root, with a home that cannot be written, a long TMPDIR, and without git."""
    (home := tmp_path / "home").touch()  # a file: no folder can be made in it, by root neither
    (long := tmp_path / "a-temporary-folder-of-the-cluster/" / ("deeper/" * 14)).mkdir(parents=True)
    surroundings = {"HOME": str(home), "TMPDIR": str(long), "PATH": str(project), "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [sys.executable, "-m", "kepo_core.cli", "run", "tiny.ipynb"],
        cwd=project / "notebooks",
        env={name: value for name, value in os.environ.items() if not name.startswith("KEPO_")} | surroundings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (project / "results").glob("2*")
    assert done.stdout.endswith(f"kepo: completed, everything about it is in results/{folder.name}\n")
    assert Run.open(folder).provenance["code"]["note"].startswith("git cannot be run")


def test_a_notebook_works_in_the_root_or_where_its_files_are_named(project: Path, here: Path) -> None:
    """A study's page reads the study file once more, as it was read: from where the command was given."""
    work = "from pathlib import Path; Path(where).write_text(str(Path.cwd()))"
    cells = [new_code_cell("where = ''"), new_code_cell(work)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells), notebook := project / "notebooks/where.ipynb")
    for folder, expected in ((None, project), (Path.cwd(), here)):
        execute(notebook, here / "out.ipynb", {"where": str(here / "where")}, folder)
        assert (here / "where").read_text() == str(expected)
    assert Path.cwd() == here


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "a" * 5000, "a\0b"])
def test_a_text_that_is_no_path_is_kept_as_it_is(text: str) -> None:
    assert paths.anchored(text) == text and resolve(text).is_absolute()
