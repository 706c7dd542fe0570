"""A training process: ``accelerate launch … -m kepo_core.experiment.worker RUN``, which `launch.train` starts."""

import os
import sys
import traceback
from pathlib import Path

from kepo_core.exit_codes import leave
from kepo_core.experiment import experiment, launch
from kepo_core.quiet import quiet_third_parties
from kepo_core.runs.run import Run


def main(folder: str, *options: str) -> int:
    """Train as the parameters in the run's ``folder`` say. Returns the exit code; the last line says why it is 1."""
    quiet_third_parties()
    if launch.ATTACHED in options:
        launch.end_with_starter()
    try:
        work(Run.open(Path(folder)))
    except Exception as error:
        traceback.print_exc()
        sentence = str(error).strip().splitlines() or ["no more is known"]
        process = f"{launch.LAST_WORDS}{os.environ.get('RANK', '0')}"
        print(f"\n{process} failed: {type(error).__name__}: {sentence[0]}", flush=True)
        return 1
    return 0


def work(run: Run) -> None:
    """Data, models and trainer as the notebook's process has them, and training to the end.

    Raises ``RuntimeError`` if the data are no longer those of the run.
    """
    params = run.params
    data = experiment.load_data(params)
    if data.identity() != run.provenance["data"]:
        raise RuntimeError(f"data_root {params.data_root} holds other data here than when the run began")
    models = experiment.load_models(params)
    trainer = experiment.make_trainer(params, run, data, models)
    assert trainer is not None  # launch.several
    experiment.fit(trainer, run)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
