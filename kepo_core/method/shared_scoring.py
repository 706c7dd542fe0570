"""Scoring that reads each distinct prompt once: the completions of a group continue one prompt's keys and values.

The results equal those computed row by row, up to rounding. Half to two thirds of a batch's tokens are prompts, each
present G times. `GRPOTrainer` reads them all: a trainer that must equal it bit for bit does not share them. Gradients
reach the prompts through the cache, which excludes gradient checkpointing.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kepo_core.method.shared_prompts import drops_out, plain_cache, spread
from kepo_core.method.vision import FURTHER, MODEL_FIELDS, PER_PROMPT, PER_TOKEN, aligned, beside_tokens, choose_rows

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Shared:
    """The distinct prompts of a batch of B rows, left-padded to ``length`` tokens.

    Attributes:
        few: the model inputs of the distinct prompts, pictures included, without their last token.
        which: (B,) the index in ``few`` of each row's prompt.
        length: P.
    """

    few: dict[str, Tensor]
    which: Tensor
    length: int


def shared_rows(inputs: Mapping[str, Any], rows: Sequence[int]) -> Shared | None:
    """The distinct prompts of some rows of a batch with ``kepo_prompt``; None if no two rows share a prompt."""
    if "kepo_prompt" not in inputs:
        return None
    prompts = inputs["kepo_prompt"][list(rows)].tolist()
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(numbers) == len(prompts):
        return None
    length = inputs["prompt_ids"].shape[1]
    few = select_rows(inputs, [rows[prompts.index(prompt)] for prompt in numbers])
    cut = {
        name: value[:, : length - 1] if name in PER_PROMPT or name.endswith(PER_TOKEN) else value
        for name, value in few.items()
    }
    which = torch.tensor([numbers[prompt] for prompt in prompts], device=inputs["prompt_ids"].device)
    return Shared(cut, which, length)


def select_rows(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Model inputs (prompt and completion joined) of some rows of a GRPOTrainer batch, each with its own images."""
    fields = {name: inputs[name] for name in (*MODEL_FIELDS, "num_images", "num_tiles") if inputs.get(name) is not None}
    sizes = inputs["prompt_ids"].shape[1], inputs["completion_ids"].shape[1]
    further = {name.removeprefix(FURTHER): inputs[name] for name in inputs if name.startswith(FURTHER)}
    device, index = inputs["prompt_ids"].device, list(rows)
    merged = choose_rows(fields | beside_tokens(further, *sizes), rows)
    merged = aligned({name: value.to(device) for name, value in merged.items()}, sum(sizes))
    for joined, parts in (("input_ids", "ids"), ("attention_mask", "mask")):
        merged[joined] = torch.cat([inputs[f"prompt_{parts}"], inputs[f"completion_{parts}"]], dim=1)[index]
    return merged


class SharedReading:
    """Lets a backbone continue shared prompts, and checks at the first use whether it can."""

    def __init__(self) -> None:
        self.refused: str | None = None  # why it cannot; "" if it can; None: not checked yet

    def works(self, backbone: Any, shared: Shared, inputs: Mapping[str, Any]) -> bool:
        """Whether ``backbone`` computes the same hidden states for ``inputs`` from ``shared`` prompts.

        Args:
            inputs: the keyword arguments of a forward pass over all rows.
        """
        if self.refused is None:
            self.refused = self._why_not(backbone, shared, inputs)
            if self.refused:
                _log.warning("each prompt is scored once per completion, not once per group (slower): %s", self.refused)
        return not self.refused

    def _why_not(self, backbone: Any, shared: Shared, inputs: Mapping[str, Any]) -> str:
        if any(drops_out(module) for module in backbone.modules()):
            return "dropout is on, and would be equal for all completions of a prompt"
        if getattr(backbone.config.get_text_config(), "output_router_logits", False):
            return "its experts' load-balancing loss needs every token of every row"
        with torch.no_grad():
            usual = backbone(**inputs, use_cache=False).last_hidden_state[:, shared.length - 1 :].float()
            try:
                output = continue_prompts(backbone, backbone.forward, shared, **inputs)
            except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
                # The usual call has just succeeded: the model does not support this one.
                return f"{type(backbone).__name__} does not continue a cache ({type(error).__name__}: {error})"
        if not plain_cache(output.past_key_values):
            return f"{type(backbone).__name__} keeps more of a prompt than keys and values"
        tokens = inputs["attention_mask"][:, shared.length - 1 :].bool()
        a, b = usual[tokens], output.last_hidden_state.float()[tokens]
        if not (apart := float((a - b).norm() / a.norm())) <= torch.finfo(backbone.dtype).eps ** 0.5:
            return f"{type(backbone).__name__}'s states differ by {apart:.1g} (relative) from the usual ones"
        return ""

    @contextmanager
    def of(self, backbone: Any, shared: Shared) -> Iterator[None]:
        """Within this context ``backbone`` returns each row's states from its prompt's last token on, (B, T+1, H)."""
        own, forward = vars(backbone).get("forward"), backbone.forward
        backbone.forward = partial(continue_prompts, backbone, forward, shared)
        try:
            yield
        finally:
            del backbone.forward
            if own is not None:
                backbone.forward = own


def continue_prompts(
    backbone: Any, forward: Any, shared: Shared, *, input_ids: Tensor, attention_mask: Tensor, **inputs: Any
) -> Any:
    """The output of ``forward`` for the tokens from each prompt's last token on.

    Args:
        backbone: the model without its head.
        forward: the backbone's own forward.
        input_ids, attention_mask: (B, P+T) of all rows.
        inputs: further model inputs of all rows; only settings are used, tensors are not.
    """
    settings = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    settings |= {"use_cache": True}
    cache = forward(**shared.few, **settings).past_key_values
    spread(backbone, cache, shared.which)
    start, device = shared.length - 1, input_ids.device
    if hasattr(backbone, "rope_deltas"):  # its positions depend on pictures: it needs those of the rest
        if "pixel_values" in shared.few:
            places = (attention_mask.cumsum(-1) - 1)[:, start:] + backbone.rope_deltas
        else:
            places = torch.arange(start, input_ids.shape[1], device=device).expand(len(input_ids), -1)
        settings["position_ids"] = places.expand(3, -1, -1)
    return forward(input_ids=input_ids[:, start:], attention_mask=attention_mask, past_key_values=cache, **settings)
