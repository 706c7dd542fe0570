"""LoRA: what is trained, what the reference is, and that a run's model folder holds what was evaluated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kepo_harness import fails_on_0, make_dataset, make_trainer, score_batch, sharp_model
from peft import PeftModel
from safetensors.torch import load_file

from kepo_core.data import phantom
from kepo_core.data.records import MODALITIES
from kepo_core.experiment import experiment
from kepo_core.experiment.adapters import language_layers, lora_config, merged, save_student
from kepo_core.experiment.models import load_model, load_processor
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.testbed.embedded import build_model, build_processor


def test_adapters_are_merged_by_the_book() -> None:
    a, b, w = torch.randn(2, 3), torch.randn(4, 2), torch.randn(4, 3).bfloat16()
    state = {
        "base_model.model.x.q.base_layer.weight": w,
        "base_model.model.x.q.base_layer.bias": torch.ones(4),
        "base_model.model.x.q.lora_A.default.weight": a,
        "base_model.model.x.q.lora_B.default.weight": b,
        "base_model.model.x.norm.weight": torch.ones(3).bfloat16(),
    }
    plain = merged(state, scaling=0.5)
    assert set(plain) == {"x.q.weight", "x.q.bias", "x.norm.weight"}
    torch.testing.assert_close(plain["x.q.weight"], w.float() + 0.5 * b @ a)
    assert plain["x.q.weight"].dtype == torch.float32 and plain["x.norm.weight"].dtype == torch.bfloat16


def test_all_linear_layers_of_the_language_model_and_no_others() -> None:
    model = build_model("test")
    pattern = language_layers(model)
    assert pattern.startswith(r"model\.language_model\.")
    assert pattern.endswith("(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)")
    config = lora_config(model, Params(lora_rank=2, lora_alpha=3.0))
    wrapped = PeftModel(model, config)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * len(model.model.language_model.layers)  # A and B of each
    assert all(".language_model.layers." in name and ".lora_" in name for name in trained)
    assert lora_config(model, Params()) is None


def test_the_reference_is_the_student_without_its_adapter(tmp_path: Path) -> None:
    """Also after training, and although no second model is held."""
    student = sharp_model(0)
    lora = lora_config(student, Params(lora_rank=2))
    trainer = make_trainer(
        tmp_path,
        fails_on_0,
        student=student,
        distill=False,
        explore=False,
        beta=0.1,
        trainer_args={"peft_config": lora},
    )
    assert trainer.ref_model is None
    before = score_batch(trainer, 0, 1)["ref_per_token_logps"]
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    batch = score_batch(trainer, 0, 1)
    assert torch.equal(batch["ref_per_token_logps"], before)
    trainer._compute_loss(trainer.model, batch)
    assert trainer._metrics["train"]["kepo/loss_kl"][-1] > 0.01


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    phantom.write_phantom(root, seed=0, images=dict.fromkeys(MODALITIES, 8))
    return root


METHODS = {
    "kepo-ke-tau0": {"explore": False, "tau": 0.0},
    "sft-nothink": {"method": "sft", "thinking": False},
    "gkd-lambda1": {"method": "gkd"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_runs_model_is_plain_and_answers_as_the_adapter_does(root: Path, tmp_path: Path, name: str) -> None:
    small = {"train_items": 8, "eval_items": 1, "max_steps": 1, "prompts_per_step": 4, "prompts_per_device": 2,
             "max_completion_length": 8, "rejection_budget": 1, "learning_rate": 1e-2}  # fmt: skip
    places = {"data_root": str(root), "results_dir": str(tmp_path)}
    params = Params.load(overrides={**small, **places, "lora_rank": 2, "lora_alpha": 8.0, **METHODS[name]})
    assert params.method_name == name
    data, models, run = experiment.load_data(params), experiment.load_models(params), Run.allocate(params)
    old = {key: value.clone() for key, value in models.student.state_dict().items()}
    trainer = experiment.make_trainer(params, run, data, models)
    experiment.train(trainer, run)
    answers = experiment.evaluate_student(params, models, data.test)

    adapter = load_file(run.path / "adapter" / "adapter_model.safetensors")
    moved = [key for key in adapter if "lora_B" in key and adapter[key].abs().max() > 0]
    assert moved and all(".language_model." in key for key in adapter)
    folder = str(run.path / "model")
    assert not list(run.path.glob("model/*.bin"))
    saved = experiment.Models(load_model(folder), load_processor(folder), None)  # as `student: results/RUN/model` would
    new = saved.student.state_dict()
    assert set(new) == set(old)
    changed = {key for key in new if not torch.equal(new[key], old[key])}
    assert len(changed) == len(moved) and not any("visual" in key or "lm_head" in key for key in changed)
    ids = torch.tensor([saved.processor.tokenizer("Which of these is it?")["input_ids"]])
    with torch.no_grad():
        mine, theirs = models.student(input_ids=ids).logits, saved.student(input_ids=ids).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert experiment.evaluate_student(params, saved, data.test) == answers


def test_under_lora_the_students_own_weights_are_kept_in_the_compute_precision(tmp_path: Path) -> None:
    """They are only read; the adapters, which small steps must reach, are float32."""
    params = Params(lora_rank=2, precision="bf16", explore=False, distill=False)
    student = experiment.load_models(params).student
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in student.parameters()
    )
    trainer = make_trainer(
        tmp_path, fails_on_0, student=student, distill=False, explore=False, dataset=make_dataset(),
        trainer_args={"peft_config": lora_config(student, params)},
    )  # fmt: skip
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_the_engine_of_zero_gathers_what_is_saved(tmp_path: Path) -> None:
    """The model alone holds, under ZeRO-3, a part of each weight."""
    student = sharp_model(0)
    model = PeftModel(student, lora_config(student, Params(lora_rank=2)))
    engine, gathered = SimpleNamespace(module=model), []

    def get_state_dict(given: Any) -> dict[str, torch.Tensor]:
        gathered.append(given)
        return model.state_dict()

    trainer = SimpleNamespace(
        model=model, deepspeed=engine, is_deepspeed_enabled=True, args=SimpleNamespace(should_save=True),
        accelerator=SimpleNamespace(get_state_dict=get_state_dict), processing_class=build_processor().tokenizer,
    )  # fmt: skip
    save_student(trainer, tmp_path / "model")
    assert gathered == [engine] and (tmp_path / "model" / "model.safetensors").is_file()


def test_what_several_processes_trained_is_evaluated_as_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of LoRA is smaller than what bf16, in which the untrained student is kept, tells apart."""
    params = Params(lora_rank=2, precision="bf16", processes=2, prompts_per_step=32, results_dir=str(tmp_path),
                    explore=False, distill=False)  # fmt: skip
    models, run = experiment.load_models(params), Run.allocate(params)

    def train(*_: Any) -> None:
        trained = load_model(params.student)
        with torch.no_grad():
            trained.model.language_model.layers[0].mlp.up_proj.weight.mul_(1 + 1e-4)
        trained.save_pretrained(run.path / "model")

    monkeypatch.setattr(experiment.launch, "train", train)
    (run.path / "metrics.jsonl").write_text("")
    experiment.train_student(params, run, SimpleNamespace(identity=dict), models, None)
    saved = load_file(run.path / "model" / "model.safetensors")
    evaluated = models.student.state_dict()
    assert saved and all(torch.equal(evaluated[name], value) for name, value in saved.items())
