"""A run of `experiment` with evaluations during training, on several processes; started by test_processes.py."""

import sys
from pathlib import Path

import torch
from two_processes import shared_out_by_accelerate

from kepo_core.exit_codes import leave
from kepo_core.experiment import experiment
from kepo_core.params import Params
from kepo_core.runs.run import Run


def main(output_dir: Path, world_size: int, settings: dict[str, str]) -> None:
    run = Run.open(Path(settings["run"]))
    params: Params = run.params
    assert params.processes == world_size
    if "shard" in settings:
        shared_out_by_accelerate(params.precision)
    data, models = experiment.load_data(params), experiment.load_models(params)
    trainer = experiment.make_trainer(params, run, data, models)
    assert trainer is not None
    if "shard" in settings:
        assert trainer.accelerator.state.fsdp_plugin.mixed_precision_policy.reduce_dtype == torch.float32
    trainer.train()
    if trainer.accelerator.is_main_process:
        (output_dir / "done").touch()
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), dict(a.split("=", 1) for a in sys.argv[3:]))
    leave(0)
