"""LoRA: add adapters to a student's layers, and merge trained adapters into a plain model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig
from torch import Tensor, nn

from kepo_core.params import Params

#: PEFT's prefix of the wrapped model's parameter names.
_WRAPPED = "base_model.model."


def lora_config(model: nn.Module, params: Params) -> LoraConfig | None:
    """Adapters for all linear layers of ``model``'s language model; None if all weights are trained.

    The vision tower and the head have no adapters: TRL and the divergence read the head's weight directly.
    """
    if not params.lora_rank:
        return None
    return LoraConfig(
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        lora_dropout=0.0,
        target_modules=language_layers(model),
        task_type="CAUSAL_LM",
    )


def language_layers(model: Any) -> str:
    """A regular expression over the full names of the linear layers in ``model``'s language model."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    kinds = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(kinds))})"


def merged(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights of a plain model: W + scaling · B A, in float32, for layers with adapters; other weights unchanged.

    Args:
        state: state dict of a PEFT model with one adapter, "default"; A is (rank, in), B (out, rank).
        scaling: ``lora_alpha / lora_rank``.
    """
    plain = {}
    for name, value in state.items():
        stem, base, part = name.partition(".base_layer.")
        if base:
            name = f"{stem}.{part}"
        if base and part == "weight":
            a, b = (state[f"{stem}.lora_{letter}.default.weight"].float() for letter in "AB")
            value = value.float() + scaling * (b @ a)
        if ".lora_" not in name:
            plain[name.removeprefix(_WRAPPED)] = value
    return plain


def save_student(trainer: Any, folder: Path) -> None:
    """Write the trained model, with its processor, as a plain model that ``load_model`` reads.

    Under LoRA the adapter is also written on its own, into ``adapter`` beside it; the trained model is not changed.
    """
    if not is_peft_model(trainer.model):
        trainer.save_model(str(folder))
        return
    model = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model  # only ZeRO's engine can gather
    state = trainer.accelerator.get_state_dict(model)  # if sharded, whole on the first process
    if trainer.args.should_save:
        adapter = trainer.model.peft_config["default"]
        with torch.no_grad():
            plain = merged(state, adapter.lora_alpha / adapter.r)
        trainer.model.save_pretrained(folder.with_name("adapter"), state_dict=state)
        trainer.model.get_base_model().save_pretrained(folder, state_dict=plain)
        trainer.processing_class.save_pretrained(folder)
