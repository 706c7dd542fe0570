"""Progress: few lines where outputs are kept, one display where somebody looks."""

from types import SimpleNamespace

import pytest

from kepo_core.experiment import live
from kepo_core.experiment.live import LINES, LiveTraining, ProgressBar, headline, read_rows, total_steps, watched
from kepo_core.params import Params


def test_a_long_task_writes_few_lines_and_always_its_last(capsys):
    bar = ProgressBar("training", live=False)
    for done in range(1, 1001):
        bar(done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == LINES
    assert lines[-1].startswith("training: 100%") and " 1000/1000 [" in lines[-1]
    bar = ProgressBar("training", live=False)
    for done in (1, 2, 3):
        bar(done, 3)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_line_tells_how_far_and_how_long(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    bar = ProgressBar("training", live=False)
    now += 60
    bar(25, 100, "accuracy 0.50")
    line = capsys.readouterr().out
    assert line.startswith("training:  25%|") and "25/100 [01:00<03:00" in line and "accuracy 0.50" in line


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


def test_somebody_who_looks_gets_one_display_renewed(display, capsys):
    bar = ProgressBar("training", live=True)
    for done in range(1, 101):
        bar(done, 100, "<i>")
    assert len(display.shown) == 1
    assert len(display.updated) == 99
    assert " 100/100 [" in display.updated[-1].data and "<i>" in display.updated[-1].data
    assert not hasattr(display.updated[-1], "_repr_html_") and not capsys.readouterr().out  # text is shown as text


LOGS = {"loss": 0.1, "kepo/accuracy": 0.5, "kepo/format": 1.0, "kepo/gate_rate": 0.25, "grad_norm": 1.0}


def train(callback, steps, main=True, logs=LOGS):
    for step in range(1, steps + 1):
        state = SimpleNamespace(is_world_process_zero=main, global_step=step, max_steps=steps)
        callback.on_log(None, state, None, logs)
    callback.on_log(None, state, None, {"train_loss": 0.1, "train_runtime": 5.0})
    callback.on_train_end(None, state, None)


def test_training_without_an_onlooker_is_lines_alone(display, capsys):
    train(LiveTraining(live=False), 75)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == LINES
    assert "accuracy 0.50  format 1.00  gate 0.25" in lines[-1]
    assert display.shown == []


@pytest.mark.parametrize("onlooker", [False, True])
def test_a_sign_of_failure_is_told_once_while_it_trains(display, capsys, onlooker):
    callback = LiveTraining(live=onlooker, every_seconds=3600.0)
    shown = {}
    for step in range(1, 81):
        late = {"completions/clipped_ratio": 1.0} if step > 40 else {}
        callback.show(step, 80, LOGS | late | {"frac_reward_zero_std": 1.0})
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("warning: "):
                shown.setdefault(line.removeprefix("warning: ").partition(":")[0], []).append(step)
    assert shown == {"Rewards are equal within groups": [20], "Completions are cut off": [60]}


def test_training_with_an_onlooker_draws_and_ends_with_the_whole_curve(display):
    train(LiveTraining(live=True, every_seconds=0.0), 4)
    bar, curves = display.shown
    assert bar.data.startswith("training: ")
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
    assert headline({"kepo/accuracy": 0.256, "kepo/gate_rate": None}) == "accuracy 0.26"  # null: not a number


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


def test_rows_are_read_while_another_process_writes_them(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []
    (path := tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_the_total_is_that_of_the_whole_training():
    params = Params(epochs=3.0)
    assert total_steps(params, {"step": 7, "epoch": 7 / 25}) == 75
    assert total_steps(params.replace(max_steps=40), {"step": 7, "epoch": 7 / 25}) == 40
