"""A run in an experiment tracker (``report_to``): what transformers' own callbacks leave out, and one track for good.

transformers sends every metric and the training arguments. Here the track is given the run folder's name, by which a
resumed run goes on in it, and is sent the run's parameters, its rollouts and its figures. A tracker is imported where
it is named, and nowhere else.
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
        """Before training goes on behind step ``done``: open the track where transformers would begin another."""

    def parameters(self) -> None:
        """Once transformers has opened it: the run's parameters."""

    def reopen(self) -> None:
        """After training, which may have been in another process."""

    def rollouts(self, frame: pd.DataFrame) -> None:
        """The rollouts, a row each."""

    def figure(self, path: Any) -> None:
        """A picture file."""

    def close(self) -> None:
        """Wait until all is written."""


class _TensorBoard:
    """Event files in the run's own folder; of a resumed run, TensorBoard passes over what is logged once more."""

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
    """A row of a Markdown table; what models wrote is text there, and nothing else."""
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return f"| {' | '.join(' '.join(html.escape(text).replace('|', '&#124;').split()) for text in texts)} |"


class _Trackio:
    """A local database, or a Space where one is named."""

    def __init__(self, run: Run, project: str) -> None:
        import trackio

        self._trackio, self._run = trackio, run
        self._place = {"project": project, "name": run.path.name, "resume": "allow"}

    def begin(self, trainer: Trainer, done: int) -> None:
        """Nothing: transformers goes on in a track of that name."""

    def parameters(self) -> None:
        self._trackio.config.update({f"params/{name}": value for name, value in self._run.params.to_dict().items()})

    def reopen(self) -> None:
        tracks = self._trackio.Api().runs(self._place["project"])
        known = next((track.config or {} for track in tracks if track.name == self._run.path.name), {})
        kept = {name: value for name, value in known.items() if not name.startswith("_")}  # a new one would replace it
        self._trackio.init(**self._place, config=kept, space_id=self._run.params.trl.get("trackio_space_id"))

    def rollouts(self, frame: pd.DataFrame) -> None:
        self._trackio.log({"rollouts": self._trackio.Table(dataframe=frame)})

    def figure(self, path: Any) -> None:
        self._trackio.log({f"figures/{path.stem}": self._trackio.Image(path)})

    def close(self) -> None:
        self._trackio.finish()


class _Wandb:
    """Its files are kept in the run's folder."""

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
            self._wandb.finish()  # another run's, in a live notebook
            self._wandb.init(project=self._project, id=name, name=name, resume="allow", dir=self._run.path)

    def rollouts(self, frame: pd.DataFrame) -> None:
        self._wandb.log({"rollouts": self._wandb.Table(dataframe=frame)})

    def figure(self, path: Any) -> None:
        self._wandb.log({f"figures/{path.stem}": self._wandb.Image(str(path))})

    def close(self) -> None:
        self._wandb.finish()


class _MLflow:
    """A run of an experiment that is called as the project."""

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


#: The trackers that a run may be reported to, under transformers' names.
_TRACKS: dict[str, Callable[[Run, str], Track]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def _named(params: Params) -> str:
    return str(params.trl.get("report_to", "none"))


def check(params: Params) -> None:
    """Raise `ParamError` for a tracker that is not known, not installed, or that nobody is logged in to."""
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
    """Sends a run's parameters as soon as transformers' callback, which comes before it, has opened the track."""

    def __init__(self, track: Track) -> None:
        self._track = track

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._track.parameters()


def begin(trainer: Trainer, run: Run, done: int) -> None:
    """Let ``trainer``, on the process that writes, log in the run's track, behind optimiser step ``done``."""
    if (name := _named(run.params)) != "none":
        # At each step transformers warns of metrics that had nothing to average: they come as None, and stay out.
        logging.getLogger("transformers.integrations.integration_utils").setLevel(logging.ERROR)
        track = _TRACKS[name](run, trainer.args.project)
        track.begin(trainer, done)
        trainer.add_callback(_Parameters(track))


def send(run: Run) -> None:
    """Send the rollouts and the figures of ``run`` to its tracker; without one nothing happens.

    Where nothing was trained, its parameters are sent here, too.
    A tracker that fails here does not fail the run, whose folder has all of it: the reason is printed.
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
        print(f"kepo: {name} has not got all rollouts and figures, which are in {run.path} ({reason})", file=sys.stderr)
