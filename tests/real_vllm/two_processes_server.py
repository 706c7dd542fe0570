"""Steps over one vLLM server from several processes; started by test_server.py. A CPU has no way to send it weights."""

import json
import sys
from pathlib import Path

from trl.generation.vllm_client import VLLMClient

from kepo_core.exit_codes import leave
from kepo_core.experiment import experiment
from kepo_core.runs.run import Run


def main(folder: Path) -> None:
    VLLMClient.init_communicator = lambda self, device=0: None  # NCCL, which needs a GPU
    VLLMClient.update_named_params = lambda self, metadata, named_params: None
    run = Run.open(folder)
    data, models = experiment.load_data(run.params), experiment.load_models(run.params)
    trainer = experiment.make_trainer(run.params, run, data, models)
    assert trainer is not None
    trainer.train()
    if trainer.accelerator.is_main_process:
        steps = [row for row in trainer.state.log_history if "loss" in row]
        (folder / "steps.json").write_text(json.dumps(steps))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
