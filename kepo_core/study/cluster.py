"""Runs on a cluster: each one a job of Slurm, handed over by submitit.

A cluster file holds what submitit's ``AutoExecutor`` takes, and how many runs are handed over at a time:

```yaml
cluster: slurm            # or local: submitit's own processes on this machine
slots: 8                  # runs at a time, waiting in Slurm's queue or computing
timeout_min: 240
gpus_per_node: 1
cpus_per_task: 8
slurm_partition: gpu
```

A job may wait in the queue for hours, so it looks at the shelf when its turn comes (`work`). It writes to a log in
``results/.jobs``, from which its progress is read.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import submitit
import submitit.helpers

from kepo_core.errors import ParamError
from kepo_core.exit_codes import COMPLETED, INTERRUPTED
from kepo_core.params import Params, project_root, resolve
from kepo_core.params_io import read_yaml
from kepo_core.runs import shelf
from kepo_core.runs.run import Run
from kepo_core.study import jobs

_LATE = 10.0  # seconds that a shared disk may take to show what a job left
_PATIENCE = 45.0  # seconds that cancelled jobs get to end: Slurm kills them after 30


class Cluster:
    """`jobs.Places` on the cluster that a file describes."""

    def __init__(self, file: str, results_dir: str, slots: int = 0) -> None:
        """Raises `ParamError` naming the entry that does not fit.

        ``slots`` are used instead of the file's, if there are any.
        """
        if slots < 0:
            raise ParamError(f"slots must be at least 0, got {slots}")
        path = resolve(file)
        given = read_yaml(path)
        self._local = given.get("cluster") == "local"
        if given.get("cluster") not in ("slurm", "local"):
            raise ParamError(f"cluster in {path.name} is {given.get('cluster')!r}, expected slurm or local")
        for name, least in (("slots", 1), ("timeout_min", 1), ("cpus_per_task", 1)):
            if name in given and (type(given[name]) is not int or given[name] < least):
                raise ParamError(f"{name} in {path.name} is {given[name]!r}, expected a whole number from {least} on")
        for name in ("slots", "timeout_min"):
            if name not in given:
                raise ParamError(f"{path.name} has no {name}, expected a whole number from 1 on")
        self.count: int = slots or given["slots"]
        self.pause = 0.5 if self._local else 2.0
        self._threads = given.get("cpus_per_task", 1)
        call = (
            f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"  # job numbers come again: one folder each
        )
        folder = project_root() / results_dir / jobs.JOBS_DIR / call
        self._executor = _executor(given, folder, path.name)

    def start(self, params: Params, origin: shelf.Origin, left: Run | None) -> jobs.Started:
        """Hand a run over; `jobs.NotStarted` if the cluster refuses it."""
        try:
            with submitit.helpers.clean_env():  # the command itself may stand in a job of Slurm
                job = self._executor.submit(work, params, origin, self._threads)
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise jobs.NotStarted(f"the cluster refused it: {' '.join(str(error).split())}") from error
        return _Submitted(job, self._local)


def _executor(given: dict[str, Any], folder: Path, name: str) -> submitit.AutoExecutor:
    """Submitit's executor for a cluster file; `ParamError` if it does not take what is given."""
    asked = {entry: value for entry, value in given.items() if entry not in ("cluster", "slots")}
    try:
        executor = submitit.AutoExecutor(folder, cluster=given["cluster"])
    except RuntimeError as error:
        raise ParamError(f"cluster in {name} is slurm, but Slurm's commands (srun) are not found here") from error
    try:
        executor.update_parameters(**{"name": "kepo", **asked, "stderr_to_stdout": True})
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ParamError(f"{name} does not fit submitit: {str(error).splitlines()[0]}") from error
    return executor


def work(params: Params, origin: shelf.Origin, threads: int) -> int:
    """Make one run where the cluster says; returns `kepo`'s exit code.

    What others completed or compute by now is left to them. Whatever the cluster sends to end a job (SIGTERM when it is
    cancelled, SIGUSR2 before its time is up) reaches `kepo` as one SIGTERM, after which its folder can be gone on with.
    """
    if shelf.completed(params, origin) or shelf.at_work(params, origin):
        return COMPLETED
    arguments = jobs.command(params, shelf.broken_off(params, origin))
    heard: list[str] = []
    process: subprocess.Popen[bytes] | None = None

    def end(signum: int, frame: object) -> None:
        heard.append(signal.Signals(signum).name)
        if process is not None and len(heard) == 1:
            process.terminate()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, end)
    if not heard:
        process = subprocess.Popen(
            # Slurm sends SIGUSR2 to all processes of a job; what is ignored here is ignored by all below.
            ["/bin/sh", "-c", 'trap "" USR2; exec "$@"', "sh", sys.executable, "-m", "kepo_core.cli", *arguments],
            cwd=project_root(),
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        if heard:  # while it was started
            process.terminate()
    code = process.wait() if process is not None else INTERRUPTED
    if heard:
        print(f"kepo: the cluster stopped it ({heard[0]}); the same command goes on with it", flush=True)
    return code


class _Submitted:
    """A run that was handed over."""

    def __init__(self, job: "submitit.Job[int]", local: bool) -> None:
        self._job, self._local = job, local
        self._done_since = 0.0

    def ended(self) -> str | None:
        if not self._job.done():
            return None
        self._done_since = self._done_since or time.monotonic()
        if self._job.paths.result_pickle.exists():
            well = self._job.exception() is None and self._job.result() == COMPLETED
            return "" if well else jobs.last_words(self.output())
        if time.monotonic() - self._done_since < _LATE:
            return None
        return f"its job {self._job.job_id} ended without a result ({self._job.state}), see {self._job.paths.stdout}"

    def output(self) -> str:
        log = self._job.paths.stdout
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def stop(self) -> None:
        if self._job.done():
            return
        if self._local:  # what submitit sends by itself kills after a second
            os.kill(int(self._job.job_id), signal.SIGTERM)
        else:
            self._job.cancel(check=False)

    def wait(self) -> None:
        until = time.monotonic() + _PATIENCE
        while not self._job.done(force_check=True) and time.monotonic() < until:
            time.sleep(0.5)
