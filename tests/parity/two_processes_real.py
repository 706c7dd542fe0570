"""A few steps of a KEPO run with real generation, on several processes; started by test_processes.py."""

import sys
from pathlib import Path
from typing import Any

import torch
from kepo_harness import config, make_dataset, sharp_model
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer
from two_processes import sharded, shared_out_by_accelerate, whole

from kepo_core.exit_codes import leave
from kepo_core.experiment.adapters import lora_config, save_student
from kepo_core.method.task import with_images
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.params import Params
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.testbed.embedded import build_processor


def draw_alike(trainer: Any) -> None:
    """GRPOTrainer's rollouts, where one process has two prompts that it repeats and the other's are all different."""
    data, first = trainer.train_dataset, trainer.accelerator.is_main_process
    rows = [data[i // 2 if first else i] for i in range(4)]
    batch = trainer._tokenize_prompts([with_images(row["prompt"], row) for row in rows])
    drawn = []
    for draw in (GRPOTrainer._generate_single_turn, KEPOTrainer._generate_single_turn):
        torch.manual_seed(trainer.accelerator.process_index)
        drawn.append(draw(trainer, *batch, 2)[0])
    assert drawn[0] == drawn[1] and trainer._sharing.refused == ""


def main(output_dir: Path, world_size: int, settings: dict[str, str]) -> None:
    way, resume = settings.get("shard", ""), settings.get("resume")
    if way == "accelerate":
        shared_out_by_accelerate()
    student: Any = sharp_model(0)
    teacher: Any = sharp_model(1)
    if way == "1":
        torch.distributed.init_process_group("gloo")
        student = sharded(student, output_dir / "student", world_size)
        teacher = sharded(teacher, output_dir / "teacher", world_size)
    args = config(
        output_dir, per_device_train_batch_size=6, num_generations=4, max_completion_length=6, hint_max_tokens=8,
        rejection_budget=2, tau=0.0, max_steps=4, shuffle_dataset=True, gradient_accumulation_steps=2,
        save_strategy="no" if way == "1" else "steps", save_steps=1,
    )  # fmt: skip
    lora = lora_config(student, Params(lora_rank=int(settings.get("lora", 0))))
    task = MultipleChoice()
    trainer = KEPOTrainer(
        student, task.reward_funcs, args, make_dataset(6), teacher=Teacher(teacher, build_processor()), task=task,
        processing_class=build_processor(), peft_config=lora,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world_size
    trainer.train(resume_from_checkpoint=resume)
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters()) == bool(way)
    weights = torch.cat([whole(p).flatten() for p in trainer.model.parameters()])
    if trainer.accelerator.is_main_process:
        torch.save(weights, output_dir / "weights.pt")
    if way != "1":
        save_student(trainer, output_dir / "model")
    draw_alike(trainer)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), dict(a.split("=", 1) for a in sys.argv[3:]))
    leave(0)
