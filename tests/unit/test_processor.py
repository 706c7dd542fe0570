"""KEPOTrainer reads a model's processor itself, as GRPOTrainer does, also where torchvision is missing."""

from pathlib import Path
from typing import Any

import pytest
import text_harness
import torch
from kepo_harness import config, make_dataset
from tiny_architectures import build
from transformers import AutoModelForImageTextToText

from kepo_core.method import processor as processors
from kepo_core.method.processor import ImageOnlyQwenProcessor
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.task.multiple_choice import MultipleChoice


@pytest.fixture(autouse=True)
def _no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_torchvision_works", lambda: False)


def saved(name: str, folder: Path) -> str:
    model, processor = build(name)
    model.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return str(folder)


def trained(model: Any, folder: Path, **changes: Any) -> KEPOTrainer:
    args = config(folder, distill=False, explore=False, max_completion_length=4, **changes)
    trainer = KEPOTrainer(model, MultipleChoice().reward_funcs, args, make_dataset(), task=MultipleChoice())
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen2.5-vl"])
def test_a_path_is_enough(tmp_path: Path, name: str) -> None:
    trainer = trained(saved(name, tmp_path / "model"), tmp_path / "out")
    read = trainer.processing_class
    assert isinstance(read, ImageOnlyQwenProcessor) and trainer.state.global_step == 1
    assert (read.tokenizer.padding_side, read.tokenizer.truncation_side) == ("left", "left")


def test_a_model_that_came_from_a_path_is_enough(tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(saved("qwen3-vl", tmp_path / "model"), dtype=torch.float32)
    assert isinstance(trained(model, tmp_path / "out").processing_class, ImageOnlyQwenProcessor)


def test_others_are_read_as_grpo_trainer_does(tmp_path: Path) -> None:
    text_harness.text_model(0).save_pretrained(tmp_path / "text")
    text_harness.tokenizer().save_pretrained(tmp_path / "text")
    args = config(tmp_path / "out", distill=False, explore=False)
    trainer = KEPOTrainer(str(tmp_path / "text"), text_harness.correct, args, text_harness.riddles(chat=False))
    assert type(trainer.processing_class) is type(text_harness.tokenizer())
    with pytest.raises(OSError, match="nowhere"):
        KEPOTrainer(str(tmp_path / "nowhere"), text_harness.correct, args, text_harness.riddles(chat=False))
