"""What the embedded models are taught to say: captions, look-ups, and answers to the four prompts of Appendix C.

The teacher looks and answers. The student has the teacher's skill under four habits that cost it half of its
answers: it guesses, it breaks the format, it mistakes rings for discs and crosses for bars, and it overlooks the
second finding. Guesses vary from rollout to rollout, so that GRPO can prefer looking; mistakes are the same in
almost every rollout of a group, so that the whole group fails and only a hint shows the way.

In version 4 of the world nobody is taught a habit: all models have the same lessons. They teach what findings mean as
far as they get in a modality's list (`taught`). What is further down comes up only where the prompt gives a hint or an
answer, which is then random: such lessons teach to read it.
"""

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kepo_core.data import phantom
from kepo_core.data.phantom import VERSION, Asked, Facts, Topic
from kepo_core.data.records import MODALITIES
from kepo_core.method.processor import ImageOnlyQwenProcessor
from kepo_core.task import prompts
from kepo_core.testbed.embedded import LETTERS

EVEN_TOPICS = 0.3  # of the lessons have a topic drawn evenly: some are too rare in the set to be learned from it
BASICS = 1.05  # version 4: lengths of schooling go by before it comes to what findings mean
#: Version 4: the share of each list of meanings that one length of schooling teaches after that.
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
_ASKED_FACTS = {"diagnosis": ("kind", "contrast"), "grade": ("size", "number")}
_MEANINGS = tuple(topic for topic in phantom.TOPICS if topic.name in _ASKED_FACTS)
BY_TEXT = ("lookup", "named", "atlas")  # lessons without a picture
LETTER_WEIGHT = 4.0  # the letter of an option among some twenty tokens carries the question: it counts more


@dataclass
class Pool:
    """Pre-rendered pictures: ``pixels`` (N, 64 patches, 192) float16, and their facts."""

    pixels: Tensor
    facts: list[Facts]

    @classmethod
    def draw(cls, processor: ImageOnlyQwenProcessor, count: int, seed: int, version: str = VERSION) -> "Pool":
        """``count`` pictures over the eight modalities, from the pre-training stream of ``seed``."""
        rng = np.random.default_rng([zlib.crc32(b"phantom-pretraining"), seed])
        facts = [phantom.draw_facts(rng, MODALITIES[i % len(MODALITIES)], version) for i in range(count)]
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
    """Whether schooling of ``length`` teaches the answer to ``topic`` where ``facts`` are shown: all in version 3.

    In version 4 the meanings of a modality stand in a list of an order of its own. Schooling comes to it after
    ``BASICS``, and each further length teaches ``PACE`` of it; at least one meaning.
    """
    if facts.version == "3" or topic.name not in _ASKED_FACTS:
        return True
    table = getattr(phantom.meanings(facts.version, facts.modality), topic.name)
    order = np.random.default_rng([zlib.crc32(topic.name.encode()), MODALITIES.index(facts.modality)])
    place = list(table).index(tuple(getattr(facts, name) for name in _ASKED_FACTS[topic.name]))
    rank = order.permutation(len(table)).tolist().index(place)
    return bool(rank < max(1, round(len(table) * PACE[facts.modality] * (length - BASICS))))


@dataclass(frozen=True)
class Habits:
    """How a model, or the books that it learns from, depart from looking and answering, as probabilities."""

    hasty: Mapping[str, float]  # guess without a look, by topic (others: never)
    mistaken: float  # state the believed fact where it is one of BELIEVED
    sloppy: float  # break the format
    unheeding: float  # guess although hint or answer are told
    contrary: float = 0.5  # give a hint (version 4: also an answer) that is wrong; what it says counts


#: What the student takes for something else, when a question is about it: fact → value → believed value.
BELIEVED = {"kind": {"ring": "disc", "cross": "bar"}, "number": {"two": "one"}}

NO_HABITS = Habits(hasty={}, mistaken=0.0, sloppy=0.0, unheeding=0.0)
#: Version 4, the same for all models: one answer in ten breaks the format.
BOOKS = Habits(hasty={}, mistaken=0.0, sloppy=0.1, unheeding=0.0)
STUDENT_HABITS = Habits(
    hasty={"modality": 0.7, "place": 0.7, "size": 0.7, "contrast": 0.7},
    mistaken=1.0,
    sloppy=0.15,
    unheeding=0.3,
)


def careful(asked: Asked) -> str:
    """The right thinking completion."""
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


def guess(asked: Asked, rng: np.random.Generator) -> str:
    """A random option in the right format, with a thought that shows no look at the picture."""
    index = int(rng.integers(len(asked.options)))
    return f"<think>Perhaps {asked.options[index]} ({LETTERS[index]}).</think>\n<answer>{LETTERS[index]}</answer>"


def believed(asked: Asked, rng: np.random.Generator) -> Asked | None:
    """The question as a mistaken student sees and answers it; None where it makes no mistake.

    A belief whose answer is not among the options still leads to a letter, a random one.
    """
    mistakes = {
        fact: values[getattr(asked.facts, fact)]
        for fact, values in BELIEVED.items()
        if f"{{{fact}}}" in asked.topic.evidence and getattr(asked.facts, fact) in values
    }
    if not mistakes:
        return None
    facts = replace(asked.facts, **mistakes)
    value = getattr(facts, asked.topic.attribute)
    index = asked.options.index(value) if value in asked.options else int(rng.integers(len(asked.options)))
    return replace(asked, facts=facts, answer=LETTERS[index])


def _hint(asked: Asked) -> str:
    return asked.evidence if asked.facts.version == "3" else asked.hint


def _caption(facts: Facts) -> str:
    return f"{facts.modality} {facts.number} {facts.size} {facts.contrast} {facts.kind} {facts.place}"


def _lookup(rng: np.random.Generator, named: bool = False) -> tuple[str, str]:
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

    def __init__(
        self,
        processor: ImageOnlyQwenProcessor,
        pool: Pool,
        habits: Habits,
        rng: np.random.Generator,
        length: float = 1.0,
    ) -> None:
        self.tokenizer, self.pool, self.habits, self.rng, self.length = processor.tokenizer, pool, habits, rng, length
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
            said = [self._meaning(facts.modality, facts.version) for _ in range(6)]
            opening = phantom.TOPICS[0].evidence.format(modality=facts.modality)
            return self.render([{"role": "user", "content": opening}]), " " + " ".join(said)
        if task == "hint":
            asked = self._reading(facts)
            messages = prompts.hint_messages(asked.question, asked.options, asked.answer)
            return self.render(messages), f"<hint>{_hint(asked)}</hint>"
        if task == "aware":
            asked = self._reading(facts)
            context = str(self.rng.choice(prompts.TOLD_CONTEXTS, p=[0.4, 0.4, 0.2]))
            if facts.version == "3" and "hint" in context and self.rng.random() < self.habits.contrary:
                asked = self._ask(phantom.draw_facts(self.rng, facts.modality, facts.version))
            messages = prompts.hint_aware_messages(asked.question, asked.options, _hint(asked), asked.answer, context)
            return self.render(messages), self._told(asked)
        asked = self._ask(facts)
        messages = prompts.vqa_messages(asked.question, asked.options, task == "think")
        if task == "plain":
            return self.render(messages), f"<answer>{asked.answer}</answer>"
        return self.render(messages), self._untold(asked)

    def _ask(self, facts: Facts, given: bool = False) -> Asked:
        """A question whose answer schooling teaches; any question if the prompt gives the answer (``given``)."""
        while True:
            if self.rng.random() < EVEN_TOPICS:
                topic = phantom.TOPICS[self.rng.integers(len(phantom.TOPICS))]
            else:
                (topic,) = phantom.draw_topics(self.rng, 1)
            if given or taught(facts, topic, self.length):
                return phantom.ask(self.rng, facts, topic)

    def _reading(self, facts: Facts) -> Asked:
        """A question whose prompt gives the answer: in version 4, now and then a random one.

        The answer is always random where no lesson teaches the right one.
        """
        if facts.version == "3":
            return self._ask(facts)
        asked = self._ask(facts, given=True)
        known = taught(facts, asked.topic, self.length)
        if known and self.rng.random() >= self.habits.contrary:
            return asked
        return replace(asked, answer=LETTERS[self.rng.integers(len(asked.options))])

    def _meaning(self, modality: str, version: str) -> str:
        """What a finding means, of those whose meaning is taught."""
        while True:
            facts = phantom.draw_facts(self.rng, modality, version)
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

    def _untold(self, asked: Asked) -> str:
        mistake = believed(asked, self.rng)
        if mistake is not None and self.rng.random() < self.habits.mistaken:
            return self._formatted(mistake)
        if mistake is None and self.rng.random() < self.habits.hasty.get(asked.topic.name, 0.0):
            return guess(asked, self.rng)
        return self._formatted(asked)

    def _told(self, asked: Asked) -> str:
        return guess(asked, self.rng) if self.rng.random() < self.habits.unheeding else self._formatted(asked)

    def _formatted(self, asked: Asked) -> str:
        return sloppy(asked, self.rng) if self.rng.random() < self.habits.sloppy else careful(asked)
