"""A run in an experiment tracker (``report_to``): a track that survives resuming, and data that transformers omits.

transformers sends every metric and the training arguments. This module names the track after the run folder, so a
resumed run continues it, and sends the run's parameters, rollouts and figures. A tracker is imported only when it is
used.
"""

import html
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pandas as pd
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kepo_core.errors import ParamError
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import Params
from kepo_core.runs.run import Run

#: A tracker's project, unless ``project`` names another.
PROJECT = "kepo"


class Track(Protocol):
    """A run's track in one tracker, made with the run and the tracker's project."""

    def begin(self, trainer: Trainer, done: int) -> None:
        """Before training continues after step ``done``: open the track where transformers would start another one."""

    def parameters(self) -> None:
        """Send the run's parameters, after transformers has opened the track."""

    def reopen(self) -> None:
        """Open the track after training, which may have happened in another process."""

    def rollouts(self, frame: pd.DataFrame) -> None:
        """Send the rollouts, a row each."""

    def figure(self, path: Any) -> None:
        """Send a picture file."""

    def close(self) -> None:
        """Close the track and wait until everything is sent."""


class _TensorBoard:
    """Event files in the run's folder; for a resumed run, TensorBoard ignores steps that are logged twice."""

    def __init__(self, run: Run, project: str) -> None:
        self._run, self._folder = run, str(run.path / "tensorboard")

    def _open(self, **how: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, **how)  # type: ignore[no-untyped-call]

    def begin(self, trainer: Trainer, done: int) -> None:
        self._open(purge_step=done + 1)
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ == "TensorBoardCallback":
                callback.tb_writer = self._writer

    def parameters(self) -> None:
        lines = self._run.params.to_yaml().splitlines()
        self._writer.add_text("parameters", "\n".join(f"    {line}" for line in lines))  # type: ignore[no-untyped-call]

    def reopen(self) -> None:
        self._open()

    def rollouts(self, frame: pd.DataFrame) -> None:
        for step, rows in frame.groupby("step"):
            text = "\n".join([_cells(rows.columns), _cells(["---"] * rows.shape[1]), *map(_cells, rows.to_numpy())])
            self._writer.add_text("rollouts", text, step)  # type: ignore[no-untyped-call]

    def figure(self, path: Any) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


def _cells(values: Any) -> str:
    """A row of a Markdown table; texts of models are escaped."""
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return f"| {' | '.join(' '.join(html.escape(text).replace('|', '&#124;').split()) for text in texts)} |"


class _Trackio:
    """A local database, or a Hugging Face Space if one is named."""

    def __init__(self, run: Run, project: str) -> None:
        import trackio

        self._trackio, self._run = trackio, run
        self._place = {"project": project, "name": run.path.name, "resume": "allow"}

    def begin(self, trainer: Trainer, done: int) -> None:
        """Nothing: transformers continues a track of that name."""

    def parameters(self) -> None:
        self._trackio.config.update({f"params/{name}": value for name, value in self._run.params.to_dict().items()})

    def reopen(self) -> None:
        tracks = self._trackio.Api().runs(self._place["project"])
        known = next((track.config or {} for track in tracks if track.name == self._run.path.name), {})
        kept = {
            name: value for name, value in known.items() if not name.startswith("_")
        }  # init would replace it by an empty one
        self._trackio.init(**self._place, config=kept, space_id=self._run.params.trl.get("trackio_space_id"))

    def rollouts(self, frame: pd.DataFrame) -> None:
        self._trackio.log({"rollouts": self._trackio.Table(dataframe=frame)})

    def figure(self, path: Any) -> None:
        self._trackio.log({f"figures/{path.stem}": self._trackio.Image(path)})

    def close(self) -> None:
        self._trackio.finish()


class _Wandb:
    """Local files are in the run's folder."""

    def __init__(self, run: Run, project: str) -> None:
        import wandb

        self._wandb, self._run = wandb, run
        self._project = os.environ.get("WANDB_PROJECT", project)

    def begin(self, trainer: Trainer, done: int) -> None:
        self.reopen()

    def parameters(self) -> None:
        self._wandb.config.update({"params": self._run.params.to_dict()}, allow_val_change=True)

    def reopen(self) -> None:
        name = self._run.path.name
        if self._wandb.run is None or self._wandb.run.id != name:
            self._wandb.finish()  # of another run, in a live notebook
            self._wandb.init(project=self._project, id=name, name=name, resume="allow", dir=self._run.path)

    def rollouts(self, frame: pd.DataFrame) -> None:
        self._wandb.log({"rollouts": self._wandb.Table(dataframe=frame)})

    def figure(self, path: Any) -> None:
        self._wandb.log({f"figures/{path.stem}": self._wandb.Image(str(path))})

    def close(self) -> None:
        self._wandb.finish()


class _MLflow:
    """A run of an MLflow experiment with the project's name."""

    def __init__(self, run: Run, project: str) -> None:
        import mlflow

        self._mlflow, self._run = mlflow, run
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)

    def begin(self, trainer: Trainer, done: int) -> None:
        self.reopen()

    def parameters(self) -> None:
        self._mlflow.log_dict(self._run.params.to_dict(), "params.yaml")

    def reopen(self) -> None:
        name = self._run.path.name
        self._mlflow.end_run()
        self._mlflow.set_experiment(self._experiment)
        found = self._mlflow.search_runs(filter_string=f"attributes.run_name = '{name}'", output_format="list")
        self._mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=name)

    def rollouts(self, frame: pd.DataFrame) -> None:
        self._mlflow.log_table(frame, "rollouts.json")

    def figure(self, path: Any) -> None:
        self._mlflow.log_artifact(str(path), "figures")

    def close(self) -> None:
        self._mlflow.end_run()


#: Supported trackers, under transformers' names.
_TRACKS: dict[str, Callable[[Run, str], Track]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def _named(params: Params) -> str:
    return str(params.trl.get("report_to", "none"))


def check(params: Params) -> None:
    """Raise `ParamError` for a tracker that is unknown, not installed, or needs a login."""
    name = _named(params)
    if name == "none":
        return
    if name not in _TRACKS:
        raise ParamError(f"report_to must be one of none, {', '.join(_TRACKS)}, got {name!r}")
    if importlib.util.find_spec(name) is None:
        raise ParamError(f"report_to is {name!r}, which is not installed: pip install {name}, or set it to none")
    if name == "wandb":
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ParamError("report_to is 'wandb', but nobody is logged in: wandb login, or set WANDB_MODE=offline")


class _Parameters(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Sends a run's parameters; it is called after transformers' callback, which opens the track."""

    def __init__(self, track: Track) -> None:
        self._track = track

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._track.parameters()


def begin(trainer: Trainer, run: Run, done: int) -> None:
    """Let ``trainer``, in the process that writes, log to the run's track, after optimiser step ``done``."""
    if (name := _named(run.params)) != "none":
        # transformers warns at each step of metrics that are None because there was nothing to average.
        logging.getLogger("transformers.integrations.integration_utils").setLevel(logging.ERROR)
        track = _TRACKS[name](run, trainer.args.project)
        track.begin(trainer, done)
        trainer.add_callback(_Parameters(track))


def send(run: Run) -> None:
    """Send the rollouts and figures of ``run`` to its tracker; without a tracker do nothing.

    A run that trains nothing sends its parameters here, too. If the tracker fails, the reason is printed and the run
    continues: its folder has everything.
    """
    if (name := _named(run.params)) == "none":
        return
    try:
        track = _TRACKS[name](run, str(run.params.trl.get("project", PROJECT)))
        track.reopen()
        if run.params.method == "none":
            track.parameters()
        rollouts = collect_rollouts(run.training_dir)
        if not rollouts.empty:
            track.rollouts(rollouts)
        for path in sorted((run.path / "figures").glob("*.png")):
            track.figure(path)
        track.close()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"kepo: {name} misses rollouts or figures ({reason}); all of them are in {run.path}", file=sys.stderr)
