"""Prompts of all kinds, and whether vLLM reads them as the trainer does."""

from typing import Any

import torch
from PIL import Image

from kepo_core.method import hinted


def picture(width: int, height: int, shade: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (shade, 40, 200 - shade))
    image.paste((250, 250, 250), (4, 4, width // 2, height // 3))
    return image


#: The parts of a prompt: a number is a picture of this width, a text a text.
PROMPTS = {
    "one picture, text behind": [64, "What is it?"],
    "one picture, text before": ["What is it?", 64],
    "a picture alone": [64],
    "two of one size, side by side": [64, 64, "Which is darker?"],
    "two of two sizes, text between": [64, "and", 96, "Which is larger?"],
    "three sizes, the text before": ["Which is largest?", 32, 96, 64],
    "text alone": ["What is two and two?"],
}


def as_prompt(parts: list[Any]) -> Any:
    content = [
        {"type": "image", "image": picture(part, 64, 20 * number)}
        if isinstance(part, int)
        else {"type": "text", "text": part}
        for number, part in enumerate(parts)
    ]
    return [{"role": "user", "content": content}]


def difference(trainer: Any, prompts: list[Any]) -> float:
    """Mean |log p by vLLM − log p by the trainer| of one completion per prompt."""
    ids, images, fields = trainer._tokenize_prompts(prompts)
    drawn, logps = trainer._generate_single_turn(ids, images, fields, 1)
    ours, _, mask = hinted.log_probabilities(trainer, prompts, drawn)
    theirs = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in logps], batch_first=True)
    return float(((ours - theirs).abs() * mask).sum() / mask.sum())
