"""Two CPU processes (DDP, gloo) compute what one computes, with groups spread over both and only one exploring."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import two_processes_text
from kepo_harness import sharp_model
from text_harness import ScriptedText

from kepo_core.data import phantom
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import Params
from kepo_core.runs.run import Run

HERE = Path(__file__).parent


def start(script: str, world_size: int, output_dir: Path, *arguments: str) -> None:
    """Run ``script`` to its end on the given number of processes."""
    output_dir.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]),
    }
    command += [str(HERE / script), str(output_dir), str(world_size), *arguments]
    done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def launch(output_dir: Path, world_size: int, *overrides: str) -> tuple[dict, pd.DataFrame]:
    start("two_processes.py", world_size, output_dir, *overrides)
    return torch.load(output_dir / "result.pt"), collect_rollouts(output_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("distill_normalizer=gated_tokens", "hint_importance=truncated"),
        ("gate=unsure", "guidance=advantage"),  # student and teacher score tokens, groups are weighed as a whole
    ],
)
@pytest.mark.parametrize(
    "shard", [(), ("shard=1",), ("shard=accelerate",)], ids=["DDP", "FSDP2", "FSDP2 by accelerate"]
)
def test_two_processes_equal_one_on_the_same_rollouts(
    tmp_path: Path, overrides: tuple[str, ...], shard: tuple[str, ...]
) -> None:
    """Student and teacher whole (DDP) or sharded (FSDP2, both), each process with half of the rows."""
    one, rows_one = launch(tmp_path / "one", 1, *overrides)
    two, rows_two = launch(tmp_path / "two", 2, *overrides, *shard)
    pd.testing.assert_frame_equal(rows_one, rows_two, rtol=1e-4)
    assert rows_one["injected"].sum() == 2 and set(rows_one.query("injected")["group"]) == {0, 1}
    for name, value in one["log"].items():
        if name.startswith("kepo/top_k"):
            continue  # measured on the first rows of each process
        same = two["log"][name]
        assert (value is None) == (same is None), name
        if value is not None and not math.isnan(value):
            # A process samples only its own part of the weights, which is another one when they are sharded.
            within = 1e-3 if name == "kepo/unmoved_weights" else 1e-6
            assert same == pytest.approx(value, rel=1e-3, abs=within), name
    assert torch.allclose(one["weights"], two["weights"], rtol=1e-5, atol=1e-6)
    start = torch.cat([p.detach().flatten() for p in sharp_model(0).parameters()])
    assert (one["weights"] - start).abs().max() > 1e-4


@pytest.mark.slow
def test_a_sharded_student_in_bf16_logs_what_a_whole_one_does(tmp_path: Path) -> None:
    """Only weights and states are rounded, as under DDP; the resulting log-probabilities are not."""
    logged = []
    for name, shard in (("whole", ()), ("shared out", ("shard=accelerate",))):
        found, _ = launch(tmp_path / name, 2, "precision=bf16", *shard)
        logged.append(found["log"])
    for name in ("kepo/entropy", "kepo/divergence", "kepo/loss_distill", "grad_norm"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=0.02), name
        assert logged[0][name] != 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kepo", "sft"])
@pytest.mark.parametrize("shard", [(), ("shard=1",)], ids=["DDP", "FSDP2 by accelerate"])
def test_a_lora_student_is_asked_on_the_way(tmp_path: Path, shard: tuple[str, ...], method: str) -> None:
    phantom.write_phantom(tmp_path / "world", 0, {"MRI": 12, "CT": 4})
    params = Params.load(None, {
        "data_root": str(tmp_path / "world"), "train_items": 4, "eval_items": 2, "results_dir": str(tmp_path),
        "explore": False, "prompts_per_step": 2, "prompts_per_device": 1, "group_size": 2, "max_steps": 2,
        "save_steps": 0, "processes": 2, "lora_rank": 2, "curve_steps": 1, "curve_items": 2, "method": method,
        "max_completion_length": 8, "eval_max_tokens": 8, "precision": "bf16", "thinking": method != "sft",
    })  # fmt: skip
    run = Run.allocate(params, owner="test")
    start("two_processes_curve.py", 2, tmp_path / "two", f"run={run.path}", *shard)
    assert len(pd.read_parquet(run.evaluation_dir / "step-1.parquet")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("shard", [(), ("shard=1",)], ids=["DDP", "FSDP2"])
def test_what_two_processes_generate_is_reproducible(tmp_path: Path, shard: tuple[str, ...]) -> None:
    """Each process samples by itself; the same seed and number of processes give the same rollouts and weights."""
    runs = []
    for name in ("one", "again"):
        start("two_processes_real.py", 2, tmp_path / name, *shard)
        runs.append((collect_rollouts(tmp_path / name), torch.load(tmp_path / name / "weights.pt")))
    (rows, weights), (rows_again, weights_again) = runs
    pd.testing.assert_frame_equal(rows, rows_again)
    assert torch.equal(weights, weights_again)
    assert (rows["exploration"] != "").any()
    halves = rows[~rows["replaced"] & (rows["step"] == 1)]["completion"].to_numpy().reshape(2, -1)
    assert (halves[0] != halves[1]).any()  # the processes generate different completions


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("lora=4",)], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("shard", [(), ("shard=accelerate",)], ids=["DDP", "FSDP2 by accelerate"])
def test_resumed_on_two_processes_is_never_stopped(
    tmp_path: Path, shard: tuple[str, ...], lora: tuple[str, ...]
) -> None:
    """From the middle, and from after the last step, when only the student must be saved."""
    whole = tmp_path / "whole"
    start("two_processes_real.py", 2, whole, *shard, *lora)
    for step in (2, 4):
        resumed = tmp_path / f"resumed-{step}"
        start("two_processes_real.py", 2, resumed, f"resume={whole / f'checkpoint-{step}'}", *shard, *lora)
        assert torch.equal(torch.load(whole / "weights.pt"), torch.load(resumed / "weights.pt"))
        assert (resumed / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
        if step < 4:
            rows = collect_rollouts(whole).query("step > @step").reset_index(drop=True)
            pd.testing.assert_frame_equal(collect_rollouts(resumed), rows)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start of two processes for the ordinary tests below, because starting takes longer than the tests."""
    folder = tmp_path_factory.mktemp("processes") / "two"
    start("two_processes_ordinary.py", 2, folder)
    return folder


def test_algorithm_1_on_two_processes(two: Path) -> None:
    assert (two / "algorithm_1" / "agreed").read_text() == "30"


def test_a_task_of_ones_own_on_two_processes_equals_one(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards by name, one of them asynchronous, while only one process explores and a group straddles both."""
    monkeypatch.setattr(ScriptedText, "script", None)  # removes what `main` sets after the test
    two_processes_text.main(tmp_path, 1)
    (one, rows), (other, rows_of_other) = (
        (torch.load(folder / "result.pt"), collect_rollouts(folder)) for folder in (tmp_path, two / "text")
    )
    pd.testing.assert_frame_equal(rows, rows_of_other, rtol=1e-4)
    assert one["log"].keys() == other["log"].keys()
    for name, value in one["log"].items():
        assert value is None or other["log"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert torch.allclose(one["weights"], other["weights"], rtol=1e-4, atol=1e-6)
    kept = rows.query("not replaced")
    assert (kept["gate"] == (kept["rewards/correct_later"] >= 5)).all() and kept["gate"].sum() == 1 + 4
    assert one["log"]["kepo/explored_groups"] == 2 and one["log"]["kepo/accepted"] == 1
