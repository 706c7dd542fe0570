"""A process that trains or evaluates: ``accelerate launch … -m kepo_core.experiment.worker RUN``, see `launch`."""

import os
import sys
import traceback
from pathlib import Path

from kepo_core.exit_codes import leave
from kepo_core.experiment import experiment, launch
from kepo_core.quiet import quiet_third_parties
from kepo_core.runs.run import Run


def main(folder: str, *options: str) -> int:
    """Train or evaluate the run in ``folder``. Returns the exit code; if it is 1, the last line of output says why."""
    quiet_third_parties()
    if launch.ATTACHED in options:
        launch.end_with_starter()
    try:
        run = Run.open(Path(folder))
        if launch.EVALUATE in options:
            experiment.evaluate_here(run, load_data(run), options[-1])
        else:
            work(run)
    except Exception as error:
        traceback.print_exc()
        sentence = str(error).strip().splitlines() or ["no message"]
        process = f"{launch.LAST_WORDS}{os.environ.get('RANK', '0')}"
        print(f"\n{process} failed: {type(error).__name__}: {sentence[0]}", flush=True)
        return 1
    return 0


def load_data(run: Run) -> experiment.StudyData:
    """The same data as in the notebook's process; ``RuntimeError`` if they differ from those of the run."""
    data = experiment.load_data(run.params)
    if data.identity() != run.provenance["data"]:
        raise RuntimeError(f"data_root {run.params.data_root} has other data here than when the run began")
    return data


def work(run: Run) -> None:
    """Make models and trainer as in the notebook's process, and train to the end."""
    params, data = run.params, load_data(run)
    models = experiment.load_models(params)
    trainer = experiment.make_trainer(params, run, data, models)
    assert trainer is not None  # launch.several
    experiment.fit(trainer, run)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
