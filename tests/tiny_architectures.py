"""Tiny random models of several architectures, each with a processing class of its own, built without any download.

They show that the method does not depend on one model family. Every model has the layout of its real elders (which
tokens stand for a picture, which fields the processor makes, whether the output head is tied), only with two layers
and a hidden size of 32. The processors are the PIL ones and refuse videos: torchvision is not needed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
from transformers.processing_utils import ProcessorMixin

from kepo_core.method.processor import ImageOnlyQwenProcessor

HIDDEN, HEAD_DIM, PATCH = 32, 16, 8
# Side of the square that a vision tower of fixed size takes, and LLaVA-OneVision's (whose prompts are the longest).
SIDE, LLAVA_SIDE = 32, 16
GEMMA_TOKENS = 4
PINPOINTS = [[h * LLAVA_SIDE, w * LLAVA_SIDE] for h in (1, 2) for w in (1, 2)]
CORPUS = "<think> </think><answer> </answer><hint> </hint> What is shown in the image? Answer with red green left right"
TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False, "patch_size": PATCH}


@dataclass(frozen=True)
class Markup:
    """A family's special tokens, and how its chat template writes a turn and a picture."""

    special: tuple[str, ...]
    start: str
    end: str
    picture: str
    pad: str
    eos: str
    named: dict[str, str]
    bos: str | None = None

    def template(self) -> str:
        return (
            f"{self.bos or ''}{{% for m in messages %}}{self.start}{{{{ m['role'] }}}}\n"
            "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
            f"{{% if c['type'] == 'image' %}}{self.picture}"
            "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
            f"{self.end}\n{{% endfor %}}{{% if add_generation_prompt %}}{self.start}assistant\n{{% endif %}}"
        )


QWEN = Markup(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
             "<|video_pad|>"),
    start="<|im_start|>", end="<|im_end|>", picture="<|vision_start|><|image_pad|><|vision_end|>",
    pad="<|endoftext|>", eos="<|im_end|>", named={"image_token": "<|image_pad|>"},
)  # fmt: skip
GEMMA = Markup(
    special=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
             "<image_soft_token>"),
    start="<start_of_turn>", end="<end_of_turn>", picture="<start_of_image>", pad="<pad>", eos="<eos>", bos="<bos>",
    named={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
)  # fmt: skip
LLAVA = Markup(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    start="<|im_start|>", end="<|im_end|>", picture="<image>\n", pad="<|endoftext|>", eos="<|im_end|>",
    named={"image_token": "<image>", "video_token": "<video>"},
)  # fmt: skip
INTERNVL = Markup(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    start="<|im_start|>", end="<|im_end|>", picture="<IMG_CONTEXT>\n", pad="<|endoftext|>", eos="<|im_end|>",
    named={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
           "video_token": "<video>"},
)  # fmt: skip
SMOLVLM = Markup(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<image>", "<global-img>",
             "<fake_token_around_image>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))),
    start="<|im_start|>", end="<end_of_utterance>", picture="<image>", pad="<|im_end|>", eos="<end_of_utterance>",
    named={"image_token": "<image>"},
)  # fmt: skip


class ImageOnlyLlavaProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without the half for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, num_image_tokens: int, chat_template: Any = None) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy, self.vision_aspect_ratio = "full", "anyres_max_9"
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyInternVLProcessor(InternVLProcessor):
    """InternVL's processor without the half for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, image_seq_length: int, chat_template: Any = None) -> None:
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
        self.image_token, self.video_token = tokenizer.context_image_token, tokenizer.video_token
        self.image_token_id = tokenizer.context_image_token_id
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})|(?P<video><video>)")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyVideoLlamaProcessor(VideoLlama3Processor):
    """VideoLLaMA 3's processor without the half for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlySmolVLMProcessor(SmolVLMProcessor):
    """SmolVLM's processor without the half for videos, which needs torchvision and num2words."""

    def __init__(self, image_processor: Any, tokenizer: Any, image_seq_len: int, chat_template: Any = None) -> None:
        self.image_seq_len = image_seq_len
        self.image_token, self.video_token = "<image>", None
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.fake_image_token, self.global_image_token = "<fake_token_around_image>", "<global-img>"
        self.end_of_utterance_token = "<end_of_utterance>"
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        # SmolVLMProcessor's own asks its video processor how to sample frames.
        return ProcessorMixin.apply_chat_template(self, *args, **kwargs)


def _tokenizer(markup: Markup) -> PreTrainedTokenizerFast:
    """A byte-level BPE over a handful of words, the family's special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=alphabet, special_tokens=list(markup.special), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 2, trainer)
    if markup.bos is not None:
        # As Gemma's tokenizer does: a text that already begins with it must be encoded without special tokens.
        begin = (markup.bos, tokenizer.token_to_id(markup.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{markup.bos} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=markup.bos,
        eos_token=markup.eos,
        pad_token=markup.pad,
        extra_special_tokens=markup.named,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=markup.template(),
    )


def _processor(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    template = tokenizer.chat_template
    if name == "qwen3":
        return tokenizer
    if name == "gemma3":
        gemma_images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
        return transformers.Gemma3Processor(gemma_images, tokenizer, template, GEMMA_TOKENS)
    if name == "llava-onevision":
        size = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
        llava_images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS)
        return ImageOnlyLlavaProcessor(llava_images, tokenizer, (LLAVA_SIDE // PATCH) ** 2, template)
    if name == "llava-next":
        next_images = LlavaNextImageProcessorPil(
            size={"shortest_edge": LLAVA_SIDE}, image_grid_pinpoints=PINPOINTS,
            crop_size={"height": LLAVA_SIDE, "width": LLAVA_SIDE},
        )  # fmt: skip
        return transformers.LlavaNextProcessor(next_images, tokenizer, PATCH, "full", template)
    if name == "internvl":
        size = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
        tiles = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
        return ImageOnlyInternVLProcessor(tiles, tokenizer, (LLAVA_SIDE // PATCH // 2) ** 2, template)
    if name == "smolvlm":
        smol_images = SmolVLMImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        return ImageOnlySmolVLMProcessor(smol_images, tokenizer, (SIDE // PATCH // 2) ** 2, template)
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    if name == "video-llama3":
        images = VideoLlama3ImageProcessorPil(patch_size=PATCH, size=pixels, merge_size=2)
        return ImageOnlyVideoLlamaProcessor(images, tokenizer, template)
    return ImageOnlyQwenProcessor(Qwen2VLImageProcessorPil(patch_size=PATCH, size=pixels), tokenizer, template)


def _text(tokenizer: PreTrainedTokenizerFast, hidden: int, padded_rows: int) -> dict[str, Any]:
    """What the language models have in common."""
    return {
        "vocab_size": len(tokenizer) + padded_rows,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        **{f"{what}_token_id": getattr(tokenizer, f"{what}_token_id") for what in ("bos", "eos", "pad")},
    }


def _qwen_vl(name: str, text: dict[str, Any], token: Callable[[str], int]) -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": PATCH,
              "out_hidden_size": text["hidden_size"]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    ids = {f"{what}_token_id": token(f"<|{what}_pad|>") for what in ("image", "video")}
    ids |= {f"vision_{edge}_token_id": token(f"<|vision_{edge}|>") for edge in ("start", "end")}
    if name == "qwen2.5-vl":
        # The first block sees windows, the second everything, as in the real tower.
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **ids)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = text | {"rope_parameters": rope | {"mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def _config(name: str, tokenizer: PreTrainedTokenizerFast, hidden: int, padded_rows: int) -> PreTrainedConfig:
    token = tokenizer.convert_tokens_to_ids
    text = _text(tokenizer, hidden, padded_rows)
    if name == "qwen3":
        return transformers.Qwen3Config(**text, tie_word_embeddings=True)
    if name == "gemma3":
        text |= {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 512, "sliding_window_pattern": 2}
        vision = SIGLIP | {"image_size": SIDE}
        ids = {"boi_token_index": token("<start_of_image>"), "eoi_token_index": token("<end_of_image>")}
        ids |= {"image_token_index": token("<image_soft_token>"), "mm_tokens_per_image": GEMMA_TOKENS}
        return transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)
    if name == "llava-onevision":
        ids = {"image_token_index": token("<image>"), "video_token_index": token("<video>")}
        ids |= {"image_grid_pinpoints": PINPOINTS}
        text |= {"model_type": "qwen2"}
        vision = SIGLIP | {"image_size": LLAVA_SIDE}
        return transformers.LlavaOnevisionConfig(text_config=text, vision_config=vision, **ids)
    if name == "llava-next":
        ids = {"image_token_index": token("<image>"), "image_grid_pinpoints": PINPOINTS}
        vision = SIGLIP | {"image_size": LLAVA_SIDE}
        text |= {"model_type": "llama"}
        return transformers.LlavaNextConfig(
            text_config=text, vision_config=vision, vision_feature_select_strategy="full", **ids
        )
    if name == "internvl":
        text |= {"model_type": "qwen2"}
        vision = TOWER | {"image_size": [LLAVA_SIDE, LLAVA_SIDE], "patch_size": [PATCH, PATCH]}
        return transformers.InternVLConfig(
            text_config=text, vision_config=vision, image_token_id=token("<IMG_CONTEXT>"),
            image_seq_length=(LLAVA_SIDE // PATCH // 2) ** 2,
        )  # fmt: skip
    if name == "video-llama3":
        text |= {"model_type": "qwen2"}
        vision = TOWER | {"patch_size": PATCH}
        ids = {f"{what}_token_id": token(f"<|{what}_pad|>") for what in ("image", "video")}
        return transformers.VideoLlama3Config(text_config=text, vision_config=vision, **ids)
    if name == "smolvlm":
        text |= {"model_type": "llama"}
        vision = TOWER | {"image_size": SIDE, "patch_size": PATCH}
        return transformers.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=token("<image>"))
    return _qwen_vl(name, text, token)


_FAMILIES = {
    "qwen3": (transformers.Qwen3ForCausalLM, QWEN),
    "qwen3-vl": (transformers.Qwen3VLForConditionalGeneration, QWEN),
    "qwen2.5-vl": (transformers.Qwen2_5_VLForConditionalGeneration, QWEN),
    "gemma3": (transformers.Gemma3ForConditionalGeneration, GEMMA),
    "llava-onevision": (transformers.LlavaOnevisionForConditionalGeneration, LLAVA),
    "llava-next": (transformers.LlavaNextForConditionalGeneration, LLAVA),
    "internvl": (transformers.InternVLForConditionalGeneration, INTERNVL),
    "video-llama3": (transformers.VideoLlama3ForConditionalGeneration, QWEN),
    "smolvlm": (transformers.SmolVLMForConditionalGeneration, SMOLVLM),
}
ARCHITECTURES: tuple[str, ...] = tuple(_FAMILIES)


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> None:
    """Weights large enough for words and pictures to matter: at the usual 0.02 so small a model hears neither."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.2 if id(weight) in embeddings else weight[0].numel() ** -0.5)


def build(name: str, seed: int = 0, hidden: int | None = None, padded_rows: int = 0) -> tuple[PreTrainedModel, Any]:
    """A random float32 model of ``name`` on the CPU, and its processing class; ``seed`` fixes the weights.

    ``hidden`` makes the language model wider, ``padded_rows`` its vocabulary larger than the tokenizer's.
    """
    hidden = HIDDEN if hidden is None else hidden
    if hidden % HEAD_DIM:
        raise ValueError(f"hidden is {hidden}, expected a multiple of {HEAD_DIM}")
    model_class, markup = _FAMILIES[name]
    tokenizer = _tokenizer(markup)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(_config(name, tokenizer, hidden, padded_rows)).float()
        _enliven(model)
    # Gemma has two ends, its tokenizer's own and a turn's; for the others they are one.
    ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(markup.end)})
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), _processor(name, tokenizer)
