"""Completions for an evaluation: by transformers, or by the vLLM engine that samples rollouts in training."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from transformers import GenerationConfig
from trl.generation.vllm_generation import VLLMGeneration

from kepo_core.method.forward import let_generate
from kepo_core.method.shared_prompts import SharedPrompts, first_rows, is_sharded
from kepo_core.method.vllm_rollouts import CheckedVLLM, making_engine

#: (prompts, a picture for each, a name that seeds sampling) → the tokens of each completion, possibly padded.
Draw = Callable[[Sequence[str], Sequence[Image], str], Sequence[Sequence[int]]]


def start_vllm(folder: str, processor: Any, accelerator: Any, args: Any) -> CheckedVLLM:
    """An engine of this process for the model in ``folder``, with the settings of a ``KEPOConfig``."""
    model: Any = nn.Module()  # without weights: the engine reads those of the folder and gets no others
    model.name_or_path, model.generation_config = folder, _generation(folder)
    with making_engine(args):
        engine = VLLMGeneration(
            model,
            accelerator,
            processor,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            model_impl=args.vllm_model_impl,
        )
    return CheckedVLLM(engine, processor)


def in_step(model: Any) -> bool:
    """Whether all processes must sample equally many batches of equal size: they share a model or an engine."""
    if isinstance(model, CheckedVLLM):
        return bool(model.mode == "server" or model.tensor_parallel_size > 1 or model.enable_sleep_mode)
    return is_sharded(model)


@contextmanager
def drawing(model: Any, processor: Any, max_tokens: int, temperature: float) -> Iterator[tuple[list[int], Draw]]:
    """The stop tokens and a function that samples from ``model``; the model is unchanged afterwards.

    Args:
        model: an image-text model with ``generate``, or a `CheckedVLLM`.
        processor: its processor.
        max_tokens: most tokens of a completion, at least 1.
        temperature: of sampling; 0 decodes greedily.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}, expected at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature}, expected 0 (greedy) or more.")
    by = _by_vllm if isinstance(model, CheckedVLLM) else _by_transformers
    with by(model, processor, max_tokens, temperature) as found:
        yield found


@contextmanager
def _by_transformers(
    model: Any, processor: Any, max_tokens: int, temperature: float
) -> Iterator[tuple[list[int], Draw]]:
    """Put ``model`` into evaluation mode with a plain generation configuration, and restore both at the end.

    The configuration is replaced on the model, because ``generate`` takes missing arguments from it.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    own, was_training = model.generation_config, model.training
    stop_tokens = _stop_tokens(own, processor.tokenizer)
    image_token = getattr(model.config, "image_token_id", None)
    sharing = SharedPrompts()

    def made(texts: Sequence[str], pictures: Sequence[Image]) -> Any:
        images = [[picture] for picture in pictures]
        return processor(text=list(texts), images=images, padding=True, padding_side="left", return_tensors="pt").to(
            model.device
        )

    def draw(texts: Sequence[str], pictures: Sequence[Image], name: str) -> Sequence[Sequence[int]]:
        inputs, firsts = made(texts, pictures), list(range(len(texts)))
        together = {"synced_gpus": True} if in_step(model) else {}
        if not together:  # several samples of a question follow one another
            firsts = first_rows(texts, [[picture] for picture in pictures])

        def few(_: Any, rows: Sequence[int]) -> Any:
            return dict(made([texts[row] for row in rows], [pictures[row] for row in rows]))

        with _seeded(name, model.device), sharing.of(model, firsts, few):
            output = model.generate(**inputs, **together)
        return output[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

    let_generate(model)
    model.generation_config = GenerationConfig(
        **sampling,
        max_new_tokens=max_tokens,
        eos_token_id=stop_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        # As in training: a sampled image placeholder would have no image.
        suppress_tokens=None if image_token is None else [image_token],
    )
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: tensors that it leaves in caches cannot be used in training
            yield stop_tokens, draw
    finally:
        model.generation_config = own
        model.train(was_training)


@contextmanager
def _by_vllm(
    model: CheckedVLLM, processor: Any, max_tokens: int, temperature: float
) -> Iterator[tuple[list[int], Draw]]:
    """Set the engine to plain sampling, and restore its settings at the end."""
    stop_tokens = _stop_tokens(model.model.generation_config, processor.tokenizer)

    def draw(texts: Sequence[str], pictures: Sequence[Image], name: str) -> Sequence[Sequence[int]]:
        # Without padding. The processor repeats a picture's placeholder, as in training; the engine checks the count.
        ids = [
            processor(text=[text], images=[[picture]])["input_ids"][0]
            for text, picture in zip(texts, pictures, strict=True)
        ]
        _, drawn, *_ = model.generate([list(row) for row in ids], [[picture] for picture in pictures], 1)
        return drawn  # type: ignore[no-any-return]

    with model.sampling(temperature, max_tokens, stop_tokens):
        yield stop_tokens, draw


def _generation(folder: str) -> GenerationConfig:
    """A saved model's own generation configuration; an empty one if it has none."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig()


def _stop_tokens(own: GenerationConfig, tokenizer: Any) -> list[int]:
    """The stop tokens of the checkpoint's generation configuration and of the tokenizer."""
    declared = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return sorted({token for token in (*declared, tokenizer.eos_token_id) if token is not None})


@contextmanager
def _seeded(name: str, device: torch.device) -> Iterator[None]:
    """Seed torch (CPU and ``device``) with a hash of ``name``, and restore the random state at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield
