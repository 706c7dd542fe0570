"""The board of many runs: what it says, where, and that nothing in it is taken for more than text."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from kepo_core.experiment.live import ProgressBar
from kepo_core.params import Params
from kepo_core.study import board
from kepo_core.study.board import Board, fitting, row, summary
from kepo_core.study.jobs import Job, State


def job(name: str, state: State = "waiting", seconds: float = 0.0, **entries: object) -> Job:
    made = Job(name, Params())
    made.state, made.seconds, made.began = state, seconds, time.monotonic() - seconds
    for entry, value in entries.items():
        setattr(made, entry, value)
    return made


def writes(done: int, total: int) -> SimpleNamespace:
    """A process whose training is so far, after a minute."""
    lines: list[str] = []
    moments = iter((0.0, 60.0))
    ProgressBar("training", live=False, write=lines.append, clock=lambda: next(moments))(done, total)
    return SimpleNamespace(output=lambda: "\n".join(lines))


def test_a_row_says_what_became_of_a_run() -> None:
    assert row(job("a")) == ("a", "waiting", "", "", "")
    assert row(job("a", "running", 61, process=writes(30, 75))) == ("a", "running", "training 30/75", "1:01", "1:30")
    nothing_yet = SimpleNamespace(output=str)
    assert row(job("a", "running", 3, process=nothing_yet)) == ("a", "running", "starting", "0:03", "")
    assert row(job("a", "completed", 125, process=writes(75, 75))) == ("a", "completed", "", "2:05", "")
    assert row(job("a", "failed", 5, note="no\x1b[31m luck\n"))[2] == "no [31m luck "
    assert row(job("\x07a", "elsewhere", note="process 7 is at work on it"))[:3] == (
        " a", "elsewhere", "process 7 is at work on it")  # fmt: skip


def test_the_time_left_is_told_once_a_run_has_completed_here() -> None:
    jobs = [job("found", "found"), job("a", "running", 29.9), *map(job, "bcd"), job("e", "elsewhere")]
    assert summary(jobs, 2) == "1 of 6 runs ended (1 found)"
    jobs += [job("f", "failed", 1), job("g", "completed", 100), job("h", "completed", 140)]
    # a mean of 120 s: 90 are left of a, 360 of b, c and d, in two places
    assert summary(jobs, 2) == "4 of 9 runs ended (1 found, 2 completed, 1 failed), about 3:45 left"
    assert summary(jobs, 100) == summary(jobs, 4)  # no more at a time than there are
    late = [job("a", "running", 500), job("g", "completed", 100)]
    assert summary(late, 1) == "1 of 2 runs ended (1 completed), about 0:00 left"
    assert summary(jobs[-2:], 2) == "2 of 2 runs ended (2 completed)"


def test_lines_are_written_for_changes_alone() -> None:
    lines: list[str] = []
    one, two, three = job("one"), job("two", "found"), job("three", "elsewhere", note="process 7 is at work on it")
    with Board(1, "lines", write=lines.append) as shown:
        shown([one, two, three])
        one.state = "running"
        for _ in range(5):
            shown([one, two, three])
        one.state, one.seconds = "completed", 61.0
        three.state, three.note = "failed", "it broke"
        shown([one, two, three])
        shown([one, two, three])
    assert [line[10:] for line in lines] == [
        f"{'two':<24} found", f"{'three':<24} waits: process 7 is at work on it", f"{'one':<24} started",
        f"{'one':<24} completed after 1:01", f"{'three':<24} failed: it broke"]  # fmt: skip


def test_a_terminal_renews_one_table() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=12)
    jobs = [job(f"[red]run {i}[/red]") for i in range(20)]
    with Board(2, "terminal", console=console) as shown:
        jobs[9].state, jobs[9].process = "running", writes(30, 75)
        shown(jobs)
        first = console.file.getvalue()  # type: ignore[attr-defined]
        shown(jobs)
        assert console.file.getvalue() == first  # type: ignore[attr-defined]  # nothing changed within the second
        jobs[9].state, jobs[9].note = "failed", "[bold]it broke"
        shown(jobs)
    assert "[red]run 9[/red]" in first and "training 30/75" in first and "… and 14 more" in first
    assert "[red]run 19[/red]" not in first
    last = console.file.getvalue()[len(first) :]  # type: ignore[attr-defined]
    assert "[bold]it broke" in last and "1 of 20 runs ended (1 failed)" in last
    assert last.rpartition("passed")[2].count("[/red]") == 20  # what stays on screen is the whole table


def test_what_matters_most_is_shown_where_room_is_short() -> None:
    states: list[State] = ["found", "completed", "waiting", "running", "failed", "elsewhere", "waiting", "running"]
    jobs = [job(str(i), state) for i, state in enumerate(states)]
    assert [shown.name for shown in fitting(jobs, 5)] == ["2", "3", "4", "5", "7"]
    assert fitting(jobs, 100) == jobs and len(fitting(jobs, -3)) == 1


def test_a_notebook_renews_one_table_and_shows_text_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []
    handle = SimpleNamespace(update=lambda page: pages.append(page.data))

    def display(page: object, display_id: bool) -> SimpleNamespace:
        assert not pages
        handle.update(page)
        return handle

    monkeypatch.setattr(board, "display", display)
    monkeypatch.setattr(board, "watched", lambda: True)
    failing = job("<b>x</b>")
    with Board(1) as shown:
        shown([failing])
        failing.state, failing.note = "failed", "<script>alert(1)</script>"
        shown([failing])
    assert len(pages) == 2 and "<b>x" not in pages[0] and "<script" not in pages[1]
    assert "&lt;script&gt;alert(1)" in pages[1] and "1 of 1 runs ended (1 failed)" in pages[1]
