"""Many runs: each one `kepo run` in a process of its own, several at a time; what has completed already is not run.

There is one loop, `run_all`, over whatever starts processes: this machine (`Here`) or a cluster
(``kepo_core.study.cluster``). Whoever computes a run says so twice: the run folder names its process, and a lock in
``results/.jobs`` is held from just before its start, so that two studies at once share the work instead of doing it
twice. Nothing needs to be cleaned up after a kill: locks end with their process, and folders tell whether theirs lives.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from kepo_core.errors import ParamError
from kepo_core.params import Params, project_root
from kepo_core.runs import shelf
from kepo_core.runs.run import Run

#: The notebook that trains and evaluates one method.
NOTEBOOK = "notebooks/03_train_kepo.ipynb"
#: Where locks and a cluster's logs lie, below ``results_dir``.
JOBS_DIR = ".jobs"

#: found: had completed before; elsewhere: another process computes it, and its end is waited for.
State = Literal["waiting", "found", "running", "completed", "failed", "elsewhere"]

_LOOK_EVERY = 2.0  # seconds between two looks at what other processes compute


class Started(Protocol):
    """A run's process, wherever it computes."""

    def ended(self) -> str | None:
        """``None`` while it computes; "" once it ended well, else the sentence that says why not."""

    def output(self) -> str:
        """What it has written so far."""

    def stop(self) -> None:
        """Ask it to end; it notes in its folder that it was interrupted."""

    def wait(self) -> None:
        """Return when it has ended after `stop`."""


@dataclass
class Job:
    """One run among many, and what has become of it."""

    name: str
    params: Params
    state: State = "waiting"
    note: str = ""  # why it failed, or who is at work on it
    run: Run | None = None  # the completed one; while elsewhere, the one at work, where it is known
    process: Started | None = None
    began: float = 0.0  # monotonic seconds
    seconds: float = 0.0  # that it took, once it has ended
    looked: float = -float("inf")  # when the shelf was asked last
    claim: FileLock = field(init=False)

    def __post_init__(self) -> None:
        folder = project_root() / self.params.results_dir / JOBS_DIR
        self.claim = FileLock(folder / f"{self.params.hash}.lock", timeout=0)

    @property
    def passed(self) -> float:
        """Seconds since it was started here, or that it took; 0 if it never was."""
        return time.monotonic() - self.began if self.state == "running" else self.seconds

    def becomes(self, state: State, note: str = "", run: Run | None = None) -> None:
        """Change the state; whoever does not compute it lets others have it."""
        self.state, self.note, self.run = state, note, run
        if state != "running":
            self.claim.release()


class Places(Protocol):
    """Where runs compute: at most ``count`` at a time, looked after every ``pause`` seconds."""

    @property
    def count(self) -> int:
        """Runs at a time."""

    @property
    def pause(self) -> float:
        """Seconds between two looks at what was started."""

    def start(self, params: Params, origin: shelf.Origin, left: Run | None) -> Started:
        """Begin a run, or go on with what is ``left`` of it; `NotStarted` if that is refused."""


class NotStarted(RuntimeError):  # noqa: N818  # as it reads where it is raised
    """A run could not be started; the sentence says why."""


#: Shown all jobs whenever something may have changed.
Show = Callable[[Sequence[Job]], None]


def run_all(
    wanted: Mapping[str, Params], data: dict[str, Any], places: Places, show: Show = lambda jobs: None
) -> tuple[dict[str, Run], dict[str, str]]:
    """Every one of ``wanted`` (name → parameters) as a completed run: found on the shelf, gone on with, or run now.

    Args:
        wanted: what to run; parameters that two names share are run once.
        data: `StudyData.identity` of the data that all of them share.
        places: `Here`, or a cluster.
        show: is shown the jobs.

    Returns the completed runs and, of the others, why they failed; nothing is tried twice. A run that another process
    computes is waited for, and gone on with if it is broken off there. If this process is interrupted, so are the runs
    that it started, and the next call goes on with them.
    """
    origin = shelf.origin(project_root() / NOTEBOOK, data)  # as it is now: files may be edited while runs compute
    jobs: dict[str, Job] = {}  # by the parameters' hash
    for name, params in wanted.items():
        jobs.setdefault(params.hash, Job(name, params))
    _run(list(jobs.values()), origin, places, show)
    ended = {name: jobs[params.hash] for name, params in wanted.items()}
    return (
        {name: job.run for name, job in ended.items() if job.run is not None},
        {name: job.note for name, job in ended.items() if job.state == "failed"},
    )


def completed(wanted: Mapping[str, Params], data: dict[str, Any]) -> dict[str, Run]:
    """Those of ``wanted`` that `run_all` would find completed; nothing is run."""
    origin = shelf.origin(project_root() / NOTEBOOK, data)
    found = {name: shelf.completed(params, origin) for name, params in wanted.items()}
    return {name: run for name, run in found.items() if run is not None}


def _run(jobs: Sequence[Job], origin: shelf.Origin, places: Places, show: Show) -> None:
    """Until all have ended: see what became of those that run, and give free places to those that wait."""
    for job in jobs:
        _turn(job, origin)
    try:
        while True:
            for job in jobs:
                if job.state == "running":
                    _see(job, origin)
            for job in jobs:
                free = sum(other.state == "running" for other in jobs) < places.count
                due = time.monotonic() - job.looked > _LOOK_EVERY
                if (job.state == "waiting" and free) or (job.state == "elsewhere" and due):
                    _turn(job, origin, places if free else None)
            show(jobs)
            if all(job.state in ("found", "completed", "failed") for job in jobs):
                return
            time.sleep(places.pause)
    finally:
        running = [job.process for job in jobs if job.state == "running" and job.process]
        for process in running:  # only where this process is interrupted: they note that they were, too
            process.stop()
        for process in running:
            process.wait()
        for job in jobs:
            job.claim.release()


def _turn(job: Job, origin: shelf.Origin, places: Places | None = None) -> None:
    """Look at the shelf for what others did meanwhile; if the run is left to us and ``places`` are given, start it."""
    job.looked = time.monotonic()
    try:
        mine = places is not None and _claimed(job)
    except OSError as problem:
        job.becomes("failed", f"{job.claim.lock_file} cannot be locked: {problem.strerror}")
        return
    if run := shelf.completed(job.params, origin):
        job.becomes("found", run=run)
    elif run := shelf.at_work(job.params, origin):
        job.becomes("elsewhere", f"{run.worker} is at work on it in {run.path.name}", run)
    elif job.run is not None and (error := shelf.failed(job.run)):
        job.becomes("failed", f"in another process: {error}")
    elif places is not None and not mine:
        job.becomes("elsewhere", "another study is at work on it")
    elif places is not None:
        try:
            job.process = places.start(job.params, origin, shelf.broken_off(job.params, origin))
        except (NotStarted, ParamError, OSError) as refused:  # its parameter file may have been edited meanwhile
            job.becomes("failed", str(refused))
        else:
            job.began = time.monotonic()
            job.becomes("running")


def _claimed(job: Job) -> bool:
    """Whether no other study of this machine (or shared disk) starts or computes the job."""
    try:
        job.claim.acquire()
    except Timeout:
        return False
    return True


def _see(job: Job, origin: shelf.Origin) -> None:
    """What became of a job that was started here."""
    if job.process is None or (said := job.process.ended()) is None:
        return
    job.seconds = time.monotonic() - job.began
    if run := shelf.completed(job.params, origin):
        job.becomes("completed", run=run)
    elif run := shelf.at_work(job.params, origin):  # others were faster: a cluster's queue is long, say
        job.becomes("elsewhere", f"{run.worker} is at work on it in {run.path.name}", run)
    else:
        job.becomes("failed", said or "code, notebook or data were changed before it completed")


def command(params: Params, left: Run | None) -> list[str]:
    """What ``kepo`` is told to make this run: to go on with one that was broken off, or to begin it."""
    if left is not None:
        return ["resume", str(left.path)]
    return ["run", NOTEBOOK, *params.to_arguments()]


def last_words(output: str) -> str:
    """The sentence with which ``kepo`` ended, or what its process said last."""
    lines = [line for line in output.strip().splitlines() if not line.startswith("submitit ")] or ["it said nothing"]
    progress = (" everything about it is in ", "kepo: run folder ", "kepo: resuming ")
    told = [line for line in lines if line.startswith("kepo: ") and not any(part in line for part in progress)]
    return (told or lines)[-1].removeprefix("kepo: ")


# This machine -------------------------------------------------------------------------------------------------------


def slots(wanted: int = 0, processes: int = 1) -> list[dict[str, str]]:
    """The environment of each place where a run can compute: GPUs of its own, else an equal share of the CPU's cores.

    ``wanted``: how many, at most as many as there are GPUs or cores for; 0: all of them. ``processes``: of a run, each
    of which takes a GPU or a core.
    """
    if wanted < 0:
        raise ParamError(f"slots must be at least 0, got {wanted}")
    import torch  # takes seconds, and jobs on a cluster's nodes do not need it

    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    count = min(wanted or cores, max(1, (gpus or cores) // processes))
    if gpus:
        allotted = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
        shares = [allotted[place * processes : (place + 1) * processes] for place in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))}] * count


class Here:
    """The `slots` of this machine, as `Places`."""

    pause = 0.2

    def __init__(self, wanted: int = 0, processes: int = 1) -> None:
        self._slots = slots(wanted, processes)
        self._taken: dict[int, Started] = {}

    @property
    def count(self) -> int:
        """A run for each slot."""
        return len(self._slots)

    def start(self, params: Params, origin: shelf.Origin, left: Run | None) -> Started:
        """Begin or go on in the first slot that is free."""
        free = [slot for slot in range(self.count) if slot not in self._taken or self._taken[slot].ended() is not None]
        self._taken[free[0]] = _Process(command(params, left), self._slots[free[0]])
        return self._taken[free[0]]


class _Process:
    """``kepo`` with these arguments, on this machine."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile("ab+")  # noqa: SIM115  # appended to by one process, read by the other
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kepo_core.cli", *arguments],
            cwd=project_root(),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )

    def ended(self) -> str | None:
        code = self._process.poll()
        if not code:
            return code if code is None else ""
        return f"its process was ended by {signal.Signals(-code).name}" if code < 0 else last_words(self.output())

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        self._process.wait()
