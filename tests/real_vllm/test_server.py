"""Server mode over a real `vllm serve`, as far as a CPU goes: all but the sending of weights, which is NCCL's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from prompts import PROMPTS, as_prompt, difference
from trl.generation.vllm_client import VLLMClient

from kepo_core.experiment import experiment
from kepo_core.experiment.models import EMBEDDED_DIR
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import Params
from kepo_core.runs.run import Run

PORT = 8132


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> dict[str, Any]:
    """The parameters that name a server of the student. It keeps its weights, so nothing is learned either."""
    serve(str(EMBEDDED_DIR / "student"), PORT, "student")
    return {"vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{PORT}", "learning_rate": 0.0,
            "max_steps": 2, "curve_steps": 1, "curve_items": 2}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_draws_for_each_process_what_it_asked(
    server: dict[str, Any], small: Callable[..., Params], processes: int
) -> None:
    """Log-probabilities agree row by row, so each process got the answers to its own prompts, explored ones too."""
    run = Run.allocate(small(**server, processes=processes, prompts_per_device=2))
    script = [str(Path(__file__).with_name("two_processes_server.py")), str(run.path)]
    launch = [sys.executable] if processes == 1 else [
        str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads((run.path / "steps.json").read_text())
    off = [step["kepo/vllm_difference"] for step in steps]
    print(f"\n{processes} process(es): mean |Δ log p| {off}")
    assert len(off) == 2 and max(off) < 1e-4
    rows = collect_rollouts(run.training_dir)
    assert len(rows[~rows["injected"]]) == 2 * 4 * 4 and rows["draws"].sum() > 0
    answered = pd.read_parquet(run.evaluation_dir / "step-1.parquet")
    assert len(answered) == 16 and answered["completion"].str.len().gt(0).all()


@pytest.fixture
def trainer(server: dict[str, Any], small: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> Any:
    """One over the server, to which no weights are sent, and its run."""
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device=0: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, named_params: None)
    params = small(**server | {"max_steps": 3, "save_steps": 1, "curve_steps": 0})
    data, models, run = experiment.load_data(params), experiment.load_models(params), Run.allocate(params)
    return experiment.make_trainer(params, run, data, models), run


def test_prompts_of_all_kinds_are_the_same_at_a_server(trainer: Any) -> None:
    for name, parts in PROMPTS.items():
        assert difference(trainer[0], [as_prompt(parts)] * 2) < 1e-4, name
    assert difference(trainer[0], [as_prompt(parts) for parts in PROMPTS.values()]) < 1e-4


def test_a_context_too_short_is_the_servers(trainer: Any) -> None:
    """It was started with 512, whatever vllm_max_model_length says."""
    trainer[0].vllm_generation._inner.max_model_length = 100_000
    with pytest.raises(ValueError, match=r"leaves no room for a completion of 48 in vLLM's context of 512"):
        difference(trainer[0], [as_prompt(["What is it? " * 200])])


def test_a_server_that_dies_is_one_sentence_and_what_was_done_is_kept(trainer: Any) -> None:
    trainer, run = trainer
    client = trainer.vllm_generation.vllm_client  # type: ignore[attr-defined]
    ask, asked = client.session.request, []

    def gone(method: str, url: str, **given: Any) -> Any:
        asked.append(url)
        alive = trainer.state.global_step < 1
        return ask(method, url if alive else url.replace(str(PORT), "1"), **given)

    client.session.request = gone
    client.session.adapters["http://"].max_retries.total = 0
    with pytest.raises(ConnectionError, match=rf"the vLLM server at http://127.0.0.1:{PORT} does not answer"):
        experiment.fit(trainer, run)
    assert asked and (run.training_dir / "checkpoint-1").is_dir()
