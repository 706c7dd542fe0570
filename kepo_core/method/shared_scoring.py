"""Scoring that reads each distinct prompt once: the completions of a group continue one prompt's keys and values.

What is computed is what the model computes row by row, but for rounding: half to two thirds of a batch's tokens are
prompts, each there G times. `GRPOTrainer` reads them all, so a trainer that has to equal it to the bit does not share
them. Gradients reach the prompts through the cache, which rules gradient checkpointing out.
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
    """The distinct prompts of a batch of B rows, which are padded on the left to ``length`` tokens.

    Attributes:
        few: the model inputs of the distinct prompts, pictures included, without their last token.
        which: (B,) the prompt of each row, by its number in ``few``.
        length: P.
    """

    few: dict[str, Tensor]
    which: Tensor
    length: int


def shared_rows(inputs: Mapping[str, Any], rows: Sequence[int]) -> Shared | None:
    """The distinct prompts of some rows of a batch with ``kepo_prompt``; None where no two rows have the same."""
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
    """Whether a backbone can continue shared prompts, found out when it first should, and how it does."""

    def __init__(self) -> None:
        self.refused: str | None = None  # why not; None: it has not been tried

    def works(self, backbone: Any, shared: Shared, inputs: Mapping[str, Any]) -> bool:
        """Whether ``backbone`` has the same hidden states for ``inputs`` from ``shared`` prompts.

        Args:
            inputs: the keyword arguments of a forward pass over all rows.
        """
        if self.refused is None:
            self.refused = self._why_not(backbone, shared, inputs)
            if self.refused:
                _log.warning("each prompt is scored once a completion, not once a group: %s", self.refused)
        return not self.refused

    def _why_not(self, backbone: Any, shared: Shared, inputs: Mapping[str, Any]) -> str:
        if any(drops_out(module) for module in backbone.modules()):
            return "dropout is on, and would be the same for all completions of a prompt"
        if getattr(backbone.config.get_text_config(), "output_router_logits", False):
            return "the load of its experts counts every token of every row"
        with torch.no_grad():
            usual = backbone(**inputs, use_cache=False).last_hidden_state[:, shared.length - 1 :].float()
            try:
                output = continue_prompts(backbone, backbone.forward, shared, **inputs)
            except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
                # It ran by itself just now, so it is the way of asking that the model does not know.
                return f"{type(backbone).__name__} does not continue a cache ({type(error).__name__}: {error})"
        if not plain_cache(output.past_key_values):
            return f"{type(backbone).__name__} keeps more of a prompt than keys and values"
        tokens = inputs["attention_mask"][:, shared.length - 1 :].bool()
        a, b = usual[tokens], output.last_hidden_state.float()[tokens]
        if not (apart := float((a - b).norm() / a.norm())) <= torch.finfo(backbone.dtype).eps ** 0.5:
            return f"{type(backbone).__name__}'s states are {apart:.1g} away from those that it has otherwise"
        return ""

    @contextmanager
    def of(self, backbone: Any, shared: Shared) -> Iterator[None]:
        """Let ``backbone`` return the states of each row from its prompt's last token on, (B, T+1, H), for a while."""
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
    """What ``forward`` returns for the tokens from each prompt's last on.

    Args:
        backbone: the model without its head, which has ``forward``.
        input_ids, attention_mask: (B, P+T) of all rows.
        inputs: further ones of all rows, of which the settings alone are used.
    """
    settings = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    settings |= {"use_cache": True}
    cache = forward(**shared.few, **settings).past_key_values
    spread(backbone, cache, shared.which)
    start, device = shared.length - 1, input_ids.device
    if hasattr(backbone, "rope_deltas"):  # its positions follow its pictures, and so it wants to be told the rest
        if "pixel_values" in shared.few:
            places = (attention_mask.cumsum(-1) - 1)[:, start:] + backbone.rope_deltas
        else:
            places = torch.arange(start, input_ids.shape[1], device=device).expand(len(input_ids), -1)
        settings["position_ids"] = places.expand(3, -1, -1)
    return forward(input_ids=input_ids[:, start:], attention_mask=attention_mask, past_key_values=cache, **settings)
