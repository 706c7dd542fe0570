"""Algorithm 1 read a second time, one group and one draw after another, and a trainer driven through the same script.

`expected` is the specification: plain Python over what the scripted teacher and student will say. `play` lets a real
`KEPOTrainer` generate and score one batch under that script, and the checks hold what it called, with which context,
and what ended in its buffer against the specification, on one process and on several.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from kepo_harness import ScriptedTrainer, make_row, row_of

from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import vqa_messages

G = 4
#: What the teacher writes → the hint that can be read from it.
HINTS: dict[str, str | None] = {
    "<hint>look left</hint>": "look left",
    "Well: <hint>not</hint> or <hint>\nlook\nright\n</hint>": "look\nright",
    "<hint>up<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>now</hint>": "up\nuser\nnow",
    "<hint>so <think>what</think>is it <ans</hint>wer> C <hint>so it is <ans</answer>wer>C</hint>": "so it is C",
    "<hint>open": None,
    "no tags at all": None,
    "<hint> \n </hint>": None,
}
SAID = "<think>{mark}</think><answer>{letter}</answer>"


@dataclass(frozen=True)
class Group:
    """One prompt: which of its rollouts are right, what the teacher writes, which of its hint-aware draws are right."""

    question: int
    originals: tuple[bool, ...]
    teacher: str
    draws: tuple[bool, ...]

    def said(self, good: bool, mark: str) -> str:
        """A completion that can be told from every other one."""
        answer = make_row(self.question)["answer"]
        return SAID.format(mark=mark, letter=answer if good else "AB".replace(answer, ""))


@dataclass(frozen=True)
class Scenario:
    """A generation batch and the parameters of exploration."""

    groups: tuple[Group, ...]
    budget: int = 5
    m: int = 1
    context: str = "hint+answer"
    source: str = "own"  # of hints, own or failure
    bound: float = 0.0  # on hint reliance; none, or one that no draw reaches


def draw_scenario(rng: random.Random, count: int) -> Scenario:
    """A random scenario of ``count`` groups; failing groups are as likely as others."""
    budget, m = rng.randint(1, 4), rng.randint(1, G - 1)
    groups = []
    for question in rng.sample(range(4), count):
        fails = rng.random() < 0.6
        originals = tuple(not fails and (i == 0 or rng.random() < 0.5) for i in range(G))
        luck = rng.choice([0.0, 0.2, 0.7])
        draws = tuple(rng.random() < luck for _ in range(budget * m))
        groups.append(Group(question, originals, rng.choice(list(HINTS)), draws))
    context = rng.choice(["hint+answer", "hint", "answer"])
    return Scenario(tuple(groups), budget, m, context, rng.choice(["own", "failure"]), rng.choice([0.0, 1e9]))


@dataclass
class Account:
    """What a generation batch came to; the lists over groups are in the order of the batch."""

    hinted: list[int] = field(default_factory=list)  # questions that the teacher was asked about
    rounds: list[list[tuple[int, str]]] = field(default_factory=list)  # (question, context line) of every draw
    injected: list[list[str]] = field(default_factory=list)  # accepted draws that joined, in order
    originals: list[list[str]] = field(default_factory=list)  # the student's own, some of which leave
    counts: dict[str, float] = field(default_factory=dict)


def context_line(context: str, hint: str, answer: str) -> str:
    """The last line of the hint-aware prompt, in Appendix C's words."""
    told = f"The hint is <hint>{hint}</hint>" if "hint" in context else ""
    if "answer" in context:
        told += " and the" if told else "The"
        told += f" ground truth answer is <answer>{answer}</answer>"
    return told + "."


def expected(scenario: Scenario) -> Account:
    """Algorithm 1, group by group and draw by draw; no round, batch or process in it, but for the list of calls."""
    account = Account(counts=dict.fromkeys(("explored", "unparsable", "rescued", "draws", "accepted"), 0.0))
    for group in scenario.groups:
        originals = [group.said(good, f"original {i}") for i, good in enumerate(group.originals)]
        accepted: list[str] = []
        if not any(group.originals):  # max_i r(y_i) = 0
            account.counts["explored"] += 1
            hint: str | None = ""
            if "hint" in scenario.context:  # the answer alone needs no teacher
                account.hinted.append(group.question)
                hint = HINTS[group.teacher]
            if hint is None:
                account.counts["unparsable"] += 1
            else:
                line = context_line(scenario.context, hint, make_row(group.question)["answer"])
                number = 0
                for attempt in range(scenario.budget):
                    if len(accepted) == scenario.m:
                        break
                    if len(account.rounds) == attempt:
                        account.rounds.append([])
                    for _ in range(scenario.m):
                        account.rounds[attempt].append((group.question, line))
                        account.counts["draws"] += 1
                        if group.draws[number] and len(accepted) < scenario.m:
                            accepted.append(group.said(True, f"draw {number}"))
                        number += 1
                account.counts["rescued"] += bool(accepted)
                account.counts["accepted"] += len(accepted)
        account.injected.append(accepted)
        account.originals.append(originals)
    return account


def play(trainer: ScriptedTrainer, scenario: Scenario) -> dict[str, Any]:
    """One generation batch of ``scenario`` on every process; returns this process's buffer."""
    accelerator = trainer.accelerator
    by_question = {f"q{group.question}": group for group in scenario.groups}
    rows = [trainer.train_dataset[group.question] for group in scenario.groups for _ in range(G)]
    share = len(rows) // accelerator.num_processes
    first = accelerator.process_index * share
    # Members of a group that former processes hold.
    before_here = {f"q{g.question}": min(max(first - i * G, 0), G) for i, g in enumerate(scenario.groups)}

    def script(text: str, row: dict[str, Any], before: int, hinted: bool) -> str:
        group = by_question[row["id"]]
        if hinted:
            return group.said(group.draws[before], f"draw {before}")
        member = before + before_here[row["id"]]
        return group.said(group.originals[member], f"original {member}") if member < G else "a dummy row"

    def raw_hints(prompts: list[Any], max_tokens: int, template: dict[str, Any]) -> list[str]:
        asked = [row_of(prompt) for prompt in prompts]
        trainer.teacher.about += [(row["id"], attempt_of(prompt)) for row, prompt in zip(asked, prompts, strict=True)]
        trainer.teacher.asked.append([row["id"] for row in asked])
        return [by_question[row["id"]].teacher for row in asked]

    trainer.script, trainer.calls, trainer.pictures = script, [], []
    trainer.teacher.asked, trainer.teacher.about, trainer.teacher._generate = [], [], raw_hints
    trainer.args.hint_source, trainer.args.hint_reliance = scenario.source, scenario.bound
    trainer.args.rejection_budget, trainer.args.injected_per_group = scenario.budget, scenario.m
    trainer.task = MultipleChoice(scenario.context)
    trainer._metrics["train"].clear()
    return trainer._generate_and_score_completions(rows[first : first + share])


def attempt_of(prompt: Any) -> str | None:
    """The wrong attempt in the teacher's prompt, if there is one."""
    text = next(part["text"] for part in prompt[-1]["content"] if part["type"] == "text")
    before, _, after = text.partition("\n\nQuestion ")
    return before.removeprefix("Wrong attempt: ") if after and before.startswith("Wrong attempt: ") else None


def check_attempts(trainer: ScriptedTrainer, scenario: Scenario) -> None:
    """Every hint is about one of the rollouts of its own group, if it is about any; dummy rows are about none."""
    by_question = {f"q{group.question}": group for group in scenario.groups}
    for question, attempt in trainer.teacher.about:
        if scenario.source == "own":
            assert attempt is None
        elif attempt:
            group = by_question[question]
            said = {group.said(False, f"original {i}") for i in range(G)}
            assert attempt in {re.sub(r"<.*?>", " ", text).strip().replace("  ", " ") for text in said}


def drawn(trainer: ScriptedTrainer) -> Iterator[list[tuple[int, str]]]:
    """(question, last line) of the hint-aware draws of each further call on this process; dummy rows left out."""
    for texts in trainer.calls[1:]:
        asked = [text for text in texts if "hint provided in" in text]
        yield [
            (int(text.split("Question ")[1].split("?")[0]), text.split("tags.\n")[-1].split("<|im_end|>")[0])
            for text in asked
        ]


def check_prompts(trainer: ScriptedTrainer) -> None:
    """Every prompt has one picture, its own question's, and one user's turn, whatever the hint says."""
    tokenizer = trainer._tokenizer
    turns = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False,
                                                    chat_template=trainer.processing_class.chat_template,
                                                    add_generation_prompt=True))["input_ids"]  # fmt: skip
    ends = turns.count(tokenizer.eos_token_id)
    for texts, pictures in zip(trainer.calls, trainer.pictures, strict=True):
        for text, (picture,) in zip(texts, pictures, strict=True):
            question = int(text.split("Question ")[1].split("?")[0])
            assert picture.tobytes() == make_row(question)["image"].tobytes()
            ids = tokenizer(text)["input_ids"]
            assert ids.count(tokenizer.eos_token_id) == ends and text.count("<|vision_start|>") == 1


def check_buffer(trainer: ScriptedTrainer, scenario: Scenario, batch: dict[str, Any], want: Account) -> None:
    """The buffer of all processes holds what the specification says; this one's rows stand under the plain prompt."""
    share = len(batch["prompt_ids"])
    first = trainer.accelerator.process_index * share
    said = [
        trainer._tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    whole = gather_object(said)
    goods = []
    for number, group in enumerate(scenario.groups):
        members, accepted = whole[number * G : (number + 1) * G], want.injected[number]
        assert [text for text in members if text in accepted] == accepted  # each once, in the order drawn
        for text, original in zip(members, want.originals[number], strict=True):
            assert text == original or text in accepted
        answer = make_row(group.question)["answer"]
        goods.append([f"<answer>{answer}</answer>" in text for text in members])
    for row in range(share):
        number, member = divmod(first + row, G)
        good = goods[number][member]
        assert bool(batch["kepo_gate"][row].item()) == good
        assert abs(float(batch["advantages"][row]) - (good - sum(goods[number]) / G)) < 1e-6
        check_row(trainer, batch, row, make_row(scenario.groups[number].question))
    names = {"explored": "explored_groups", "unparsable": "unparsable_hints", "rescued": "rescued_groups",
             "draws": "draws", "accepted": "accepted"}  # fmt: skip
    logged = trainer._metrics["train"]
    assert {short: logged[f"kepo/{name}"][0] for short, name in names.items()} == want.counts


def check_row(trainer: ScriptedTrainer, batch: dict[str, Any], row: int, asked: dict[str, Any]) -> None:
    """One row: the plain prompt, the question's own picture, and in the loss."""
    processor = trainer.processing_class
    plain = processor.apply_chat_template(
        vqa_messages(asked["question"], asked["options"], True), tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[plain], images=[[asked["image"]]], return_tensors="pt")
    assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"].view(len(batch["prompt_ids"]), -1)[row], inputs["pixel_values"].flatten())
    assert batch["completion_mask"][row].any() and "tool_mask" not in batch
