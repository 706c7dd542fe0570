"""A completed run as a folder ready for the Hugging Face Hub: weights, processor, model card, parameters.

Nothing is uploaded. The folder contains no pickle, and no path or address of the training machine.
"""

import html
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from kepo_core.analysis.intervals import percent
from kepo_core.analysis.statistics import AVG_OOD, accuracy_table, format_table, paired_differences
from kepo_core.data.items import read_images
from kepo_core.data.records import Answer
from kepo_core.errors import ParamError
from kepo_core.files import read_json, write_json
from kepo_core.pages import shell
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.runs.shelf import read_answers
from kepo_core.task.prompts import NON_THINKING, THINKING

#: Files of a saved model that are copied; training_args.bin, a pickle, is not.
_TAKEN = (".safetensors", ".json", ".jinja", ".txt", ".model")
#: What each gate lets through, with the name of the reward and τ.
_GUIDED = {
    "reward": "rollouts whose {reward} reward is at least {tau:g}",
    "below": "rollouts whose {reward} reward is below {tau:g}",
    "always": "every rollout",
    "corrective": "rollouts whose {reward} reward is below {tau:g}, those more that the teacher finds likely",
    "unsure": "rollouts whose {reward} reward is at least {tau:g}, those more that were unlikely to the student",
    "teacher": "rollouts of prompts that the teacher itself answers right",
    "aligned": "every rollout, those tokens more where teacher and {reward} reward agree",
}
_TOLD = {
    "hint+answer": "with a teacher's hint and the answer",
    "hint": "with a teacher's hint",
    "answer": "with the answer",
    "none": "of the same prompt",
    "fading": "with a teacher's hint and the answer at first, later with the hint, at last of the same prompt",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def export(run: Run, folder: Path) -> Path:
    """Write the model of a completed ``run`` into the new ``folder``, whole or not at all. Returns the folder.

    Raises:
        ParamError: the run has not completed or has no trained model, or the folder exists.
    """
    if run.state != "completed":
        raise ParamError(f"{run.path} is {run.state}, expected a completed run")
    weights = sorted((run.path / "model").glob("*.safetensors"))
    if not weights:
        raise ParamError(f"{run.path} has no trained model (model/*.safetensors), expected a run that trains one")
    if folder.exists():
        raise ParamError(f"{folder} exists already and is not overwritten: name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "figures").mkdir(parents=True)
        for path in (run.path / "model").iterdir():
            if path.suffix in _TAKEN:
                shutil.copyfile(path, partial / path.name)
        for path in (run.path / "figures").glob("*.png"):
            shutil.copyfile(path, partial / "figures" / path.name)
        _name_processor(partial)
        (partial / "params.yaml").write_text(portable(run.params).to_yaml(), encoding="utf-8")
        (partial / "README.md").write_text(model_card(run), encoding="utf-8")
        partial.replace(folder)
    except OSError as error:
        raise ParamError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _name_processor(folder: Path) -> None:
    """Let ``AutoProcessor`` load the processor of a saved model that this package's image-only processor wrote.

    The class becomes transformers' own for the model's family; its video half takes the image settings from
    ``preprocessor_config.json``.
    """
    kind = read_json(folder / "config.json")["model_type"]
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = read_json(folder / name)
        if hasattr(transformers, settings.get("processor_class", "")):
            continue
        write_json(folder / name, settings | {"processor_class": PROCESSOR_MAPPING_NAMES[kind]})
        if "image_processor" in settings:
            write_json(folder / "preprocessor_config.json", settings["image_processor"])


def portable(params: Params) -> Params:
    """``params`` for another machine: placeholders replace the folders of absolute paths, and server addresses."""
    changes: dict[str, Any] = {
        name: f"PATH/TO/{Path(value).name}" if not address else "http://HOST:8000/v1"
        for name, value in params.to_dict().items()
        if isinstance(value, str) and ((address := "://" in value) or value[:1] == "~" or Path(value).is_absolute())
    }
    return params.replace(**changes | {"run_dir": "", "results_dir": Params().results_dir})


def model_card(run: Run) -> str:
    """The run's README.md for the Hub: metadata, method, data, results with intervals, and the command to repeat it."""
    params, made, answers = run.params, run.provenance, read_answers(run)
    code, counts = made["code"], run.headline or {}
    drawn = [name for name in ("accuracy", "training") if (run.path / f"figures/{name}.png").is_file()]
    results, caution = result_table(run, answers)
    asked = list(answers.values())[-1]
    notebook = Path(made.get("notebook", "notebooks/03_train_kepo.ipynb"))
    return shell.render(
        "model_card.md.j2",
        metadata=_metadata(run, asked),
        name=run.method,
        what=describe(params),
        student=_named(params.student),
        teacher=_named(params.teacher) if "teacher" in describe(params) else "",
        version=made["versions"]["kepo-core"],
        results=as_markdown(results),
        caution=caution,
        questions=len({answer.question_id for answer in asked}),
        samples=params.eval_samples,
        greedy=not params.eval_temperature,
        in_domain=params.train_modality,
        figures=drawn,
        data=_data_name(params),
        phantom=params.data_root == "phantom",
        identity=made["data"],
        seeds=made["seeds"],
        steps=counts.get("steps", "?"),
        prompt=THINKING if params.thinking else NON_THINKING,
        commit=code.get("commit") or "unknown",
        uncommitted=code.get("uncommitted", ""),
        notebook=notebook.name if notebook.is_absolute() else notebook.as_posix(),
        machine=", ".join(made.get("hardware", {}).get("gpus", [])) or "CPU only",
        versions=made["versions"],
        licence=_licence(params),
    )


def describe(params: Params) -> str:
    """The method in a sentence, with its own parameters."""
    if params.method == "sft":
        return "A vision-language model fine-tuned on right answers (SFT)."
    if params.method == "gkd":
        return f"A vision-language model distilled from a teacher by MM-GKD (λ = {params.gkd_lambda:g})."
    parts = [
        "distillation from a teacher on "
        + _GUIDED[params.gate].format(reward=params.gate_reward or "accuracy", tau=params.tau)
        + ("" if params.guidance == "loss" else ", in the advantage")
        if params.distill
        else "",
        f"further draws, for up to {params.rejection_budget} rounds, {_TOLD[params.hint_context]} where all "
        f"{params.group_size} rollouts of a prompt fail"
        if params.explore
        else "",
    ]
    with_parts = f" with {', and '.join(filter(None, parts))}" if any(parts) else ""
    return f"A vision-language model trained by reinforcement learning: GRPO{with_parts}."


def result_table(run: Run, answers: dict[str, list[Answer]]) -> tuple[pd.DataFrame, str]:
    """Accuracies before and after training and their change (a row per modality and average); a caution, or ""."""
    images = read_images(run.path / "items.csv")
    first, *_, last = [*answers, *answers]
    known = images if all(answer.question_id in images for answer in answers[last]) else None
    caution = "" if known else " It is unknown which questions share a picture, so intervals may be too narrow."
    table = format_table(accuracy_table(answers, known, run.params.train_modality)).T
    if first != last:
        changes = paired_differences(answers[first], answers[last], known, run.params.train_modality)
        numbers = changes[["difference", "low", "high"]].astype(float)
        cells = {row: percent(*values, sign="+") for row, *values in numbers.itertuples()}
        table["change"] = [cells.get(row, "–") for row in table.index]
    return table, caution


def _metadata(run: Run, asked: list[Answer]) -> str:
    """The card's YAML head, written by huggingface_hub."""
    params, table = run.params, accuracy_table({"model": asked}, None, run.params.train_modality)
    means = {str(row): float(table[row]["accuracy"].iloc[0]) for row in table.columns.unique(level=0)}
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=_data_name(params).lower(),
            dataset_name=_data_name(params),
            dataset_config=row,
            metric_type="accuracy",
            metric_value=round(value, 4),
        )
        for row, value in means.items()
        if row in (params.train_modality, "Avg.", AVG_OOD) and value == value
    ]
    return ModelCardData(
        model_name=run.method,
        base_model=params.student if _on_hub(params.student) else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=_licence(params) or None,
        tags=["kepo", "trl", params.method_name.partition("-")[0]],
        eval_results=results,
    ).to_yaml()


def _licence(params: Params) -> str:
    return "apache-2.0" if params.student.startswith("embedded:") else ""


def _on_hub(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _named(name: str) -> str:
    """A model's public name: on the Hub or in this package, or the last part of a path."""
    return f"`{name if _on_hub(name) or name.startswith('embedded:') else Path(name).name}`"


def _data_name(params: Params) -> str:
    return "PhantomVQA" if params.data_root == "phantom" else Path(params.data_root).stem


def as_markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, the index first; cells are escaped."""
    lines = [("", *table.columns), ("---",) * (1 + table.shape[1]), *table.itertuples(name=None)]
    return "\n".join(
        f"| {' | '.join(html.escape(str(cell)).replace('|', '&#124;') for cell in line)} |" for line in lines
    )
