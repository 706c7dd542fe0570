import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from kepo_core.cli import main, method_overrides, parse_value
from kepo_core.data import phantom
from kepo_core.params import Params
from kepo_core.runs.run import Run

ROOT = Path(__file__).parents[2]

READ = "from kepo_core.params import Params\nparams = Params.from_notebook(globals())"
OPEN = "from kepo_core.runs.run import Run\nrun = Run.for_notebook(params)"
WORK = 'print("training at", params.tau)\n(run.path / "metrics.jsonl").touch()\n"<script>x</script>"'
FINISH = 'import sys\nrun.finish({"tau": params.tau, "python": sys.executable})'


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def kepo_run(tmp_path, results, capsys):
    """Run a notebook of these cells; returns exit code, stdout, stderr."""

    def kepo_run(*sources: str, parameters: tuple[str, ...] = ()):
        notebook = write_notebook(tmp_path, *sources)
        code = main(["run", str(notebook), "-p", "results_dir", str(results), *parameters])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return kepo_run


def write_notebook(folder: Path, *sources: str) -> Path:
    cells = [new_code_cell("tau = None\nresults_dir = None\nrun_dir = ''")]
    cells[0].metadata["tags"] = ["parameters"]
    cells += [new_code_cell(source) for source in (*sources, "if 'headline' in globals():\n    run.finish(headline)")]
    path = folder / "tiny.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def only_folder(results: Path) -> Path:
    (folder,) = results.glob("*/")
    return folder


def test_a_row_of_the_table_of_methods_is_a_set_of_parameters_under_the_given_ones() -> None:
    found = method_overrides("kepo-ke-tau0", Params(), {"seed": 3})
    assert found == {"method": "kepo", "distill": True, "explore": False, "thinking": True, "tau": 0.0, "seed": 3}
    assert method_overrides("teacher", Params(teacher="some/model"), {})["student"] == "some/model"
    assert main(["run", "notebooks/03_train_kepo.ipynb", "-m", "grop"]) == 2


@pytest.mark.parametrize(
    ("notebook", "sentence"),
    [
        ("README.md", "notebook README.md cannot be read as a notebook"),
        ("kepo_core/embedded/student/config.json", "notebook config.json cannot be read as a notebook"),
        ("notebooks/02_baselines.ipynb", "makes no run (none of its cells calls run.finish): papermill notebooks/02"),
    ],
)
def test_what_makes_no_run_is_refused_before_anything_is_written(
    notebook: str, sentence: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", notebook, "-p", "rows", "all", "-p", "results_dir", str(results)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not any(results.glob("*"))


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phantom.write_phantom(tmp_path / "set", seed=0, images={"MRI": 1})
    assert main(["data", "check", str(tmp_path / "set"), "--html", str(tmp_path / "nowhere" / "x.html")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kepo: ") and "No such file or directory" in error and error.count("\n") == 1


def test_where_nobody_reads_any_more_nothing_is_said() -> None:
    """As in a pipe to ``head``: no traceback, neither on writing nor at the interpreter's end."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "kepo_core.cli", "params"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_run_leaves_a_complete_folder(kepo_run, results):
    code, out, err = kepo_run(READ, OPEN, WORK, FINISH, parameters=("-p", "tau", "0"))
    folder = only_folder(results)
    assert (code, err) == (0, "")
    assert "training at 0.0" in out, "the kernel's output is on screen"
    assert out.rstrip().endswith(f"completed, everything about it is in {folder}")
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "completed"
    assert status["headline"] == {"tau": 0.0, "python": sys.executable}
    assert sorted(path.name for path in folder.iterdir()) == [
        *(".lock", "headline.json", "metrics.jsonl", "notebook.ipynb", "params.yaml", "provenance.json"),
        *("report.html", "status.json"),
    ]
    assert Params.load(folder / "params.yaml").tau == 0.0
    assert "hardware" in json.loads((folder / "provenance.json").read_text())
    written_last = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert written_last.name == "status.json"
    page = (folder / "report.html").read_text()
    assert "training at 0.0" in page
    assert "<script" not in page
    assert f'href="./{folder.name}/report.html"' in (results / "index.html").read_text()


def test_a_failing_notebook_leaves_a_folder_that_says_so(kepo_run, results):
    code, _, err = kepo_run(READ, OPEN, WORK, "raise RuntimeError('the loss is not finite')", FINISH)
    folder = only_folder(results)
    status = json.loads((folder / "status.json").read_text())
    assert (code, status["state"], status["error"]) == (1, "failed", "RuntimeError: the loss is not finite")
    assert "RuntimeError: the loss is not finite" in err
    assert "the loss is not finite" in (folder / "report.html").read_text()


def test_data_that_do_not_fit_leave_nothing_behind(kepo_run, results):
    bad_row = "class DataError(ValueError): ...\nraise DataError('qa.json row 7: option_A is missing')"
    code, _, err = kepo_run(READ, OPEN, bad_row)
    assert code == 2
    assert err.splitlines()[-1] == "kepo: qa.json row 7: option_A is missing"
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("began", [True, False])
def test_an_input_error_keeps_the_folder_once_training_began(kepo_run, results, monkeypatch, began):
    def execute(notebook, output, given):
        if began:
            (output.parent / "metrics.jsonl").touch()
        raise PapermillExecutionError(3, 3, "load()", "ParamError", "late", [])

    monkeypatch.setattr("kepo_core.experiment.execution.execute", execute)
    code, _, err = kepo_run()
    assert code == (1 if began else 2)
    assert len(list(results.glob("*/"))) == began
    assert "late" in err
    if began:
        assert json.loads((only_folder(results) / "status.json").read_text())["error"] == "ParamError: late"


def test_our_own_bug_is_told_by_the_folder_and_shown(kepo_run, results, monkeypatch):
    monkeypatch.setattr("kepo_core.experiment.execution.execute", lambda *_: {}["bug"])
    with pytest.raises(KeyError):
        kepo_run()
    assert json.loads((only_folder(results) / "status.json").read_text())["error"] == "KeyError: 'bug'"


def test_a_dead_kernel_is_a_failure(kepo_run, results):
    code, _, err = kepo_run(READ, OPEN, "import os\nos._exit(1)", FINISH)
    assert code == 1
    assert "died" in err
    assert json.loads((only_folder(results) / "status.json").read_text())["state"] == "failed"


def test_a_notebook_without_a_headline_did_not_complete(kepo_run, results, monkeypatch):
    monkeypatch.setattr("kepo_core.experiment.execution.execute", lambda *_: None)
    code, _, err = kepo_run()
    assert code == 1
    assert "before run.finish" in err
    assert json.loads((only_folder(results) / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("parameter", "match"),
    [
        (("taw", "1"), "taw is not a parameter; the nearest is tau"),
        (("tau", "3"), "tau must lie between 0 and 1"),
        (("tau", "x"), "tau must be a number, got 'x'"),
        (("seed", "1.5"), "seed must be a whole number"),
        (("thinking", "true"), "thinking must be True or False, got 'true'"),
        (("thinking", "False"), "explore needs thinking"),
        (("temperature", "0"), "temperature must be greater than 0"),
        (("__import__('os').system('x')", "1"), "is not a parameter"),
    ],
)
def test_bad_parameters_stop_at_once_with_one_sentence(kepo_run, results, parameter, match):
    code, out, err = kepo_run("this would not even parse", parameters=("-p", *parameter))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert match in err
    assert not results.exists()


def test_notebook_03_is_run_where_none_is_named(monkeypatch):
    ran = []
    monkeypatch.setattr("kepo_core.experiment.execution.run_notebook", lambda *given: ran.append(given) or 0)
    assert main(["run", "-p", "tau", "0"]) == 0
    ((notebook, params, cell),) = ran
    assert (notebook.name, params.tau, cell["tau"]) == ("03_train_kepo.ipynb", 0.0, 1.0)


def test_a_run_is_called_as_its_row_in_folder_and_list(no_kernel, kepo_run, results, capsys):
    for row in ("grpo", "grpo-std", "grpo-g9"):
        assert kepo_run(READ, OPEN, FINISH, parameters=("-m", row))[0] == 0
    names = {Run.open(folder).method: folder.name for folder in results.glob("*/")}
    assert sorted(names) == ["grpo", "grpo-g9", "grpo-std"]
    assert all(re.fullmatch(rf"\d{{8}}T\d{{6}}Z-{row}-[0-9a-f]{{8}}", name) for row, name in names.items())
    assert main(["runs", "list", "--results", str(results), "--method", "grpo", "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == [names["grpo"]]
    assert ">grpo-std</td>" in (results / "index.html").read_text()


def test_a_missing_notebook_is_refused(capsys):
    assert main(["run", "nowhere.ipynb"]) == 2
    assert capsys.readouterr().err == "kepo: notebook nowhere.ipynb does not exist\n"


def test_an_interrupted_run_says_so(tmp_path, results):
    notebook = write_notebook(tmp_path, READ, OPEN, "print('started', flush=True)\nimport time\ntime.sleep(60)")
    command = [sys.executable, "-m", "kepo_core.cli", "run", str(notebook), "-p", "results_dir", str(results)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def as_in_a_terminal():  # a background job inherits an ignored SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, preexec_fn=as_in_a_terminal
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("started"):
                break
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=50)
    assert time.monotonic() - begin < 45
    assert process.returncode == 130
    assert json.loads((only_folder(results) / "status.json").read_text())["state"] == "interrupted"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1.0", 1.0), ("1e-6", 1e-6), ("True", True), ("None", None), ("true", "true"), ("[1]", "[1]")],
)
def test_values_are_read_as_papermill_reads_them(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_params_prints_a_file_that_loads(capsys, tmp_path):
    assert main(["params", "-f", "params/paper.yaml"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert Params.load(file).hash == Params.load("params/paper.yaml").hash


# Resuming ---------------------------------------------------------------------------------------------------------

ONCE = "flag = run.path / 'flag'\nif not flag.exists():\n    flag.touch()\n    raise RuntimeError('out of luck')"


def test_a_run_that_failed_goes_on_with_its_parameters_and_completes(kepo_run, results, capsys):
    assert kepo_run(READ, OPEN, WORK, ONCE, FINISH, parameters=("-p", "tau", "0"))[0] == 1
    folder = only_folder(results)
    before = json.loads((folder / "status.json").read_text())
    assert main(["resume", str(folder)]) == 0
    after = json.loads((folder / "status.json").read_text())
    assert (before["state"], after["state"], after["headline"]["tau"]) == ("failed", "completed", 0.0)
    assert after["started"] == before["started"] and len(after["resumed"]) == 1 and "error" not in after
    assert "training at 0.0" in (folder / "report.html").read_text()
    assert main(["resume", str(folder)]) == 2
    assert "is a completed run" in capsys.readouterr().err


def test_a_run_at_work_is_not_resumed(kepo_run, results, capsys):
    kepo_run(READ, OPEN, WORK, ONCE, FINISH)
    folder = only_folder(results)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "running", "pid": os.getpid()}))
    with FileLock(folder / ".lock"):
        assert main(["resume", str(folder)]) == 2
    assert f"is made by process {os.getpid()} now" in capsys.readouterr().err
    assert main(["resume", str(folder)]) == 0  # it was killed


def test_what_no_command_made_is_not_resumed(tmp_path, results, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    run = Run.allocate(Params(results_dir=str(results)))
    assert main(["resume", str(run.path)]) == 2
    assert "does not name its notebook" in capsys.readouterr().err
    assert run.status["owner"] == "notebook"  # untouched


def test_data_that_have_gone_since_leave_the_folder_and_say_so(kepo_run, results, capsys):
    gone = ONCE + "\nclass DataError(ValueError): ...\nraise DataError('qa.json has gone')"
    kepo_run(READ, OPEN, gone)
    folder = only_folder(results)
    assert main(["resume", str(folder)]) == 1
    assert json.loads((folder / "status.json").read_text())["error"] == "DataError: qa.json has gone"


# Pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernel(monkeypatch):
    """Runs complete without a process: their notebooks count as executed."""

    def execute(notebook, output, given):
        output.write_bytes(notebook.read_bytes())
        Run.open(given["run_dir"]).finish({})

    monkeypatch.setattr("kepo_core.experiment.execution.execute", execute)


def test_a_runs_page_is_rendered_again_and_is_the_same(no_kernel, kepo_run, results, capsys):
    kepo_run(READ, OPEN, FINISH)
    folder = only_folder(results)
    once = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"kepo: wrote {folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes() == once
    (folder / "notebook.ipynb").write_text("{")
    assert main(["report", str(folder)]) == 2
    assert "notebook.ipynb cannot be read as a notebook" in capsys.readouterr().err
    (folder / "notebook.ipynb").unlink()
    assert main(["report", str(folder)]) == 2
    assert "has no notebook.ipynb, expected a run of `kepo run`" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == once


def test_what_is_no_run_has_no_report(tmp_path, capsys):
    assert main(["report", "params"]) == 2
    assert (
        "no run is called 'params', expected the name, its beginning or its end, of a folder in results"
        in capsys.readouterr().err
    )
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    study = tmp_path / "study.yaml"
    study.write_text(
        f"params: params/smoke.yaml\nmethods: [grpo]\ncompared_with: grpo\nseeds: [0]\n"
        f"set: {{results_dir: '{tmp_path}/results'}}"
    )
    assert main(["report", str(study)]) == 2
    said = capsys.readouterr().err
    assert f"none of the 1 runs of {study} has completed" in said and f"`kepo study run {study}` makes them" in said
    assert not (tmp_path / "results").exists()
    assert main(["report", "--index", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder, expected the folder with the run folders" in capsys.readouterr().err


def test_the_index_is_written_alone_and_never_over_somebody_elses(no_kernel, kepo_run, results, capsys):
    kepo_run(READ, OPEN, FINISH)
    index = results / "index.html"
    index.unlink()
    assert main(["report", "--index", str(results)]) == 0
    assert only_folder(results).name in index.read_text()
    index.write_text("my own page")
    assert main(["report", "--index", str(results)]) == 2
    assert "was not written by `kepo report`" in capsys.readouterr().err
    code, _, err = kepo_run(READ, OPEN, FINISH)
    assert code == 0, "the run is none the worse"
    assert "the index of runs was not written: " in err
    assert index.read_text() == "my own page"


def test_a_folder_of_the_users_gets_no_index(no_kernel, kepo_run, results, tmp_path):
    (tmp_path / "mine").mkdir()
    assert kepo_run(READ, OPEN, FINISH, parameters=("-p", "run_dir", str(tmp_path / "mine/run")))[0] == 0
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["run"]
    assert not results.exists()
