"""How much a short run like `make train`'s slows down beside busy processes, with the embedded models on the CPU.

``python tests/bench/busy.py [repetitions]`` (part of ``make bench``) prints seconds by the clock, medians over the
repetitions, alone and beside as many processes that compute as there are cores, in turns. The machine should have
nothing else to do. Each repetition is a process of its own, with as many threads as the package gives it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd

#: The most that a run may take beside busy processes, as a multiple of what it takes alone.
GOAL = 2.5
QUESTIONS, STEPS = 200, 10
_BUSY = [sys.executable, "-c", "import os\nstarter = os.getppid()\nwhile os.getppid() == starter: pass"]


def work(questions: int, steps: int) -> dict[str, float]:
    """Seconds of each part of a short run, in this process."""
    seconds, last = dict[str, float](), time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        seconds[part], last = time.perf_counter() - last, time.perf_counter()

    from kepo_core.experiment import experiment
    from kepo_core.params import Params
    from kepo_core.quiet import quiet_third_parties
    from kepo_core.runs.run import Run

    quiet_third_parties()
    lap("imports")
    with tempfile.TemporaryDirectory() as folder:
        params = Params.from_notebook({"results_dir": folder, "max_steps": steps})
        data = experiment.load_data(params)
        models = experiment.load_to_run(params)
        run = Run.for_notebook(params, "kepo")
        lap("data and models")
        experiment.evaluate_student(params, models, data.test[:questions], run.evaluation_dir / "untrained.jsonl")
        lap(f"{questions} questions")
        experiment.train(experiment.make_trainer(params, run, data, models), run)
        lap(f"{steps} steps")
    return seconds


@contextmanager
def beside(command: Sequence[str], count: int) -> Iterator[None]:
    """``count`` processes of ``command``, for a while."""
    others = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(repetitions: int, questions: int = QUESTIONS, steps: int = STEPS) -> pd.DataFrame:
    """Per part of the run and in all: median seconds alone and beside busy processes, and the median ratio."""
    cores = len(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found: dict[str, list[Mapping[str, float]]] = {"alone": [], "busy": []}
    for _ in range(repetitions):
        for name, count in (("alone", 0), ("busy", cores)):
            with beside(_BUSY, count):
                command = [sys.executable, __file__, "--work", str(questions), str(steps)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            seconds = json.loads(done.stdout.splitlines()[-1])
            found[name].append(seconds | {"in all": sum(seconds.values())})
    return table(found)


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> pd.DataFrame:
    """Repetitions → medians; a ratio is of one repetition, whose halves came one after the other."""
    rows = []
    for part in found["alone"][0]:
        alone, busy = ([seconds[part] for seconds in found[name]] for name in ("alone", "busy"))
        ratio = statistics.median(b / a for a, b in zip(alone, busy, strict=True))
        rows.append({"measured": part, "alone s": statistics.median(alone), "busy s": statistics.median(busy),
                     "ratio": ratio})  # fmt: skip
    return pd.DataFrame(rows).set_index("measured").round(2)


def main(arguments: Sequence[str]) -> None:
    """Print the table; or, as the process that is measured, its seconds."""
    if arguments[:1] == ["--work"]:
        print(json.dumps(work(*map(int, arguments[1:]))))
        return
    shown = measure(int(arguments[0]) if arguments else 3)
    met = "met" if shown["ratio"]["in all"] <= GOAL else "missed"
    print(f"\nbeside as many busy processes as cores\n{shown.to_string()}\n\nratio in all, goal at most {GOAL}: {met}")


if __name__ == "__main__":
    main(sys.argv[1:])
