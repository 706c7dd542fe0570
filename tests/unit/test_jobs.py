"""Finished runs and the jobs that make them: what counts as done, what is resumed, and what happens at once."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from kepo_core.analysis.answers import to_table
from kepo_core.arguments import parser
from kepo_core.cli import parse_value
from kepo_core.data.records import Answer, AnswerOutcome
from kepo_core.errors import ParamError
from kepo_core.experiment.methods import methods
from kepo_core.params import Params
from kepo_core.params_io import tagged_cell
from kepo_core.runs import provenance, shelf
from kepo_core.runs.run import Run
from kepo_core.study import jobs

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
    killed = Run.allocate(params, owner="kepo run")
    killed.remember(notebook_sha256=now.notebook)
    killed._write_status("running", owner="kepo run", pid=1, started="")
    killed.release()
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


class Executor:
    """Its runs have ended when they are first polled, having done what ``ends`` says for their hash: "" or a reason."""

    pause = 0.0

    def __init__(self, ends: dict[str, Callable[[], str]], count: int = 1) -> None:
        self.ends, self.count, self.asked = ends, count, {}

    def start(self, params: Params, origin: shelf.Origin) -> jobs.Handle:
        assert params.hash not in self.asked, "tried twice"
        self.asked[params.hash] = jobs.command(params, origin)[3:]
        said: list[str] = []

        def poll() -> int:
            said.append(self.ends.get(params.hash, str)())
            return int(bool(said[-1]))

        return SimpleNamespace(poll=poll, reason=lambda: said[-1], terminate=lambda: None, wait=lambda: None)


def test_a_job_says_every_parameter_that_differs_from_the_file(params: Params) -> None:
    wanted = [params.replace(**entry.overrides(params)) for entry in methods().values()]
    wanted += [params.replace(seed=3, learning_rate=1e-5, top_p=0.5, items_file="results/a b/items.csv")]
    for one in wanted:
        asked = parser("").parse_args(jobs.command(one, shelf.origin(ROOT / jobs.NOTEBOOK, DATA))[3:])
        given = {name: parse_value(value) for name, value in asked.parameter}
        assert Params.load(asked.file, given).hash == one.hash


def test_a_job_computes_what_the_study_asks_whatever_the_notebooks_cell_says(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = tmp_path / jobs.NOTEBOOK
    edited.parent.mkdir()
    text = (ROOT / jobs.NOTEBOOK).read_text(encoding="utf-8")
    edited.write_text(text.replace('"tau = 1.0 ', '"epsilon_high = 0.3\\n",\n    "tau = 0.0 ', 1), encoding="utf-8")
    assert (cell := tagged_cell(edited))["tau"] == 0.0 and cell["epsilon_high"] == 0.3
    monkeypatch.setattr(jobs, "project_root", lambda: tmp_path)
    for one in (params, params.replace(tau=0.0), params.replace(epsilon_high=0.2)):
        asked = parser("").parse_args(jobs.command(one, shelf.origin(ROOT / jobs.NOTEBOOK, DATA))[3:])
        given = {name: parse_value(value) for name, value in asked.parameter}
        assert Params.load(asked.file, given, cell=cell) == one


def test_a_run_that_was_broken_off_is_gone_on_with(params: Params) -> None:
    stopped = leave(params, ROOT / jobs.NOTEBOOK, "interrupted")
    executor = Executor({})
    _, failures = jobs.run_all({"one": params, "two": params.replace(seed=1)}, DATA, executor)
    assert executor.asked[params.hash] == ["resume", str(stopped.path)]
    assert executor.asked[params.replace(seed=1).hash][0] == "run"
    assert failures == dict.fromkeys(("one", "two"), "code, notebook or data changed before it completed")


def test_slots_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 8)
    assert jobs.slots() == [{"OMP_NUM_THREADS": "1"}] * 8
    assert jobs.slots(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert jobs.slots(20) == jobs.slots()
    with pytest.raises(ParamError, match="slots must be at least 0, got -1"):
        jobs.slots(-1)
    assert jobs.slots(processes=4) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert jobs.slots(processes=2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert jobs.slots(processes=8) == [{"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}]  # the run says that these are too few
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
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
    monkeypatch.setattr(jobs, "command", lambda params, _: [str(script), "-m", "kepo_core.cli", params.student])
    monkeypatch.setattr(jobs, "slots", lambda wanted, _: [{"OMP_NUM_THREADS": "1"}] * wanted)
    monkeypatch.setattr(jobs.LocalExecutor, "pause", 0.1)

    def completed(params: Params, origin: shelf.Origin) -> Path | None:
        log = tmp_path / f"{params.student}.log"
        return log if log.is_file() and "end" in log.read_text() else None

    monkeypatch.setattr(shelf, "completed", completed)
    return tmp_path


def go(fake: Path, names: list[str], slots: int, show: jobs.Show) -> dict[str, str]:
    wanted = {name: Params(student=name, results_dir=str(fake / "results")) for name in names}
    return jobs.run_all(wanted, DATA, jobs.LocalExecutor(slots), show)[1]


def times(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()]


def test_as_many_at_a_time_as_there_are_slots_and_a_failure_stops_no_other(fake: Path) -> None:
    started: dict[str, None] = {}

    def show(all_jobs: Sequence[jobs.Job]) -> None:
        started.update(dict.fromkeys(job.name for job in all_jobs if job.state == "running"))

    names = ["one", "fails", "two", "raises", "three", "killed"]
    failures = go(fake, names, 2, show)
    assert failures == {"fails": "no such thing", "raises": "KeyError: 7", "killed": "its process was ended by SIGKILL"}
    log = fake / f"results/.jobs/{Params(student='fails', results_dir=str(fake / 'results')).hash}.log"
    assert "kepo: run folder x" in log.read_text()
    assert list(started) == names
    assert len(times(fake / "fails.log")) == 1  # nothing is tried twice
    spans = {name: times(fake / f"{name}.log") for name in ("one", "two", "three")}
    moments = sorted((moment, +1 if i == 0 else -1) for span in spans.values() for i, moment in enumerate(span))
    at_once, most = 0, 0
    for _, change in moments:
        at_once += change
        most = max(most, at_once)
    assert most == 2


def test_whoever_is_interrupted_interrupts_its_runs(fake: Path) -> None:
    def show(all_jobs: Sequence[jobs.Job]) -> None:
        if any(job.state == "completed" for job in all_jobs):
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        go(fake, ["slow", "quick"], 2, show)
    assert time.monotonic() - started < 5
    assert (fake / "slow.log").read_text().splitlines()[-1] == "stopped"
    slow = Params(student="slow", results_dir=str(fake / "results"))
    with jobs.Job("slow", slow).claim:  # nobody has it any more
        pass


def test_what_two_names_share_runs_once_and_what_failed_says_why(params: Params) -> None:
    notebook = ROOT / jobs.NOTEBOOK
    leave(params, notebook)
    other, broken = params.replace(seed=1), params.replace(seed=2)

    def end_well() -> str:
        leave(other, notebook)
        return ""

    executor = Executor({other.hash: end_well, broken.hash: lambda: "it broke"})
    wanted = {"found": params, "new": other, "same": other.replace(save_steps=3), "broken": broken}
    runs, failures = jobs.run_all(wanted, DATA, executor)
    assert list(executor.asked) == [other.hash, broken.hash]
    assert set(runs) == {"found", "new", "same"} and runs["new"].path == runs["same"].path
    assert failures == {"broken": "it broke"}
    assert jobs.run_all(wanted, DATA, again := Executor({broken.hash: lambda: "it broke"}))[1] == failures
    assert list(again.asked) == [broken.hash]  # and what has completed is not run

    class Full(Executor):
        def start(self, *_: object) -> jobs.Handle:
            raise ParamError("no room")

    assert jobs.run_all({"broken": broken}, DATA, Full({})) == ({}, {"broken": "no room"})


# Two studies at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "state", "note"),
    [
        ("completed", "reused", ""),
        ("failed", "failed", "in another process: out of luck"),
        ("interrupted", "failed", "ours"),  # taken over
        ("deleted", "failed", "ours"),
    ],
)
def test_a_run_at_work_elsewhere_is_waited_for(
    params: Params, monkeypatch: pytest.MonkeyPatch, end: str, state: str, note: str
) -> None:
    theirs = Run.allocate(params, owner="kepo run")  # by this very process, which is alive
    theirs.remember(data=DATA, notebook_sha256=provenance.notebook_digest(ROOT / jobs.NOTEBOOK))
    other = params.replace(seed=1)
    seen: list[list[tuple[str, str]]] = []
    executor = Executor(dict.fromkeys((params.hash, other.hash), lambda: "ours"))

    def show(all_jobs: Sequence[jobs.Job]) -> None:
        seen.append([(job.state, job.note) for job in all_jobs])
        assert len(seen) < 100, "it waits for ever"
        if len(seen) == 4:
            with jobs.Job("of another study", params).claim:  # whoever waits lets others have it
                pass
            shutil.rmtree(theirs.path) if end == "deleted" else theirs.conclude(end, "out of luck")  # type: ignore[arg-type]

    jobs.run_all({"theirs": params, "other": other}, DATA, executor, show)
    waits = ("elsewhere", f"process {os.getpid()} is making it in {theirs.path.name}")
    assert [rows[0] for rows in seen[:4]] == [waits] * 4
    assert seen[3][1] == ("failed", "ours")  # the others went on
    assert seen[-1][0] == (state, note)
    assert (params.hash in executor.asked) == (note == "ours")
    if end == "interrupted":
        assert executor.asked[params.hash] == ["resume", str(theirs.path)]


def test_two_studies_share_the_work_instead_of_doing_it_twice(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = (  # another process, as it starts the run: it has no folder yet
        "import sys; from kepo_core.params import Params; from kepo_core.study import jobs\n"
        f"job = jobs.Job('x', Params.load('params/smoke.yaml', {{'results_dir': {params.results_dir!r}}}))\n"
        "job.claim.acquire(); print('claimed', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, **pipes) as study:  # type: ignore[call-overload]
        assert study.stdout.readline() == "claimed\n"
        seen: list[tuple[str, str]] = []
        executor = Executor({params.hash: lambda: "ours"})

        def show(all_jobs: Sequence[jobs.Job]) -> None:
            seen.append((all_jobs[0].state, all_jobs[0].note))
            assert len(seen) < 100, "it waits for ever"
            if len(seen) == 5:
                assert not executor.asked
                study.kill()  # a lock dies with its process
                study.wait()

        jobs.run_all({"x": params}, DATA, executor, show)
    assert seen[:5] == [("elsewhere", "another study is making it")] * 5
    assert seen[-1] == ("failed", "ours") and list(executor.asked) == [params.hash]


def test_folders_that_cannot_be_read_hold_no_run(params: Params, notebook: Path) -> None:
    whole = leave(params, notebook)
    for name, text in (("status.json", "{"), ("params.yaml", "taw: 1\n"), ("provenance.json", "{}")):
        (leave(params, notebook).path / name).write_text(text)
    (leave(params, notebook).path / "provenance.json").unlink()
    found = shelf.completed(params, shelf.origin(notebook, DATA))
    assert found is not None and found.path == whole.path


def test_time_is_counted_from_start_to_end(params: Params, notebook: Path) -> None:
    run = leave(params, notebook)
    run._write_status(
        "completed", owner="kepo run", pid=1, started="2026-01-01T00:00:00Z", finished="2026-01-01T00:01:30Z"
    )
    assert run.minutes == 1.5
    assert pd.Timestamp(run.status["finished"]).tz is not None
