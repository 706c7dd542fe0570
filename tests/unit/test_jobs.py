"""The shelf of runs and the jobs that fill it: what counts as done, what is gone on with, and what happens at once."""

import json
import stat
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from kepo_core.cli import _parser, parse_value
from kepo_core.data.records import Answer, AnswerOutcome
from kepo_core.params import ParamError, Params
from kepo_core.study import jobs, provenance, shelf
from kepo_core.study.answers import to_table
from kepo_core.study.methods import methods
from kepo_core.study.runs import Run

ROOT = Path(__file__).parents[2]
DATA = {"train_items": 2, "test_items": {"MRI": 1}, "rows_dropped": {}}


@pytest.fixture
def params(tmp_path: Path) -> Params:
    return Params.load(ROOT / "params/smoke.yaml", {"results_dir": str(tmp_path / "results")})


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    path = tmp_path / "notebook.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["1 + 1"]}]}))
    return path


def leave(params: Params, notebook: Path, state: str = "completed", **entries: object) -> Run:
    """A run folder as `kepo run` leaves it."""
    run = Run.allocate(params, owner="kepo run")
    run.remember(**{"data": DATA, "notebook_sha256": provenance.notebook_digest(notebook), **entries})
    run.conclude(state)  # type: ignore[arg-type]
    return run


# The shelf -------------------------------------------------------------------------------------------------------


def test_a_completed_run_is_found_by_what_made_it(
    params: Params, notebook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = shelf.origin(notebook, DATA)
    assert shelf.completed(params, now) is None
    leave(params, notebook)
    newest = leave(params, notebook)
    leave(params, notebook, "failed")
    found = shelf.completed(params, now)
    assert found is not None and found.path == newest.path
    assert shelf.completed(params.replace(save_steps=7), now) is not None  # a place, not a parameter
    assert shelf.completed(params.replace(tau=0.0), now) is None
    assert shelf.completed(params, shelf.origin(notebook, {**DATA, "train_items": 3})) is None
    assert shelf.completed(params.replace(results_dir=f"{params.results_dir}/other"), now) is None
    cells = [{"cell_type": "code", "source": "1 + 1", "outputs": ["2"]}, {"cell_type": "markdown", "source": "words"}]
    notebook.write_text(json.dumps({"cells": cells}))
    assert shelf.origin(notebook, DATA) == now  # words and outputs compute nothing
    notebook.write_text(json.dumps({"cells": [{"cell_type": "code", "source": "1 + 2"}]}))
    assert shelf.completed(params, shelf.origin(notebook, DATA)) is None
    monkeypatch.setattr(provenance, "package_digest", lambda: "another package")
    assert shelf.completed(params, shelf.Origin("another package", now.notebook, DATA)) is None
    # Gone on with by hand, it is a run of two codes, which nobody can make again.
    stopped = leave(params.replace(seed=5), notebook, "interrupted")
    monkeypatch.undo()
    Run.reopen(stopped.path).conclude("completed")
    assert stopped.provenance["code"]["package"].startswith("another package and ")


def test_what_was_broken_off_is_found_and_what_is_at_work_or_failed_is_not(params: Params, notebook: Path) -> None:
    now = shelf.origin(notebook, DATA)
    leave(params, notebook, "failed")
    leave(params, notebook)
    assert shelf.broken_off(params, now) is None
    at_work = Run.allocate(params, owner="kepo run")  # by this very process
    at_work.remember(notebook_sha256=now.notebook)
    assert shelf.broken_off(params, now) is None
    assert (found := shelf.at_work(params, now)) and found.path == at_work.path
    at_work.conclude("failed")
    assert shelf.at_work(params, now) is None
    stopped = leave(params, notebook, "interrupted")
    assert (found := shelf.broken_off(params, now)) and found.path == stopped.path
    assert shelf.broken_off(params, shelf.origin(notebook, {**DATA, "train_items": 3})) is None  # begun on other data
    ended = subprocess.Popen(["true"])
    ended.wait()
    killed = Run.allocate(params, owner="kepo run")
    killed.remember(notebook_sha256=now.notebook)
    killed._write_status("running", owner="kepo run", pid=ended.pid, started="")
    assert (found := shelf.broken_off(params, now)) and found.path == killed.path


def test_the_digest_is_that_of_code_tables_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance.kepo_core, "__file__", str(tmp_path / "__init__.py"))
    digests = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b/model.safetensors", ""), ("b/methods.yaml", "x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        digests.add(provenance.package_digest.__wrapped__())
    assert len(digests) == 4
    (tmp_path / "README.md").write_text("words")
    assert provenance.package_digest.__wrapped__() in digests


def test_answers_come_back_as_they_were(params: Params, notebook: Path) -> None:
    given = Answer("q1", "MRI", "", "<answer>A</answer>", AnswerOutcome.CORRECT, "A", True, True, 5, True)
    cut = replace(given, question_id="q2", outcome=AnswerOutcome.TRUNCATED, letter="", correct=False, sample=3)
    run = leave(params, notebook)
    run.write_table("predictions", to_table({"untrained": [cut, given], "grpo": [given]}))
    back = shelf.read_answers(run)
    assert back == {"untrained": [cut, given], "grpo": [given]} and list(back)[-1] == "grpo"
    assert all(type(value) is type(getattr(cut, name)) for name, value in asdict(back["untrained"][0]).items())


# Jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_says_every_parameter_that_differs_from_the_file(params: Params) -> None:
    wanted = [params.replace(**entry.overrides(params)) for entry in methods().values()]
    wanted += [params.replace(seed=3, learning_rate=1e-5, top_p=0.5, items_file="results/a b/items.csv")]
    for one in wanted:
        asked = _parser().parse_args(jobs.command(one, None))
        given = {name: parse_value(value) for name, value in asked.parameter}
        assert Params.load(asked.file, given).hash == one.hash


def test_a_run_that_was_broken_off_is_gone_on_with(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = leave(params, ROOT / jobs.NOTEBOOK, "interrupted")
    asked = []
    monkeypatch.setattr(jobs, "_run", lambda commands, *_: asked.append(dict(commands)) or {})
    _, failures = jobs.run_all({"one": params, "two": params.replace(seed=1)}, DATA, [{}])
    assert asked[0]["one"] == ["resume", str(stopped.path)] and asked[0]["two"][0] == "run"
    assert failures == dict.fromkeys(("one", "two"), "code, notebook or data were changed before it completed")


def test_places_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 8)
    assert jobs.slots() == [{"OMP_NUM_THREADS": "1"}] * 8
    assert jobs.slots(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert jobs.slots(20) == jobs.slots()
    with pytest.raises(ParamError, match="slots must be at least 0, got -1"):
        jobs.slots(-1)
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 2)
    assert jobs.slots() == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert jobs.slots(1) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a1")  # what this process was allotted, and nothing else
    assert jobs.slots() == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "GPU-a1"}]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jobs whose Python is a script: it notes when and where it ran, and does what its name says."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/bash\n"
        f"cd {tmp_path}; name=$3; trap 'echo stopped >> $name.log; exit 130' TERM\n"
        'echo "start $(date +%s%N)" >> $name.log; echo "kepo: run folder x"\n'
        "case $name in fails) echo 'kepo: failed, everything about it is in x'; echo 'kepo: no such thing'; exit 1;;\n"
        "raises) echo 'Traceback'; echo 'KeyError: 7'; exit 1;; killed) kill -KILL $$;;\n"
        "slow) for i in $(seq 100); do sleep 0.1; done;; *) sleep 0.5;; esac\n"
        'echo "end $(date +%s%N)" >> $name.log\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(jobs.sys, "executable", str(script))
    return tmp_path


def go(names: list[str], places: int, told: jobs.Told) -> dict[str, str]:
    return jobs._run({name: [name] for name in names}, [{"OMP_NUM_THREADS": "1"}] * places, told)


def times(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()]


def test_as_many_at_a_time_as_there_are_places_and_a_failure_stops_no_other(fake: Path) -> None:
    told: list[tuple[str, str]] = []
    names = ["one", "fails", "two", "raises", "three", "killed"]
    failures = go(names, 2, lambda name, what, _: told.append((name, what)))
    assert failures == {"fails": "no such thing", "raises": "KeyError: 7", "killed": "its process was ended by SIGKILL"}
    assert [name for name, what in told if what == "started"] == names
    assert ("fails", "no such thing") in told and ("three", "completed") in told
    assert len(times(fake / "fails.log")) == 1  # nothing is tried twice
    spans = {name: times(fake / f"{name}.log") for name in ("one", "two", "three")}
    moments = sorted((moment, +1 if i == 0 else -1) for span in spans.values() for i, moment in enumerate(span))
    at_once, most = 0, 0
    for _, change in moments:
        at_once += change
        most = max(most, at_once)
    assert most == 2


def test_whoever_is_interrupted_interrupts_its_runs(fake: Path) -> None:
    def told(name: str, what: str, seconds: float) -> None:
        if name == "quick" and what == "completed":
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        go(["slow", "quick"], 2, told)
    assert time.monotonic() - started < 5
    assert (fake / "slow.log").read_text().splitlines()[-1] == "stopped"


def test_what_two_names_share_runs_once_and_what_failed_says_why(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = ROOT / jobs.NOTEBOOK
    leave(params, notebook)
    asked = []

    def ran(commands: dict[str, list[str]], *_: object) -> dict[str, str]:
        asked.extend(commands)
        if "new" in commands:
            leave(other, notebook)
        return {"broken": "it broke"} if "broken" in commands else {}

    monkeypatch.setattr(jobs, "_run", ran)
    other, broken = params.replace(seed=1), params.replace(seed=2)
    wanted = {"found": params, "new": other, "same": other.replace(save_steps=3), "broken": broken}
    runs, failures = jobs.run_all(wanted, DATA, [{}])
    assert asked == ["new", "broken"]
    assert set(runs) == {"found", "new", "same"} and runs["new"].path == runs["same"].path
    assert failures == {"broken": "it broke"}
    Run.allocate(broken, owner="kepo run").remember(notebook_sha256=provenance.notebook_digest(notebook))
    asked.clear()
    _, failures = jobs.run_all({"broken": broken, "found": params}, DATA, [{}])  # by this very process
    assert "is at work on it in" in failures["broken"] and not asked
    shelf.at_work(broken, shelf.origin(notebook, DATA)).conclude("failed")  # type: ignore[union-attr]
    assert jobs.run_all({"broken": broken}, DATA, [{}]) == ({}, {"broken": "it broke"})


def test_time_is_counted_from_start_to_end(params: Params, notebook: Path) -> None:
    run = leave(params, notebook)
    run._write_status(
        "completed", owner="kepo run", pid=1, started="2026-01-01T00:00:00Z", finished="2026-01-01T00:01:30Z"
    )
    assert shelf.minutes(run) == 1.5
    assert pd.Timestamp(run.status["finished"]).tz is not None
