"""Many runs: each one `kepo run` in a process of its own, several at a time; what has completed already is not run."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from kepo_core.params import ParamError, Params, project_root
from kepo_core.study import shelf
from kepo_core.study.runs import Run

#: The notebook that trains and evaluates one method.
NOTEBOOK = "notebooks/03_train_kepo.ipynb"

#: Told of each job: its name, what became of it, and after how many seconds.
Told = Callable[[str, str, float], None]


@dataclass
class _Job:
    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    slot: int
    started: float


def slots(wanted: int = 0) -> list[dict[str, str]]:
    """The environment of each place where a run can compute: a GPU each, else an equal share of the CPU's cores.

    ``wanted``: how many, at most as many as there are GPUs or cores; 0: all of them.
    """
    if wanted < 0:
        raise ParamError(f"slots must be at least 0, got {wanted}")
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    count = min(wanted or cores, gpus or cores)
    if gpus:
        allotted = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        return [{"CUDA_VISIBLE_DEVICES": name} for name in allotted.split(",")[:count]]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))}] * count


def run_all(
    wanted: Mapping[str, Params], data: dict[str, Any], places: list[dict[str, str]], told: Told = lambda *_: None
) -> tuple[dict[str, Run], dict[str, str]]:
    """Every one of ``wanted`` (name → parameters) as a completed run: found on the shelf, gone on with, or run now.

    Args:
        wanted: what to run; parameters that two names share are run once.
        data: `StudyData.identity` of the data that all of them share.
        places: from `slots`.
        told: hears what was found, started, completed and failed.

    Returns the completed runs and, of the others, why they failed; nothing is tried twice. If this process is
    interrupted, so are the runs, and the next call goes on with them.
    """
    origin = shelf.origin(project_root() / NOTEBOOK, data)  # as it is now: files may be edited while runs compute
    runs: dict[str, Run] = {}  # by the parameters' hash
    failures: dict[str, str] = {}
    commands: dict[str, list[str]] = {}
    for name, params in wanted.items():
        if run := shelf.completed(params, origin):
            runs[params.hash] = run
            told(name, "found", 0.0)
        elif elsewhere := shelf.at_work(params, origin):
            failures[params.hash] = (
                f"{elsewhere.worker} is at work on it in {elsewhere.path}; ask again when it has ended"
            )
            told(name, failures[params.hash], 0.0)
        elif params.hash not in {wanted[other].hash for other in commands}:
            commands[name] = command(params, shelf.broken_off(params, origin))
    failed = _run(commands, places, told)
    for name in commands:
        if name in failed:
            failures[wanted[name].hash] = failed[name]
        elif run := shelf.completed(wanted[name], origin):
            runs[wanted[name].hash] = run
        else:
            failures[wanted[name].hash] = "code, notebook or data were changed before it completed"
    return (
        {name: runs[params.hash] for name, params in wanted.items() if params.hash in runs},
        {name: failures[params.hash] for name, params in wanted.items() if params.hash in failures},
    )


def _run(commands: Mapping[str, list[str]], places: list[dict[str, str]], told: Told) -> dict[str, str]:
    """Failures by name."""
    failures: dict[str, str] = {}
    running: list[_Job] = []
    queue = list(reversed(list(commands.items())))
    try:
        while queue or running:
            while queue and len(running) < len(places):
                slot = min(set(range(len(places))) - {job.slot for job in running})
                name, arguments = queue.pop()
                running.append(_start(name, arguments, slot, places[slot]))
                told(name, "started", 0.0)
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                if job.process.returncode:
                    failures[job.name] = _last_words(job)
                told(job.name, failures.get(job.name, "completed"), time.monotonic() - job.started)
                job.output.close()
    finally:
        for job in running:  # only where this process is interrupted: they note that they were, too
            job.process.send_signal(signal.SIGTERM)
        for job in running:
            job.process.wait()
            job.output.close()
    return failures


def _start(name: str, arguments: list[str], slot: int, environment: dict[str, str]) -> _Job:
    output = tempfile.TemporaryFile()  # noqa: SIM115  # read when the job has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "kepo_core.cli", *arguments],
        cwd=project_root(),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches them through us, once
    )
    return _Job(name, process, output, slot, time.monotonic())


def command(params: Params, left: Run | None) -> list[str]:
    """What ``kepo`` is told to make this run: to go on with one that was broken off, or to begin it."""
    if left is not None:
        return ["resume", str(left.path)]
    return ["run", NOTEBOOK, *params.to_arguments()]


def _last_words(job: _Job) -> str:
    """The sentence with which ``kepo`` ended, or what its process said last."""
    if job.process.returncode < 0:
        return f"its process was ended by {signal.Signals(-job.process.returncode).name}"
    job.output.seek(0)
    lines = job.output.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    progress = (" everything about it is in ", "kepo: run folder ", "kepo: going on in ")
    told = [line for line in lines if line.startswith("kepo: ") and not any(part in line for part in progress)]
    return (told or lines)[-1].removeprefix("kepo: ")
