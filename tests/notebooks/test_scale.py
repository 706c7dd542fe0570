"""The main job as at scale: the paper's and the released parameter file on stand-ins, and on several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from fake_teacher_server import FakeVLLM, serving

from kepo_core.cli import main
from kepo_core.experiment.models import load_model, load_processor, save_embedded
from kepo_core.params import Params, project_root
from kepo_core.runs.run import Run
from kepo_core.testbed.embedded import build_model, build_processor

ROOT = project_root()
NOTEBOOK = "notebooks/03_train_kepo.ipynb"
#: What a stand-in of the paper's setting has of its own: places, sizes and data. The method is the file's.
PLACES = {"data_root": "phantom", "image_size": 0, "accelerate_config": ""}
SIZES = {
    "train_items": 16,
    "eval_items": 1,
    "max_steps": 2,
    "prompts_per_step": 4,
    "max_completion_length": 16,
    "hint_max_tokens": 8,
    "eval_max_tokens": 8,
}


def write(path: Path, file: str, **changes: object) -> Path:
    values = yaml.safe_load((ROOT / "params" / file).read_text()) | {"results_dir": str(path.parent / "results")}
    path.write_text(yaml.safe_dump(values | changes))
    return path


def made(file: Path, before: set[Path] = frozenset()) -> Run:  # type: ignore[assignment]
    (folder,) = set((file.parent / "results").glob("*/")) - before
    return Run.open(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("paper", 2), ("released", 1)])
def test_a_reading_runs_whole_on_stand_ins(tmp_path: Path, name: str, processes: int) -> None:
    """Random Qwen3-VL models, tiny; paper.yaml in two processes."""
    processor = build_processor()
    models = {}
    for seed, role in enumerate(("student", "teacher")):
        save_embedded(build_model("test", seed), processor, tmp_path / role)
        models[role] = str(tmp_path / role)
    sizes = {**SIZES, "prompts_per_device": 2, "processes": processes}
    file = write(tmp_path / "stand-in.yaml", f"{name}.yaml", **PLACES, **sizes, **models)
    assert main(["run", NOTEBOOK, "-f", str(file)]) == 0
    run, original = made(file), Params.load(ROOT / "params" / f"{name}.yaml").to_dict()
    own = {*PLACES, *sizes, *models, "results_dir", "run_dir"}
    kept = run.params.to_dict()
    assert [key for key in kept if kept[key] != original[key] and key not in own] == []
    assert run.state == "completed" and kept["precision"] == "bf16" and kept["activation_checkpointing"]
    rollouts = pd.read_parquet(run.path / "rollouts.parquet")
    assert len(rollouts.query("not replaced")) == 2 * 4 * 8 and rollouts["draws"].sum() >= 0
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2] and "kepo/gate_rate" in steps[0]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """smoke.yaml in two processes."""
    return write(tmp_path / "two.yaml", "smoke.yaml", processes=2, prompts_per_device=2, save_steps=1, max_steps=4)


@pytest.mark.slow
def test_killed_in_several_processes_and_resumed_is_never_stopped(two: Path) -> None:
    assert main(["run", NOTEBOOK, "-f", str(two)]) == 0
    whole = made(two)
    command = [sys.executable, "-m", "kepo_core.cli", "run", NOTEBOOK, "-f", str(two)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    results, deadline = two.parent / "results", time.monotonic() + 300
    while not [p for p in results.glob("*/training/checkpoint-2") if p.parents[1] != whole.path]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # nobody is left to tell the workers
    process.wait()
    run = made(two, {whole.path})
    time.sleep(5)  # they are gone by themselves: else they would write while the run goes on
    assert main(["resume", str(run.path)]) == 0
    for name in ("metrics.jsonl", "rollouts.parquet", "predictions.parquet", "model/model.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert {path.name for path in run.training_dir.iterdir()} <= {"rollouts", "README.md"}  # TRL's card of the model


@pytest.mark.slow
def test_a_served_teacher_guides_a_lora_student_in_two_processes_as_one_in_process_does(two: Path) -> None:
    """Their numbers are the same; and where groups fail, both processes' hints are asked for and kept."""
    teacher, processor = load_model("embedded:teacher", trained=False), load_processor("embedded:teacher")
    options = ["-p", "lora_rank", "4", "-p", "max_steps", "2", "-p", "eval_items", "1", "-p", "tau", "0"]
    made_before: set[Path] = set()
    logged = []
    with serving(FakeVLLM(teacher, processor)) as server:
        served = ["-p", "teacher_url", server.url, "-p", "teacher_top_k", str(teacher.lm_head.weight.shape[0])]
        for changes in (["-p", "explore", "False"], ["-p", "explore", "False", *served], served):
            server.bodies = []
            assert main(["run", NOTEBOOK, "-f", str(two), *options, *changes]) == 0
            run = made(two, made_before)
            made_before.add(run.path)
            rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
            logged.append([{name: value for name, value in row.items() if value is not None} for row in rows])
            assert (run.path / "adapter").is_dir() and load_model(str(run.path / "model"), "student") is not None
        rollouts = pd.read_parquet(run.path / "rollouts.parquet")
    local, asked, explored = logged
    for one, other in zip(local, asked, strict=True):
        assert other.pop("kepo/unasked", 0) == 0
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert asked[0]["kepo/divergence"] > 0 and explored[0]["kepo/divergence"] > 0
    hinted = rollouts.query("exploration != ''")
    assert hinted["group"].isin([0, 1]).any() and hinted["group"].isin([2, 3]).any()  # of either process
    assert any("prompt_logprobs" not in body for body in server.bodies)


@pytest.mark.slow
def test_a_worker_that_dies_fails_the_run_with_its_last_words(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((ROOT / NOTEBOOK).read_text())
    (cell,) = [c for c in notebook["cells"] if "train_student" in "".join(c["source"])]
    # Between the notebook's reading of the data and the workers' the run is told that they are others.
    cell["source"] = ["run.remember(data={})\n", *cell["source"]]
    (copy := two.parent / "03.ipynb").write_text(json.dumps(notebook))
    assert main(["run", str(copy), "-f", str(two)]) == 1
    run = made(two)
    assert run.state == "failed" and "data_root phantom has other data here" in run.status["error"]
    assert "TrainingFailed: process " in capsys.readouterr().err
    assert "Traceback" in (run.training_dir / "processes.log").read_text()


@pytest.mark.slow
def test_two_machines_train_as_two_processes_do(two: Path) -> None:
    """Both on loopback, a process each; the second is started first, by the command in params/README.md."""
    short = ["-p", "max_steps", "2", "-p", "eval_items", "1"]
    assert main(["run", NOTEBOOK, "-f", str(two), *short]) == 0
    one_machine = made(two)
    config = yaml.safe_load((ROOT / "params/accelerate/ddp.yaml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config |= {"num_machines": 2, "num_processes": 2, "main_process_port": free.getsockname()[1]}
    (file := two.parent / "machines.yaml").write_text(yaml.safe_dump(config | {"main_process_ip": "127.0.0.1"}))
    folder = two.parent / "results/two-machines"
    second = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--machine_rank", "1"]
    second += ["--rdzv_backend", "c10d", "--rdzv_conf", "is_host=0,read_timeout=600", "--mixed_precision", "no"]
    second += ["-m", "kepo_core.experiment.worker", str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(second, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL) as joined:
        first = ["run", NOTEBOOK, "-f", str(two), *short, "-p", "accelerate_config", str(file)]
        assert main([*first, "-p", "run_dir", str(folder)]) == 0
        assert joined.wait(60) == 0
    run = Run.open(folder)
    assert run.state == "completed" and run.headline == one_machine.headline
    assert (run.path / "metrics.jsonl").read_bytes() == (one_machine.path / "metrics.jsonl").read_bytes()
