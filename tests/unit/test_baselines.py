"""The baselines are what they are called: hand-computed losses, and TRL's own trainers to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from kepo_harness import make_dataset, sharp_model
from PIL import Image
from tiny_architectures import build
from trl import DistillationConfig, DistillationTrainer

from kepo_core.baselines.gkd import MMGKDTrainer, gkd_trainer
from kepo_core.baselines.supervised import answer_text, sft_trainer, supervised_dataset
from kepo_core.data.images import load_image
from kepo_core.data.records import Question
from kepo_core.task.prompts import vqa_messages
from kepo_core.testbed.embedded import build_processor


def arguments(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "seed": 3, **overrides,
    }  # fmt: skip


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    rows = []
    for i in range(4):
        path = tmp_path / f"Images/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((64, 64)).rotate(90 * i).convert("RGB").save(path)
        rows.append(Question(f"q{i}", "Toy", "MRI", "", "What is it?", ("a", "b", "c")[: 2 + i % 2], "AB"[i % 2], path))
    return rows


def logits_of(model: Any, processor: Any, question: Question, completion: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (T, V) that predict the completion's tokens, those tokens), one row and no padding."""
    messages = vqa_messages(question.question, question.options, thinking=False)
    messages[0]["content"][0]["image"] = load_image(question.image)
    inputs = processor.apply_chat_template(
        [messages], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    said = processor.tokenizer(completion, return_tensors="pt")["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], said], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(said)], dim=1)
    with torch.no_grad():
        return model(**inputs).logits[0, -said.shape[1] - 1 : -1], said[0]


def first_loss(trainer: Any) -> float:
    trainer.train()
    return float(next(row["loss"] for row in trainer.state.log_history if "loss" in row))


def test_sft_learns_the_answers_alone(questions: list[Question], tmp_path: Path) -> None:
    processor, model = build_processor(), sharp_model(0)
    ended = f"{processor.tokenizer.eos_token}\n"
    summed, tokens = 0.0, 0
    for question in questions:
        logits, said = logits_of(model, processor, question, answer_text(question.answer) + ended)
        summed += float(torch.nn.functional.cross_entropy(logits, said, reduction="sum"))
        tokens += len(said)
    trainer = sft_trainer(model, processor, supervised_dataset(questions), arguments(tmp_path, max_steps=1))
    assert first_loss(trainer) == pytest.approx(summed / tokens, rel=1e-4)


def test_gkd_refuses_a_model_whose_inputs_would_not_all_arrive(tmp_path: Path) -> None:
    (student, processor), (teacher, _) = build("video-llama3", 0), build("video-llama3", 1)
    rows = [{"prompt": [{"role": "user", "content": "What?"}], "image": Image.new("RGB", (32, 32)), "answer": "A"}] * 4
    dataset = Dataset.from_list(rows)
    trainer = gkd_trainer(student, teacher, processor, dataset, 1.0, 1.0, arguments(tmp_path))
    with pytest.raises(ValueError, match="makes image_merge_sizes, which DistillationTrainer does not pass"):
        trainer.train()


def test_what_fills_no_step_is_left_out_of_an_epoch(questions: list[Question], tmp_path: Path) -> None:
    """As by GRPOTrainer's sampler, so that all methods take as many steps."""
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=3)
    trainer = sft_trainer(sharp_model(0), build_processor(), supervised_dataset(questions), args)
    drawn = [list(batch["input_ids"]) for batch in trainer.get_train_dataloader()]
    assert [len(batch) for batch in drawn] == [3]
    trainer.train()
    assert trainer.state.global_step == 3


def test_supervised_distillation_is_the_forward_kl_at_the_right_answers(
    questions: list[Question], tmp_path: Path
) -> None:
    processor, model, teacher = build_processor(), sharp_model(0), sharp_model(1)
    summed, tokens = 0.0, 0
    for question in questions:
        text = answer_text(question.answer) + processor.tokenizer.eos_token
        student_logits, said = logits_of(model, processor, question, text)
        teacher_logits, _ = logits_of(teacher, processor, question, text)
        log_s, log_t = (student_logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1)
        summed += float((log_t.exp() * (log_t - log_s)).sum())
        tokens += len(said)
    trainer = gkd_trainer(
        model, teacher, processor, supervised_dataset(questions), 0.0, 2.0,
        arguments(tmp_path, max_steps=1, beta=0.0, temperature=0.7),
    )  # fmt: skip
    assert first_loss(trainer) == pytest.approx(summed / tokens, rel=1e-4)
    assert trainer.generation_config.temperature == 0.7


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_on_policy_distillation_is_trls_to_the_bit(tmp_path: Path) -> None:
    trained, losses = [], []
    for kind in (DistillationTrainer, MMGKDTrainer):
        model = sharp_model(0)
        args = DistillationConfig(**arguments(tmp_path, beta=0.5, max_completion_length=8))
        extra = {"lmbda": 1.0} if kind is MMGKDTrainer else {}
        trainer = kind(model, sharp_model(1), args, train_dataset=make_dataset(), processing_class=build_processor(),
                       **extra)  # fmt: skip
        losses.append(first_loss(trainer))
        trained.append(weights(model))
    assert losses[0] == losses[1] > 0
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_half_of_the_batches_are_on_policy_and_which_depends_on_seed_and_step(tmp_path: Path) -> None:
    trainer = gkd_trainer(
        sharp_model(0), sharp_model(1), build_processor(), make_dataset(), 0.5, 1.0,
        arguments(tmp_path, max_completion_length=8),
    )  # fmt: skip
    kinds = []
    for step in range(400):
        trainer.state.global_step = step
        kinds.append(trainer.on_policy())
        assert trainer.on_policy() is kinds[-1]
    assert 160 < sum(kinds) < 240 and kinds[:200] != kinds[200:]
    with pytest.raises(ValueError, match="lmbda is 2, expected 0 to 1"):
        gkd_trainer(sharp_model(0), sharp_model(1), build_processor(), make_dataset(), 2.0, 1.0, arguments(tmp_path))
