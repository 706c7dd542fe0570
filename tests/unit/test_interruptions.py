"""What goes wrong from outside while runs are made: nothing half-done looks done, and no completed run is harmed."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kepo_core import files
from kepo_core.cli import main
from kepo_core.errors import ParamError
from kepo_core.experiment import execution
from kepo_core.params import Params
from kepo_core.runs.run import Run, is_running

ROOT = Path(__file__).parents[2]
HEADER = """
import pandas as pd, shutil
from kepo_core.params import Params
from kepo_core.runs.run import Run
run = Run.for_notebook(Params.from_notebook(globals()))
"""

Kepo = Callable[..., tuple[int, str]]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def kepo(capsys: pytest.CaptureFixture[str]) -> Kepo:
    """A `kepo` command: exit code, and what it said on both channels."""

    def kepo(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return kepo


@pytest.fixture
def notebook(tmp_path: Path) -> Callable[[str], Path]:
    """A notebook that opens its run folder, does ``work`` and finishes."""

    def notebook(work: str) -> Path:
        cells = [new_code_cell("tau = None\nresults_dir = None\nrun_dir = ''")]
        cells[0].metadata["tags"] = ["parameters"]
        cells += [new_code_cell(source) for source in (HEADER, work, "run.finish({'tau': run.params.tau})")]
        nbformat.write(new_notebook(cells=cells), path := tmp_path / "tiny.ipynb")
        return path

    return notebook


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """As on a full disk, but for files of more than 100 kB alone, of this process and of those it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def stopped(results: Path, notebook: Path, **changes: Any) -> Run:
    """A run that was interrupted before it did anything."""
    params = Params.load(ROOT / "params/smoke.yaml", {"results_dir": str(results), **changes})
    run = Run.allocate(params, owner="kepo run")
    run.remember(notebook=str(notebook))
    shutil.copy(notebook, run.path / "notebook.ipynb")
    run.conclude("interrupted")
    return run


def executes(monkeypatch: pytest.MonkeyPatch, work: Callable[[Path, dict[str, Any]], None]) -> None:
    """Let ``work``, given run folder and parameters, stand for the notebook."""
    monkeypatch.setattr(execution, "execute", lambda notebook, output, given: work(output.parent, given))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


# Disks and folders -----------------------------------------------------------------------------------------------


def test_a_full_disk_fails_one_run_and_harms_no_other(
    results: Path, notebook: Callable[[str], Path], kepo: Kepo, no_large_files: None
) -> None:
    earlier = stopped(results, notebook(""), tau=0.0)
    earlier.finish({})
    earlier.conclude("completed")
    before = digests(earlier.path)
    work = "import numpy as np\nrun.write_table('predictions', pd.DataFrame({'x': np.random.rand(100_000)}))"
    code, said = kepo("run", notebook(work), "-p", "results_dir", results)
    (folder,) = set(results.glob("*/")) - {earlier.path}
    run = Run.open(folder)
    assert (code, run.status["state"], run.status["headline"]) == (1, "failed", {})
    assert "OSError" in run.status["error"] and os.strerror(errno.EFBIG) in run.status["error"]
    assert f"`kepo resume {folder}` resumes it" in said
    assert not list(folder.rglob("*.partial")) and earlier.state == "completed" and digests(earlier.path) == before


@pytest.mark.parametrize("place", ["a-folder-of-the-cluster/" * 6, "jürgen-größe/" * 4, "no /tmp either/" * 8])
def test_a_temporary_folder_whose_path_is_too_long_for_a_socket(
    results: Path,
    notebook: Callable[[str], Path],
    kepo: Kepo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """A socket's path has 107 bytes; where there is no short folder at all, TCP does."""
    (long := tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    if place.startswith("no /tmp"):
        make = tempfile.mkdtemp
        monkeypatch.setattr(tempfile, "mkdtemp", lambda suffix, prefix, folder: make(suffix, prefix, folder and long))
    listens = "from multiprocessing.connection import Listener\nListener(family='AF_UNIX').close()"  # as data loaders
    code, said = kepo("run", notebook("" if place.startswith("no /tmp") else listens), "-p", "results_dir", results)
    assert (code, "completed, " in said, "Traceback" in said) == (0, True, False)
    assert not any(long.glob("kepo-*")), "nothing is left behind"


@pytest.mark.parametrize("full", ["report.html", "status.json", "rollouts.parquet"])
def test_a_disk_that_is_full_at_the_very_end(
    results: Path, notebook: Callable[[str], Path], kepo: Kepo, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    run = stopped(results, notebook(""))
    (run.training_dir / "checkpoint-1").mkdir(parents=True)

    def work(folder: Path, given: dict[str, Any]) -> None:
        Run.open(folder).finish({"tau": 1.0})
        if full == "rollouts.parquet":
            monkeypatch.setattr("kepo_core.runs.run.collect_rollouts", no_room)
        monkeypatch.setattr(files.Path, "write_text", write_text)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_text(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text.encode()[: 9 if full in path.name else None])
        if full in path.name:
            no_room()

    executes(monkeypatch, work)
    code, said = kepo("resume", run.path)
    monkeypatch.undo()
    assert "No space left on device" in said and not list(run.path.glob(".*.partial"))
    if full == "report.html":  # which says nothing that `kepo report` could not say later
        assert code == 0 and run.state == "completed" and "the report was not written" in said
        return
    assert code == 1 and f"`kepo resume {run.path}` resumes it" in said
    assert run.state == ("killed" if full == "status.json" else "failed")
    assert (run.training_dir / "checkpoint-1").is_dir(), "what is needed to resume was thrown away"
    report = run.path / "report.html"
    assert "failed" in report.read_text() if full == "rollouts.parquet" else not report.exists()
    executes(monkeypatch, lambda folder, given: Run.open(folder).finish({"tau": 1.0}))
    assert kepo("resume", run.path)[0] == 0 and run.state == "completed"
    assert not (run.training_dir / "checkpoint-1").exists()


def test_where_nothing_can_be_written_nothing_is_left(
    results: Path, notebook: Callable[[str], Path], kepo: Kepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kepo_core.runs.run.write_json", no_room)
    code, said = kepo("run", notebook(""), "-p", "results_dir", results)
    assert (code, said) == (2, f"kepo: results_dir {results} cannot be written: No space left on device\n")
    assert list(results.iterdir()) == []


def test_a_folder_that_is_deleted_while_it_is_made(results: Path, notebook: Callable[[str], Path], kepo: Kepo) -> None:
    code, said = kepo("run", notebook("shutil.rmtree(run.path)"), "-p", "results_dir", results)
    assert code == 1 and "was deleted or moved during the run: start it again" in said
    assert "Traceback" not in said.split("kepo: ")[-1] and list(results.iterdir()) == []


# Going on --------------------------------------------------------------------------------------------------------


def test_parameters_edited_in_the_folder_are_refused_and_those_elsewhere_do_not_matter(
    results: Path, notebook: Callable[[str], Path], kepo: Kepo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    shutil.copy(ROOT / "params/smoke.yaml", file)
    path = notebook("")
    executes(monkeypatch, lambda folder, given: (_ for _ in ()).throw(KeyboardInterrupt))
    code, said = kepo("run", path, "-f", file, "-p", "results_dir", results, "-p", "tau", "0.5")
    (folder,) = results.glob("*/")
    assert code == 130 and f"`kepo resume {folder}` resumes it" in said
    written = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(written.replace("tau: 0.5", "tau: 0.75"))
    code, said = kepo("resume", folder)
    assert code == 2 and said.startswith(
        f"kepo: params.yaml in {folder} was edited since the run began: undo the edits"
    )
    assert f"kepo run {path} -f {folder}/params.yaml" in said and Run.open(folder).state == "interrupted"
    (folder / "params.yaml").write_text(written)
    file.write_text("seed: 77\n")
    seen = []

    def work(folder: Path, given: dict[str, Any]) -> None:
        seen.append(Params.load(None, given))
        Run.for_notebook(seen[0]).finish({})

    executes(monkeypatch, work)
    assert kepo("resume", folder)[0] == 0
    assert (seen[0].tau, seen[0].seed) == (0.5, 0)


@pytest.mark.parametrize("error", ["ParamError", "DataError"])
def test_a_run_that_cannot_succeed_is_not_offered_to_be_resumed(
    results: Path, notebook: Callable[[str], Path], kepo: Kepo, error: str
) -> None:
    """But one that was resumed is: what has changed since lies outside of it."""
    work = f"from kepo_core.errors import {error}\n(run.path / 'metrics.jsonl').touch()\nraise {error}('no such data')"
    code, said = kepo("run", notebook(work), "-p", "results_dir", results)
    (folder,) = results.glob("2*")
    assert code == 1 and "no such data" in said and "kepo resume" not in said
    shown = kepo("runs", "show", folder.name, "--results", results)[1]
    assert "start it again with other parameters or data" in shown and "kepo resume" not in shown
    assert f"`kepo resume {folder}` resumes it" in kepo("resume", folder)[1]
    assert f"kepo resume {folder}" in kepo("runs", "show", folder.name, "--results", results)[1]


def test_of_two_that_go_on_with_one_run_at_once_one_does(
    results: Path, notebook: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said, resumed = stopped(results, notebook("")), [], []
    monkeypatch.setattr(Run, "is_edited", property(lambda _: bool(time.sleep(0.3))))  # time to meet

    def go_on() -> None:
        try:
            resumed.append(Run.reopen(run.path))  # kept: with it goes its lock
            said.append("went on")
        except ParamError as error:
            said.append(str(error))

    threads = [threading.Thread(target=go_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted("went on" in words for words in said) == [False, True]
    assert any("is made by process" in words for words in said) and len(run.status["resumed"]) == 1


def test_a_second_ctrl_c_leaves_a_run_that_can_be_gone_on_with(
    results: Path, notebook: Callable[[str], Path], kepo: Kepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    run = stopped(results, notebook(""))
    executes(monkeypatch, lambda folder, given: Run.open(folder).finish({}))
    monkeypatch.setattr("kepo_core.runs.run.collect_rollouts", interrupt)
    code, said = kepo("resume", run.path)
    assert code == 130 and "the status could not be written (interrupted): `kepo resume" in said
    assert run.state == "killed" and not (run.path / "report.html").exists()


# At work ---------------------------------------------------------------------------------------------------------


def test_a_run_is_at_work_as_long_as_its_process_lives_whatever_ends_it(
    results: Path, notebook: Callable[[str], Path]
) -> None:
    run = stopped(results, notebook(""))
    code = f"from kepo_core.runs.run import Run; run = Run.reopen({str(run.path)!r}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert is_running(run.path) and run.state == "running" and run.worker == f"process {process.pid}"
        with pytest.raises(ParamError, match=f"is made by process {process.pid} now, expected a run that has ended"):
            Run.reopen(run.path)
        process.kill()
    assert run.status["state"] == "running" and not is_running(run.path) and run.state == "killed"
    again = Run.reopen(run.path)
    assert run.state == "running" and len(run.status["resumed"]) == 2
    again.conclude("failed")
    assert run.state == "failed" and not is_running(run.path)


def test_whoever_only_looks_makes_no_lock_and_takes_none(results: Path, notebook: Callable[[str], Path]) -> None:
    run = stopped(results, notebook(""))
    (run.path / ".lock").unlink()
    assert not is_running(run.path) and not is_running(results / "nowhere") and not (run.path / ".lock").exists()
    mine = Run.reopen(run.path)
    assert is_running(run.path) and is_running(run.path) and run.state == "running"
    mine.release()


def test_two_runs_of_the_same_parameters_at_once_keep_apart(
    results: Path, notebook: Callable[[str], Path], kepo: Kepo
) -> None:
    given = ["run", str(notebook("import time\ntime.sleep(1)")), "-p", "results_dir", str(results)]
    command = [sys.executable, "-m", "kepo_core.cli", *given]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and "run folder" in other.stdout.readline()
        assert kepo(*given)[0] == 0
        other.communicate(timeout=120)
    assert other.returncode == 0
    made = [Run.open(folder) for folder in results.glob("*/")]
    assert [run.status["state"] for run in made] == ["completed"] * 2 and len({run.params.hash for run in made}) == 1
    headlines = [json.loads((run.path / "headline.json").read_text()) for run in made]
    assert headlines == [{"tau": 1.0}] * 2
