"""Training on several processes: ``accelerate launch`` starts `experiment.worker`, and its progress is shown here.

The workers read everything from the run folder and leave everything in it; only the first of them writes. Their
standard input is a pipe that this process holds: it closes when this process ends, however it ends, and then they end.
On several machines, `train` runs on the first and `join` on the others, over one file system.
"""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType

from kepo_core.errors import ParamError
from kepo_core.experiment.live import LiveTraining, read_step
from kepo_core.experiment.methods import needs_teacher
from kepo_core.files import read_json, write_json
from kepo_core.params import Params, project_root, resolve
from kepo_core.runs.run import Run

#: How the processes of a run without ``accelerate_config`` share the models: each has all of them.
WHOLE = "params/accelerate/ddp.yaml"
#: With this a worker's last line begins; in it stands which process it was.
LAST_WORDS = "kepo: process "

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_MIXED = {"fp32": "no", "bf16": "bf16"}
_RENDEZVOUS = "rendezvous.json"
#: Seconds that `join` waits for a run folder that is not there yet.
_PATIENCE = 600.0
_LOOK_EVERY = 5.0  # seconds between two looks at the first machine's run
_KILLED = re.compile(r"\b(SIG[A-Z]+)\b.*received")


class TrainingFailed(RuntimeError):  # noqa: N818  # as it reads where it is raised
    """A worker ended early; the sentence is its own."""


def several(params: Params) -> bool:
    """Whether other processes train, started by `train`."""
    return params.method != "none" and (params.processes > 1 or bool(params.accelerate_config))


def configuration(params: Params) -> ClusterConfig:
    """Accelerate's own reading of ``accelerate_config``; `ParamError` if it is none, or says other than ``params``."""
    path = resolve(params.accelerate_config or WHOLE)
    try:
        config = ClusterConfig.from_yaml_file(str(path))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as problem:
        raise ParamError(f"accelerate_config {path} cannot be used: {problem}") from problem
    if config.num_processes not in (-1, params.processes):
        raise ParamError(
            f"processes is {params.processes} but accelerate_config {path.name} is for {config.num_processes}: "
            "set one as the other"
        )
    if config.mixed_precision not in (None, _MIXED[params.precision]):
        raise ParamError(
            f"precision is {params.precision} but accelerate_config {path.name} has mixed_precision "
            f"{config.mixed_precision}: leave that line out, for precision decides"
        )
    if config.distributed_type == DistributedType.FSDP and config.fsdp_config.get("fsdp_version") != 2:
        raise ParamError(f"accelerate_config {path.name} is for FSDP of another version, expected fsdp_version: 2")
    if params.processes % config.num_machines:
        raise ParamError(f"processes is {params.processes}, expected a multiple of {config.num_machines} machines")
    return config


def check(params: Params) -> None:
    """Raise `ParamError` where this machine cannot train as ``params`` say."""
    gpus = torch.cuda.device_count()
    if params.of_trl("use_vllm") and params.method == "kepo":
        if importlib.util.find_spec("vllm") is None:
            raise ParamError("use_vllm is True but vllm is not installed: pip install 'trl[vllm]', or set it to False")
        if not gpus:
            raise ParamError("use_vllm is True but this machine has no GPU: set it to False")
    if gpus > 1 and params.processes == 1 and params.method != "none":
        raise ParamError(
            f"processes is 1 but this machine shows {gpus} GPUs: set CUDA_VISIBLE_DEVICES to one of them (0, say), or "
            "processes to as many (and prompts_per_step to a multiple of prompts_per_device × processes)"
        )
    if not several(params):
        return
    config = configuration(params)
    if config.distributed_type in _SHARDED and not gpus:
        raise ParamError(
            f"accelerate_config {params.accelerate_config} shards models over GPUs, and this machine has none: "
            "leave it empty, for whole models in each process"
        )
    quantised = params.teacher_quantization != "none" and needs_teacher(params)
    if config.distributed_type == DistributedType.FSDP and params.method == "gkd" and not quantised:
        raise ParamError(
            f"accelerate_config {params.accelerate_config} is for FSDP2, by which TRL's DistillationTrainer does not "
            "share out its teacher: take a ZeRO-3 file for method gkd, or a quantised teacher"
        )
    if config.distributed_type == DistributedType.DEEPSPEED and quantised:
        raise ParamError(
            f"teacher_quantization is {params.teacher_quantization!r} but accelerate_config {params.accelerate_config} "
            "is for DeepSpeed, which takes no quantised models: take an FSDP2 file, or set it to none"
        )
    if config.distributed_type == DistributedType.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise ParamError(
            f"accelerate_config {params.accelerate_config} needs deepspeed, which is not installed: "
            "pip install deepspeed, or take an FSDP2 file"
        )
    if gpus and params.processes // config.num_machines > gpus:
        raise ParamError(
            f"processes is {params.processes} on {config.num_machines} machine(s), but this one has {gpus} GPU(s)"
        )


def train(params: Params, run: Run, shown: LiveTraining) -> None:
    """Train in ``params.processes`` new processes, from the run's newest checkpoint; the model lies in ``model`` then.

    Raises `TrainingFailed` with the last words of the worker that ended first. If this process is interrupted, so are
    they; what they wrote is whole.
    """
    run.training_dir.mkdir(exist_ok=True)
    meeting = run.training_dir / _RENDEZVOUS
    place: dict[str, Any] = {"address": "", "port": 0}  # one machine: accelerate looks for a free port
    if (config := configuration(params)).num_machines > 1:
        address, port = config.main_process_ip or socket.gethostname(), config.main_process_port or _free_port()
        place = {"address": address, "port": port}
        write_json(meeting, {**place, "resumed": run.status.get("resumed", [])})
    try:
        for step, total, logs in _steps(_watched(params, run, rank=0, **place)):
            shown.show(step, total, logs)
        shown.finish()
    finally:
        meeting.unlink(missing_ok=True)


def join(folder: str, rank: int) -> None:
    """Train along as machine ``rank`` (1, 2, …) of the run in ``folder``, which another machine makes; then return.

    Waits until that run is ready to train. Raises `TrainingFailed` as `train` does, and `ParamError` if the run is
    over, does not begin within ten minutes, is made by one machine alone, or cannot be trained on this one.
    """
    if rank < 1:
        raise ParamError(f"rank is {rank}, expected 1 or more: machine 0 makes the run, with `kepo run`")
    until = time.monotonic() + _PATIENCE
    print(f"kepo: waiting for {folder} and its training to begin", flush=True)
    while not (resolve(folder) / "status.json").is_file():
        if time.monotonic() > until:
            raise ParamError(
                f"run_dir {folder} has not come within {_PATIENCE / 60:.0f} minutes: has the run begun on the first "
                "machine, and is this its folder there, on a file system that both see?"
            )
        time.sleep(1)
    run = Run.open(resolve(folder))
    check(run.params)
    machines = configuration(run.params).num_machines
    if not 1 <= rank < machines:
        raise ParamError(f"rank is {rank}, expected 1 to {machines - 1}: the run is made by {machines} machine(s)")
    meeting = run.training_dir / _RENDEZVOUS
    while not (meeting.is_file() and read_json(meeting)["resumed"] == run.status.get("resumed", [])):
        if (state := run.state) != "running":
            raise ParamError(f"run_dir {folder} is {state}, expected a run that is about to train")
        time.sleep(1)
    place = read_json(meeting)
    lines = _watched(run.params, run, rank, place["address"], place["port"], while_=lambda: run.state == "running")
    try:
        for _ in lines:
            pass
    except TrainingFailed:
        if (state := run.state) != "running":
            raise TrainingFailed(f"run_dir {folder} is {state}: the first machine has stopped") from None
        raise


def command(params: Params, run: Run, rank: int, address: str, port: int) -> list[str]:
    """What starts this machine's workers."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(resolve(params.accelerate_config or WHOLE))]
    launch += ["--num_processes", str(params.processes), "--mixed_precision", _MIXED[params.precision]]
    launch += ["--main_process_port", str(port)]
    if address:
        launch += ["--main_process_ip", address, "--machine_rank", str(rank)]
    return [*launch, "-m", "kepo_core.experiment.worker", str(run.path)]


def _watched(
    params: Params, run: Run, rank: int, address: str, port: int, while_: Callable[[], bool] | None = None
) -> Iterable[str]:
    """Start this machine's workers and yield the lines that they write, to their end.

    All of them are kept in ``training/processes-RANK.log`` until they have ended well. They are ended where ``while_``,
    asked every few seconds, no longer holds: who waits for another machine's process may wait for half an hour.
    """
    here = params.processes // configuration(params).num_machines
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // here))}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"  # else accelerate quietly makes every process a run of its own
    log, first, last = run.training_dir / f"processes-{rank}.log", list[str](), deque[str](maxlen=400)
    process = subprocess.Popen(
        command(params, run, rank, address, port),
        cwd=project_root(),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches them through us, once
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdin is not None and process.stdout is not None

    def look(holds: Callable[[], bool]) -> None:
        while process.poll() is None:
            if not holds():
                process.terminate()
            time.sleep(_LOOK_EVERY)

    if while_ is not None:
        threading.Thread(target=look, args=[while_], daemon=True).start()
    try:
        with log.open("w", encoding="utf-8") as kept:
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                last.append(line.rstrip("\n"))
                if line.startswith(LAST_WORDS) and not first:
                    first.append(last[-1])  # kept however much the others have to say behind it
                yield line
        if process.wait():
            raise TrainingFailed(last_words([*first, *last]))
        log.unlink()
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()


def _steps(lines: Iterable[str]) -> Iterable[tuple[int, int, dict[str, Any]]]:
    return (step for line in lines if (step := read_step(line)) is not None)


def last_words(lines: Iterable[str]) -> str:
    """Why the workers that wrote ``lines`` ended: the first to say so is the cause, the others miss it."""
    lines = list(lines)
    told = [line.removeprefix("kepo: ") for line in lines if line.startswith(LAST_WORDS)]
    killed = [found[1] for line in lines if (found := _KILLED.search(line))]
    if told:
        return told[0]
    if killed:
        return f"a process was ended by {killed[0]}" + (", for want of memory perhaps" * (killed[0] == "SIGKILL"))
    return next((line.strip() for line in reversed(lines) if line.strip()), "the processes ended and said nothing")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def end_with_starter() -> None:
    """In a worker: end at once when the process that started it is gone."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would disturb the interpreter's end
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
