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
    return said.partition("\n\n")[2]


def kill(folder: Path, sent: signal.Signals, seconds: float) -> str:
    """Begin, send a signal so long after a run was started, and return what was said."""
    study = begin(folder)
    assert study.stdout is not None
    said = []
    for line in study.stdout:
        said.append(line)
        if line.rstrip().endswith(" started"):
            break
    time.sleep(seconds)
    assert study.poll() is None, "".join(said)
    study.send_signal(sent)
    said.append(study.communicate()[0])
    assert study.returncode == (-signal.SIGKILL if sent is signal.SIGKILL else 130), "".join(said)
    return f"--- {sent.name} {seconds:.1f} s after a run was started\n{''.join(said)}"


@pytest.mark.slow
def test_a_study_killed_at_three_random_moments_ends_with_the_same_tables(tmp_path: Path) -> None:
    started = time.monotonic()
    whole = begin(tmp_path / "whole")
    expected = tables(whole.communicate()[0])
    a_run = (time.monotonic() - started) / 2
    assert whole.returncode == 0 and "Against grpo, in points" in expected
    moments = random.Random(SEED)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)  # after the last, its run computes on and is waited for
    log = [kill(tmp_path / "killed", sent, moments.uniform(0.1, 0.5) * a_run) for sent in signals]
    study = begin(tmp_path / "killed")
    said = study.communicate()[0]
    told = "\n".join([*log, said])
    assert study.returncode == 0 and tables(said) == expected, told
    states = [json.loads(path.read_text())["state"] for path in (tmp_path / "killed/results").glob("*/status.json")]
    assert states == ["completed"] * 2, told  # nothing was made twice, and nothing was left half-done
    print(told)
