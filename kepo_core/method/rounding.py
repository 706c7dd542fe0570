"""Measures how many weights optimiser steps leave unchanged because of rounding.

A bfloat16 number has 8 significant bits: AdamW's first steps, each about as large as the learning rate, are lost if
that is below 1/512 of a weight. A float32 number (TRL's default) has 24: they are lost below 1/33,554,432 of a weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: Maximum number of sampled weights per parameter.
SAMPLE = 1000


class RoundingWatch(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Logs ``kepo/unmoved_weights`` (`rollouts.GLOSSARY`) for steps whose learning rate is not 0."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, sampled weights, which have a gradient

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        """Keep a sample of the weights that the step will change."""
        if any(group["lr"] for group in optimizer.param_groups):  # it is 0 when a warm-up begins
            trained = [p for p in self._trainer.model.parameters() if p.grad is not None]
            self._before = [(p, _sample(p.detach()).clone(), _sample(p.grad) != 0) for p in trained]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log the share of the sampled weights with a gradient that did not change."""
        if not self._before:
            return
        counts = [
            torch.stack([(has_gradient & (_sample(p.detach()) == before)).sum(), has_gradient.sum()])
            for p, before, has_gradient in self._before
        ]
        unmoved, moving = torch.stack(counts).sum(0).tolist()
        self._before = []
        if moving:
            self._trainer._metrics["train"]["kepo/unmoved_weights"].append(unmoved / moving)


def _sample(values: Tensor) -> Tensor:
    """At most `SAMPLE` entries of this process's part of a tensor, evenly spread."""
    flat = (values.to_local() if isinstance(values, DTensor) else values).flatten()
    return flat[:: -(-len(flat) // SAMPLE) or 1]
