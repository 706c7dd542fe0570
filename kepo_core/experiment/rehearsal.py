"""One tiny training step before a run: it finds parameters that libraries refuse only when they use them."""

import copy
import gc
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import SaveStrategy

from kepo_core.data.records import Question
from kepo_core.errors import ParamError
from kepo_core.experiment.adapters import lora_config
from kepo_core.experiment.models import load_model, load_processor
from kepo_core.experiment.pair import Models
from kepo_core.experiment.threads import one_thread
from kepo_core.method.config import KEPOConfig
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.params import Params
from kepo_core.params_trl import DEFAULTS
from kepo_core.task.dataset import to_dataset
from kepo_core.task.multiple_choice import MultipleChoice

_SMALL, _TOKENS, _PIXELS = "embedded:student", 2, 16
#: Parameters of TRL's that the step sets itself.
_SET = ("max_steps", "save_steps", "max_completion_length", "report_to", "use_vllm")
_QUESTIONS = [Question("1", "", "CT", "", "What is seen?", ("nothing", "a nodule"), "A", Path("picture"))] * 2


def rehearse(params: Params, config: KEPOConfig, baseline: Callable[..., Trainer]) -> None:
    """Train the embedded student for one step, on two completions of two tokens, with ``params``.

    It has no side effects: random generators and accelerate's state are restored, and its files are deleted. Both parts
    of KEPO are off, and ``torch_compile`` wraps the model without compiling it, which would take long.

    Args:
        params: the run's parameters.
        config: KEPOTrainer's configuration, made from them.
        baseline: makes the trainer of the other methods from parameters, questions, models, a reader of pictures,
            callbacks, a folder, and changes to ``TrainingArguments``.

    Raises:
        ParamError: the step fails; the message names TRL's parameters that differ from their defaults.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, _untouched(), one_thread():
            ours = params.method == "kepo"
            trainer = _kepo(params, _reduced(config, folder)) if ours else _other(params, folder, baseline)
            trainer.remove_callback(PrinterCallback)
            with torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext():
                trainer.train()
            del trainer
            gc.collect()  # its model, which may be on the GPU
    except Exception as error:  # of any type: any library may raise where it uses a parameter first
        trl = params.trl.items()
        given = [f"{name} {value}" for name, value in trl if DEFAULTS.get(name) != value and name not in _SET]
        blamed, reason = ", ".join(given) or "these parameters", " ".join(str(error).split())
        raise ParamError(
            f"a first step of training, tried on {_SMALL}, fails with {blamed}: {type(error).__name__}: {reason}"
        ) from error


def _reduced(config: KEPOConfig, folder: str) -> KEPOConfig:
    args = copy.copy(config)
    args.output_dir, args.report_to, args.save_strategy = folder, [], SaveStrategy.NO
    args.distill = args.explore = args.use_vllm = args.log_rollouts = False
    args.num_generations = args.per_device_train_batch_size = args.generation_batch_size = 2
    args.gradient_accumulation_steps = args.steps_per_generation = args.max_steps = 1
    args.dataloader_persistent_workers &= not args.dataloader_num_workers  # torch refuses that; others take 5 s to end
    args.max_completion_length = min(_TOKENS, config.max_completion_length)
    return args


def _kepo(params: Params, args: KEPOConfig) -> Trainer:
    model, task = load_model(_SMALL), MultipleChoice(params.hint_context, params.thinking, params.answer_format)
    rows = to_dataset(_QUESTIONS, params.thinking, _picture)
    return KEPOTrainer(model, task.reward_funcs, args, rows, processing_class=load_processor(_SMALL), task=task,
                       peft_config=lora_config(model, params))  # fmt: skip


def _other(params: Params, folder: str, baseline: Callable[..., Trainer]) -> Trainer:
    processor = load_processor(_SMALL)
    teacher = Teacher(load_model(_SMALL, trained=False), processor) if params.method == "gkd" else None
    return baseline(
        params.replace(max_completion_length=_TOKENS),
        _QUESTIONS,
        Models(load_model(_SMALL), processor, teacher),
        _picture,
        [],
        Path(folder),
        report_to="none",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=1,
    )


def _picture(path: Path) -> Image.Image:
    return Image.new("RGB", (_PIXELS, _PIXELS))


@contextmanager
def _untouched() -> Iterator[None]:
    """Restore random generators and accelerate's state at the end, and log nothing: training will log it again."""
    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    states, drawn, drawn_by_numpy = [dict(state) for state in shared], random.getstate(), np.random.get_state()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        for state, before in zip(shared, states, strict=True):
            state.clear()
            state.update(before)
