"""The table of many runs: what it says, where, and that nothing in it is taken for more than text."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.study.jobs import Job, State
from kepo_core.study.progress_table import ProgressTable, progress, row, summary


def job(name: str, state: State = "waiting", seconds: float = 0.0, **entries: object) -> Job:
    made = Job(name, Params())
    made.state, made.seconds, made.began = state, seconds, time.monotonic() - seconds
    for entry, value in entries.items():
        setattr(made, entry, value)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.allocate(Params(run_dir=str(tmp_path / "run"), epochs=2.0))


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_progress_is_read_from_the_numbers_that_a_run_writes(run: Run) -> None:
    assert progress(run) == "starting"
    write(run.evaluation_dir / "untrained.jsonl", "settings", "an answer", "another")
    assert progress(run) == "untrained student: 2 answers"
    write(run.path / "metrics.jsonl", {"step": 29}, {"step": 30, "epoch": 0.8, "loss": 0.1, "reward": 1.256})
    assert progress(run) == "step 30/75, reward 1.26"
    write(run.path / "metrics.jsonl", {"step": 30, "epoch": 0.8, "loss": 0.1, "reward": None})
    assert progress(run) == "step 30/75, loss 0.10"
    write(run.evaluation_dir / "trained.jsonl", "settings", "an answer")
    assert progress(run) == "trained student: 1 answers"


def test_a_row_says_what_became_of_a_run(run: Run) -> None:
    assert row(job("a")) == ("a", "waiting", "", "")
    assert row(job("a", "running", 3)) == ("a", "running", "starting", "00:03")
    write(run.path / "metrics.jsonl", {"step": 30, "epoch": 0.8, "loss": 0.1})
    assert row(job("a", "running", 61, run=run)) == ("a", "running", "step 30/75, loss 0.10", "01:01")
    assert row(job("a", "completed", 125, run=run)) == ("a", "completed", "", "02:05")
    assert row(job("a", "failed", 5, note="no\x1b[31m luck\n"))[2] == "no [31m luck "
    assert row(job("\x07a", "elsewhere", note="process 7 is making it"))[:3] == (
        " a",
        "elsewhere",
        "process 7 is making it",
    )


def test_the_time_left_is_told_once_a_run_has_completed_here() -> None:
    jobs = [job("found", "reused"), job("a", "running", 29.9), *map(job, "bcd"), job("e", "elsewhere")]
    assert summary(jobs, 2) == "1 of 6 runs ended (1 reused)"
    jobs += [job("f", "failed", 1), job("g", "completed", 100), job("h", "completed", 140)]
    # a mean of 120 s: 90 are left of a, 360 of b, c and d, in two places
    assert summary(jobs, 2) == "4 of 9 runs ended (1 reused, 2 completed, 1 failed), about 03:45 left"
    assert summary(jobs, 100) == summary(jobs, 4)  # no more at a time than there are
    late = [job("a", "running", 500), job("g", "completed", 100)]
    assert summary(late, 1) == "1 of 2 runs ended (1 completed), about 00:00 left"
    assert summary(jobs[-2:], 2) == "2 of 2 runs ended (2 completed)"


def test_lines_are_written_for_changes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = job("one"), job("two", "reused"), job("three", "elsewhere", note="process 7 is making it")
    with ProgressTable(1, redrawn=False) as table:
        table([one, two, three])
        one.state = "running"
        for _ in range(5):
            table([one, two, three])
        one.state, one.seconds = "completed", 61.0
        three.state, three.note = "failed", f"[red]it broke{'!' * 200}"
        table([one, two, three])
        table([one, two, three])
    assert [line[10:] for line in capsys.readouterr().out.splitlines()] == [
        f"{'two':<24} reused",
        f"{'three':<24} waiting: process 7 is making it",
        f"{'one':<24} started",
        f"{'one':<24} completed after 01:01",
        f"{'three':<24} failed: [red]it broke{'!' * 200}",
    ]


def test_a_terminal_shows_one_table_those_at_work_first(run: Run) -> None:
    file = io.StringIO()
    jobs = [job(f"[red]run {i}[/red]") for i in range(20)]
    with ProgressTable(2, redrawn=True, console=Console(file=file, force_terminal=True, width=80, height=12)) as table:
        write(run.path / "metrics.jsonl", {"step": 30, "epoch": 0.8, "loss": 0.1})
        jobs[15].state, jobs[15].run = "running", run
        table(jobs)
        first = file.getvalue()
        table(jobs)
        assert file.getvalue() == first  # nothing changed within the second
        jobs[15].state, jobs[15].note = "failed", "[bold]it broke"
        table(jobs)
    assert "[red]run 15[/red]" in first and "step 30/75" in first and "[red]run 19[/red]" not in first
    last = file.getvalue()[len(first) :]
    assert "[bold]it broke" in last and "1 of 20 runs ended (1 failed)" in last
    assert last.rpartition("progress")[2].count("[/red]") == 20  # what stays on screen is the whole table
