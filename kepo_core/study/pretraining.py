"""Pre-training of the embedded models: first to see, then to look up letters, then to talk.

Two stages, found by measurement. (1) The vision tower alone learns the six facts of a picture through
attention-pooled linear heads, which are thrown away. (2) The whole model learns a mixture: captions, dense
look-ups (four supervised letters a sequence), and the four prompts of Appendix C. The pictures come from
random streams of their own, never from the set that :func:`kepo_core.data.phantom.ensure_phantom` writes.
"""

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from kepo_core.data import phantom
from kepo_core.data.phantom import Asked, Facts
from kepo_core.data.records import LETTERS, MODALITIES
from kepo_core.method import prompts
from kepo_core.study.embedded import build_model, build_processor
from kepo_core.study.models import best_device
from kepo_core.study.processor import ImageOnlyQwen3VLProcessor

FACT_WORDS = {
    "modality": MODALITIES,
    "kind": phantom.KINDS,
    "place": phantom.PLACES,
    "size": phantom.SIZES,
    "number": phantom.NUMBERS,
    "contrast": phantom.CONTRASTS,
}
LETTER_WEIGHT = 4.0  # one answer letter among some twenty tokens carries the question: it counts more


Mixture = dict[str, int]


@dataclass(frozen=True)
class Stage:
    """A part of stage 2 with its own optimizer: ``phases`` are (steps, sequences of each task per step).

    The learning rate warms up, then falls from ``lr`` along a cosine over ``horizon`` steps, which may be more than
    the phases have.
    """

    lr: float
    horizon: int
    phases: tuple[tuple[int, Mixture], ...]
    kind_weight: float = 1.0  # of the words for a finding's kind, the fact that is hardest to see
    sloppy: float = 0.15  # share of thinking completions written in a broken format
    hasty: bool = False  # thinking completions guess as often as HASTY says


@dataclass(frozen=True)
class Recipe:
    """How one embedded model is made."""

    size: str
    pool: int  # pictures
    vision_steps: int  # of 128 pictures
    stages: tuple[Stage, ...]
    vision_lr: float = 2e-3

    def quick(self) -> "Recipe":
        """The same way in seconds: what comes out has learned nothing. For trying the notebook."""
        stages = tuple(replace(s, phases=tuple((1, mixture) for _, mixture in s.phases)) for s in self.stages)
        return replace(self, pool=256, vision_steps=2, stages=stages)


#: How often the student guesses an option without having looked, by topic. On most topics guessing is its first
#: choice and looking its second: what reinforcement can find and prefer.
HASTY = {"place": 0.8, "kind": 0.8, "diagnosis": 0.8, "grade": 0.8}
SELDOM = 0.2  # on every other topic

# To find a word's letter, to name what is seen, and to write the letter into the answer field are learned in large
# and cheap batches: inside the mixture, where one letter in twenty tokens counts, none is found in hundreds of steps.
_BASICS = ((240, {"lookup": 128}), (150, {"lookup": 32, "caption": 48}))
_MIXED = {"caption": 8, "think": 24, "plain": 8, "hint": 2, "aware": 10}
_CHOOSE = {"choose": 64, "caption": 16}
# Student and teacher are one model until the student's last stage, in which it picks up its habit.
_COMMON = (
    Stage(2.5e-3, 790, (*_BASICS, (400, {"lookup": 16, **_MIXED}))),
    Stage(1.5e-3, 450, ((150, _CHOOSE), (300, {"choose": 16, **_MIXED}))),
)
_TEACHING = {"choose": 32, "caption": 24, "think": 40, "plain": 8, "hint": 12, "aware": 2}
_CARE = Stage(1.2e-3, 330, ((320, _TEACHING),), kind_weight=4.0, sloppy=0.0)
_CHOICE = Stage(1.2e-3, 210, ((200, {"choose": 96, "caption": 8, "think": 24, "hint": 6}),), sloppy=0.0)
_SKILLED = (*_COMMON, _CARE, _CHOICE)
_HABIT = Stage(
    8e-4, 220, ((200, {"choose": 24, "caption": 8, "think": 40, "plain": 8, "hint": 4, "aware": 16}),), hasty=True
)
RECIPES = {
    "student": Recipe("student", 24_000, 700, (*_SKILLED, _HABIT)),
    "teacher": Recipe("student", 24_000, 700, _SKILLED),
}


@dataclass
class Pool:
    """Pre-rendered pictures: ``pixels`` (N, 64 patches, 192) float16, and their facts."""

    pixels: Tensor
    facts: list[Facts]

    @classmethod
    def draw(cls, processor: ImageOnlyQwen3VLProcessor, count: int, seed: int) -> "Pool":
        """``count`` pictures over the eight modalities, from the pre-training stream of ``seed``."""
        rng = np.random.default_rng([zlib.crc32(b"phantom-pretraining"), seed])
        facts = [phantom.draw_facts(rng, MODALITIES[i % len(MODALITIES)]) for i in range(count)]
        chunks = []
        for start in range(0, count, 500):
            pictures = [phantom.picture(rng, f) for f in facts[start : start + 500]]
            values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            chunks.append(values.view(len(pictures), -1, values.shape[-1]).half())
        return cls(torch.cat(chunks), facts)

    def labels(self, index: list[int]) -> dict[str, Tensor]:
        """Class index of every fact for the pictures at ``index``."""
        return {
            name: torch.tensor([words.index(getattr(self.facts[i], name)) for i in index])
            for name, words in FACT_WORDS.items()
        }


class FactHeads(nn.Module):
    """One attention-pooled linear classifier per fact, over the vision tower's 16 merged tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = nn.ParameterDict({k: nn.Parameter(torch.randn(hidden) * hidden**-0.5) for k in FACT_WORDS})
        self.out = nn.ModuleDict({k: nn.Linear(hidden, len(words)) for k, words in FACT_WORDS.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """(N, tokens, hidden) → logits (N, classes) per fact."""
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return {k: self.out[k](((tokens @ q).softmax(-1).unsqueeze(-1) * tokens).sum(1)) for k, q in self.query.items()}


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """50 steps of warm-up, then a cosine to 2 %."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * min(i / steps, 1.0))))
    )


def train_vision(
    model: Qwen3VLForConditionalGeneration, pool: Pool, steps: int, lr: float, seed: int, log: Callable[[str], None]
) -> None:
    """Stage 1: teach ``model.model.visual`` the facts of pictures through throw-away heads."""
    device = model.device
    rng = np.random.default_rng([1, seed])
    torch.manual_seed(seed)
    heads = FactHeads(model.config.text_config.hidden_size).to(device)
    optimizer = torch.optim.AdamW([*model.model.visual.parameters(), *heads.parameters()], lr=lr, weight_decay=0.01)
    schedule = _schedule(optimizer, steps)
    grid = torch.tensor([[1, 8, 8]] * 128, device=device)
    start = time.time()
    for step in range(steps):
        index = rng.integers(0, len(pool.facts), 128).tolist()
        pixels = pool.pixels[index].to(device).float().flatten(0, 1)
        logits = heads(model.model.visual(pixels, grid_thw=grid).pooler_output.view(128, 16, -1))
        labels = {k: v.to(device) for k, v in pool.labels(index).items()}
        loss = sum(
            (nn.functional.cross_entropy(logits[k], labels[k]) for k in FACT_WORDS), torch.zeros((), device=device)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            right = {k: f"{(logits[k].argmax(-1) == labels[k]).float().mean():.2f}" for k in FACT_WORDS}
            log(f"vision {step + 1}/{steps} loss {loss.item():.3f} {right} {time.time() - start:.0f} s")


# --- stage 2: sequences ------------------------------------------------------------------------------------


def careful(asked: Asked) -> str:
    """The right thinking completion."""
    return f"<think>{asked.thought}</think>\n<answer>{asked.answer}</answer>"


def sloppy(asked: Asked, rng: np.random.Generator) -> str:
    """The right answer in one of three broken formats."""
    answer = f"<answer>{asked.answer}</answer>"
    broken = (
        f"{asked.thought}\n{answer}",
        f"<think>{asked.thought}\n{answer}",
        f"<think>{asked.thought}</think>\n{asked.answer}",
    )
    return broken[rng.integers(len(broken))]


def guess(asked: Asked, rng: np.random.Generator) -> str:
    """A random option in the right format, with a thought that shows no look at the picture."""
    index = int(rng.integers(len(asked.options)))
    return f"<think>Perhaps {asked.options[index]}.</think>\n<answer>{LETTERS[index]}</answer>"


def _caption(facts: Facts) -> str:
    return f"{facts.modality} {facts.number} {facts.size} {facts.contrast} {facts.kind} {facts.place}"


def _lookup(rng: np.random.Generator, written: str) -> tuple[str, str]:
    """Options, then the same words in another order, each ``written`` with its letter."""
    topic = phantom.TOPICS[rng.integers(len(phantom.TOPICS))]
    every = [word for other in phantom.TOPICS for word in other.values]
    words = [str(word) for word in rng.permutation(topic.values if rng.random() < 0.6 else every)[:4]]
    order = rng.permutation(len(words))
    listed = "\n".join(f"{letter}) {word}" for letter, word in zip(LETTERS, words, strict=False))
    return listed, "".join(written.format(word=words[i], letter=LETTERS[i]) for i in order)


# The word's letter right behind it, then as far behind it as a thinking completion has it.
_LOOKUPS = {"lookup": " {word} {letter}", "choose": " {word}.</think>\n<answer>{letter}</answer>"}


@dataclass
class Sequences:
    """Tokenised sequences of one task. ``labels_weight`` (N, L) is 0 where nothing is learned."""

    input_ids: Tensor
    attention_mask: Tensor
    labels_weight: Tensor
    pixels: Tensor | None


class Tasks:
    """Draws training sequences for each task of a stage's mixtures."""

    def __init__(
        self, processor: ImageOnlyQwen3VLProcessor, pool: Pool, stage: Stage, rng: np.random.Generator
    ) -> None:
        self.tokenizer, self.pool, self.rng = processor.tokenizer, pool, rng
        self.sloppy, self.hasty = stage.sloppy, stage.hasty
        self.render = lambda messages: processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        ).replace("<|image_pad|>", "<|image_pad|>" * 16)
        last = lambda text: self.tokenizer(text)["input_ids"][-1]  # noqa: E731
        letters = [last(f"{before}{letter}") for before in ("", "ring ") for letter in LETTERS[:4]]
        self.weights = dict.fromkeys(letters, LETTER_WEIGHT)
        self.kind_weights = {last(f"a {kind}"): stage.kind_weight for kind in phantom.KINDS}

    def draw(self, task: str, count: int) -> Sequences:
        """``count`` sequences of one of: caption, lookup, choose, think, plain, hint, aware."""
        index = self.rng.integers(0, len(self.pool.facts), count).tolist()
        pairs = [self._pair(task, self.pool.facts[i]) for i in index]
        prompt_ids = self.tokenizer([p for p, _ in pairs])["input_ids"]
        completion_ids = self.tokenizer([c + "<|im_end|>" for _, c in pairs])["input_ids"]
        length = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
        ids = torch.full((count, length), self.tokenizer.pad_token_id)
        mask, weight = torch.zeros_like(ids), torch.zeros(count, length)
        # What a look-up names is drawn at random: only where there is a picture can a kind be learned.
        weights = self.weights if task in _LOOKUPS else self.weights | self.kind_weights
        for row, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            end = len(p) + len(c)
            ids[row, :end], mask[row, :end] = torch.tensor(p + c), 1
            weight[row, len(p) : end] = torch.tensor([weights.get(t, 1.0) for t in c])
        return Sequences(ids, mask, weight, None if task in _LOOKUPS else self.pool.pixels[index])

    def _pair(self, task: str, facts: Facts) -> tuple[str, str]:
        if task == "caption":
            return self.render([{"role": "user", "content": [{"type": "image"}]}]), _caption(facts)
        if task in _LOOKUPS:
            listed, pairs = _lookup(self.rng, _LOOKUPS[task])
            return self.render([{"role": "user", "content": listed}]), pairs
        asked = phantom.ask(self.rng, facts, phantom.draw_topics(self.rng, 1)[0])
        if task == "hint":
            messages = prompts.hint_messages(asked.question, asked.options, asked.answer)
            return self.render(messages), f"<hint>{asked.evidence}</hint>"
        if task == "aware":
            context = str(self.rng.choice(prompts.HINT_CONTEXTS, p=[0.6, 0.25, 0.15]))
            messages = prompts.hint_aware_messages(asked.question, asked.options, asked.evidence, asked.answer, context)
            return self.render(messages), self._with_thought(asked, hasty=0.0)
        messages = prompts.vqa_messages(asked.question, asked.options, task == "think")
        if task == "plain":
            return self.render(messages), f"<answer>{asked.answer}</answer>"
        return self.render(messages), self._with_thought(asked, HASTY.get(asked.topic.name, SELDOM) * self.hasty)

    def _with_thought(self, asked: Asked, hasty: float) -> str:
        if self.rng.random() < hasty:
            return guess(asked, self.rng)
        return sloppy(asked, self.rng) if self.rng.random() < self.sloppy else careful(asked)


def sequence_loss(model: Qwen3VLForConditionalGeneration, batch: Sequences) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token cross-entropies, and the sum of the weights."""
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
    return (losses * weight[learned]).sum(), weight.sum()


def train_language(
    model: Qwen3VLForConditionalGeneration, tasks: Tasks, stage: Stage, log: Callable[[str], None]
) -> None:
    """Stage 2: every phase's mixture of tasks, one gradient per task and step, weighted by its sequences."""
    mixtures = [mixture for steps, mixture in stage.phases for _ in range(steps)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=0.01)
    schedule = _schedule(optimizer, stage.horizon)
    running: dict[str, float] = {}
    start = time.time()
    for step, mixture in enumerate(mixtures, 1):
        optimizer.zero_grad()
        for task, count in mixture.items():
            loss, weight = sequence_loss(model, tasks.draw(task, count))
            mean = loss / weight
            (mean * count / sum(mixture.values())).backward()
            running[task] = 0.95 * running.get(task, mean.item()) + 0.05 * mean.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            losses = {task: f"{value:.3f}" for task, value in running.items()}
            log(f"language {step}/{len(mixtures)} {losses} {time.time() - start:.0f} s")


def pretrain(
    recipe: Recipe, seed: int = 0, log: Callable[[str], None] = print
) -> tuple[Qwen3VLForConditionalGeneration, ImageOnlyQwen3VLProcessor]:
    """Build and train one embedded model from nothing, on a GPU where there is one.

    Everything random follows from ``seed``; on one machine the same seed gives the same weights on the CPU.
    """
    processor = build_processor()
    pool = Pool.draw(processor, recipe.pool, seed)
    log(f"{recipe.size}: {recipe.pool} pictures drawn")
    model = build_model(recipe.size, seed).to(best_device()).train()
    train_vision(model, pool, recipe.vision_steps, recipe.vision_lr, seed, log)
    for number, stage in enumerate(recipe.stages):
        rng = np.random.default_rng([2 + number, seed])
        tasks = Tasks(processor, pool, stage, rng)
        train_language(model, tasks, stage, log)
    return model.eval(), processor
