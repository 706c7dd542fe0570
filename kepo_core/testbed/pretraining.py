"""Pre-training of the embedded models: first to see, then to look up letters, then to talk.

Three stages, found by measurement. (1) The vision tower alone learns the six facts of a picture through
attention-pooled linear heads, which are thrown away; from then on it is frozen. (2) The language model learns
dense look-ups (four supervised letters a sequence), captions, and the four prompts of Appendix C: the teacher.
(3) A short further training gives the teacher's copy the habits of :mod:`kepo_core.testbed.lessons`: the student.
The pictures come from random streams of their own, never from the set that
:func:`kepo_core.data.phantom.ensure_phantom` writes.
"""

import copy
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
from kepo_core.experiment.models import best_device
from kepo_core.experiment.threads import one_thread
from kepo_core.files import in_place_of
from kepo_core.method.processor import ImageOnlyQwenProcessor
from kepo_core.testbed.embedded import build_model, build_processor
from kepo_core.testbed.lessons import (
    NO_HABITS,
    STUDENT_HABITS,
    Pool,
    Sequences,
    Tasks,
    fact_labels,
)

Log = Callable[[str], None]
Mixture = dict[str, int]  # sequences of each task in one step


@dataclass(frozen=True)
class Recipe:
    """How the two embedded models are made; phases are (steps, mixture)."""

    pictures: int = 24_000
    vision_steps: int = 900  # of 128 pictures
    # To find a word's letter and to name what is seen are learned in large and cheap batches: inside the mixture,
    # where one letter in twenty tokens counts, neither is found in hundreds of steps.
    teacher_phases: tuple[tuple[int, Mixture], ...] = (
        (240, {"lookup": 128}),
        (120, {"lookup": 32, "caption": 64}),
        (900, {"lookup": 24, "caption": 8, "think": 24, "plain": 8, "hint": 6, "aware": 14}),
    )
    student_phases: tuple[tuple[int, Mixture], ...] = ((300, {"think": 40, "plain": 6, "hint": 4, "aware": 24}),)
    student_share: float = 0.5  # of the teacher's learning rates

    def quick(self) -> "Recipe":
        """The same way in seconds: what comes out has learned nothing. For trying the notebook."""
        teacher, student = (
            tuple((1, mixture) for _, mixture in phases) for phases in (self.teacher_phases, self.student_phases)
        )
        return Recipe(256, 2, teacher, student)


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


class _Descent:
    """Muon for the matrices of blocks, AdamW for all else; clipped gradients, 50 steps of warm-up, then a cosine.

    Muon finds the look-up of letters in 200 steps where AdamW alone does not within 260, and halves the steps
    that seeing takes.
    """

    def __init__(self, modules: Iterable[nn.Module], steps: int, lr: float = 2.5e-3, muon_lr: float = 0.02) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        matrices = [m.weight for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
        chosen = {id(m) for m in matrices if m.requires_grad}
        others = [p for p in self.parameters if id(p) not in chosen]
        self.optimizers = (
            torch.optim.Muon([m for m in matrices if id(m) in chosen], lr=muon_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=lr, weight_decay=0.01),
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
    """A stage's state in a file, every so many steps, from which the stage goes on as if it had not been cut off."""

    path: Path
    every: int = 100

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
        """Keep the state of ``parts`` after ``step`` steps, if it is the turn of that step."""
        if step % self.every:
            return
        state = {"step": step, "rng": rng.bit_generator.state, "parts": [part.state_dict() for part in parts]}
        with in_place_of(self.path) as partial:
            torch.save(state, partial)


def train_vision(
    model: Qwen3VLForConditionalGeneration, pool: Pool, steps: int, seed: int, log: Log, kept: Kept | None = None
) -> None:
    """Stage 1: teach ``model.model.visual`` the facts of pictures through throw-away heads."""
    device = model.device
    rng = np.random.default_rng([1, seed])
    torch.manual_seed(seed)
    heads = FactHeads(model.config.text_config.hidden_size).to(device)
    descent = _Descent([model.model.visual, heads], steps)
    grid = torch.tensor([[1, 8, 8]] * 128, device=device)
    start = time.time()
    done = kept.read(rng, model, heads, descent) if kept else 0
    for step in range(done + 1, steps + 1):
        pixels, facts = pool.mirrored(rng.integers(0, len(pool.facts), 128).tolist(), rng)
        logits = heads(
            model.model.visual(pixels.to(device).flatten(0, 1), grid_thw=grid).pooler_output.view(128, 16, -1)
        )
        labels = {k: v.to(device) for k, v in fact_labels(facts).items()}
        loss = torch.stack([nn.functional.cross_entropy(logits[k], labels[k]) for k in phantom.WORDS]).sum()
        loss.backward()
        descent.step()
        if kept:
            kept.write(step, rng, model, heads, descent)
        if step % 50 == 0:
            right = {k: f"{(logits[k].argmax(-1) == labels[k]).float().mean():.2f}" for k in phantom.WORDS}
            log(f"vision {step}/{steps} loss {loss.item():.3f} {right} {time.time() - start:.0f} s")


def sequence_loss(model: Qwen3VLForConditionalGeneration, batch: Sequences) -> Tensor:
    """Weighted mean of next-token cross-entropies."""
    device = model.device
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    image: dict[str, Tensor] = {}
    if batch.pixels is not None:
        image = {
            "pixel_values": batch.pixels.to(device).float().flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * len(ids), device=device),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False, **image).last_hidden_state
    weight = batch.labels_weight[:, 1:].to(device)
    learned = weight > 0
    losses = nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][learned]), ids[:, 1:][learned], reduction="none")
    return (losses * weight[learned]).sum() / weight.sum()


def train_language(
    model: Qwen3VLForConditionalGeneration,
    tasks: Tasks,
    phases: tuple[tuple[int, Mixture], ...],
    log: Log,
    share: float = 1.0,
    kept: Kept | None = None,
) -> None:
    """Stages 2 and 3: every phase's mixture of tasks with the vision tower frozen; tasks weigh as their sequences.

    ``share`` scales the learning rates.
    """
    model.model.visual.requires_grad_(False)
    mixtures = [mixture for steps, mixture in phases for _ in range(steps)]
    descent = _Descent([model.model.language_model], len(mixtures), lr=share * 2.5e-3, muon_lr=share * 0.02)
    running: dict[str, float] = {}
    start = time.time()
    done = kept.read(tasks.rng, model, descent) if kept else 0
    for step, mixture in enumerate(mixtures[done:], done + 1):
        for task, count in mixture.items():
            loss = sequence_loss(model, tasks.draw(task, count))
            (loss * count / sum(mixture.values())).backward()
            running[task] = 0.95 * running.get(task, loss.item()) + 0.05 * loss.item()
        descent.step()
        if kept:
            kept.write(step, tasks.rng, model, descent)
        if step % 20 == 0:
            losses = {task: f"{value:.3f}" for task, value in running.items()}
            log(f"language {step}/{len(mixtures)} {losses} {time.time() - start:.0f} s")
    model.model.visual.requires_grad_(True)


def pretrain(
    recipe: Recipe, seed: int = 0, log: Log = print
) -> tuple[dict[str, Qwen3VLForConditionalGeneration], ImageOnlyQwenProcessor]:
    """Build and train both embedded models from nothing, on a GPU where there is one.

    Everything random follows from ``seed``; on one machine the same seed gives the same weights on the CPU, which
    computes with one thread: sums would be rounded differently with another number of them.
    Returns the models by name ("student", "teacher") and their processor.
    """
    with one_thread():
        return _pretrain(recipe, seed, log)


def _pretrain(
    recipe: Recipe, seed: int, log: Log
) -> tuple[dict[str, Qwen3VLForConditionalGeneration], ImageOnlyQwenProcessor]:
    processor = build_processor()
    pool = Pool.draw(processor, recipe.pictures, seed)
    log(f"{recipe.pictures} pictures drawn")
    teacher = build_model("small", seed).to(best_device()).train()
    train_vision(teacher, pool, recipe.vision_steps, seed, log)
    lessons = Tasks(processor, pool, NO_HABITS, np.random.default_rng([2, seed]))
    train_language(teacher, lessons, recipe.teacher_phases, log)
    student = copy.deepcopy(teacher)
    lessons = Tasks(processor, pool, STUDENT_HABITS, np.random.default_rng([3, seed]))
    train_language(student, lessons, recipe.student_phases, log, recipe.student_share)
    return {"student": student.eval(), "teacher": teacher.eval()}, processor
