"""Runs on a cluster: each one is a Slurm job, submitted through submitit.

A cluster file has the settings of submitit's ``AutoExecutor``, and the number of runs that are submitted at a time:

```yaml
cluster: slurm            # or local: submitit's own processes on this machine
slots: 8                  # runs at a time, queued or running
timeout_min: 240
gpus_per_node: 1
cpus_per_task: 8
slurm_partition: gpu
```

A job may wait in the queue for hours, so it looks up finished runs when it starts (`work`).
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

_LATE = 10.0  # seconds until a job's result shows on a shared disk, at most
_PATIENCE = 45.0  # seconds to wait for cancelled jobs: Slurm kills them after 30


class Cluster:
    """`jobs.Executor` on the cluster that a file describes; ``slots``, unless 0, replaces the file's number."""

    pause = 2.0

    def __init__(self, file: str, results_dir: str, slots: int = 0) -> None:
        """Raises `ParamError` naming the entry that does not fit."""
        if slots < 0:
            raise ParamError(f"slots must be at least 0, got {slots}")
        given = {"cpus_per_task": 1, **read_yaml(path := resolve(file))}
        for name in ("slots", "timeout_min", "cpus_per_task"):
            if type(given.get(name)) is not int or given[name] < 1:
                raise ParamError(f"{name} in {path.name} is {given.get(name)!r}, expected a whole number of at least 1")
        if given.get("cluster") not in ("slurm", "local"):
            raise ParamError(f"cluster in {path.name} is {given.get('cluster')!r}, expected slurm or local")
        self.count: int = slots or given["slots"]
        self._threads: int = given["cpus_per_task"]
        call = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"  # job numbers repeat
        self._executor = _executor(given, jobs.jobs_dir(results_dir) / call, path.name)

    def start(self, params: Params, origin: shelf.Origin) -> "Submitted":
        """Submit a run; `ParamError` if the cluster refuses it."""
        try:
            with submitit.helpers.clean_env():  # the command itself may be part of a Slurm job
                return Submitted(self._executor.submit(work, params, origin, self._threads))
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise ParamError(f"the cluster refused the job: {' '.join(str(error).split())}") from error


def _executor(given: dict[str, Any], folder: Path, name: str) -> submitit.AutoExecutor:
    """Submitit's executor for a cluster file; `ParamError` if submitit refuses the file's settings."""
    asked = {entry: value for entry, value in given.items() if entry not in ("cluster", "slots")}
    try:
        executor = submitit.AutoExecutor(folder, cluster=given["cluster"])
        executor.update_parameters(**{"name": "kepo", **asked, "stderr_to_stdout": True})
    except RuntimeError as error:
        raise ParamError(f"cluster in {name} is slurm, but Slurm's commands (srun) are not found here") from error
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ParamError(f"submitit refuses {name}: {str(error).splitlines()[0]}") from error
    return executor


def work(params: Params, origin: shelf.Origin, threads: int) -> int:
    """Make one run on a node of the cluster; returns `kepo`'s exit code.

    A run that another job has completed or is making is skipped. Signals that end a job (SIGTERM when it is cancelled,
    SIGUSR2 before its time is up) reach `kepo` as one SIGTERM; the run can be resumed afterwards.
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
        # Slurm sends SIGUSR2 to all processes of a job; child processes inherit that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
    )
    if stopped:  # while it was starting
        process.terminate()
    code = process.wait()
    if stopped:
        print("kepo: the cluster stopped the run; the same command resumes it", flush=True)
    return code


class Submitted:
    """A submitted run, as `jobs.Handle`."""

    def __init__(self, job: "submitit.Job[int]") -> None:
        self._job = job
        self._ended = 0.0  # when it was first seen to have ended without a result

    def poll(self) -> int | None:
        """The exit code, or None while the job has not ended."""
        if not self._job.done():
            return None
        if self._job.paths.result_pickle.exists():
            return FAILED if self._job.exception() else self._job.result()
        self._ended = self._ended or time.monotonic()
        return FAILED if time.monotonic() - self._ended >= _LATE else None

    def reason(self) -> str:
        """Why it failed, from its log; Slurm's state if the job left no result."""
        log = self._job.paths.stdout
        if not self._job.paths.result_pickle.exists():
            return f"its job {self._job.job_id} ended without a result ({self._job.state}), see {log}"
        code = FAILED if self._job.exception() else self._job.result()
        return jobs.reason(code, log.read_text(encoding="utf-8", errors="replace"))

    def terminate(self) -> None:
        """Cancel the job."""
        self._job.cancel(check=False)

    def wait(self) -> None:
        """Wait after `terminate` until the job has ended, at most `_PATIENCE` seconds."""
        until = time.monotonic() + _PATIENCE
        while not self._job.done(force_check=True) and time.monotonic() < until:
            time.sleep(0.5)
