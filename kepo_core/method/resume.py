"""Exact resume: training continues from a checkpoint as if it had never stopped.

transformers saves weights, optimiser, schedule, step and random generators. This module adds what it and TRL omit:
the rollouts of an unfinished generation window, the position inside that window, metrics that are not logged yet, and
how often the sampler has shuffled. A checkpoint is written under another name and then renamed: anything called
``checkpoint-N`` is complete, wherever the process was killed. Checksums in it detect later damage; resume then takes
the checkpoint before it.
"""

import hashlib
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from trl import GRPOTrainer

from kepo_core.errors import ParamError
from kepo_core.files import read_json, write_json
from kepo_core.method.rollouts import forget_rollouts

#: Entries of a buffered batch that can be recomputed from the others.
_DERIVED = ("kepo_targets",)
_PARTIAL = ".partial"
#: The file in a checkpoint with the SHA-256 of all other files: relative path → checksum.
_CHECKSUMS = "checksums.json"


class ResumableTrainer(GRPOTrainer):  # type: ignore[misc]  # trl is not followed by the type checker
    """GRPOTrainer whose ``train(resume_from_checkpoint=…)`` is exact on the CPU.

    Only the tables of ``log_completions`` restart empty: a checkpoint does not hold completions not yet written.
    """

    #: (step, number within the step) of the newest generation batch.
    _generation_of_step: tuple[int, int] = (-1, 0)
    #: Sums since the last optimiser step: mode → sums.
    _window: dict[str, list[float]]
    #: Which prompts the teacher itself answers right, as far as it was asked.
    answered: dict[str, bool]
    _resumed_from: str | None = None
    _verified: str | None = None

    def last_checkpoint(self) -> str | None:
        """`last_checkpoint` of ``output_dir``. All processes must call it; the first reads the disk."""
        found = [last_checkpoint(Path(self.args.output_dir)) if self.accelerator.is_main_process else None]
        self._verified = broadcast_object_list(found)[0]
        return self._verified

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; ``True`` resumes from the newest checkpoint of ``output_dir``, or starts without one.

        Rollouts of an earlier training are removed for the steps that are trained now.

        Raises:
            ValueError: the given checkpoint is damaged; the message names the file. ``True`` skips damaged ones.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_checkpoint()
        unseen = resume_from_checkpoint and str(resume_from_checkpoint) != self._verified
        if unseen and (reason := damage(Path(str(resume_from_checkpoint)))):
            raise ValueError(f"{resume_from_checkpoint} is damaged: {reason}; resume from an earlier checkpoint")
        self._resumed_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.args.log_rollouts and self.accelerator.is_main_process:
            forget_rollouts(self.args.output_dir, trained_steps(self._resumed_from) if self._resumed_from else 0)
        return super().train(resume_from_checkpoint=self._resumed_from, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train no step from a finished checkpoint: transformers' loop trains one before it checks.

        At this point everything is prepared (and sharded, if configured) as for training, and can be saved.
        """
        if self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save transformers' checkpoint and the loop's own state, atomically."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        partial, main = folder / _PARTIAL, self.args.should_save
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(folder)
        if self.state.best_model_checkpoint == str(partial / name):
            self.state.best_model_checkpoint = str(folder / name)
            if main:
                self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
        torch.save(self._loop_state(), partial / name / f"loop_{self.accelerator.process_index}.pt")
        self.accelerator.wait_for_everyone()
        if main:
            write_json(partial / name / _CHECKSUMS, _checksums(partial / name))
            shutil.rmtree(folder / name, ignore_errors=True)
            (partial / name).rename(folder / name)
            if (card := partial / "README.md").is_file():  # TRL's model card
                card.replace(folder / card.name)
            shutil.rmtree(partial)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def _loop_state(self) -> dict[str, Any]:
        buffered = self._buffered_inputs
        if buffered is not None:
            buffered = [{k: v for k, v in batch.items() if k not in _DERIVED} for batch in buffered]
        return {
            "step": self._step,
            "buffered": buffered,
            "generation_of_step": self._generation_of_step,
            "metrics": {mode: dict(metrics) for mode, metrics in self._metrics.items()},
            "window": self._window,
            "answered": self.answered,
            "loss": self._tr_loss,
            "loss_since": self._globalstep_last_logged,
        }

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random generators, and the loop's state: transformers calls this last."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"loop_{self.accelerator.process_index}.pt"
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist, expected a checkpoint of this trainer, written by the same number of processes"
            )
        device = self.accelerator.device  # "cpu:0" with several processes, which torch.load does not know
        state = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
        self._step, self._buffered_inputs = state["step"], state["buffered"]
        self._generation_of_step = state["generation_of_step"]
        for mode, metrics in state["metrics"].items():
            self._metrics[mode] = defaultdict(list, metrics)
        self._window, self.answered = state["window"], state["answered"]
        self._tr_loss, self._globalstep_last_logged = state["loss"], state["loss_since"]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's sampler, which shuffles every epoch from one generator: repeat the shuffles of past epochs."""
        sampler = super()._get_train_sampler(dataset)
        if self._resumed_from and getattr(sampler, "shuffle", False):
            for _ in range(int(_trainer_state(self._resumed_from).epoch + 1e-6)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler


def last_checkpoint(folder: Path) -> str | None:
    """The newest intact checkpoint in ``folder``; None without one.

    Newer checkpoints that are damaged, or another trainer's, are renamed (they must not count as checkpoints to keep),
    with a message on standard error.
    """
    while folder.is_dir() and (newest := get_last_checkpoint(str(folder))):
        path = Path(newest)
        if not (reason := damage(path)):
            return str(newest)
        aside = path.with_name(path.name.replace("checkpoint", "damaged"))
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        before = get_last_checkpoint(str(folder))
        instead = f"resumes from {Path(before).name}" if before else "starts over, as there is no other checkpoint"
        print(f"kepo: {path} is damaged ({reason}): renamed to {aside.name}; training {instead}",
              file=sys.stderr, flush=True)  # fmt: skip
    return None


def damage(checkpoint: Path) -> str:
    """Which file of a checkpoint differs from what was written, in words; "" if none does."""
    if not (checkpoint / _CHECKSUMS).is_file():
        return f"{_CHECKSUMS} does not exist, expected a checkpoint of this trainer"
    try:
        written = read_json(checkpoint / _CHECKSUMS)
        found = _checksums(checkpoint)
    except (ParamError, OSError) as error:
        return str(error)
    if not written:
        return f"{_CHECKSUMS} lists no file"
    for name in sorted(written | found):
        if found.get(name) != written.get(name):
            return f"{name} {'is missing' if name not in found else 'has changed since it was written'}"
    return ""


def _checksums(checkpoint: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != _CHECKSUMS):
        if path.name.startswith("."):  # written by a file manager or a network file system
            continue
        with path.open("rb") as file:
            sums[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def trained_steps(checkpoint: str) -> int:
    """How many optimiser steps a checkpoint has been trained for."""
    return int(_trainer_state(checkpoint).global_step)


def _trainer_state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
