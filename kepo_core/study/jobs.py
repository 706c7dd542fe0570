"""Many runs, several at a time: each one is `kepo run` in its own process, and completed runs are reused.

One loop, `run_all`, works with an executor that starts processes: `LocalExecutor` on this machine, or
``kepo_core.study.cluster`` on Slurm. From just before its start to its end, a run holds a lock in ``results/.jobs``:
two studies at the same time share the work. A kill leaves nothing to clean up: locks end with their process.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from kepo_core.errors import ParamError
from kepo_core.params import Params, at_root, project_root
from kepo_core.params_io import tagged_cell
from kepo_core.runs import shelf
from kepo_core.runs.run import Run

#: The notebook that trains and evaluates one method.
NOTEBOOK = "notebooks/03_train_kepo.ipynb"

#: reused: it completed earlier; elsewhere: another process makes it, and this one waits for its end.
State = Literal["waiting", "reused", "running", "completed", "failed", "elsewhere"]


def jobs_dir(results_dir: str) -> Path:
    """The folder with the locks and logs of a results folder's runs."""
    return at_root(results_dir) / ".jobs"


class Handle(Protocol):
    """A started run: the methods of ``subprocess.Popen`` that are used here, and the reason of a non-zero exit code."""

    def poll(self) -> int | None: ...  # noqa: D102
    def terminate(self) -> None: ...  # noqa: D102
    def wait(self) -> object: ...  # noqa: D102
    def reason(self) -> str: ...  # noqa: D102


class Executor(Protocol):
    """Starts or resumes runs, at most ``count`` at a time; they are polled every ``pause`` seconds."""

    count: int
    pause: float

    def start(self, params: Params, origin: shelf.Origin) -> Handle: ...  # noqa: D102


@dataclass
class Job:
    """One run among many, and its state."""

    name: str
    params: Params
    state: State = "waiting"
    note: str = ""  # why it failed, or which process makes it
    run: Run | None = None  # the completed or running one, once it has a folder
    handle: Handle | None = None
    began: float = 0.0  # monotonic seconds
    seconds: float = 0.0  # from start to end
    claim: FileLock = field(init=False)

    def __post_init__(self) -> None:
        self.claim = FileLock(jobs_dir(self.params.results_dir) / f"{self.params.hash}.lock", timeout=0)

    @property
    def passed(self) -> float:
        """Seconds since it was started here, or that it took; 0 if it was not started here."""
        return time.monotonic() - self.began if self.state == "running" else self.seconds

    def set_state(self, state: State, note: str = "", run: Run | None = None) -> None:
        """Change the state; unless the job runs here, other studies may take it."""
        self.state, self.note, self.run = state, note, run
        if state != "running":
            self.claim.release()


#: Called with all jobs whenever something may have changed.
Show = Callable[[Sequence[Job]], None]


def run_all(
    wanted: Mapping[str, Params], data: dict[str, Any], executor: Executor, show: Show = lambda jobs: None
) -> tuple[dict[str, Run], dict[str, str]]:
    """Reuse, resume or start every run of ``wanted`` (name → parameters), until all have ended.

    Args:
        wanted: the runs; names with the same parameters share one run.
        data: `StudyData.identity` of the data that all of them share.
        executor: `LocalExecutor`, or a cluster.
        show: called with the jobs when they may have changed.

    Returns the completed runs, and for the others why they failed; there are no retries. If another process makes a
    run, this one waits, and resumes the run if it is interrupted there. If this process is interrupted, so are the
    runs that it started, and the next call resumes them.
    """
    origin = shelf.origin(project_root() / NOTEBOOK, data)  # as it is now: files may be edited while runs are made
    jobs: dict[str, Job] = {}  # by the parameters' hash
    for name, params in wanted.items():
        jobs.setdefault(params.hash, Job(name, params))
    try:
        _run(list(jobs.values()), origin, executor, show)
    finally:
        _stop(list(jobs.values()))
    ended = {name: jobs[params.hash] for name, params in wanted.items()}
    return (
        {name: job.run for name, job in ended.items() if job.run is not None},
        {name: job.note for name, job in ended.items() if job.state == "failed"},
    )


def completed(wanted: Mapping[str, Params], data: dict[str, Any]) -> dict[str, Run]:
    """The runs of ``wanted`` that `run_all` would reuse; nothing is run."""
    origin = shelf.origin(project_root() / NOTEBOOK, data)
    found = {name: shelf.completed(params, origin) for name, params in wanted.items()}
    return {name: run for name, run in found.items() if run is not None}


def _run(jobs: Sequence[Job], origin: shelf.Origin, executor: Executor, show: Show) -> None:
    """Until all have ended: poll the running jobs, and give free slots to waiting ones."""
    for job in jobs:
        _advance(job, origin)
    while True:
        for job in jobs:
            if job.state == "running":
                _poll(job, origin)
        for job in jobs:
            free = sum(other.state == "running" for other in jobs) < executor.count
            if (job.state == "waiting" and free) or job.state == "elsewhere":
                _advance(job, origin, executor if free else None)
        show(jobs)
        if all(job.state in ("reused", "completed", "failed") for job in jobs):
            return
        time.sleep(executor.pause)


def _stop(jobs: Sequence[Job]) -> None:
    """Interrupt the jobs that still run, because this process is interrupted, and wait until they have ended."""
    handles = [job.handle for job in jobs if job.state == "running" and job.handle]
    for handle in handles:
        handle.terminate()
    for handle in handles:
        handle.wait()
    for job in jobs:
        job.claim.release()


def _advance(job: Job, origin: shelf.Origin, executor: Executor | None = None) -> None:
    """Look up what other processes did meanwhile; if the run is still to be made, start it on ``executor``, if any."""
    mine = False
    try:
        if executor is not None:
            job.claim.acquire()  # before the look-up, which then finds what another study completes in between
            mine = True
    except Timeout:  # another study on this machine, or on the shared disk, has it
        pass
    except OSError as problem:
        job.set_state("failed", f"{job.claim.lock_file} cannot be locked: {problem.strerror}")
        return
    if run := shelf.completed(job.params, origin):
        job.set_state("reused", run=run)
    elif run := shelf.at_work(job.params, origin):
        job.set_state("elsewhere", f"{run.worker} is making it in {run.path.name}", run)
    elif job.run is not None and (error := shelf.failed(job.run)):
        job.set_state("failed", f"in another process: {error}")
    elif executor is not None and not mine:
        job.set_state("elsewhere", "another study is making it")
    elif executor is not None:
        try:
            job.handle = executor.start(job.params, origin)
            job.began = time.monotonic()
            job.set_state("running")
        except (ParamError, OSError) as refused:  # its parameter file may have been edited meanwhile
            job.set_state("failed", str(refused))


def _poll(job: Job, origin: shelf.Origin) -> None:
    """Find the folder of a job that was started here and, once it has ended, its result."""
    assert job.handle is not None
    job.run = job.run or shelf.at_work(job.params, origin)
    code = job.handle.poll()
    if code is None:
        return
    job.seconds = time.monotonic() - job.began
    if run := shelf.completed(job.params, origin):
        job.set_state("completed", run=run)
    elif run := shelf.at_work(job.params, origin):  # another process was faster: a cluster's queue can be long
        job.set_state("elsewhere", f"{run.worker} is making it in {run.path.name}", run)
    else:
        changed = "code, notebook or data changed before it completed"
        job.set_state("failed", job.handle.reason() if code else changed)


def command(params: Params, origin: shelf.Origin) -> list[str]:
    """The command for this run: it resumes an interrupted run, or starts a new one."""
    kepo = [sys.executable, "-m", "kepo_core.cli"]
    if interrupted := shelf.broken_off(params, origin):
        return [*kepo, "resume", str(interrupted.path)]
    return [*kepo, "run", NOTEBOOK, *params.to_arguments(tagged_cell(project_root() / NOTEBOOK))]


def reason(code: int, output: str) -> str:
    """Why ``kepo`` ended with ``code``: its own message, or the last line of its output."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    lines = [line for line in output.strip().splitlines() if not line.startswith("submitit ")] or ["it said nothing"]
    where = (" everything about it is in ", "kepo: run folder ", "kepo: resuming ")
    told = [line for line in lines if line.startswith("kepo: ") and not any(part in line for part in where)]
    return (told or lines)[-1].removeprefix("kepo: ")


# This machine -------------------------------------------------------------------------------------------------------


def slots(wanted: int = 0, processes: int = 1) -> list[dict[str, str]]:
    """The environment variables of each slot: its own GPUs or, without GPUs, an equal share of the cores.

    ``wanted``: number of slots, limited by the GPUs or cores; 0: as many as fit. ``processes``: of a run, each with
    one GPU or core.
    """
    if wanted < 0:
        raise ParamError(f"slots must be at least 0, got {wanted}")
    import torch  # takes seconds, and jobs on a cluster do not need it

    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    count = min(wanted or cores, max(1, (gpus or cores) // processes))
    if gpus:
        allotted = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
        shares = [allotted[slot * processes : (slot + 1) * processes] for slot in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))}] * count


class LocalExecutor:
    """Runs in the `slots` of this machine; the output of each is in ``results/.jobs/HASH.log``."""

    pause = 0.5

    def __init__(self, wanted: int = 0, processes: int = 1) -> None:
        self._slots = slots(wanted, processes)
        self._taken: list[Process | None] = [None] * len(self._slots)
        self.count = len(self._slots)

    def start(self, params: Params, origin: shelf.Origin) -> "Process":
        """Start or resume the run in the first free slot."""
        free = next(i for i, process in enumerate(self._taken) if process is None or process.poll() is not None)
        log = jobs_dir(params.results_dir) / f"{params.hash}.log"
        self._taken[free] = started = Process(command(params, origin), log, self._slots[free])
        return started


class Process(subprocess.Popen[bytes]):
    """A `command` on this machine, in its own session: Ctrl-C reaches it once, through this process."""

    def __init__(self, arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("wb") as output:
            super().__init__(
                arguments,
                cwd=project_root(),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def reason(self) -> str:
        """`reason`, from the log."""
        return reason(self.returncode, self.log.read_text(encoding="utf-8", errors="replace"))
