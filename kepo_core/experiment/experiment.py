"""From parameters to the parts of one experiment: data, models, trainer, evaluation. Notebooks call these."""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from kepo_core.analysis import diagnosis
from kepo_core.baselines.gkd import gkd_trainer
from kepo_core.baselines.supervised import sft_trainer, supervised_dataset
from kepo_core.data.images import Pictures, ReadPicture, load_image
from kepo_core.data.records import Answer, Question
from kepo_core.experiment import kernel, launch, live, serving
from kepo_core.experiment.adapters import lora_config, save_student
from kepo_core.experiment.answering import start_vllm
from kepo_core.experiment.evaluation import Progress, answered, evaluate, parts, read_answers
from kepo_core.experiment.models import best_device, load_model, load_processor
from kepo_core.experiment.models import resolve as model_folder
from kepo_core.experiment.pair import Models as Models
from kepo_core.experiment.pair import in_our_words
from kepo_core.experiment.pair import load_models as load_models
from kepo_core.experiment.rehearsal import rehearse
from kepo_core.experiment.study_data import StudyData as StudyData
from kepo_core.experiment.study_data import load_data as load_data
from kepo_core.experiment.threads import idle_cores, suit_threads, with_forks
from kepo_core.method.config import KEPOConfig
from kepo_core.method.forward import keep_float32_outputs
from kepo_core.method.options import MethodOptions, declared
from kepo_core.method.resume import ResumableTrainer, last_checkpoint, trained_steps
from kepo_core.method.rounding import RoundingWatch
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.params import Params
from kepo_core.runs import curves, tracking
from kepo_core.runs.metrics import MetricsWriter, forget_after
from kepo_core.runs.run import Run
from kepo_core.task.dataset import to_dataset
from kepo_core.task.multiple_choice import MultipleChoice


def load_to_run(params: Params) -> Models:
    """`load_models` for the process that makes the run; if other processes train, only a served teacher is loaded.

    This checks everything that can be checked before a model is called.

    Raises `ParamError` if this machine cannot train with ``params``.
    """
    launch.check(params)
    tracking.check(params)
    if params.method != "none":
        with in_our_words():
            config = training_config(params, Path("results"))
            KEPOTrainer.get_optimizer_cls_and_kwargs(config)
            nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
            get_scheduler(config.lr_scheduler_type, nothing, 0, 1, config.lr_scheduler_kwargs)
        rehearse(params, config, _baseline)
    return load_models(params, with_teacher=not launch.several(params))


def _shared_arguments(params: Params, output_dir: Path) -> dict[str, Any]:
    """Arguments of the trainers of all methods: the study's parameters under TRL's names, then TRL's own fields."""
    common = {field.name for field in fields(TrainingArguments)} - {"activation_checkpointing"}
    return {
        "ddp_timeout": 1800 + serving.patience(params),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": params.prompts_per_device,
        "gradient_accumulation_steps": params.prompts_per_step // (params.prompts_per_device * params.processes),
        "num_train_epochs": params.epochs,
        "learning_rate": params.learning_rate,
        "bf16": params.precision == "bf16",
        # Under its old name, which TRL's configurations switch on by default.
        "gradient_checkpointing": bool(params.of_trl("activation_checkpointing")),
        "seed": params.seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": 1,
        "report_to": "none",
        "run_name": output_dir.parent.name,
        "project": tracking.PROJECT,
        "disable_tqdm": True,  # the notebook shows its own progress
        **{name: value for name, value in params.trl.items() if name in common},
        "save_strategy": "no",
    }


def training_config(params: Params, output_dir: Path) -> KEPOConfig:
    """`Params` → `KEPOConfig`; batch sizes are in prompts there and in completions here."""
    shared = _shared_arguments(params, output_dir)
    shared["per_device_train_batch_size"] *= params.group_size
    method = {name: getattr(params, name) for name in declared(MethodOptions)}
    saving = {"save_strategy": "steps" if params.trl["save_steps"] else "no", "save_total_limit": 2}
    # vLLM's log-probabilities are over the nucleus that it samples from, the trainer's over all tokens: their ratio
    # would down-weight answers by what top_p cuts off, long answers most.
    vllm = {"vllm_importance_sampling_correction": params.of_trl("top_p") == 1}
    trl = {name: value for name, value in params.trl.items() if name != "activation_checkpointing"}
    return KEPOConfig(num_generations=params.group_size, **{**vllm, **method, **trl, **shared, **saving})


@in_our_words()
def make_trainer(
    params: Params, run: Run, data: StudyData, models: Models, callbacks: Sequence[TrainerCallback] = ()
) -> Trainer | None:
    """The trainer of the run's method; None for ``method: none``, which trains nothing.

    KEPO with both parts off is TRL's GRPO. The baselines write no checkpoints: a resumed run of theirs trains from the
    start. All ``params.processes`` call this.

    Raises `ParamError` for values that the trainer refuses, ``RuntimeError`` if the number of processes differs.
    """
    if params.method == "none":
        return None
    callbacks = [MetricsWriter(run), *callbacks]
    pictures = Pictures(params.image_size, params.image_fit)
    if params.method == "kepo":
        task = MultipleChoice(params.hint_context, params.thinking, params.answer_format)
        trainer: Trainer = KEPOTrainer(
            model=models.student,
            reward_funcs=task.reward_funcs,
            args=training_config(params, run.training_dir),
            train_dataset=to_dataset(data.train, params.thinking, pictures),
            processing_class=models.processor,
            teacher=models.teacher,
            task=task,
            callbacks=callbacks,
            peft_config=lora_config(models.student, params),
        )
    else:
        trainer = _baseline(params, data.train, models, pictures, callbacks, run.training_dir)
        keep_float32_outputs(trainer.accelerator)
        trainer.add_callback(RoundingWatch(trainer))
    if (found := trainer.accelerator.num_processes) != params.processes:
        raise RuntimeError(f"{found} processes train together, expected {params.processes} (processes)")
    if params.curve_steps:
        questions = curves.asked(data.tests, params.curve_items)

        def ask() -> list[Answer]:  # the student with its adapters, sharded if it is
            accelerator = trainer.accelerator
            student = trainer.current_vllm() if isinstance(trainer, KEPOTrainer) else None
            now = replace(models, student=student or accelerator.unwrap_model(trainer.model_wrapped))
            return evaluate_student(params, now, questions, accelerator=accelerator)

        trainer.add_callback(curves.CurveWriter(ask, run.evaluation_dir, params.curve_steps))
    trainer.remove_callback(PrinterCallback)  # it prints every logged dictionary; they are in metrics.jsonl
    return trainer


def _baseline(
    params: Params,
    questions: Sequence[Question],
    models: Models,
    pictures: ReadPicture,
    callbacks: list[TrainerCallback],
    output_dir: Path,
    **changes: Any,
) -> Trainer:
    """The trainer of ``method: sft`` or ``gkd``; ``changes`` override arguments of ``TrainingArguments``."""
    shared = _shared_arguments(params, output_dir) | changes
    lora = lora_config(models.student, params)
    if params.method == "sft":
        dataset = supervised_dataset(questions, pictures)
        return sft_trainer(models.student, models.processor, dataset, shared, callbacks, lora)
    assert isinstance(models.teacher, Teacher)
    drawing = {name: params.of_trl(name) for name in ("max_completion_length", "temperature", "top_p")}
    arguments = shared | drawing | {"beta": params.distill_beta}
    return gkd_trainer(
        models.student,
        models.teacher.model,
        models.processor,
        to_dataset(questions, params.thinking, pictures),
        params.gkd_lambda,
        params.distill_temperature,
        arguments,
        callbacks,
        lora,
    )


def train_student(params: Params, run: Run, data: StudyData, models: Models, shown: live.LiveTraining) -> pd.DataFrame:
    """Train ``models.student`` to the end with ``params``, here or in ``params.processes`` others (`launch.train`).

    Returns the rows of ``diagnosis.training_table``, none if nothing is trained. Raises `ParamError` if a repeated cell
    would train something other than the run's record.
    """
    kernel.check_record(params, run, data.identity())
    if params.method != "none":
        kernel.check_trainable(params, run, models.student)
    if not launch.several(params):
        callbacks = [kernel.NotesTraining(models.student), shown]
        return train(make_trainer(params, run, data, models, callbacks), run)
    last_checkpoint(run.training_dir)  # its warnings about damaged checkpoints are shown in this process
    models.student.to("cpu")  # they need the GPUs
    torch.cuda.empty_cache()
    launch.train(params, run, shown)
    kernel.note_trained(models.student)
    models.student.float()  # under LoRA it has the compute precision, which rounds small updates away
    models.student.load_state_dict(load_model(str(run.path / "model"), "student").state_dict())
    models.student.to(best_device())  # type: ignore[arg-type]
    return diagnosis.read_training(run.path / "metrics.jsonl")


def train(trainer: Trainer | None, run: Run) -> pd.DataFrame:
    """`fit` in this process only. Returns the rows of ``diagnosis.training_table``, none without a trainer."""
    if trainer is None:
        return diagnosis.training_table([])
    fit(trainer, run)
    return diagnosis.read_training(run.path / "metrics.jsonl")


def fit(trainer: Trainer, run: Run) -> None:
    """Train to the end, from the run's newest whole checkpoint if it has one; save the model in the run's folder.

    Log lines of an earlier process after that checkpoint are deleted first, because these steps run again. If several
    processes call this, only the first writes.
    """
    checkpoint = trainer.last_checkpoint() if isinstance(trainer, ResumableTrainer) else None
    done = trained_steps(checkpoint) if checkpoint else 0
    writes = trainer.is_world_process_zero()
    if writes:
        forget_after(run, done)
        curves.forget_after(run.evaluation_dir, done)
        tracking.begin(trainer, run, done)
    trainer.train(resume_from_checkpoint=checkpoint)
    if writes and trainer.state.global_step > done:
        # Answers of a model that another process trained: this model may differ, for example on a GPU.
        for answers in parts(run.evaluation_dir / "trained.jsonl"):
            answers.unlink()
    save_student(trainer, run.path / "model")


def evaluate_student(
    params: Params,
    models: Models,
    questions: Sequence[Question],
    kept: Path | None = None,
    progress: Progress | None = None,
    accelerator: Any = None,
) -> list[Answer]:
    """The answers of the student, as it is now, to ``questions``: greedy, or sampled as ``eval_samples`` says.

    Partial answers go into the file ``kept``: a resumed run answers only the missing questions. The processes of an
    ``accelerator`` share the questions; without one, idle cores help to fill ``kept``.
    """
    count = len(questions) * params.eval_samples
    kernel.check_untrained(models.student, kept, count)
    ask = partial(
        evaluate,
        models.student,
        models.processor,
        questions,
        thinking=params.thinking,
        max_tokens=params.eval_max_tokens,
        batch_size=params.eval_batch_size,
        temperature=params.eval_temperature,
        samples=params.eval_samples,
        seed=params.seed,
        pictures=partial(load_image, image_size=params.image_size, fit=params.image_fit),
        kept=kept,
        answer_format=params.answer_format,
    )
    of = min(idle_cores(), -(-count // params.eval_batch_size))
    if accelerator is None and kept is not None and of > 1 and answered(kept) < count:

        def show(*_: int) -> None:
            if progress is not None:
                progress(answered(kept), count)

        with_forks(lambda number: ask(share=(number, of), progress=None if number else show), of)
        show()
    return ask(progress=progress, accelerator=accelerator)


def evaluate_run(params: Params, run: Run, data: StudyData, models: Models, student: str) -> list[Answer]:
    """The answers of the run's "untrained" or "trained" student to all test questions, also kept in the run's folder.

    ``models.student`` is this student; several processes or vLLM load it themselves. Raises `ParamError` if parameters
    or data are not those of the run any longer, or an earlier cell was skipped.
    """
    kernel.check_record(params, run, data.identity())
    if student == "trained":
        kernel.check_trained(run)
    kept, progress = run.evaluation_dir / f"{student}.jsonl", live.ProgressBar(student)
    if not launch.evaluates(params):
        return evaluate_student(params, models, data.test, kept, progress)
    count = len(data.test) * params.eval_samples
    if parts(kept) != [kept] or len(read_answers(kept)) != count:
        models.student.to("cpu")  # they need the GPUs
        torch.cuda.empty_cache()
        launch.evaluate(params, run, student, kept, count, progress)
    return read_answers(kept)


def evaluate_here(run: Run, data: StudyData, student: str) -> None:
    """Answer this process's share of `evaluate_run`'s questions; `launch.evaluate` starts the processes."""
    params = run.params
    source = params.student if student == "untrained" else str(run.path / "model")
    args = training_config(params, run.training_dir)
    accelerator, processor = Accelerator(), load_processor(params.student, "student")
    if args.use_vllm:
        model: Any = start_vllm(model_folder(source, "student"), processor, accelerator, args)
    else:
        # Trained weights are not rounded, also under LoRA.
        adapted = student == "untrained" and bool(params.lora_rank)
        model = load_model(source, "student", trained=not adapted, precision=params.precision)
        suit_threads(model)
    models = Models(model, processor, None)
    kept = run.evaluation_dir / f"{student}.jsonl"
    evaluate_student(params, models, data.test, kept, accelerator=accelerator)
