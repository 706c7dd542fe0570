"""The two embedded models: real Qwen3-VL, only tiny, with a tokenizer and processor of their own.

The tokenizer is a byte-level BPE over PhantomVQA's words (any other text falls back to bytes). As in Qwen3's,
``<think>`` and ``</think>`` are ordinary added tokens, ``<answer>`` and ``<hint>`` plain text. The fixed
sentences of Appendix C are one token each, which makes prompts about 60 tokens long instead of 130: the price
of a laptop-scale world, and why these models know the paper's wording and no other.
"""

import re
from collections.abc import Iterator

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kepo_core.data import phantom, records
from kepo_core.data.records import MODALITIES
from kepo_core.method.processor import ImageOnlyQwenProcessor
from kepo_core.task import prompts

#: The letters that the models know: no question of PhantomVQA has more options.
LETTERS = records.LETTERS[:8]
VOCAB_SIZE = 576
PATCH, MERGE = 8, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# text hidden, layers, heads, kv heads, mlp; vision hidden, layers, heads
_SIZES = {
    "test": (32, 2, 2, 1, 64, 16, 2, 2),
    "small": (128, 4, 4, 2, 384, 64, 3, 4),
    "medium": (192, 4, 6, 3, 512, 96, 3, 4),
    "large": (256, 5, 8, 4, 768, 128, 3, 4),
}
_HEAD_DIM = {"test": 16, "small": 32, "medium": 32, "large": 32}


def _fixed_sentences() -> list[str]:
    """Appendix C's sentences between its tags and placeholders, longest first."""
    pieces: set[str] = set()
    for template in (prompts.THINKING, prompts.NON_THINKING, prompts.HINT_WRITING, prompts.HINT_AWARE):
        pieces |= {p for p in re.split(r"<think>\.\.\.</think>|\{\w+\}", template) if len(p) > 20}
    for context in prompts.TOLD_CONTEXTS:
        text = prompts.hint_aware_messages("", [], "{hint}", "{answer}", context)[0]["content"][1]["text"]
        line = text.split(prompts.HINT_AWARE)[1]
        pieces |= {p for p in re.split(r"</?(?:hint|answer)>|\{\w+\}", line) if len(p) > 10}
    return sorted(pieces, key=len, reverse=True)


def _corpus() -> Iterator[str]:
    words = [*phantom.KINDS, *phantom.PLACES, *phantom.SIZES, *phantom.NUMBERS, *phantom.CONTRASTS,
             *phantom.DIAGNOSES, *phantom.GRADES, *MODALITIES]  # fmt: skip
    lines = [f"{letter}) {word}\n" for letter in LETTERS for word in words]
    lines += [f"<answer>{letter}</answer> {letter}" for letter in LETTERS]
    lines += ["<hint></hint>", "user\n", "assistant\n", "\n\n", " : "]
    for topic in phantom.TOPICS:
        lines += [*topic.wordings, topic.evidence, f"{topic.evidence} {topic.conclusion}", " (A)."]
    return (line for line in lines for _ in range(4))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, built from the fixed corpus: the same vocabulary on every call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 48, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # Every answer and every option's mark is one token, so that a word stands next to its letter.
    composed = (*phantom.PLACES, *phantom.GRADES, "X-Ray")
    marks = [mark for letter in LETTERS for mark in (f"{letter})", f" ({letter})")]
    ordinary = ["<think>", "</think>", *_fixed_sentences(), *(f" {answer}" for answer in composed), *marks]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ordinary])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    if len(fast) > VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {len(fast)} entries, expected at most {VOCAB_SIZE}")
    return fast


def build_processor() -> ImageOnlyQwenProcessor:
    """Tokenizer, chat template and an image processor that keeps 64×64 pictures as they are (16 tokens)."""
    side = PATCH * MERGE
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=1,
        size={"shortest_edge": 2 * side * 2 * side, "longest_edge": 8 * side * 8 * side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return ImageOnlyQwenProcessor(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_config(size: str) -> Qwen3VLConfig:
    """An architecture with Qwen3-VL's own layout.

    "small" (1.2 million parameters: both embedded models), "medium" (2.5), "large" (5.4), or "test" (for unit tests).
    """
    hidden, layers, heads, kv_heads, mlp, v_hidden, v_layers, v_heads = _SIZES[size]
    head_dim = _HEAD_DIM[size]
    token = build_tokenizer().convert_tokens_to_ids
    quarter = head_dim // 2 // 4
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [head_dim // 2 - 2 * quarter, quarter, quarter],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": v_layers,
            "hidden_size": v_hidden,
            "intermediate_size": 3 * v_hidden,
            "num_heads": v_heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(size: str = "test", seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A randomly initialised model, float32, eager to learn: matrices at 1/√fan-in instead of 0.02.

    ``seed`` fixes the weights without touching the caller's global generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(build_config(size)).float()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.lm_head:
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.Conv3d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, fan_in**-0.5, generator=generator)
        # At 0.02 the places of patches drown in their contents, and "where" is learned late.
        model.model.visual.pos_embed.weight.normal_(0, 0.4, generator=generator)
    special = model.config.text_config
    model.generation_config.eos_token_id = special.eos_token_id
    model.generation_config.pad_token_id = special.pad_token_id
    return model
