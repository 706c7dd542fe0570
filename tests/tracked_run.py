"""A small run that reports to a tracker, is killed, resumed and finished as notebook 03 does.

``python tests/tracked_run.py TRACKER FOLDER [PROJECT]`` makes it in FOLDER and prints where.
"""

import sys
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import TrainerCallback

from kepo_core.data import phantom
from kepo_core.data.records import MODALITIES
from kepo_core.experiment import experiment
from kepo_core.params import Params
from kepo_core.runs import tracking
from kepo_core.runs.run import Run

STEPS = 4


class _Killed(TrainerCallback):
    """Ends the training once step 3 is logged; the newest checkpoint is that of step 2."""

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def make(tracker: str, folder: Path, **changes: Any) -> Run:
    phantom.write_phantom(folder / "set", seed=0, images=dict.fromkeys(MODALITIES, 8))
    params = Params.load(overrides={
        "data_root": str(folder / "set"), "results_dir": str(folder / "results"), "train_items": 16, "eval_items": 2,
        "group_size": 2, "prompts_per_step": 4, "prompts_per_device": 4, "max_steps": STEPS, "save_steps": 2,
        "max_completion_length": 8, "rejection_budget": 1, "report_to": tracker, **changes,
    })  # fmt: skip
    tracking.check(params)
    run, data = Run.allocate(params), experiment.load_data(params)
    for callbacks in ([_Killed()], []):
        trainer = experiment.make_trainer(params, run, data, experiment.load_models(params), callbacks)
        assert trainer is not None
        try:
            experiment.fit(trainer, run)
        except KeyboardInterrupt:
            assert callbacks
    (run.path / "figures").mkdir()
    Image.new("RGB", (6, 4), "red").save(run.path / "figures/training.png")
    tracking.send(run)
    return run


if __name__ == "__main__":
    name, place, *project = sys.argv[1:]
    print("\n" + str(make(name, Path(place), **({"project": project[0]} if project else {})).path))
