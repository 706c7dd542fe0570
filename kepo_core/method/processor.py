"""An image-only processor for Qwen's image-text models, for machines without a working torchvision.

``Qwen3VLProcessor`` and its predecessors need torchvision for their *video* half. If torchvision is missing, or does
not match torch and fails on import, this subclass does the image half with the PIL backend. Qwen2-VL, Qwen2.5-VL and
Qwen3-VL share that half (an image is one placeholder token per merged patch). It is not registered with
``AutoProcessor`` (which silently returns a bare tokenizer): load it by its own class.
"""

import importlib
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

#: Model types whose own processors need torchvision, though only for videos.
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE_TOKEN, VISION_START, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"


class ImageOnlyQwenProcessor(Qwen3VLProcessor):
    """Image processor + tokenizer + chat template; without a video processor, videos are refused."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None:
            raise ValueError("tokenizer is None, expected the tokenizer of a Qwen-VL checkpoint")
        self.image_token, self.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.video_token, self.video_token_id = "<|video_pad|>", tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self.vision_start_token, self.vision_end_token = VISION_START, VISION_END
        self.vision_start_token_id = tokenizer.convert_tokens_to_ids(VISION_START)
        self.vision_end_token_id = tokenizer.convert_tokens_to_ids(VISION_END)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def image_only_processor(kind: str, source: str, **where: Any) -> ImageOnlyQwenProcessor | None:
    """The processor of a checkpoint that ``AutoProcessor`` cannot read without torchvision; None if it can.

    Args:
        kind: the checkpoint's ``model_type``.
        source: its folder or hub name.
        **where: as for ``from_pretrained``, for example ``revision``.
    """
    if kind not in QWEN or _torchvision_works():
        return None
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", truncation_side="left", **where)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(source, **where)
    return ImageOnlyQwenProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)


def _torchvision_works() -> bool:
    try:  # finding it is not enough: a build for another torch fails only on import
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True
