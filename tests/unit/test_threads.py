"""Small models compute with one thread, and idle cores answer questions: no result depends on either."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from kepo_core.experiment import threads
from kepo_core.experiment.evaluation import evaluate, read_answers
from kepo_core.params import project_root

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork")
SMALL, LARGE = nn.Linear(10, 10), nn.Linear(5_000, 2_001, device="meta")

#: A short run's weights, rollouts and answers, in a process of its own.
RUN = """
import hashlib, json, os, sys
from kepo_core.experiment import experiment, live
from kepo_core.params import Params
from kepo_core.runs.run import Run
import torch

params = Params.from_notebook({"results_dir": sys.argv[1], "max_steps": 2, "eval_items": 6, "eval_batch_size": 10})
data = experiment.load_data(params)
began = torch.get_num_threads()
models = experiment.load_to_run(params)
run = Run.for_notebook(params, "kepo")
forked, fork = [], os.fork
os.fork = lambda: forked.append(fork()) or forked[-1]
answers = [experiment.evaluate_run(params, run, data, models, "untrained")]
metrics = experiment.train_student(params, run, data, models, live.LiveTraining())
answers.append(experiment.evaluate_run(params, run, data, models, "trained"))
digest = hashlib.sha256()
for tensor in models.student.state_dict().values():
    digest.update(tensor.numpy().tobytes())
files = [sorted(path.name for path in run.evaluation_dir.iterdir())]
print(json.dumps({
    "threads": [began, torch.get_num_threads()], "forks": len(forked), "files": files, "weights": digest.hexdigest(),
    "loss": metrics["loss"].tolist(), "answers": [[answer.completion for answer in given] for given in answers],
}))
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    number = torch.get_num_threads()
    monkeypatch.setattr(threads, "_replaced", None)
    yield
    torch.set_num_threads(number)


def test_small_models_get_one_thread_and_others_what_was_there():
    torch.set_num_threads(3)
    threads.suit_threads(SMALL, LARGE)
    assert torch.get_num_threads() == 3 and threads.idle_cores() == 1
    for _ in range(2):  # as when the cell that loads the models is executed again
        threads.suit_threads(SMALL, SMALL)
        assert torch.get_num_threads() == 1 and threads.idle_cores() == (3 if sys.platform == "linux" else 1)
    threads.suit_threads(LARGE)
    assert torch.get_num_threads() == 3 and threads.idle_cores() == 1
    torch.set_num_threads(2)  # the user's
    threads.suit_threads(LARGE)
    assert torch.get_num_threads() == 2


def test_one_thread_is_for_a_while():
    torch.set_num_threads(3)
    with pytest.raises(KeyError), threads.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3


@linux
def test_a_run_is_the_same_to_the_bit_with_one_core_and_several(tmp_path):
    """More than one answer in as many processes. ``OMP_NUM_THREADS`` is not set."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    cores, found = sorted(os.sched_getaffinity(0)), []
    for number, pinned in enumerate([["taskset", "-c", str(cores[0])], []]):
        done = subprocess.run([*pinned, sys.executable, "-c", RUN, str(tmp_path / str(number))], cwd=project_root(),
                              env=environment, capture_output=True, text=True, check=True)  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
        before, during = found[-1].pop("threads")
        assert during == 1 and (before == 1 if pinned else before > 1 or len(cores) == 1)
        assert found[-1].pop("forks") == 2 * (min(before, threads.TOGETHER) - 1)  # the student is asked twice
    assert found[0] == found[1] and found[0]["files"] == [["trained.jsonl", "untrained.jsonl"]]


@pytest.fixture
def asked(tiny_model, processor, tmp_path):
    """A call of `evaluate` for a share of ten questions in five batches, and the file that they share."""
    from kepo_core.data.loading import load_questions
    from kepo_core.data.phantom import write_phantom

    write_phantom(tmp_path / "data", 0, {"MRI": 2, "CT": 2})
    questions, kept = load_questions(tmp_path / "data")[:10], tmp_path / "untrained.jsonl"
    model = tiny_model(0)

    def ask(share=(0, 1), progress=None, kept=kept):
        return evaluate(model, processor, questions, thinking=True, max_tokens=8, batch_size=2, kept=kept, share=share,
                        progress=progress)  # fmt: skip

    return ask, kept


@linux
def test_forks_answer_their_shares_and_what_they_leave_is_answered_here(asked):
    ask, kept = asked
    whole, alone = ask(kept=None), kept.with_name("alone.jsonl")
    ask(kept=alone)

    def work(number):
        if number == 1:
            raise SystemExit(1)
        ask(share=(number, 3))

    threads.with_forks(work, 3)
    assert sorted(path.name for path in kept.parent.glob("un*.jsonl")) == ["untrained.2.jsonl", "untrained.jsonl"]
    told = []
    assert ask(progress=lambda *state: told.append(state)) == whole == read_answers(kept)
    assert told == [(8, 10), (10, 10)]  # the shares of five batches are 2, 2 and 1
    assert [path.name for path in kept.parent.glob("un*.jsonl")] == ["untrained.jsonl"]
    assert kept.read_bytes() == alone.read_bytes()


@linux
def test_a_fork_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(threads, "PATIENCE", 0.2)
    began, here = time.monotonic(), []
    threads.with_forks(lambda number: time.sleep(600) if number else here.append(number), 3)
    assert here == [0] and time.monotonic() - began < 60


@linux
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_fork_outlives_an_interrupt_or_an_error(tmp_path, error):
    def work(number):
        if number:
            (tmp_path / "pid").write_text(str(os.getpid()))
            time.sleep(600)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        raise error

    with pytest.raises(error):
        threads.with_forks(work, 2)
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


@linux
def test_forks_end_when_their_starter_is_killed():
    code = (
        "import os, time; from kepo_core.experiment import threads;"
        "threads.with_forks(lambda number: (os.write(1, b'%d\\n' % os.getpid()), time.sleep(600)), 3)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=project_root())
    assert starter.stdout is not None
    numbers = [int(starter.stdout.readline()) for _ in range(3)]
    assert starter.pid in numbers
    began = time.monotonic()
    starter.kill()
    assert starter.stdout.read() == "" and time.monotonic() - began < 60  # the pipe's last writer has ended
    starter.wait()
