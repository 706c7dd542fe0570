"""A study that is killed at random moments, against one that never stopped: notebook 03, with seconds of training."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEED = 20  # of the moments
PARAMS = (ROOT / "params/smoke.yaml").read_text().replace("max_steps: 2", "max_steps: 4\nsave_steps: 1")
STUDY = "params: {params}\nmethods: [zero-shot, grpo]\ncompared_with: grpo\nseeds: [0]\n"


def begin(folder: Path) -> subprocess.Popen[str]:
    """`kepo study run` with results in ``folder``, as from a terminal of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(f"{PARAMS}results_dir: {folder}/results\n")
    (folder / "study.yaml").write_text(STUDY.format(params=folder / "params.yaml"))
    return subprocess.Popen(
        [sys.executable, "-m", "kepo_core.cli", "study", "run", str(folder / "study.yaml"), "--slots", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hears_interrupts,
    )


def hears_interrupts() -> None:  # a job in the background inherits that SIGINT is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tables(said: str) -> str:
    return said.partition("\n\n")[2].rpartition("\nkepo: ")[0]  # behind them stands how to draw them


def trained(folder: Path, method: str) -> int:
    """Steps that the study's run of ``method`` has logged; -1 before it has asked its first questions."""
    found = list((folder / "results").glob(f"*-{method}-????????/evaluation/untrained.jsonl"))
    logs = [path.parents[1] / "metrics.jsonl" for path in found]
    return max((len(log.read_text().splitlines()) if log.exists() else 0 for log in logs), default=-1)


def kill(folder: Path, sent: signal.Signals, method: str, steps: int, seconds: float) -> str:
    """Begin, send a signal so long after a run has logged so many steps, and return what was said."""
    study = begin(folder)
    while trained(folder, method) < steps:
        assert study.poll() is None
        time.sleep(0.02)
    time.sleep(seconds)
    assert study.poll() is None
    study.send_signal(sent)
    said = study.communicate()[0]
    assert study.returncode == (-signal.SIGKILL if sent is signal.SIGKILL else 130), said
    return f"--- {sent.name} {seconds:.1f} s after step {steps} of {method}\n{said}"


@pytest.mark.slow
def test_a_study_killed_at_three_random_moments_ends_with_the_same_tables(tmp_path: Path) -> None:
    whole = begin(tmp_path / "whole")
    expected = tables(whole.communicate()[0])
    assert whole.returncode == 0 and "Against grpo, in points" in expected and "zero-shot     1" in expected
    moments = random.Random(SEED)
    early, late = sorted(moments.sample(range(4), 2))
    plan = [(signal.SIGTERM, "zero-shot", 0), (signal.SIGINT, "grpo", early), (signal.SIGKILL, "grpo", late)]
    # After the last, the run itself computes on and is waited for.
    log = [kill(tmp_path / "killed", *moment, moments.uniform(0, 0.5)) for moment in plan]
    study = begin(tmp_path / "killed")
    said = study.communicate()[0]
    told = "\n".join([*log, said])
    assert study.returncode == 0 and tables(said) == expected, told
    states = [json.loads(path.read_text())["state"] for path in (tmp_path / "killed/results").glob("*/status.json")]
    assert states == ["completed"] * 2, told  # nothing was made twice, and nothing was left half-done
    print(told)
