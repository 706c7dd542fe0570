"""Several processes: accelerate's configurations, what starts the workers, and how these end (stand-ins for them)."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env

from kepo_core.errors import ParamError
from kepo_core.experiment import launch, live
from kepo_core.params import Params, project_root
from kepo_core.runs.run import Run

FOLDER = project_root() / "params/accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
#: file → machines, processes, and the parameter file that it is for
SIZES = {
    "1gpu": (1, 1, "phantom"),
    "ddp": (1, 2, "smoke"),
    "4gpu-fsdp2": (1, 4, "paper"),
    "4gpu-zero3": (1, 4, "paper"),
    "8gpu-fsdp2": (1, 8, "released"),
    "8gpu-zero3": (1, 8, "released"),
    "2nodes-fsdp2": (2, 16, "paper"),
}


def params(name: str = "ddp", **changes: Any) -> Params:
    """The parameters that go with an accelerate configuration."""
    processes, fits = SIZES[name][1:]
    batch = {"paper": 2, "released": 2}.get(fits, 1)
    sizes = {"processes": processes, "prompts_per_device": batch, "prompts_per_step": batch * processes}
    file = "" if name == "ddp" else f"params/accelerate/{name}.yaml"
    return Params.load(f"params/{fits}.yaml", {"accelerate_config": file, **sizes, **changes})


# Configurations ---------------------------------------------------------------------------------------------------


def test_every_configuration_is_listed() -> None:
    assert {path.stem for path in FILES} == set(SIZES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_configuration_is_what_accelerate_reads(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its own classes, from the very command line that starts the workers."""
    given = params(path.stem)
    config = launch.configuration(given)
    machines, processes, _ = SIZES[path.stem]
    kind = {"fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED, "ddp": DistributedType.MULTI_GPU}
    assert config.num_machines == machines and config.num_processes in (-1, processes)
    assert config.distributed_type == kind.get(path.stem.split("-")[-1], DistributedType.NO)
    run = Run.allocate(given.replace(run_dir=str(tmp_path / "run")))
    command = launch.command(given, run)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    assert (arguments.num_processes, arguments.training_script) == (processes, "kepo_core.experiment.worker")
    assert arguments.mixed_precision == {"bf16": "bf16", "fp32": "no"}[given.precision]
    if config.distributed_type == DistributedType.FSDP:
        with patch_environment(**prepare_multi_gpu_env(arguments)):
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert "FULL" in str(plugin.state_dict_type) and not plugin.cpu_ram_efficient_loading
        assert not plugin.activation_checkpointing
        assert arguments.nproc_per_node == str(processes // machines)
        if machines > 1:  # the others know the first by its name
            assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("c10d", f"{socket.gethostname()}:29500")
    if config.distributed_type == DistributedType.DEEPSPEED:
        assert (arguments.use_deepspeed, arguments.zero_stage, arguments.zero3_save_16bit_model) == (True, 3, True)


def test_the_parameter_files_name_a_configuration_of_their_size() -> None:
    for name in ("paper", "released"):
        given = Params.load(f"params/{name}.yaml")
        assert launch.configuration(given).num_processes == given.processes
        assert given.prompts_per_step == given.processes * given.prompts_per_device


def write(tmp_path: Path, **changes: Any) -> str:
    values = yaml.safe_load((FOLDER / "4gpu-fsdp2.yaml").read_text()) | changes
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return str(path)


def test_what_does_not_fit_together_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(sentence: str, given: Params) -> None:
        with pytest.raises(ParamError, match=sentence):
            launch.check(given)

    four = params("4gpu-fsdp2")
    bad("accelerate_config .*none.yaml cannot be used", four.replace(accelerate_config=str(tmp_path / "none.yaml")))
    bad("unknown keys", four.replace(accelerate_config=write(tmp_path, gpus=4)))
    bad("processes is 4 but accelerate_config config.yaml is for 8",
        four.replace(accelerate_config=write(tmp_path, num_processes=8)))  # fmt: skip
    bad(
        "precision is bf16 but .* mixed_precision fp16",
        four.replace(accelerate_config=write(tmp_path, mixed_precision="fp16")),
    )
    bad("fsdp_version: 2", four.replace(accelerate_config=write(tmp_path, fsdp_config={"fsdp_version": 1})))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    bad("shards models over GPUs, and this machine has none", four)
    launch.check(four.replace(method="none"))  # nothing is trained
    launch.check(params("ddp"))
    drawn = Params().replace(use_vllm=True)
    missing = launch.importlib.metadata.PackageNotFoundError("vllm")
    monkeypatch.setattr(launch.importlib.metadata, "version", Mock(side_effect=missing))
    bad("use_vllm is True but vllm is not installed", drawn)
    for version, sentence in (
        ("0.32.0", "this machine has no GPU"),
        ("0.29.1", r"vllm is 0\.29\.1, expected 0\.30 or later, and before 0\.33"),
        ("0.33.0+cpu", r"vllm is 0\.33\.0\+cpu, expected"),
    ):  # fmt: skip
        monkeypatch.setattr(launch.importlib.metadata, "version", lambda name, version=version: version)
        bad(f"use_vllm is True but {sentence}", drawn)
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda name: "0.32.0+cpu")
    launch.check(drawn)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    bad("needs deepspeed", params("4gpu-zero3"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bad(r"processes is 4, 4 on this machine, which has 2 GPU\(s\)", four)
    bad("processes is 4, 4 on this machine", Params().replace(method="none", processes=4, prompts_per_device=2))
    for alone in (Params(), params("1gpu")):  # transformers would spread one process over both
        bad("processes is 1 but this machine shows 2 GPUs: set CUDA_VISIBLE_DEVICES to one", alone)
    launch.check(Params(method="none"))


def test_teachers_that_a_way_of_sharing_out_cannot_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    fsdp, zero = params("4gpu-fsdp2"), params("4gpu-zero3")
    with pytest.raises(ParamError, match="cannot shard its teacher with it: use a ZeRO-3 file for method gkd"):
        launch.check(fsdp.replace(method="gkd"))
    launch.check(fsdp.replace(method="gkd", teacher_quantization="4bit"))
    launch.check(zero.replace(method="gkd"))
    with pytest.raises(ParamError, match="DeepSpeed, which cannot use quantised models: use an FSDP2 file"):
        launch.check(zero.replace(teacher_quantization="8bit"))
    launch.check(zero.replace(teacher_quantization="8bit", distill=False, explore=False))  # no teacher is loaded


# Workers ----------------------------------------------------------------------------------------------------------


class Shown(live.LiveTraining):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int, dict]] = []
        self.finished = False

    def show(self, step: int, total: int, logs: dict[str, Any]) -> None:
        self.steps.append((step, total, logs))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.allocate(params("ddp", run_dir=str(tmp_path / "run")))


def works(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let ``script`` stand for the launcher and its workers."""
    monkeypatch.setattr(launch, "command", lambda *a: [sys.executable, "-c", script])


#: Stands for a worker that logs ``sys.argv[1]``'s steps, and resumes at the second of them.
LOGS = """
import json, os, sys, time
from pathlib import Path
for steps in ([1, 2, 3], [1, 2, 3, 4]):
    rows = [json.dumps({"step": step, "epoch": step / 4, "loss": 0.5, "kepo/accuracy": None}) for step in steps]
    Path("METRICS").write_text("\\n".join(rows) + "\\n" + '{"step": 5, "torn')
    time.sleep(1)
print(os.environ["OMP_NUM_THREADS"])
"""


def test_steps_are_shown_as_they_come(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them once, from the numbers that the workers log."""
    monkeypatch.setattr(launch, "_PAUSE", 0.05)
    works(monkeypatch, LOGS.replace("METRICS", str(run.path / "metrics.jsonl")))
    launch.train(run.params.replace(max_steps=-1, epochs=2.0), run, shown := Shown())
    assert [(step, total) for step, total, _ in shown.steps] == [(1, 8), (2, 8), (3, 8), (4, 8)]
    assert shown.steps[0][2]["loss"] == 0.5 and shown.finished and not list(run.training_dir.iterdir())


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            "import sys; print('Traceback'); print('kepo: process 1 failed: FloatingPointError: nan at step 3');"
            "print('kepo: process 0 failed: RuntimeError: gloo'); sys.exit(1)",
            "^process 1 failed: FloatingPointError: nan at step 3$",
        ),
        (
            "import sys; print('kepo: process 2 failed: ValueError: the cause');"
            "[print('line', n) for n in range(1000)]; print('kepo: process 0 failed: RuntimeError: nccl'); sys.exit(1)",
            "^process 2 failed: ValueError: the cause$",
        ),
        (
            "import sys; print('traceback : Signal 9 (SIGKILL) received by PID 7'); sys.exit(1)",
            r"SIGKILL \(out of memory",
        ),
        ("import sys; print('no launcher'); sys.exit(3)", "^no launcher$"),
        ("import sys; sys.exit(3)", "without a message"),
    ],
)
def test_the_first_that_fails_says_why(run: Run, monkeypatch: pytest.MonkeyPatch, script: str, sentence: str) -> None:
    works(monkeypatch, script)
    with pytest.raises(launch.TrainingFailed, match=sentence):
        launch.train(run.params, run, Shown())
    assert (run.training_dir / "processes.log").is_file()  # the whole of what they said


@pytest.mark.parametrize("error", ["ParamError", "DataError"])
def test_what_a_worker_refuses_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    works(monkeypatch, f"import sys; print('kepo: process 1 failed: {error}: no such picture'); sys.exit(1)")
    with pytest.raises(ParamError, match=f"^process 1 failed: {error}: no such picture$"):
        launch.train(run.params, run, Shown())


#: A worker that says its number and then does nothing; and one whose starter is killed.
IDLE = """
import os, time
from kepo_core.experiment import launch
launch.end_with_starter()
print(os.getpid(), flush=True)
"""


def test_an_interrupt_ends_the_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    works(monkeypatch, LOGS.replace("METRICS", str(run.path / "metrics.jsonl")) + "time.sleep(600)")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    shown, began = Shown(), time.monotonic()
    shown.show = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        launch.train(run.params, run, shown)
    assert time.monotonic() - began < 60


def test_a_worker_ends_when_its_starter_is_killed() -> None:
    code = IDLE + "time.sleep(30)"
    child = f"subprocess.Popen([sys.executable, '-c', {code!r}], stdin=subprocess.PIPE)"
    worker = f"import subprocess, sys; process = {child}; process.wait()"
    starter = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True, cwd=project_root())
    assert starter.stdout is not None
    number = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    began = time.monotonic()
    starter.stdout.read()  # to its end: when the worker, which could still write, has ended
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(number, 0)
            time.sleep(0.1)
