"""Runs that cannot succeed are refused before any model is called: one sentence in our words, from one place."""

import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from kepo_core.data import source
from kepo_core.data.phantom import ensure_phantom, write_phantom
from kepo_core.errors import DataError, ParamError
from kepo_core.experiment import experiment, launch, serving
from kepo_core.experiment.models import save_embedded
from kepo_core.experiment.rehearsal import rehearse
from kepo_core.method.chat_client import ChatClient, TeacherServerError
from kepo_core.params import Params
from kepo_core.testbed.embedded import build_model, build_processor

WEIGHTS = "model.safetensors"
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_embedded(build_model(), build_processor(), folder := tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture
def refused(saved: Path, tmp_path: Path) -> Callable[..., str]:
    """The sentence that refuses a run after ``edit`` has changed its model ``role``."""

    def refused(role: str, edit: Edit, **changes: Any) -> str:
        folder = tmp_path / "edited"
        folder.mkdir()
        for file in saved.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        edit(folder)
        names = {"student": str(saved), "teacher": str(saved), role: str(folder)}
        with pytest.raises(ParamError) as error:
            experiment.load_to_run(Params.load("params/smoke.yaml", names | changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


def config_of(name: str, *path: str, **entries: Any) -> Edit:
    def edit(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        part = whole
        for step in path:
            part = part[step]
        part.update(entries)
        (folder / name).write_text(json.dumps(whole))

    return edit


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(name for name in tensors if "layers.0" in name))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "layers.0" in name)
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


# Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "whose weights cannot be read: Error no file named model.saf"),
        (truncated, "whose weights cannot be read: Error while deserializing header"),
        (without_a_tensor, "whose weights lack 1 tensors, for example model.language_model.layers.0"),
        (of_another_shape, "whose weights cannot be read: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "whose processor cannot be read: "),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "whose processor cannot be read: "),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "whose processor cannot be read: "),
        (lambda folder: (folder / "config.json").write_text("{"), "whose config.json cannot be read: "),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"),
            "whose chat template cannot be read: ",
        ),
    ],
)
def test_files_of_a_model_that_are_missing_or_damaged(
    refused: Callable[..., str], role: str, edit: Edit, said: str
) -> None:
    sentence = refused(role, edit)
    assert sentence.startswith(f"{role} is ") and said in sentence


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_marks_pictures_otherwise_than_its_processor(refused: Callable[..., str], role: str) -> None:
    sentence = refused(role, config_of("config.json", image_token_id=7))
    assert sentence.startswith(f"{role} is ") and "has image_token_id 7 and whose processor 5, expected" in sentence


@pytest.mark.parametrize(
    ("role", "word", "does"),
    [
        ("teacher", "<hint>", "asks for a hint"),
        ("student", "Look at the left", "gives a hint"),
        ("student", "<think>", "asks a question"),
    ],
)
def test_a_chat_template_that_refuses_a_prompt(refused: Callable[..., str], role: str, word: str, does: str) -> None:
    def edit(folder: Path) -> None:
        template = folder / "chat_template.jinja"
        refusing = f"{{% if '{word}' in messages | string %}}{{{{ raise_exception('No, never.') }}}}{{% endif %}}"
        template.write_text(refusing + template.read_text())

    assert refused(role, edit).endswith(f"whose chat template refuses the prompt that {does}: No, never.")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (config_of("preprocessor_config.json", patch_size=16), "the teacher's patch_size is 16 and the student's 8"),
        (config_of("preprocessor_config.json", image_mean=[0.1] * 3), "the teacher's image_mean is"),
        (
            config_of("config.json", "text_config", final_logit_softcapping=30.0),
            "the teacher's final_logit_softcapping",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(refused: Callable[..., str], edit: Edit, said: str, processes: int) -> None:
    """Also if the training processes start later and load it then."""
    assert said in refused("teacher", edit, processes=processes, prompts_per_device=1)


def test_a_head_of_another_size_under_gkd(refused: Callable[..., str]) -> None:
    def padded(folder: Path) -> None:
        model = build_model()
        model.resize_token_embeddings(640)
        save_embedded(model, build_processor(), folder)

    assert "head has 576 rows and the teacher's 640, expected equally many for method gkd" in refused(
        "teacher", padded, method="gkd"
    )


def test_a_student_whose_logits_are_more_than_its_head(refused: Callable[..., str]) -> None:
    edit = config_of("config.json", "text_config", logit_scale=2.0)
    assert "the student's logit_scale is 2.0" in refused("student", edit)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"optim": "galore_adamw"}, "optim"),
        ({"optim": "lomo"}, "lomo"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"use_transformers_continuous_batching": True}, "does not support multimodal models"),
        ({"sync_ref_model": True, "beta": 0.1, "lora_rank": 2}, "PEFT"),
    ],
)
def test_what_trl_cannot_make(refused: Callable[..., str], changes: dict[str, Any], said: str) -> None:
    assert said in refused("student", lambda folder: None, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_p": 2.0}, "min_p 2.0: ValueError: `min_p` has to be a float in the [0, 1] interval"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0: ValueError: `penalty` has to be a strictly positive"),
        ({"top_k": -5}, "top_k -5: ValueError: `top_k` has to be a strictly positive"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers -1: ValueError: num_workers option should be"),
        ({"dataloader_persistent_workers": True}, "ValueError: persistent_workers option needs num_workers > 0"),
        ({"multi_objective_aggregation": "foo"}, "ValueError: Invalid multi_objective_aggregation: foo"),
        ({"adam_beta1": 2.0}, "adam_beta1 2.0: ValueError: Invalid beta parameter at index 0: 2.0"),
        ({"adam_epsilon": -1.0}, "adam_epsilon -1.0: ValueError: Invalid epsilon value: -1.0"),
        ({"use_liger_kernel": True}, "use_liger_kernel True: ImportError: "),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha -1.0: RuntimeError: uniform_ expects"),
        ({"torch_compile_mode": "foo"}, "torch_compile_mode foo: RuntimeError: Unrecognized mode=foo"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of 0: ZeroDivisionError: "),
        ({"adam_beta1": 2.0, "method": "sft", "thinking": False}, "ValueError: Invalid beta parameter at index 0: 2.0"),
        ({"dataloader_persistent_workers": True, "method": "gkd"}, "ValueError: persistent_workers option needs"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 True: AttributeError: "),
    ],
)
def test_what_a_first_step_finds(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    """Wherever libraries use the parameter: in sampling, the loss, the optimiser, the data loader."""
    for name, value in (("BACKEND", "NO"), ("MODE", "default")):  # transformers sets them for the whole process
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    sentence = refused("student", lambda folder: None, **changes)
    assert sentence.startswith("a first step of training, tried on embedded:student, fails with ") and said in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 2, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"mask_truncated_completions": True, "save_steps": 0, "loss_type": "luspo"},
        {"method": "sft", "thinking": False},
        {"method": "gkd"},
        {"method": "gkd", "thinking": False, "gkd_lambda": 0.0, "lora_rank": 2},
    ],
)
def test_a_first_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    def state() -> list[str]:
        kept = [AcceleratorState._shared_state, PartialState._shared_state, GradientState._shared_state]
        return [str(random.getstate()), str(np.random.get_state()), str(torch.get_rng_state().tolist()), str(kept)]

    params = Params.load("params/smoke.yaml", changes)
    config = experiment.training_config(params, tmp_path / "results")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, fields = state(), str(config)
    capfd.readouterr()
    rehearse(params, config, experiment._baseline)
    assert state() == before and str(config) == fields
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


def test_fewer_training_questions_than_a_step_takes(tmp_path: Path) -> None:
    write_phantom(tmp_path, seed=0, images={"MRI": 6, "CT": 3})
    given = Params(data_root=str(tmp_path), prompts_per_step=64)
    with pytest.raises(DataError, match=r"training questions of MRI, expected at least prompts_per_step \(64\)"):
        experiment.load_data(given)
    assert experiment.load_data(given.replace(method="none")).train


# Surroundings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_SIZE", "4"), ("PMI_SIZE", "2"), ("LOCAL_RANK", "0"), ("RANK", "1"),
     ("ACCELERATE_MIXED_PRECISION", "fp16"), ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"), ("ACCELERATE_USE_FSDP", "true"),
     ("ACCELERATE_USE_DEEPSPEED", "true")],
)  # fmt: skip
def test_an_environment_of_another_launcher(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    for params in (Params(), Params(processes=2, prompts_per_device=4), Params(method="sft", thinking=False)):
        with pytest.raises(ParamError, match=rf"^{name} is {value} in the environment.* \(env -u {name} kepo"):
            launch.check(params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "1"),
        ("PMI_SIZE", ""),
        ("LOCAL_RANK", "-1"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
    ],
)
def test_an_environment_of_one_process_is_none(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    launch.check(Params())


def test_a_compiler_that_an_earlier_run_of_this_kernel_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves it in the environment, and would also compile the next run."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    launch.check(Params.load(None, {"torch_compile": True}))
    with pytest.raises(ParamError, match=r"^ACCELERATE_DYNAMO_BACKEND is inductor .* not be what the parameters say"):
        launch.check(Params())


def test_a_temporary_folder_without_room_for_workers_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for them would never end: as in a bare papermill or Jupyter run under a cluster's TMPDIR."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + "a-folder-of-the-cluster/" * 4)
    launch.check(Params())
    with pytest.raises(
        ParamError, match=r"dataloader_num_workers is 1, but .* is too long for their sockets: set TMPDIR"
    ):
        launch.check(Params.load(None, {"dataloader_num_workers": 1}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://localhost:1080"),
        ("HTTP_PROXY", "nonsense://localhost"),
        ("SSL_CERT_FILE", "/not/there.pem"),
    ],
)
def test_proxies_and_certificates_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path))
    for other in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    given = Params(teacher_url="https://teacher:8000/v1", teacher_top_k=20)
    with pytest.raises(TeacherServerError, match="exempt its host by NO_PROXY"):
        ChatClient(given.teacher_url)
    for ask in (lambda: serving.reach(given, build_processor(), build_model()), lambda: serving.report(given, None)):
        with pytest.raises(ParamError, match=r"^teacher_url: no connection to the teacher at https://teacher"):
            ask()


def test_more_tokens_asked_of_a_served_teacher_than_there_are() -> None:
    given = Params(teacher_url="http://localhost:1/v1", teacher_top_k=600)
    with pytest.raises(ParamError, match="top_k is 600, expected at most the student's 576 tokens"):
        serving.reach(given, build_processor(), build_model())


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with a read-only home: PhantomVQA, an archive's pictures and a served teacher's hints are kept there."""
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", Path("/proc/kepo")):
        monkeypatch.setenv("KEPO_CACHE", str(cache))
        for use in (
            ensure_phantom,
            lambda: source.in_cache("OmniMedVQA-0123"),
            lambda: serving.connect(Params(teacher_url="http://localhost:1/v1", teacher_top_k=20), build_processor()),
        ):
            with pytest.raises(DataError, match=r"cannot be written \(.*\): set KEPO_CACHE to a writable folder"):
                use()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEPO_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)  # as containers give out
    with pytest.raises(DataError, match="this user has no home folder: set KEPO_CACHE"):
        ensure_phantom()
