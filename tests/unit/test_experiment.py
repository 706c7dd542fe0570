"""From parameters to parts: every kind of bad input is refused before training, by name."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trl import GRPOConfig

from kepo_core.analysis import diagnosis, statistics
from kepo_core.data import phantom
from kepo_core.data.records import MODALITIES
from kepo_core.errors import DataError, ParamError
from kepo_core.experiment import experiment, methods
from kepo_core.experiment.models import save_embedded
from kepo_core.method.chat_client import RETRIES, TIMEOUT
from kepo_core.method.config import KEPOConfig
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.testbed.embedded import build_model, build_processor

SMOKE = {"train_items": 4, "eval_items": 2, "prompts_per_step": 4, "prompts_per_device": 4}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    phantom.write_phantom(root, seed=0, images=dict.fromkeys(MODALITIES, 8))
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A small set that a test may spoil: pictures are linked to, files of questions copied."""
    copy = tmp_path / "set"
    for path in original.rglob("*"):
        target = copy / path.relative_to(original)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copy


def params(root: Path, **changes: object) -> Params:
    return Params.load(overrides={"data_root": str(root), **SMOKE, **changes})


def edit_rows(root: Path, **changes: object) -> str:
    """Change every MRI row; returns the first one's id. A value of None removes the key."""
    file = root / "QA_information/Open-access/PhantomVQA-MRI.json"
    rows = json.loads(file.read_text())
    for row in rows:
        for key, value in changes.items():
            row.pop(key, None)
            if value is not None:
                row[key] = value
    file.write_text(json.dumps(rows))
    return rows[0]["question_id"]


def test_validation_images_are_not_test_images(root: Path) -> None:
    chosen, reported = (experiment.load_data(params(root, eval_split=name)) for name in ("validation", "test"))
    assert chosen.train == reported.train and not {q.image for q in chosen.test} & {q.image for q in reported.test}


def test_good_data_is_split_by_image(root: Path) -> None:
    data = experiment.load_data(params(root))
    assert len(data.train) == 4 and list(data.tests) == list(MODALITIES)
    assert len(data.test) == 16 and set(data.images) == {q.id for q in data.test}
    assert not {q.image for q in data.train} & {q.image for q in data.test}
    identity = data.identity()
    assert identity["train_items"] == 4 and identity["train_sha256"] != identity["test_sha256"]


NO_OPTIONS = {f"option_{letter}": None for letter in "ABCD"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (NO_OPTIONS, "option"),
        ({"gt_answer": "none of these"}, "none of these"),
        ({"image_path": "../../elsewhere.png"}, "elsewhere.png"),
        ({"image_path": "Images/PhantomVQA-MRI/missing.png"}, "missing.png"),
        ({"modality_type": "Thermography"}, "Thermography"),
    ],
)
def test_a_bad_row_is_named(root: Path, changes: dict[str, object], expected: str) -> None:
    first = edit_rows(root, **changes)
    with pytest.raises(DataError, match=expected) as error:
        experiment.load_data(params(root))
    assert first in str(error.value)


def test_bad_rows_among_good_ones_are_left_out_and_counted(root: Path) -> None:
    file = root / "QA_information/Open-access/PhantomVQA-CT.json"
    rows = json.loads(file.read_text())
    rows[0]["gt_answer"] = "none of these"
    file.write_text(json.dumps(rows))
    data = experiment.load_data(params(root))
    assert data.identity()["rows_dropped"] == {"the answer is not among the options": 1}
    assert rows[0]["question_id"] not in {q.id for q in data.test}


def test_an_unreadable_image_is_named(root: Path) -> None:
    for path in (root / "Images/PhantomVQA-MRI").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"PhantomVQA-MRI_\d+.*\.png"):
        experiment.load_data(params(root))


def test_an_empty_split_and_a_wrong_root_are_named(root: Path, tmp_path: Path) -> None:
    (root / "QA_information/Open-access/PhantomVQA-CT.json").unlink()
    with pytest.raises(DataError, match="train_modality"):
        experiment.load_data(params(root, train_modality="CT"))
    with pytest.raises(DataError, match=r"data_root .*nowhere does not exist"):
        experiment.load_data(params(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="QA_information"):
        experiment.load_data(params(tmp_path))


def test_another_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    processor = build_processor()
    save_embedded(build_model(), processor, tmp_path / "student")
    processor.tokenizer.add_tokens(["zzz"])
    save_embedded(build_model(), processor, tmp_path / "teacher")
    names = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    with pytest.raises(ParamError, match="another vocabulary"):
        experiment.load_models(params(root, **names))
    assert experiment.load_models(params(root, **names, distill=False, explore=False)).teacher is None


def test_training_config_says_what_the_parameters_say(tmp_path: Path) -> None:
    changed = {"tau": 0.0, "group_size": 4, "prompts_per_step": 6, "prompts_per_device": 2, "beta": 0.1, "seed": 7,
               "data_seed": 3, "learning_rate": 1e-5, "scale_rewards": "group", "distill_beta": 0.5}  # fmt: skip
    config = experiment.training_config(Params.load(overrides=changed), tmp_path)
    assert (config.num_generations, config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 8, 3)
    assert (config.tau, config.beta, config.seed, config.learning_rate) == (0.0, 0.1, 7, 1e-5)
    assert (config.scale_rewards, config.distill_beta) == ("group", 0.5)
    assert config.data_seed is None and not config.bf16
    config = experiment.training_config(Params.load(overrides=changed | {"processes": 3}), tmp_path)
    assert config.gradient_accumulation_steps == 1


def test_processes_wait_for_each_other_longer_than_for_a_served_teacher(tmp_path: Path) -> None:
    assert experiment.training_config(Params(), tmp_path).ddp_timeout == 1800
    served = Params(teacher_url="http://far:8000/v1", teacher_top_k=20)
    assert experiment.training_config(served, tmp_path).ddp_timeout >= 1800 + (RETRIES + 1) * TIMEOUT + RETRIES * 120


METHODS = {
    "sft-nothink": {"method": "sft", "thinking": False},
    "gkd-lambda0.5-nothink": {"method": "gkd", "gkd_lambda": 0.5, "thinking": False},
    "gkd-lambda1": {"method": "gkd"},
    "zero-shot": {"method": "none"},
}


#: Parameters that all trainers are told, under transformers' names where those differ; none at TRL's default here.
SHARED: dict[str, tuple[str, Any]] = {
    "learning_rate": ("learning_rate", 3e-3), "lr_scheduler_type": ("lr_scheduler_type", "cosine"),
    "max_grad_norm": ("max_grad_norm", 0.5), "max_steps": ("max_steps", 3), "epochs": ("num_train_epochs", 2.5),
    "seed": ("seed", 7),
}  # fmt: skip
#: Those of each method; of bools, not the default of its trainer.
FURTHER: dict[str, dict[str, tuple[str, Any]]] = {
    "sft": {"activation_checkpointing": ("gradient_checkpointing", False)},
    "gkd": {
        "activation_checkpointing": ("gradient_checkpointing", False),
        "max_completion_length": ("max_completion_length", 7),
        "temperature": ("temperature", 0.7), "top_p": ("top_p", 0.9), "distill_beta": ("beta", 0.5),
    },
    "kepo": {
        "activation_checkpointing": ("gradient_checkpointing", True),
        "max_completion_length": ("max_completion_length", 7),
        "temperature": ("temperature", 0.7), "top_p": ("top_p", 0.9), "distill_beta": ("distill_beta", 0.5),
        "distill_temperature": ("distill_temperature", 2.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("method", FURTHER)
def test_what_all_methods_are_told_arrives(root: Path, tmp_path: Path, method: str) -> None:
    told = SHARED | FURTHER[method]
    own = {"method": method, "thinking": method != "sft", "distill_temperature": 2.0, "gkd_lambda": 1.0}
    sizes = {"prompts_per_step": 4, "prompts_per_device": 2, "results_dir": str(tmp_path)}
    given = params(root, **own | sizes | {name: value for name, (_, value) in told.items()})
    data, models = experiment.load_data(given), experiment.load_models(given)
    trainer = experiment.make_trainer(given, Run.allocate(given, owner="test"), data, models)
    assert trainer is not None
    defaults = type(trainer.args)(output_dir=str(tmp_path), use_cpu=True)
    for name, (theirs, value) in told.items():
        assert getattr(trainer.args, theirs) == value, name
        assert value != getattr(defaults, theirs), name
    batch = trainer.args.per_device_train_batch_size // (given.group_size if method == "kepo" else 1)
    assert (batch, trainer.args.gradient_accumulation_steps) == (2, 2)
    if method == "gkd":
        assert trainer.temperature == 2.0 and trainer.generation_config.temperature == 0.7


@pytest.mark.parametrize("name", METHODS)
def test_a_baseline_trains_on_the_same_items_and_leaves_the_same_files(root: Path, tmp_path: Path, name: str) -> None:
    small = {"max_steps": 1, "prompts_per_step": 4, "prompts_per_device": 2, "max_completion_length": 4}
    given = params(root, results_dir=str(tmp_path), eval_max_tokens=4, **small, **METHODS[name])
    assert given.method_name == name and methods.needs_teacher(given) == ("gkd" in name)
    data, models, run = experiment.load_data(given), experiment.load_models(given), Run.allocate(given, owner="test")
    before = {key: value.clone() for key, value in models.student.state_dict().items()}
    trainer = experiment.make_trainer(given, run, data, models)
    metrics = experiment.train(trainer, run)
    same = all(torch.equal(value, before[key]) for key, value in models.student.state_dict().items())
    answers = experiment.evaluate_student(given, models, data.test)
    assert same == metrics.empty == (name == "zero-shot") and len(answers) == 16
    if trainer is not None:
        assert (trainer.args.learning_rate, trainer.args.gradient_accumulation_steps) == (given.learning_rate, 2)
        assert (run.path / "model/model.safetensors").is_file() and metrics["loss"].iloc[0] > 0
    differences = statistics.paired_differences(answers, answers, None, given.train_modality)
    headline = diagnosis.headline(given, differences, metrics)
    assert headline["steps"] == (0 if name == "zero-shot" else 1) and not any("kepo/" in key for key in headline)


def test_every_method_parameter_reaches_the_trainer() -> None:
    """What KEPOConfig adds to GRPOConfig is a parameter of the same name, but for the rollouts switch."""
    ours, theirs, parameters = ({f.name for f in fields(kind)} for kind in (KEPOConfig, GRPOConfig, Params))
    assert (
        ours - theirs - {"log_rollouts", "activation_checkpointing"} <= parameters
    )  # transformers 5.19 lacks the last


def test_pictures_are_pictures(root: Path) -> None:
    data = experiment.load_data(params(root))
    assert {Image.open(q.image).size for q in data.test} == {(64, 64)}
