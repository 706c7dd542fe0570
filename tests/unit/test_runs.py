import fcntl
import json
import math
import os
import re
import subprocess
import time
import types

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from transformers import TrainerControl, TrainerState

from kepo_core.errors import ParamError
from kepo_core.files import json_line, write_atomically, write_json
from kepo_core.method.rollouts import Rollout, write_rollouts
from kepo_core.params import Params
from kepo_core.runs import provenance
from kepo_core.runs.metrics import MetricsWriter, is_timing
from kepo_core.runs.run import Run, is_running


@pytest.fixture
def params(tmp_path):
    return Params(results_dir=str(tmp_path / "results"))


def read_json(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


# -- identity


def test_a_new_folder_says_when_what_and_with_which_parameters(params):
    run = Run.allocate(params)
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z-kepo-tau1-{params.hash}", run.path.name)
    assert Params.load(run.path / "params.yaml").hash == params.hash
    assert run.status["state"] == "running"
    assert run.headline is None
    assert Run.open(run.path).params.hash == params.hash


def test_runs_of_the_same_second_do_not_share_a_folder(params, monkeypatch):
    moment = time.gmtime(0)
    monkeypatch.setattr("kepo_core.runs.run.time.gmtime", lambda: moment)
    names = [Run.allocate(params).path.name for _ in range(3)]
    base = f"19700101T000000Z-kepo-tau1-{params.hash}"
    assert names == [base, f"{base}-2", f"{base}-3"]


def test_a_run_is_called_as_it_was_told_else_by_its_method(params):
    run = Run.for_notebook(params, "grpo-std")
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z-grpo-std-{params.hash}", run.path.name) and run.method == "grpo-std"
    earlier = read_json(run.path / "provenance.json")  # of a version that recorded none
    del earlier["method"]
    write_json(run.path / "provenance.json", earlier)
    assert run.method == "kepo-tau1"


def test_provenance_names_code_versions_and_seeds_but_no_place(params):
    run = Run.allocate(params.replace(seed=3, data_seed=4))
    found = read_json(run.path / "provenance.json")
    assert found["seeds"] == {"seed": 3, "data_seed": 4}
    assert found["params_hash"] == run.params.hash
    assert re.fullmatch("[0-9a-f]{40}|", found["code"]["commit"])
    assert re.match(r"\d+\.\d+", found["versions"]["torch"])
    assert str(run.path) not in json.dumps(found)


def test_the_code_hash_sees_changed_and_new_files_and_nothing_else(tmp_path, monkeypatch):
    git = ["-c", "user.name=n", "-c", "user.email=e"]
    assert provenance.code(tmp_path)["commit"] == ""
    provenance._git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    (tmp_path / ".gitignore").write_text("ignored\n")
    provenance._git(tmp_path, "add", ".")
    provenance._git(tmp_path, *git, "commit", "-qm", "first")
    clean = provenance.code(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["uncommitted"] == ""
    (tmp_path / "ignored").write_text("x")
    assert provenance.code(tmp_path) == clean
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))  # as in a hook of another repository
        assert provenance.code(tmp_path) == clean, name
    seen = {""}
    for name, text in (("a.py", "2"), ("new.py", "1"), ("new.py", "2"), ("newer.py", "")):
        (tmp_path / name).write_text(text)
        seen.add(provenance.code(tmp_path)["uncommitted"])
    assert len(seen) == 5


# -- never overwritten


def test_a_named_folder_is_made_once(params, tmp_path):
    named = params.replace(run_dir=str(tmp_path / "mine"))
    run = Run.for_notebook(named)
    assert run.path == tmp_path / "mine"
    with pytest.raises(ParamError, match=r"run_dir .*mine exists already"):
        Run.allocate(named)
    run.finish({"accuracy": 1})
    with pytest.raises(ParamError, match="is a finished run"):
        Run.for_notebook(named)


def test_a_folder_that_is_no_run_is_refused(params, tmp_path):
    with pytest.raises(ParamError, match="is not a run folder"):
        Run.for_notebook(params.replace(run_dir=str(tmp_path)))


def test_a_notebook_must_mean_what_its_folder_says(params):
    run = Run.allocate(params, owner="kepo run")
    assert Run.for_notebook(params.replace(run_dir=str(run.path))).path == run.path
    with pytest.raises(ParamError, match="seed is 1 in the notebook but 0 in its run folder"):
        Run.for_notebook(params.replace(run_dir=str(run.path), seed=1))


# -- what a run leaves


def rollout(step: int) -> Rollout:
    facts = {"outcome": "correct", "letter": "A", "format_ok": True, "accuracy": 1.0}
    return Rollout(step, 0, 0, 0, "q1", "näh", 3, True, facts, {"accuracy_reward": 1.0, "format_reward": 1.0}, 2.0)


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_rollouts_become_one_table_however_the_run_ends(params, end):
    files = []
    for _ in range(2):
        run = Run.allocate(params)
        for step in (2, 1):
            write_rollouts(run.training_dir, [rollout(step)])
        run.finish({}) if end == "finish" else run.fail(ValueError("broken"))
        table = pd.read_parquet(run.path / "rollouts.parquet")
        assert (table["step"].tolist(), table["completion"].tolist()) == ([1, 2], ["näh", "näh"])
        files.append((run.path / "rollouts.parquet").read_bytes())
    assert files[0] == files[1]


def test_a_broken_rollouts_file_is_told_and_the_status_is_written(params):
    for state in ("completed", "interrupted"):
        run = Run.allocate(params)
        path = write_rollouts(run.training_dir, [rollout(1)])
        path.write_bytes(path.read_bytes()[:50])
        run.conclude(state)
        assert run.status["state"] == {"completed": "failed"}.get(state, state)
        assert "the rollouts could not be collected" in run.status["error"]


def test_tables_and_data_have_their_places(params):
    run = Run.allocate(params)
    run.write_table("predictions", pd.DataFrame({"correct": [True]}))
    run.remember(data={"train": {"questions": 600, "sha256": "ab"}})
    assert pd.read_parquet(run.path / "predictions.parquet")["correct"].tolist() == [True]
    found = read_json(run.path / "provenance.json")
    assert found["data"]["train"]["questions"] == 600
    assert found["params_hash"] == params.hash, "what was known before stays"


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""
    (tmp_path / "code.py").write_text("1\n")
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.skipif(os.getuid() != 0, reason="a folder can be given to another owner by root alone")
def test_a_checkout_of_another_owner_is_one(checkout, monkeypatch):
    monkeypatch.delenv("SUDO_UID", raising=False)
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 65534, 65534)
    refused = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    found = provenance.code(checkout)
    assert len(found["commit"]) == 40 and found["uncommitted"] == "" and "note" not in found


def test_where_git_says_nothing_the_record_says_why(checkout, tmp_path_factory, monkeypatch):
    (checkout / ".git/index").write_bytes(b"no index")
    found = provenance.code(checkout)
    assert len(found["commit"]) == 40 and "git cannot name the code that ran: " in found["note"], "it is not clean"
    bare = tmp_path_factory.mktemp("bare")
    assert provenance.code(bare)["note"] == "the code did not run from a git checkout"
    subprocess.run(["git", "init", "-q"], cwd=bare, check=True)
    assert "git cannot name the code that ran: fatal: " in provenance.code(bare)["note"], "there is no commit"
    (bare / ".git/config").write_text("[core\n")
    assert str(bare) not in provenance.code(bare)["note"] and "bad config" in provenance.code(bare)["note"]
    monkeypatch.setenv("PATH", str(bare))
    assert provenance.code(bare)["note"].startswith("git cannot be run, so the code's commit is unknown (No ")


# -- how a run ends


def test_a_bare_notebook_completes_its_own_status(params):
    run = Run.for_notebook(params)
    run.finish({"MRI": np.float64(0.75), "worst": math.inf, "n": np.int64(3)})
    status = read_json(run.path / "status.json")
    assert status["state"] == "completed"
    assert status["headline"] == {"MRI": 0.75, "worst": None, "n": 3}
    assert status["started"] <= status["finished"]
    assert "error" not in status


def test_under_kepo_run_the_command_writes_the_last_status(params):
    run = Run.allocate(params, owner="kepo run")
    Run.for_notebook(params.replace(run_dir=str(run.path))).finish({"MRI": 0.5})
    assert run.status["state"] == "running"
    run.conclude("completed")
    assert run.status["headline"] == {"MRI": 0.5}


def test_a_failure_is_one_sentence_and_a_mended_notebook_overrules_it(params):
    run = Run.allocate(params)
    run.fail(ValueError("first line\nsecond line"))
    assert (run.status["state"], run.status["error"]) == ("failed", "ValueError: first line")
    run.finish({})
    assert run.status["state"] == "completed"
    assert "error" not in run.status


def test_a_cell_that_raises_in_a_bare_notebook_marks_the_run(params, monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    run = Run.for_notebook(params)
    shell.run_cell("1 + 1")
    assert run.status["state"] == "running"
    shell.run_cell("1 / 0")
    assert run.status["error"] == "ZeroDivisionError: division by zero"


def test_under_kepo_run_a_cell_that_raises_leaves_the_status_to_the_command(params, monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    run = Run.for_notebook(params.replace(run_dir=str(Run.allocate(params, owner="kepo run").path)))
    shell.run_cell("1 / 0")
    assert run.status["state"] == "running"


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json(path, {"state": "running"})
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "half")
    assert read_json(path) == {"state": "running"}


def test_what_is_no_data_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="no plain data"):
        write_json(tmp_path / "x.json", {"path": tmp_path})
    assert json_line({"a": [np.float32(0.5), -math.inf, None, True]}) == '{"a": [0.5, null, null, true]}\n'


# -- metrics


@pytest.mark.parametrize(
    ("name", "timing"),
    [
        ("step_time", True),
        ("profiling/Time taken: KEPOTrainer._prepare_inputs", True),
        ("loss", False),
        ("kepo/gate_rate", False),
        ("completions/mean_length", False),
        ("epoch", False),
    ],
)
def test_clock_dependent_names_are_told_apart(name, timing):
    assert is_timing(name) is timing


def test_metrics_and_timings_are_written_apart(params):
    run = Run.allocate(params)
    writer, state = MetricsWriter(run), TrainerState(is_world_process_zero=True)
    for step in (1, 2):
        state.global_step = step
        writer.on_log(types.SimpleNamespace(), state, TrainerControl(), {"loss": math.nan, "step_time": step / 3})
    writer.on_log(types.SimpleNamespace(), state, TrainerControl(), {"train_loss": 0.5, "train_runtime": 3.0})
    other = TrainerState(is_world_process_zero=False, global_step=9)
    writer.on_log(types.SimpleNamespace(), other, TrainerControl(), {"loss": 0.0})
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n'
    timings = [json.loads(line) for line in (run.path / "timings.jsonl").read_text().splitlines()]
    assert [row["step_time"] for row in timings] == [1 / 3, 2 / 3]
    assert timings[0]["seconds"] <= timings[1]["seconds"]


def test_readers_of_a_lock_do_not_take_one_another_for_the_run(params):
    run = Run.allocate(params, owner="kepo run")
    assert is_running(run.path)
    run.release()
    with (run.path / ".lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not is_running(run.path)
    (run.path / ".lock").chmod(0o444)
    assert not is_running(run.path)
