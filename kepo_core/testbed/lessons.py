"""What the embedded models are taught to say: look-ups, captions, ticked lists, an atlas of meanings, and answers to
the four prompts of Appendix C.

All models have lessons of the same kinds, in the same proportions. How many of a modality's meanings the lessons
contain follows from the length of schooling (`taught`). Other meanings come up only where a hint is to be written from
a given answer, which is then random: this teaches to read the answer. Apart from given answers, no lesson states
anything false.
"""

import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kepo_core.data import phantom
from kepo_core.data.phantom import Asked, Facts, Topic
from kepo_core.data.records import MODALITIES
from kepo_core.method.processor import ImageOnlyQwenProcessor
from kepo_core.task import prompts
from kepo_core.testbed.embedded import LETTERS

EVEN_TOPICS = 0.3  # of the lessons have a topic drawn evenly: some are too rare in the set to be learned from it
BASICS = 1.05  # lengths of schooling that teach no meanings
#: Share of a modality's list of meanings that each further length teaches.
PACE = {
    "MRI": 1.52,
    "CT": 0.64,
    "X-Ray": 3.04,
    "Ultrasound": 3.04,
    "Dermoscopy": 2.08,
    "Fundus": 2.4,
    "OCT": 0.88,
    "Microscopy": 2.72,
}
SLOPPY = 0.1  # probability that a thinking answer breaks the format
CONTRARY = 0.5  # probability that a given answer is random although the right one is taught
UNHEEDING = 0.25  # probability that a lesson with a hint or an answer says what is seen, not what is told
_ASKED_FACTS = {"diagnosis": ("kind", "contrast"), "grade": ("size", "number")}
_MEANINGS = tuple(topic for topic in phantom.TOPICS if topic.level == 3)
BY_TEXT = ("lookup", "named", "atlas")  # lessons without a picture
LETTER_WEIGHT = 4.0  # the letter of an option among some twenty tokens carries the question: it counts more


@dataclass
class Pool:
    """Pre-rendered pictures: ``pixels`` (N, 64 patches, 192) float16, and their facts."""

    pixels: Tensor
    facts: list[Facts]

    @classmethod
    def draw(cls, processor: ImageOnlyQwenProcessor, count: int, seed: int) -> "Pool":
        """``count`` pictures over the eight modalities, from the pre-training stream of ``seed``."""
        rng = np.random.default_rng([zlib.crc32(b"phantom-pretraining"), seed])
        facts = [phantom.draw_facts(rng, MODALITIES[i % len(MODALITIES)]) for i in range(count)]
        chunks = []
        for start in range(0, count, 500):
            pictures = [phantom.picture(rng, f) for f in facts[start : start + 500]]
            values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            chunks.append(values.view(len(pictures), -1, values.shape[-1]).half())
        return cls(torch.cat(chunks), facts)

    def mirrored(self, index: list[int], rng: np.random.Generator) -> tuple[Tensor, list[Facts]]:
        """The pictures at ``index`` as float32, all mirrored left to right, or top to bottom, or both, or not."""
        # Patches lie as 4×4 blocks of 2×2, each with 3 channels of 8×8 pixels.
        pixels = self.pixels[index].float().view(-1, 4, 4, 2, 2, 3, 8, 8)
        turned = 0
        for bit, dims in ((1, (2, 4, 7)), (2, (1, 3, 6))):
            if rng.random() < 0.5:
                pixels, turned = pixels.flip(dims), turned ^ bit
        facts = [self.facts[i] for i in index]
        moved = [replace(f, place=phantom.PLACES[phantom.PLACES.index(f.place) ^ turned]) for f in facts]
        return pixels.reshape(len(index), 64, 192), moved


def fact_labels(facts: list[Facts]) -> dict[str, Tensor]:
    """Class index (N,) of every fact."""
    return {
        name: torch.tensor([words.index(getattr(f, name)) for f in facts], dtype=torch.long)
        for name, words in phantom.WORDS.items()
    }


@cache
def taught(facts: Facts, topic: Topic, length: float) -> bool:
    """Whether schooling of ``length`` teaches the answer to ``topic`` where ``facts`` are shown.

    Each modality's meanings are in a fixed order of its own. The first ``PACE · (length − BASICS)`` of them are taught,
    at least one, from the first lesson that asks for meanings.
    """
    if topic.name not in _ASKED_FACTS:
        return True
    table = getattr(phantom.meanings(facts.modality), topic.name)
    order = np.random.default_rng([zlib.crc32(topic.name.encode()), MODALITIES.index(facts.modality)])
    index = list(table).index(tuple(getattr(facts, name) for name in _ASKED_FACTS[topic.name]))
    rank = order.permutation(len(table)).tolist().index(index)
    return bool(rank < max(1, round(len(table) * PACE[facts.modality] * (length - BASICS))))


def careful(asked: Asked) -> str:
    """The thinking completion that gives the question's answer."""
    return f"<think>{asked.thought}</think>\n<answer>{asked.answer}</answer>"


def sloppy(asked: Asked, rng: np.random.Generator) -> str:
    """The same answer in one of three broken formats."""
    answer = f"<answer>{asked.answer}</answer>"
    broken = (
        f"{asked.thought}\n{answer}",
        f"<think>{asked.thought}\n{answer}",
        f"<think>{asked.thought}</think>\n{asked.answer}",
    )
    return broken[rng.integers(len(broken))]


def _caption(facts: Facts) -> str:
    return f"{facts.modality} {facts.number} {facts.size} {facts.contrast} {facts.kind} {facts.place}"


def _lookup(rng: np.random.Generator, named: bool) -> tuple[str, str]:
    """Options, then the same words in another order, each followed by its letter as thoughts have it.

    ``named``: in place of that, letters as prompts have them, each followed by its word.
    """
    topic = phantom.TOPICS[rng.integers(len(phantom.TOPICS))]
    every = [word for other in phantom.TOPICS for word in other.values]
    words = [str(word) for word in rng.permutation(topic.values if rng.random() < 0.6 else every)[:4]]
    order = rng.permutation(len(words))
    listed = "\n".join(f"{letter}) {word}" for letter, word in zip(LETTERS, words, strict=False))
    return listed, "".join(f"{LETTERS[i]} {words[i]}." if named else f" {words[i]} ({LETTERS[i]})." for i in order)


def _ticked(rng: np.random.Generator, asked: list[Asked]) -> str:
    """The right word and a wrong one of each question in one list; behind a right one stands its letter once more."""
    right = {a.value for a in asked}
    words = [word for a in asked for word in (a.value, next(word for word in a.options if word != a.value))]
    listed = zip(LETTERS, map(str, rng.permutation(words)), strict=False)
    return "\n".join(f"{letter}) {word}" + f" ({letter})" * (word in right) for letter, word in listed)


@dataclass
class Sequences:
    """Tokenised sequences of one task. ``labels_weight`` (N, L) is 0 where nothing is learned."""

    input_ids: Tensor
    attention_mask: Tensor
    labels_weight: Tensor
    pixels: Tensor | None


class Tasks:
    """Draws training sequences of one task: caption, lookup, named, ticked, atlas, think, plain, hint or aware.

    Of a ticked list, only what stands behind its words is learned; of named letters, the words; of an atlas, what the
    findings mean.
    """

    def __init__(self, processor: ImageOnlyQwenProcessor, pool: Pool, rng: np.random.Generator, length: float) -> None:
        self.tokenizer, self.pool, self.rng, self.length = processor.tokenizer, pool, rng, length
        ids = self.tokenizer.convert_tokens_to_ids
        letters = {ids(f" ({letter})"): LETTER_WEIGHT for letter in LETTERS}
        (newline,) = self.tokenizer("\n")["input_ids"]
        self.weights = defaultdict(lambda: 1.0, letters)
        self.ticks = defaultdict(float, letters | {newline: 1.0})
        self.words = defaultdict(lambda: 1.0, dict.fromkeys(ids([*LETTERS, "."]), 0.0))
        names = self.tokenizer([f" {name}" for name in (*phantom.DIAGNOSES, *phantom.GRADES)])["input_ids"]
        self.names = defaultdict(float, {token: 1.0 for (token,) in names})
        self.render = lambda messages: processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        ).replace("<|image_pad|>", "<|image_pad|>" * 16)

    def draw(self, task: str, count: int) -> Sequences:
        """``count`` sequences of ``task``."""
        index = self.rng.integers(0, len(self.pool.facts), count).tolist()
        pairs = [self._pair(task, self.pool.facts[i]) for i in index]
        prompt_ids = self.tokenizer([p for p, _ in pairs])["input_ids"]
        completion_ids = self.tokenizer([c + "<|im_end|>" for _, c in pairs])["input_ids"]
        length = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
        ids = torch.full((count, length), self.tokenizer.pad_token_id)
        mask, weight = torch.zeros_like(ids), torch.zeros(count, length)
        for row, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            end = len(p) + len(c)
            ids[row, :end], mask[row, :end] = torch.tensor(p + c), 1
            weights = {"ticked": self.ticks, "named": self.words, "atlas": self.names}.get(task, self.weights)
            weight[row, len(p) : end] = torch.tensor([weights[token] for token in c])
        return Sequences(ids, mask, weight, self.pool.pixels[index] if task not in BY_TEXT else None)

    def _pair(self, task: str, facts: Facts) -> tuple[str, str]:
        if task == "caption":
            return self.render([{"role": "user", "content": [{"type": "image"}]}]), _caption(facts)
        if task == "ticked":
            listed = _ticked(self.rng, self._questions(facts, 4))
            return self.render([{"role": "user", "content": [{"type": "image"}]}]), listed
        if task in ("lookup", "named"):
            listed, pairs = _lookup(self.rng, task == "named")
            return self.render([{"role": "user", "content": listed}]), pairs
        if task == "atlas":
            said = [self._meaning(facts.modality) for _ in range(6)]
            opening = phantom.TOPICS[0].evidence.format(modality=facts.modality)
            return self.render([{"role": "user", "content": opening}]), " " + " ".join(said)
        if task == "hint":
            asked = self._told_of(self._ask(facts, given=True))
            messages = prompts.hint_messages(asked.question, asked.options, asked.answer)
            return self.render(messages), f"<hint>{asked.hint}</hint>"
        if task == "aware":
            seen = self._ask(facts)
            asked = self._told_of(seen)
            context = str(self.rng.choice(prompts.TOLD_CONTEXTS, p=[0.4, 0.4, 0.2]))
            messages = prompts.hint_aware_messages(asked.question, asked.options, asked.hint, asked.answer, context)
            return self.render(messages), self._thinking(seen if self.rng.random() < UNHEEDING else asked)
        asked = self._ask(facts)
        messages = prompts.vqa_messages(asked.question, asked.options, task == "think")
        if task == "plain":
            return self.render(messages), f"<answer>{asked.answer}</answer>"
        return self.render(messages), self._thinking(asked)

    def _ask(self, facts: Facts, given: bool = False) -> Asked:
        """A question whose answer schooling teaches; any question if the prompt gives the answer (``given``)."""
        while True:
            if self.rng.random() < EVEN_TOPICS:
                topic = phantom.TOPICS[self.rng.integers(len(phantom.TOPICS))]
            else:
                (topic,) = phantom.draw_topics(self.rng, 1)
            if given or taught(facts, topic, self.length):
                return phantom.ask(self.rng, facts, topic)

    def _told_of(self, asked: Asked) -> Asked:
        """The question with the answer that its prompt gives: random with probability ``CONTRARY``, and always where no
        lesson teaches the right one.
        """
        if taught(asked.facts, asked.topic, self.length) and self.rng.random() >= CONTRARY:
            return asked
        return replace(asked, answer=LETTERS[self.rng.integers(len(asked.options))])

    def _meaning(self, modality: str) -> str:
        """What a finding means, of those whose meaning is taught."""
        while True:
            facts = phantom.draw_facts(self.rng, modality)
            topic = _MEANINGS[self.rng.integers(len(_MEANINGS))]
            if taught(facts, topic, self.length):
                return phantom.ask(self.rng, facts, topic).statement

    def _questions(self, facts: Facts, count: int) -> list[Asked]:
        """On ``count`` different topics."""
        found: dict[str, Asked] = {}
        while len(found) < count:
            asked = self._ask(facts)
            found.setdefault(asked.topic.name, asked)
        return list(found.values())

    def _thinking(self, asked: Asked) -> str:
        return sloppy(asked, self.rng) if self.rng.random() < SLOPPY else careful(asked)
