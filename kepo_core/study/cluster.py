"""Runs on a cluster: each one a job of Slurm, submitted through submitit.

A cluster file holds what submitit's ``AutoExecutor`` takes, and how many runs are submitted at a time:

```yaml
cluster: slurm            # or local: submitit's own processes on this machine
slots: 8                  # runs at a time, waiting in Slurm's queue or computing
timeout_min: 240
gpus_per_node: 1
cpus_per_task: 8
slurm_partition: gpu
```

A job may wait in the queue for hours, so it looks up finished runs when its turn comes (`work`).
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import submitit
import submitit.helpers

from kepo_core.errors import ParamError
from kepo_core.exit_codes import COMPLETED, FAILED
from kepo_core.params import Params, project_root, resolve
from kepo_core.params_io import read_yaml
from kepo_core.runs import shelf
from kepo_core.study import jobs

_LATE = 10.0  # seconds that a shared disk may take to show a job's result
_PATIENCE = 45.0  # seconds that cancelled jobs get to end: Slurm kills them after 30


class Cluster:
    """`jobs.Executor` on the cluster that a file describes; ``slots`` are used instead of the file's, if any."""

    pause = 2.0

    def __init__(self, file: str, results_dir: str, slots: int = 0) -> None:
        """Raises `ParamError` naming the entry that does not fit."""
        if slots < 0:
            raise ParamError(f"slots must be at least 0, got {slots}")
        given = {"cpus_per_task": 1, **read_yaml(path := resolve(file))}
        for name in ("slots", "timeout_min", "cpus_per_task"):
            if type(given.get(name)) is not int or given[name] < 1:
                raise ParamError(f"{name} in {path.name} is {given.get(name)!r}, expected a whole number from 1 on")
        if given.get("cluster") not in ("slurm", "local"):
            raise ParamError(f"cluster in {path.name} is {given.get('cluster')!r}, expected slurm or local")
        self.count: int = slots or given["slots"]
        self._threads: int = given["cpus_per_task"]
        call = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"  # job numbers come again
        self._executor = _executor(given, jobs.jobs_dir(results_dir) / call, path.name)

    def start(self, params: Params, origin: shelf.Origin) -> "Submitted":
        """Submit a run; `ParamError` if the cluster refuses it."""
        try:
            with submitit.helpers.clean_env():  # the command itself may be part of a Slurm job
                return Submitted(self._executor.submit(work, params, origin, self._threads))
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise ParamError(f"the cluster refused it: {' '.join(str(error).split())}") from error


def _executor(given: dict[str, Any], folder: Path, name: str) -> submitit.AutoExecutor:
    """Submitit's executor for a cluster file; `ParamError` if it does not take what is given."""
    asked = {entry: value for entry, value in given.items() if entry not in ("cluster", "slots")}
    try:
        executor = submitit.AutoExecutor(folder, cluster=given["cluster"])
        executor.update_parameters(**{"name": "kepo", **asked, "stderr_to_stdout": True})
    except RuntimeError as error:
        raise ParamError(f"cluster in {name} is slurm, but Slurm's commands (srun) are not found here") from error
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ParamError(f"{name} does not fit submitit: {str(error).splitlines()[0]}") from error
    return executor


def work(params: Params, origin: shelf.Origin, threads: int) -> int:
    """Make one run on the cluster's node; returns `kepo`'s exit code.

    What others completed or compute by now is left to them. Whatever the cluster sends to end a job (SIGTERM when it is
    cancelled, SIGUSR2 before its time is up) reaches `kepo` as one SIGTERM, after which its folder can be resumed.
    """
    if shelf.completed(params, origin) or shelf.at_work(params, origin):
        return COMPLETED
    stopped: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(signum: int, frame: object) -> None:
        stopped.append(signum)
        if process is not None:
            process.terminate()

    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(ending, stop)
    process = subprocess.Popen(
        jobs.command(params, origin),
        cwd=project_root(),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # Slurm sends SIGUSR2 to all processes of a job; what is ignored here is ignored by all below.
        preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
    )
    if stopped:  # while it was started
        process.terminate()
    code = process.wait()
    if stopped:
        print("kepo: the cluster stopped it; the same command resumes it", flush=True)
    return code


class Submitted:
    """A submitted run, as `jobs.Handle`."""

    def __init__(self, job: "submitit.Job[int]") -> None:
        self._job = job
        self._ended = 0.0  # when it was first seen to have ended without a result

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        if not self._job.done():
            return None
        if self._job.paths.result_pickle.exists():
            return FAILED if self._job.exception() else self._job.result()
        self._ended = self._ended or time.monotonic()
        return FAILED if time.monotonic() - self._ended >= _LATE else None

    def reason(self) -> str:
        """Why it failed, from its log; Slurm's word where the job left no result."""
        log = self._job.paths.stdout
        if not self._job.paths.result_pickle.exists():
            return f"its job {self._job.job_id} ended without a result ({self._job.state}), see {log}"
        code = FAILED if self._job.exception() else self._job.result()
        return jobs.reason(code, log.read_text(encoding="utf-8", errors="replace"))

    def terminate(self) -> None:
        """Cancel it."""
        self._job.cancel(check=False)

    def wait(self) -> None:
        """Return when it has ended after `terminate`, or after the time in which Slurm kills it."""
        until = time.monotonic() + _PATIENCE
        while not self._job.done(force_check=True) and time.monotonic() < until:
            time.sleep(0.5)
