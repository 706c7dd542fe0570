"""Pre-training of the embedded models: first to see, then to look up letters, then to talk.

Two stages, found by measurement. (1) The vision tower alone learns the six facts of a picture through
attention-pooled linear heads, which are thrown away; from then on it is frozen. (2) The language model learns
what :mod:`kepo_core.testbed.lessons` draws: first dense look-ups (four supervised letters a sequence); then also
captions, ticked lists, the atlas and hints; at last all four prompts of Appendix C. Matching a word with its letter and
naming what is seen are learned in large, cheap batches: where one token in twenty is a letter, hundreds of steps do not
suffice for either.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from kepo_core.data import phantom
from kepo_core.files import in_place_of
from kepo_core.testbed.lessons import Pool, Sequences, Tasks, fact_labels

Log = Callable[[str], None]
Mixture = dict[str, int]  # sequences of each task in one step


class FactHeads(nn.Module):
    """One attention-pooled linear classifier per fact, over the vision tower's 16 merged tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = nn.ParameterDict({k: nn.Parameter(torch.randn(hidden) * hidden**-0.5) for k in phantom.WORDS})
        self.out = nn.ModuleDict({k: nn.Linear(hidden, len(words)) for k, words in phantom.WORDS.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """(N, tokens, hidden) → logits (N, classes) per fact."""
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return {k: self.out[k](((tokens @ q).softmax(-1).unsqueeze(-1) * tokens).sum(1)) for k, q in self.query.items()}


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` in float32: on a CPU without bfloat16 the original takes four times as long as all else."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nesterov momentum, orthogonalised; tall matrices take longer steps."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(velocity, group["momentum"]))
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """``matrix`` (m, n) with singular values near 1 (about 0.7 to 1.2), by five Newton–Schulz steps with the
    coefficients of ``torch.optim.Muon``.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class _Descent:
    """Muon for the matrices of blocks, AdamW for all else; clipped gradients, 50 steps of warm-up, then a cosine.

    Muon finds the look-up of letters in 200 steps where AdamW alone does not within 260, and halves the steps
    that seeing takes.
    """

    def __init__(self, modules: Iterable[nn.Module], steps: int) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        matrices = [m.weight for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
        chosen = {id(m) for m in matrices if m.requires_grad}
        others = [p for p in self.parameters if id(p) not in chosen]
        self.optimizers = (
            Muon([m for m in matrices if id(m) in chosen], lr=0.02, weight_decay=0.01),
            torch.optim.AdamW(others, lr=2.5e-3, weight_decay=0.01),
        )
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                o, lambda i: min((i + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * min(i / steps, 1.0))))
            )
            for o in self.optimizers
        ]

    @property
    def _parts(self) -> list[Any]:
        return [*self.optimizers, *self.schedules]

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, kept in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(kept)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@dataclass(frozen=True)
class Kept:
    """A stage's state, saved to a file every so many steps; an interrupted stage resumes from it exactly."""

    path: Path
    every: int

    def read(self, rng: np.random.Generator, *parts: Any) -> int:
        """Put the kept state into ``rng`` and ``parts`` → steps done; 0 where there is none."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        rng.bit_generator.state = state["rng"]
        for part, kept in zip(parts, state["parts"], strict=True):
            part.load_state_dict(kept)
        return int(state["step"])

    def write(self, step: int, rng: np.random.Generator, *parts: Any) -> None:
        """Save ``parts`` if ``step`` is a multiple of ``every``."""
        if step % self.every:
            return
        state = {"step": step, "rng": rng.bit_generator.state, "parts": [part.state_dict() for part in parts]}
        with in_place_of(self.path) as partial:
            torch.save(state, partial)


def train_vision(
    model: Qwen3VLForConditionalGeneration, pool: Pool, steps: int, seed: int, log: Log, kept: Kept
) -> None:
    """Stage 1: teach ``model.model.visual`` the facts of pictures through throw-away heads."""
    rng = np.random.default_rng([1, seed])
    torch.manual_seed(seed)
    heads = FactHeads(model.config.text_config.hidden_size)
    descent = _Descent([model.model.visual, heads], steps)
    grid = torch.tensor([[1, 8, 8]] * 128)
    start = time.time()
    done = kept.read(rng, model, heads, descent)
    for step in range(done + 1, steps + 1):
        pixels, facts = pool.mirrored(rng.integers(0, len(pool.facts), 128).tolist(), rng)
        logits = heads(model.model.visual(pixels.flatten(0, 1), grid_thw=grid).pooler_output.view(128, 16, -1))
        labels = fact_labels(facts)
        loss = torch.stack([nn.functional.cross_entropy(logits[k], labels[k]) for k in phantom.WORDS]).sum()
        loss.backward()
        descent.step()
        kept.write(step, rng, model, heads, descent)
        if step % 50 == 0:
            right = {k: f"{(logits[k].argmax(-1) == labels[k]).float().mean():.2f}" for k in phantom.WORDS}
            log(f"vision {step}/{steps} loss {loss.item():.3f} {right} {time.time() - start:.0f} s")


def sequence_loss(model: Qwen3VLForConditionalGeneration, batch: Sequences) -> Tensor:
    """Weighted mean of next-token cross-entropies."""
    ids, mask, weight = batch.input_ids, batch.attention_mask, batch.labels_weight[:, 1:]
    image: dict[str, Tensor] = {}
    if batch.pixels is not None:
        image = {
            "pixel_values": batch.pixels.float().flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * len(ids)),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False, **image).last_hidden_state
    learned = weight > 0
    losses = nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][learned]), ids[:, 1:][learned], reduction="none")
    return (losses * weight[learned]).sum() / weight.sum()


def train_language(
    model: Qwen3VLForConditionalGeneration,
    tasks: Tasks,
    phases: tuple[tuple[int, Mixture], ...],
    log: Log,
    kept: Kept,
) -> None:
    """Stage 2: every phase's mixture of tasks with the vision tower frozen; each task weighs in proportion to its
    sequences.
    """
    model.model.visual.requires_grad_(False)
    mixtures = [mixture for steps, mixture in phases for _ in range(steps)]
    descent = _Descent([model.model.language_model], len(mixtures))
    running: dict[str, float] = {}
    start = time.time()
    done = kept.read(tasks.rng, model, descent)
    for step, mixture in enumerate(mixtures[done:], done + 1):
        for task, count in mixture.items():
            loss = sequence_loss(model, tasks.draw(task, count))
            (loss * count / sum(mixture.values())).backward()
            running[task] = 0.95 * running.get(task, loss.item()) + 0.05 * loss.item()
        descent.step()
        kept.write(step, tasks.rng, model, descent)
        if step % 20 == 0:
            losses = {task: f"{value:.3f}" for task, value in running.items()}
            log(f"language {step}/{len(mixtures)} {losses} {time.time() - start:.0f} s")
    model.model.visual.requires_grad_(True)
