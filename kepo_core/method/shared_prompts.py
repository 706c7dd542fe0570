"""Rollouts that read each distinct prompt only once, with its pictures, for all of its completions.

GRPO samples G completions of a prompt, and transformers' ``generate`` reads it G times. Here the distinct prompts are
read up to their last token, the cache is repeated for their completions, and ``generate`` continues from there: the
same tokens for the same random state, up to rounding. The first generation compares logits; a model for which they
differ generates as before.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from kepo_core.method.hinted import largest
from kepo_core.method.vision import MODEL_FIELDS, PER_PROMPT, PER_TOKEN, VisionTrainer, by_row, choose_rows, count_tiles

#: (model inputs of all rows, row indices) → the inputs of these rows.
Pick = Callable[[Mapping[str, Tensor], Sequence[int]], dict[str, Tensor]]
_CACHES = {DynamicLayer, DynamicSlidingWindowLayer}
_log = logging.getLogger(__name__)


def is_sharded(model: Any) -> bool:
    """Whether processes hold parts of ``model`` (FSDP2, ZeRO-3): all must then make the same forward passes."""
    parts = isinstance(model, nn.Module) and any(isinstance(module, FSDPModule) for module in model.modules())
    return parts or bool(is_deepspeed_zero3_enabled())


def first_rows(prompt_ids: Sequence[Sequence[Any]], images: Sequence[Sequence[Any] | None] | None) -> list[int]:
    """For each row the first row with the same prompt: the same tokens, and pictures with the same pixels.

    Args:
        prompt_ids: tokens of each row's prompt, or its text.
        images: the pictures of each row; None if no row has any. Only PIL images are compared by pixels.
    """
    by_ids: dict[tuple[Any, ...], list[int]] = {}
    found = []
    for row, ids in enumerate(prompt_ids):
        alike = by_ids.setdefault(tuple(ids), [])
        same = (other for other in alike if images is None or _same(images[row] or (), images[other] or ()))
        first = next(same, row)
        if first == row:
            alike.append(row)
        found.append(first)
    return found


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        x is y or (isinstance(x, Image) and isinstance(y, Image) and x == y) for x, y in zip(a, b, strict=True)
    )


class SharedPrompts:
    """Generation from shared prompts, and the check whether a model supports it.

    Args:
        anyone: returns whether its argument is true on any process. If the model is sharded, all processes must make
            the same forward passes; by default each process decides for itself.
    """

    def __init__(self, anyone: Callable[[bool], bool] = bool) -> None:
        self._anyone = anyone
        self._checked = False
        self.refused = ""  # why prompts are not shared

    @contextmanager
    def of(self, model: Any, firsts: Sequence[int], pick: Pick) -> Iterator[None]:
        """Within this context ``model.generate`` reads only the prompts of the rows ``firsts`` (see `first_rows`)."""
        own, generate = vars(model).get("generate"), model.generate
        repeated = len(set(firsts)) < len(firsts)
        if self.refused or not self._anyone(repeated):
            yield
            return
        model.generate = partial(self._generate, model, generate, firsts, pick)
        try:
            yield
        finally:
            if own is None:
                del model.generate
            else:
                model.generate = own

    def _generate(
        self, model: Any, generate: Any, firsts: Sequence[int], pick: Pick, inputs: Any = None, **given: Any
    ) -> Any:
        """The output of ``generate`` for the same arguments."""
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        settings = {name: value for name, value in given.items() if name not in tensors}
        if self._anyone(bool(reason := self._unfit(model, inputs, tensors, settings))):
            self._refuse(reason or "another process cannot")
            return generate(**given) if inputs is None else generate(inputs, **given)
        distinct = sorted(set(firsts))
        few = pick(tensors, distinct)
        if not self._checked:
            self._checked = True
            if self._anyone(bool(reason := self._differs(model, generate, few, settings))):
                self._refuse(reason or "another process cannot")
                return generate(**given)
        place = {row: number for number, row in enumerate(distinct)}
        which = torch.tensor([place[row] for row in firsts], device=tensors["input_ids"].device)
        rows = {name: tensors[name] for name in PER_PROMPT}
        return generate(**rows, past_key_values=_read(model, generate, few, settings, which), **settings)

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        _log.warning("each prompt is read once per completion instead of once per group (slower): %s", reason)

    @staticmethod
    def _unfit(model: Any, inputs: Any, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
        """Why prompts cannot be shared in this call, from its arguments and the model's settings; "" if they can."""
        if inputs is not None or not set(PER_PROMPT) <= tensors.keys():
            return "generate is not called with input_ids and attention_mask"
        if tensors["input_ids"].shape[1] < 2:
            return "the prompts have one token"
        if model.config.is_encoder_decoder:
            return "the model has an encoder"
        for config in (settings.get("generation_config"), model.generation_config):
            for name, usual in (("num_beams", 1), ("num_return_sequences", 1), ("use_cache", True)):
                if getattr(config, name, None) not in (None, usual):
                    return f"{name} is {getattr(config, name)}"
            if (kind := getattr(config, "cache_implementation", None)) not in (None, "dynamic"):
                return f"cache_implementation is {kind}"
        if any(drops_out(module) for module in model.modules()):
            return "dropout is on, and would be equal for all completions of a prompt"
        return ""

    @staticmethod
    def _differs(model: Any, generate: Any, few: dict[str, Tensor], settings: Mapping[str, Any]) -> str:
        """How two tokens' logits from a shared prompt differ from those of ``generate``; "" if they do not.

        Args:
            few: the inputs of the distinct prompts.
        """
        greedy = {**settings, "generation_config": _greedy(2, output_logits=True)}
        rows = {name: few[name] for name in PER_PROMPT}
        which = torch.arange(len(rows["input_ids"]), device=rows["input_ids"].device)
        usual = generate(**few, **greedy)
        try:
            cache = _read(model, generate, few, settings, which)
            if not plain_cache(cache):
                return f"{type(model).__name__} keeps more of a prompt than keys and values"
            shared = generate(**rows, past_key_values=cache, **greedy)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
            # The usual call has just succeeded: the model does not support this one.
            return f"{type(model).__name__} does not continue a cache ({type(error).__name__}: {error})"
        alike = torch.ones_like(which, dtype=torch.bool)
        for step, (a, b) in enumerate(zip(usual.logits, shared.logits, strict=True)):
            a, b = a[alike].float(), b[alike].float()
            most = torch.finfo(model.dtype).eps ** 0.5
            if len(a) and not (apart := float((a - b).norm() / a.norm())) <= most:  # NaN is no agreement
                return f"{type(model).__name__}'s logits differ by {apart:.1g} (relative) from the usual ones"
            place = rows["input_ids"].shape[1] + step
            alike = alike & (usual.sequences[:, place] == shared.sequences[:, place])  # they can differ only by ties
        return ""


def drops_out(module: nn.Module) -> bool:
    """Whether dropout is active in a module."""
    share = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
    return module.training and isinstance(share, float) and share > 0


def _greedy(tokens: int, **settings: Any) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1, temperature=1.0, top_k=50,
        top_p=1.0, return_dict_in_generate=True, disable_compile=True, **settings,
    )  # fmt: skip


def _read(
    model: Any, generate: Any, few: Mapping[str, Tensor], settings: Mapping[str, Any], which: Tensor
) -> DynamicCache:
    """The cache of the distinct prompts without their last token, repeated: row i holds prompt ``which[i]``."""
    per_token = {name for name in few if name in PER_PROMPT or name.endswith(PER_TOKEN)}
    short = {name: value[:, :-1] if name in per_token else value for name, value in few.items()}
    cache = generate(**short, **{**settings, "generation_config": _greedy(1)}).past_key_values
    spread(model, cache, which)
    return cache


def plain_cache(cache: Any) -> bool:
    """Whether a cache holds only keys and values, which can be repeated and continued."""
    return type(cache) is DynamicCache and all(type(layer) in _CACHES for layer in cache.layers)


def spread(model: Any, cache: DynamicCache, which: Tensor) -> None:
    """Repeat the state that ``model`` keeps of prompts: row i gets that of prompt ``which[i]``."""
    cache.batch_select_indices(which)
    for module in model.modules():  # Qwen: how far pictures shift the positions of each row
        if isinstance(deltas := getattr(module, "rope_deltas", None), Tensor):
            module.rope_deltas = deltas[which]


class SharingTrainer(VisionTrainer):
    """GRPOTrainer whose rollouts share their prompts, with transformers' generation."""

    _sharing: SharedPrompts | None = None
    _firsts: tuple[int, ...] = ()  # `first_rows` of the batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with ``kepo_prompt``, (B,): the first row of the generation batch with the same prompt."""
        self._firsts = tuple[int, ...]()
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._firsts and not self.tools:  # tools may add pictures to completions
            output["kepo_prompt"] = torch.tensor(self._firsts, device=self.accelerator.device)
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, dict[str, Any]]:
        ids, images, fields = super()._tokenize_prompts(prompts)
        self._firsts = self._firsts or tuple(first_rows(ids, images))  # only the first call: prompts with hints follow
        return ids, images, fields

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any, **kw: Any) -> Any:
        if self.use_vllm or self.use_transformers_continuous_batching or self.tools:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kw)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        if self._sharing is None:
            self._sharing = SharedPrompts(self._anyone) if is_sharded(model) else SharedPrompts()
        with self._sharing.of(model, first_rows(prompt_ids, images), partial(self._pick, images)):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kw)

    def _anyone(self, flag: bool) -> bool:
        return bool(largest(self.accelerator, int(flag)))

    def _pick(self, images: list[list[Any]] | None, inputs: Mapping[str, Tensor], rows: Sequence[int]) -> Any:
        """The model inputs of some rows of a batch with the pictures ``images``."""
        if images is None:
            return choose_rows(inputs, rows)
        processor = self.processing_class.image_processor
        by_name: dict[str, Any] = {
            name: value if name in (*MODEL_FIELDS, *PER_PROMPT) or name.endswith(PER_TOKEN)
            else by_row(name, value, images, processor)
            for name, value in inputs.items()
        }  # fmt: skip
        by_name["num_images"] = [len(pictures) for pictures in images]
        if (tiles := count_tiles(inputs, images, processor)) is not None:
            by_name["num_tiles"] = tiles
        return choose_rows(by_name, rows)
