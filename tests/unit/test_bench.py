"""The benchmark compares like with like."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import busy
from bench import MEASURED, Bench, peak_mib
from reading import measure_both
from sizes import SIZES, Shape, config_of

TINY = dataclasses.replace(
    SIZES["small"],
    student=Shape((32, 2, 2, 1, 16, 64), (16, 2, 2, 48)),
    teacher=Shape((48, 2, 2, 1, 16, 96), (16, 2, 2, 48)),
    prompts=2,
    group=4,
)


def test_all_variants_run_and_the_plain_reading_has_our_loss(tmp_path: Path) -> None:
    bench = Bench(TINY, tmp_path)
    assert bench.kepo() == pytest.approx(bench.plain(), rel=1e-4) and bench.kepo() > 0.001
    bench.scoring()
    assert bench._batch["kepo_gate"].sum() == len(bench.rows) // 2
    peaks = {name: peak_mib(getattr(bench, name)) for name in MEASURED}
    assert all(peak > 0 for peak in peaks.values())
    assert peaks["explore"] > peaks["draws"] * 0.5


def test_the_papers_models_have_their_size() -> None:
    """2B and 32B parameters, counted without allocating any."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    for shape, low, high in ((SIZES["paper"].student, 2.0e9, 2.4e9), (SIZES["paper"].teacher, 31e9, 35e9)):
        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(config_of(shape, SIZES["paper"]))
        assert low < sum(p.numel() for p in model.parameters()) < high


@pytest.mark.parametrize("rows", [840, pytest.param(89_000, marks=pytest.mark.slow)])
def test_a_set_as_large_as_omnimedvqa_is_read_in_seconds(rows: int) -> None:
    for found in measure_both(rows).values():
        assert found["rows"] == rows
        assert found["of one core"] < 20 and found["peak MiB"] < 1000  # work, not the clock: others may be busy, too


def test_a_busy_machine_is_busy_while_a_run_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, with the environment that a user's run has; ratios are within a repetition."""
    beside, others, calls = busy.beside, [], []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        calls.append((others[-1], "OMP_NUM_THREADS" in env, command[-2:]))
        return SimpleNamespace(stdout=f'noise\n{{"imports": {len(calls)}, "3 steps": 1}}')

    def recorded(command: list[str], count: int) -> Any:
        others.append(count)
        return beside([sys.executable, "-c", ""], count)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(busy, "beside", recorded)
    monkeypatch.setattr(busy.subprocess, "run", run)
    found = busy.measure(2, questions=5, steps=3)
    cores = len(os.sched_getaffinity(0))
    assert calls == [(count, False, ["5", "3"]) for count in (0, cores, 0, cores)]
    assert found.loc["imports"].tolist() == [2.0, 3.0, 1.67] and found.loc["in all", "alone s"] == 3.0


def test_busy_processes_end_with_what_they_stand_beside() -> None:
    began = time.monotonic()
    with busy.beside([sys.executable, "-c", "while True: pass"], 1):
        pass
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_short_run_is_measured() -> None:
    assert set(busy.work(20, 1)) == {"imports", "data and models", "20 questions", "1 steps"}
