"""Training and evaluation in other processes: ``accelerate launch`` starts `experiment.worker`; progress shows here.

The workers read from the run folder and write to it; only the first of them writes. Their standard input is a pipe of
this process: it closes when this process ends, however it ends, and then the workers end. On several machines with one
file system, `train` starts the workers of the first machine, and ``accelerate launch`` those of the others.
"""

import importlib.metadata
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType

from kepo_core.errors import ParamError
from kepo_core.experiment.evaluation import Progress, answered
from kepo_core.experiment.live import LiveTraining, read_rows, total_steps
from kepo_core.experiment.methods import needs_teacher
from kepo_core.files import holds_sockets
from kepo_core.method.vllm_rollouts import VERSIONS
from kepo_core.params import Params, project_root, resolve
from kepo_core.runs.run import Run

#: The configuration of a run without ``accelerate_config``: each process has whole models.
WHOLE = "params/accelerate/ddp.yaml"
#: Start of a worker's last line, before the number of its process.
LAST_WORDS = "kepo: process "
#: A worker's argument: call `end_with_starter`, because standard input is `train`'s pipe.
ATTACHED = "--attached"
#: A worker's argument: evaluate instead of training; "untrained" or "trained" follows.
EVALUATE = "--evaluate"

#: Variables from which accelerate reads the number of processes.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
#: ACCELERATE_* variables that override precision, compiler or sharding; `_OFF` are values without effect.
_SWITCHES = ("MIXED_PRECISION", "DYNAMO_BACKEND", "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM",
             "USE_PARALLELISM_CONFIG")  # fmt: skip
_OFF = ("", "no", "false", "0")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_MIXED = {"fp32": "no", "bf16": "bf16"}
_PAUSE = 0.5  # seconds between two polls of the workers
_KILLED = re.compile(r"\b(SIG[A-Z]+)\b.*received")


class TrainingFailed(RuntimeError):  # noqa: N818  # as it reads where it is raised
    """A worker ended early; the message is its own."""


def several(params: Params) -> bool:
    """Whether `train` starts other processes: several, those of ``accelerate_config``, or one with vLLM."""
    elsewhere = params.processes > 1 or bool(params.accelerate_config) or bool(params.of_trl("use_vllm"))
    return params.method != "none" and elsewhere


def evaluates(params: Params) -> bool:
    """Whether `evaluate` starts other processes: several, or one with vLLM."""
    return params.processes > 1 or bool(params.of_trl("use_vllm"))


def configuration(params: Params) -> ClusterConfig:
    """``accelerate_config`` as accelerate reads it; `ParamError` if it is invalid, or contradicts ``params``."""
    path = resolve(params.accelerate_config or WHOLE)
    try:
        config = ClusterConfig.from_yaml_file(str(path))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as problem:
        raise ParamError(f"accelerate_config {path} cannot be used: {problem}") from problem
    if config.num_processes not in (-1, params.processes):
        raise ParamError(
            f"processes is {params.processes} but accelerate_config {path.name} is for {config.num_processes}: "
            "set both to one number"
        )
    if config.mixed_precision not in (None, _MIXED[params.precision]):
        raise ParamError(
            f"precision is {params.precision} but accelerate_config {path.name} has mixed_precision "
            f"{config.mixed_precision}: delete that line, because precision decides"
        )
    if config.distributed_type == DistributedType.FSDP and config.fsdp_config.get("fsdp_version") != 2:
        raise ParamError(f"accelerate_config {path.name} is for another version of FSDP, expected fsdp_version: 2")
    if params.processes % config.num_machines:
        raise ParamError(f"processes is {params.processes}, expected a multiple of {config.num_machines} machines")
    return config


def check(params: Params) -> None:
    """Raise `ParamError` if this machine cannot train with ``params``."""
    check_alone(bool(params.of_trl("torch_compile")))
    gpus, temporary = torch.cuda.device_count(), tempfile.gettempdir()
    if params.of_trl("dataloader_num_workers") and sys.platform != "win32" and not holds_sockets(temporary):
        raise ParamError(
            f"dataloader_num_workers is {params.of_trl('dataloader_num_workers')}, but the path of the temporary "
            f"folder {temporary} is too long for their sockets: set TMPDIR to a shorter one, such as /tmp"
        )
    if params.of_trl("use_vllm"):
        _check_vllm(gpus)
    if gpus > 1 and params.processes == 1 and params.method != "none":
        raise ParamError(
            f"processes is 1 but this machine shows {gpus} GPUs: set CUDA_VISIBLE_DEVICES to one (for example 0), "
            f"or processes to {gpus} (and prompts_per_step to a multiple of prompts_per_device × processes)"
        )
    if params.processes > 1:
        here = params.processes // configuration(params).num_machines
        if gpus and here > gpus:
            raise ParamError(f"processes is {params.processes}, {here} on this machine, which has {gpus} GPU(s)")
    if not several(params):
        return
    config = configuration(params)
    if config.distributed_type in _SHARDED and not gpus:
        raise ParamError(
            f"accelerate_config {params.accelerate_config} shards models over GPUs, and this machine has none: "
            "leave it empty to have whole models in each process"
        )
    quantised = params.teacher_quantization != "none" and needs_teacher(params)
    if config.distributed_type == DistributedType.FSDP and params.method == "gkd" and not quantised:
        raise ParamError(
            f"accelerate_config {params.accelerate_config} is for FSDP2, but TRL's DistillationTrainer cannot shard "
            "its teacher with it: use a ZeRO-3 file for method gkd, or a quantised teacher"
        )
    if config.distributed_type == DistributedType.DEEPSPEED and quantised:
        raise ParamError(
            f"teacher_quantization is {params.teacher_quantization!r} but accelerate_config {params.accelerate_config} "
            "is for DeepSpeed, which cannot use quantised models: use an FSDP2 file, or set it to none"
        )
    if config.distributed_type == DistributedType.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise ParamError(
            f"accelerate_config {params.accelerate_config} needs deepspeed, which is not installed: "
            "pip install deepspeed, or use an FSDP2 file"
        )


def _check_vllm(gpus: int) -> None:
    (least, end), wanted = VERSIONS, "pip install -e '.[vllm]', or set it to False"
    try:
        found = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as missing:
        raise ParamError(f"use_vllm is True but vllm is not installed: {wanted}") from missing
    if not least <= tuple(map(int, re.findall(r"\d+", found)[:2])) < end:
        known = f"{'.'.join(map(str, least))} or later, and before {'.'.join(map(str, end))}"
        raise ParamError(f"use_vllm is True but vllm is {found}, expected {known}: {wanted}")
    if not gpus and "cpu" not in found:
        raise ParamError("use_vllm is True but this machine has no GPU: set it to False")


def check_alone(compiles: bool = False) -> None:
    """Raise `ParamError` if the environment makes this process one of several that `train` has not started.

    The same for other variables of accelerate's launcher; with ``compiles``, one for a compiler is allowed.
    """
    sizes = {name: os.environ.get(name, "") for name in _SIZES}
    leaked = [name for name, size in sizes.items() if size.isdigit() and int(size) > 1]
    leaked += [name for name in ("RANK", "LOCAL_RANK") if os.environ.get(name, "-1") != "-1"]
    without = "training would wait for processes that do not come"
    if not leaked:
        switches = [f"ACCELERATE_{name}" for name in _SWITCHES if not (compiles and name == "DYNAMO_BACKEND")]
        leaked = [name for name in switches if os.environ.get(name, "").lower() not in _OFF]
        without = "training would not be what the parameters say"
    if leaked:
        raise ParamError(
            f"{leaked[0]} is {os.environ[leaked[0]]} in the environment, as torchrun, mpirun or accelerate set it: "
            f"{without}. Start it without (env -u {' -u '.join(leaked)} kepo …), and for several processes set "
            "processes: kepo starts them itself"
        )


def train(params: Params, run: Run, shown: LiveTraining) -> None:
    """Train in ``params.processes`` new processes, from the run's newest checkpoint; the model is saved in ``model``.

    Their output is in ``training/processes.log`` until they have succeeded; their progress is read from
    ``metrics.jsonl``. Raises `TrainingFailed` with the last words of the worker that ended first. If this process is
    interrupted, so are they; their files are whole.
    """
    seen = 0

    def show() -> None:
        nonlocal seen
        seen = _show_after(seen, params, run, shown)

    _watch(command(params, run), params.processes // configuration(params).num_machines, run, show)
    shown.finish()


def evaluate(params: Params, run: Run, student: str, kept: Path, count: int, progress: Progress) -> None:
    """Let this machine's share of ``params.processes`` give all ``count`` answers to the run's test questions.

    Args:
        student: "untrained" or "trained".
        kept: the file that has all answers afterwards.
        progress: called with the number of answers.

    Raises:
        TrainingFailed: with the last words of the worker that ended first; answers so far are kept.
        ParamError: with these words, if a worker refused a parameter or the data.
    """
    here = max(1, params.processes // configuration(params).num_machines)
    whole = params.replace(processes=here, accelerate_config="")

    def show() -> None:
        progress(answered(kept), count)

    _watch([*command(whole, run), EVALUATE, student], here, run, show)
    progress(count, count)


def _watch(command: Sequence[str], processes: int, run: Run, show: Callable[[], None]) -> None:
    """Run ``command`` to its end and call ``show`` regularly; errors as for `train`."""
    run.training_dir.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate silently makes each process a separate run
    log = run.training_dir / "processes.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=project_root(),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches them once, through this process
        )
    assert process.stdin is not None
    try:
        while process.poll() is None:
            time.sleep(_PAUSE)
            show()
        if process.returncode:
            words = last_words(log.read_text(encoding="utf-8", errors="replace"))
            refused = "failed: ParamError: " in words or "failed: DataError: " in words
            raise ParamError(words) if refused else TrainingFailed(words)
        log.unlink()
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()


def _show_after(seen: int, params: Params, run: Run, shown: LiveTraining) -> int:
    """Show the steps logged after step ``seen``; returns the last one."""
    for row in read_rows(run.path / "metrics.jsonl"):
        if row["step"] > seen and "loss" in row:
            seen = row["step"]
            shown.show(seen, total_steps(params, row), row)
    return seen


def command(params: Params, run: Run) -> list[str]:
    """The command that starts this machine's workers; workers of several machines meet at the first one (c10d)."""
    config = configuration(params)
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(resolve(params.accelerate_config or WHOLE))]
    launch += ["--num_processes", str(params.processes), "--mixed_precision", _MIXED[params.precision]]
    if config.num_machines == 1:
        launch += ["--main_process_port", "0"]  # a free one
    else:
        launch += ["--main_process_ip", config.main_process_ip or socket.gethostname(), "--rdzv_backend", "c10d"]
    return [*launch, "-m", "kepo_core.experiment.worker", str(run.path), ATTACHED]


def last_words(output: str) -> str:
    """Why the workers that wrote ``output`` ended: the first message is the cause, later ones follow from it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line.removeprefix("kepo: ") for line in lines if line.startswith(LAST_WORDS)]
    killed = [found[1] for line in lines if (found := _KILLED.search(line))]
    if told:
        return told[0]
    if killed:
        return f"a process was ended by {killed[0]}" + (" (out of memory?)" * (killed[0] == "SIGKILL"))
    return (lines or ["the processes ended without a message"])[-1]


def end_with_starter() -> None:
    """In a worker: end at once when the process that started it has ended."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would disturb the interpreter's shutdown
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
