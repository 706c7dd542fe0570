"""Progress: few lines where outputs are kept, one display where somebody looks."""

from types import SimpleNamespace

import pytest

from kepo_core.experiment import live
from kepo_core.experiment.live import LINES, LiveTraining, Progress, ProgressBar, headline, read_progress, watched


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_long_task_writes_few_lines_and_always_its_last():
    lines = []
    bar = ProgressBar("training", live=False, write=lines.append)
    for done in range(1, 1001):
        bar(done, 1000)
    assert len(lines) == LINES
    assert lines[-1].split()[2] == "1000/1000"
    lines.clear()
    bar = ProgressBar("training", live=False, write=lines.append)
    for done in (1, 2, 3):
        bar(done, 3)
    assert len(lines) == 3


def test_a_line_tells_how_far_and_how_long():
    clock, lines = Clock(), []
    bar = ProgressBar("training", live=False, write=lines.append, clock=clock)
    clock.now += 60
    bar(25, 100, "accuracy 0.50")
    assert lines == ["training   " + "█" * 6 + "░" * 18 + " 25/100  1:00, 3:00 left  accuracy 0.50"]
    clock.now += 65
    bar(100, 100)
    assert lines[1].endswith("100/100  2:05")


@pytest.mark.parametrize("label", ["training", "trained on it", "a label longer than its column"])
def test_what_a_bar_writes_is_read_back(label):
    clock, lines = Clock(), ["kepo: run folder x"]
    bar = ProgressBar(label, live=False, write=lines.append, clock=clock)
    assert read_progress("\n".join(lines)) is None
    for done, left in ((25, "3:00"), (50, "1:00"), (100, "")):
        clock.now = 100.0 + {25: 60, 50: 60, 100: 70}[done]
        bar(done, 100, "accuracy 0.50  gate 1/3  0:01, 0:02 left")
        lines.append("a warning that stands behind 3/4  1:00")
        assert read_progress("\n".join(lines)) == Progress(label, done, 100, left)


class Display:
    """Stands in for IPython's display and counts what is shown and what is renewed."""

    def __init__(self):
        self.shown, self.updated = [], []

    def __call__(self, page, display_id):
        assert display_id is True
        self.shown.append(page)
        return SimpleNamespace(update=self.updated.append)


@pytest.fixture
def display(monkeypatch):
    shown = Display()
    monkeypatch.setattr(live, "display", shown)
    return shown


def test_somebody_who_looks_gets_one_display_renewed(display):
    bar = ProgressBar("<b>", live=True, write=lambda line: pytest.fail("a line of text"))
    for done in range(1, 101):
        bar(done, 100, "<i>")
    assert len(display.shown) == 1
    assert len(display.updated) == 99
    assert "max='100'" in display.updated[-1].data
    assert "&lt;b&gt;" in display.updated[-1].data
    assert "&lt;i&gt;" in display.updated[-1].data


LOGS = {"loss": 0.1, "kepo/accuracy": 0.5, "kepo/format": 1.0, "kepo/gate_rate": 0.25, "grad_norm": 1.0}


def train(callback, steps, main=True, logs=LOGS):
    for step in range(1, steps + 1):
        state = SimpleNamespace(is_world_process_zero=main, global_step=step, max_steps=steps)
        callback.on_log(None, state, None, logs)
    callback.on_log(None, state, None, {"train_loss": 0.1, "train_runtime": 5.0})
    callback.on_train_end(None, state, None)


def test_training_without_an_onlooker_is_lines_alone(display):
    lines = []
    train(LiveTraining(live=False, bar=ProgressBar("training", live=False, write=lines.append)), 75)
    assert len(lines) == LINES
    assert lines[-1].endswith("accuracy 0.50  format 1.00  gate 0.25")
    assert display.shown == []


def test_training_with_an_onlooker_draws_and_ends_with_the_whole_curve(display):
    train(LiveTraining(live=True, every_seconds=0.0), 4)
    bar, curves = display.shown
    assert bar.data.startswith("<div>training")
    pictures = [page for page in display.updated if hasattr(page, "format")]
    assert curves.data.startswith(b"\x89PNG")
    assert len(pictures) == 4  # three more steps and the end
    display.shown.clear()
    display.updated.clear()
    train(LiveTraining(live=True, every_seconds=3600.0), 4)
    assert len([page for page in [*display.shown, *display.updated] if hasattr(page, "format")]) == 2


def test_other_processes_say_nothing(display):
    train(LiveTraining(live=True), 3, main=False)
    assert display.shown == []


def test_what_a_method_does_not_log_is_left_out():
    assert headline({"loss": 1.0}) == ""
    assert headline({"kepo/accuracy": 0.256}) == "accuracy 0.26"


def test_who_counts_as_an_onlooker(monkeypatch):
    def kernel(**names):
        shell = type("ZMQInteractiveShell", (), {"__module__": "ipykernel.zmqshell"})()
        shell.user_ns = names
        monkeypatch.setattr(live, "get_ipython", lambda: shell)

    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.setattr(live, "get_ipython", lambda: None)
    assert not watched()
    kernel()
    assert not watched()  # as papermill starts it
    kernel(__vsc_ipynb_file__="x.ipynb")
    assert watched()
    kernel()
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert watched()
    monkeypatch.setattr(live, "get_ipython", lambda: None)
    assert not watched()
    terminal = type("TerminalInteractiveShell", (), {"__module__": "IPython.terminal", "user_ns": {}})()
    monkeypatch.setattr(live, "get_ipython", lambda: terminal)
    assert not watched()


def test_a_torn_line_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    state = live.TrainerState(global_step=1, max_steps=2, is_world_process_zero=True)
    live.Relay().on_log(None, state, None, {"loss": 0.5})
    line = capsys.readouterr().out
    assert live.read_step(line) == (1, 2, {"loss": 0.5})
    assert live.read_step(line.strip() + "[W1121 a warning of another process") is None
    assert live.read_step(line[:20]) is None
