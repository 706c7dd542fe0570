"""Hint-aware draws over a (fake) vLLM server, as many as each process wants; started by test_processes.py."""

import sys
from pathlib import Path
from typing import Any

import fake_vllm
from kepo_harness import ScriptedTrainer, fails_on_0, make_row, make_trainer

from kepo_core.exit_codes import leave
from kepo_core.method.exploration import Request
from kepo_core.method.hinted import _Sampler
from kepo_core.method.rollouts import Completion
from kepo_core.method.task import with_images
from kepo_core.task.prompts import vqa_messages
from kepo_core.testbed.embedded import build_processor

ASKED = [[1, 3], [3, 1], [0, 2], [2, 2]]


def main(output_dir: Path, world_size: int) -> None:
    tokenizer = build_processor().tokenizer

    def says(text: str, pictures: list[Any]) -> list[int]:
        """The question's number, and whether it was asked with its own picture."""
        number = int(text.split("Question ")[1].split("?")[0])
        own = [picture.tobytes() for picture in pictures] == [make_row(number)["image"].tobytes()]
        return [*tokenizer(f"<think>{number} {own}</think>")["input_ids"], tokenizer.eos_token_id]

    del ScriptedTrainer._generate_single_turn
    fake_vllm.install(says)
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://nowhere"}
    trainer = make_trainer(output_dir, fails_on_0, per_device_train_batch_size=4, **server)
    index = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == world_size
    for numbers in ASKED:
        rows = [make_row(3 * index + group) for group in range(max(numbers[index], 1))]
        rows = [row | {"prompt": vqa_messages(row["question"], row["options"], True)} for row in rows]
        prompts = [with_images(row["prompt"], row) for row in rows]
        groups = range(numbers[index])
        own = [Completion([5], "not scored", True)]
        sampler = _Sampler(trainer, rows, prompts, own, {group: group for group in groups}, "0")
        draws = sampler.draw([Request(group, "look", 1) for group in groups])
        assert [draw.text for draw in draws] == [f"<think>{3 * index + g} True</think>" for g in groups], draws
        assert all(draw.rewards == (0.0, 0.0) for draw in draws)
    if trainer.accelerator.is_main_process:
        (output_dir / "asked").write_text(str(ASKED))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)
