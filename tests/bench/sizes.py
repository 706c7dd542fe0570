"""Student and teacher of several sizes with random weights, and a batch of pictures to go with them."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from kepo_core.plan.architecture import load_config
from kepo_core.task.prompts import vqa_messages
from kepo_core.testbed.embedded import build_config, build_processor


@dataclass(frozen=True)
class Shape:
    """One Qwen3-VL: text hidden, layers, heads, kv heads, head size, mlp; vision hidden, layers, heads, mlp.

    ``tied``: its output embedding is the input's.
    """

    text: tuple[int, int, int, int, int, int]
    vision: tuple[int, int, int, int]
    deepstack: tuple[int, ...] = (0,)
    tied: bool = True


@dataclass(frozen=True)
class Size:
    """What one benchmark runs on: ``prompts`` × ``group`` completions of ``tokens`` tokens, ``side``² pictures."""

    name: str
    student: Shape
    teacher: Shape
    vocabulary: int
    prompts: int
    group: int
    tokens: int
    side: int = 64
    patch: int = 8


def published(name: str) -> Shape:
    """The shape of one of the models whose configuration comes with the package."""
    config, _ = load_config(name)
    text, vision = config.text_config, config.vision_config
    return Shape(
        (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, text.head_dim,
         text.intermediate_size),
        (vision.hidden_size, vision.depth, vision.num_heads, vision.intermediate_size),
        tuple(vision.deepstack_visual_indexes),
        config.tie_word_embeddings,
    )  # fmt: skip


SMALL = Shape((128, 4, 4, 2, 32, 384), (64, 3, 4, 192))
MIDDLE = Shape((256, 6, 8, 4, 32, 768), (128, 4, 4, 384))
LARGE = Shape((512, 8, 8, 4, 64, 1536), (192, 6, 6, 576))
SIZES = {
    "small": Size("small", SMALL, MIDDLE, 576, 8, 8, 24),
    "middle": Size("middle", MIDDLE, LARGE, 8_000, 8, 8, 32),
    "large": Size("large", LARGE, Shape((768, 12, 12, 4, 64, 2304), (256, 6, 8, 768)), 32_000, 8, 4, 32),
    # The paper's models, with pictures of 384×384: 144 tokens.
    "paper": Size(
        "paper", published("Qwen/Qwen3-VL-2B-Instruct"), published("Qwen/Qwen3-VL-32B-Instruct"), 151_936, 2, 8, 512,
        side=384, patch=16,
    ),
}  # fmt: skip


def config_of(shape: Shape, size: Size) -> Qwen3VLConfig:
    """The configuration of ``shape`` with the embedded models' special tokens."""
    base = build_config("small").to_dict()
    hidden, layers, heads, kv_heads, head_dim, mlp = shape.text
    v_hidden, v_layers, v_heads, v_mlp = shape.vision
    quarter = head_dim // 2 // 4
    base["tie_word_embeddings"] = base["text_config"]["tie_word_embeddings"] = shape.tied
    base["text_config"] |= {
        "vocab_size": size.vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": mlp,
    }  # fmt: skip
    base["text_config"]["rope_parameters"]["mrope_section"] = [head_dim // 2 - 2 * quarter, quarter, quarter]
    base["vision_config"] |= {
        "hidden_size": v_hidden, "depth": v_layers, "num_heads": v_heads, "intermediate_size": v_mlp,
        "out_hidden_size": hidden, "patch_size": size.patch, "deepstack_visual_indexes": list(shape.deepstack),
        "num_position_embeddings": (size.side // size.patch) ** 2,
    }  # fmt: skip
    return Qwen3VLConfig.from_dict(base)


def build(shape: Shape, size: Size, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A model of ``shape`` with random weights, on the accelerator if there is one."""
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(dtype)
        try:
            model = Qwen3VLForConditionalGeneration(config_of(shape, size))
        finally:
            torch.set_default_dtype(torch.float32)
    special = model.config.text_config
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        special.eos_token_id,
        special.pad_token_id,
    )
    return model


def processor_of(size: Size) -> Any:
    """The embedded processor, cutting pictures as ``size`` says."""
    processor = build_processor()
    image_processor = processor.image_processor
    image_processor.patch_size = size.patch
    side = size.side * size.side
    image_processor.size = {"shortest_edge": side, "longest_edge": side}
    return processor


def dataset_of(size: Size, uneven: bool = False) -> Dataset:
    """``prompts`` questions with a picture each; ``uneven``: of several lengths, so that batches are padded."""
    rows = [
        {
            "id": f"q{i}", "question": f"Question {i}?" + " Look!" * i * uneven, "options": ["red", "blue", "green"],
            "answer": "A",
            "image": Image.effect_noise((size.side, size.side), 60).convert("RGB"),
            "prompt": [],
        }
        for i in range(size.prompts)
    ]  # fmt: skip

    def with_prompt(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        asked = zip(batch["question"], batch["options"], strict=True)
        return batch | {"prompt": [vqa_messages(q, o, True) for q, o in asked]}

    columns = [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    return Dataset.from_list(columns).with_transform(with_prompt)
