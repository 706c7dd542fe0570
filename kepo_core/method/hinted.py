"""Exploration with a real student: the callables of `exploration.explore`, on TRL's generation back ends.

A group may be spread over processes. The process that holds its first row explores it; hints and accepted draws are
then shared, and every process replaces the rows it holds. All processes make the same sequence of calls (with a dummy
row if they have none), so nothing hangs if only some of them explore.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from kepo_core.method import exploration, objective
from kepo_core.method.exploration import Explored, Request
from kepo_core.method.rollouts import Completion
from kepo_core.method.task import Prompt, Row, hint_request, images_in, markup_of, neutral, with_images
from kepo_core.method.vision import MODEL_FIELDS, PER_TOKEN, as_tensor, count_tiles, further_inputs

#: The longest failed attempt that the teacher reads, in tokens. Of a longer one it reads the end, where the answer is.
FAILURE_TOKENS = 256


def read_completions(trainer: Any, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> list[Completion]:
    """Decode one completion per dataset row, and read it with the task; empty if ``ids`` is."""
    if not ids:
        return []  # a tokenizer would return one empty text
    texts = trainer.processing_class.batch_decode(list(ids), skip_special_tokens=True)
    read = []
    for row, tokens, text in zip(rows, ids, texts, strict=True):
        finished = bool(tokens) and tokens[-1] in trainer.eos_token_ids
        facts = {} if trainer.task is None else trainer.task.read(row, text, finished)
        read.append(Completion(list(tokens), text, finished, facts))
    return read


def largest(accelerator: Any, number: int) -> int:
    """The largest ``number`` over all processes."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def explore_groups(
    trainer: Any,
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    own: Sequence[Completion],
    scored: Tensor,
    seed: str,
) -> tuple[list[Explored[Completion]], int, int]:
    """Run Algorithm 1 over the generation batch of all processes.

    The task first learns the progress of training (`Task.set_progress`).

    Args:
        trainer: a KEPOTrainer (its generation, rewards, accelerator, task, teacher and configuration are used).
        rows: this process's dataset rows, one per rollout.
        prompts: their plain prompts x, pictures filled in.
        own: this process's rollouts.
        scored: the rewards of all processes' rollouts, (all rows, reward functions).
        seed: seed of this generation batch; hints, and the attempts that they are about, depend on it.

    Returns:
        The results of all groups that explored, over all processes, in order; the number of tokens in their draws; and
        how many right draws ``hint_reliance`` refused.

    Raises:
        ValueError: ``hint_source`` is "other" and this process has only one group, or the task asks for hints for some
            rows only, or without a teacher.
    """
    accelerator, size = trainer.accelerator, trainer.num_generations
    failing = exploration.failing_groups(trainer.signal("exploration_reward", scored).tolist(), size)
    if not failing:
        return [], 0, 0
    trainer.task.set_progress(trainer.state.global_step / max(trainer.state.max_steps, 1))
    first = accelerator.process_index * len(rows)
    by_group = {group: group * size - first for group in failing if 0 <= group * size - first < len(rows)}
    alone = any((first + (row + size) % len(rows)) // size == group for group, row in by_group.items())
    if trainer.args.hint_source == "other" and alone:
        raise ValueError(
            "hint_source is 'other' but a process holds only one prompt, expected two or more: raise the batch size"
        )
    about = _failures(trainer, own, scored, failing, seed) if trainer.args.hint_source == "failure" else None
    sampler = _Sampler(trainer, rows, prompts, own, by_group, f"{seed}/{accelerator.process_index}", about)
    results = exploration.explore(
        list(by_group),
        hinter=sampler.hints,
        sampler=sampler.draw,
        accept=sampler.accept,
        rejection_budget=trainer.args.rejection_budget,
        injected_per_group=trainer.args.injected_per_group,
        anyone=sampler.anyone,
    )
    counts = torch.tensor([[sampler.tokens, sampler.refused]], device=accelerator.device)
    tokens, refused = accelerator.gather(counts).sum(0).tolist()
    return sorted(gather_object(results), key=lambda e: e.group), tokens, refused


def _failures(
    trainer: Any, own: Sequence[Completion], scored: Tensor, failing: Sequence[int], seed: str
) -> dict[int, str]:
    """One failed attempt for each failing group: a rollout of the group, chosen at random by the run's seed (as HiLL).

    Its text has neither special tokens nor tags, and is cut to `FAILURE_TOKENS`. All processes must call it; each gets
    all attempts, as the chosen rollout may be on another one.
    """
    signal, size = trainer.signal("exploration_reward", scored).tolist(), trainer.num_generations
    first, markup = trainer.accelerator.process_index * len(own), markup_of(trainer._tokenizer)
    held = []
    for group in failing:
        members = [place for place in range(group * size, (group + 1) * size) if signal[place] <= 0]
        place = random.Random(f"{seed}/failure/{group}").choice(members) - first
        if 0 <= place < len(own):
            text = neutral(own[place].text, markup, " ")
            ids = trainer._tokenizer(text, add_special_tokens=False)["input_ids"]
            cut = len(ids) > FAILURE_TOKENS
            held.append((group, trainer._tokenizer.decode(ids[-FAILURE_TOKENS:]) if cut else text))
    return dict(gather_object(held))


@dataclass
class _Sampler:
    """The three callables of `exploration.explore` for one process's groups, ``by_group``: group → its first row.

    ``about`` maps a group to the failed attempt that its hint is about; None if hints are about no attempt.
    """

    trainer: Any
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    own: Sequence[Completion]
    by_group: Mapping[int, int]
    seed: str
    about: Mapping[int, str] | None
    tokens: int = 0  # of all draws
    refused: int = 0  # right draws above the bound on hint reliance

    def anyone(self, flag: bool) -> bool:
        return bool(largest(self.trainer.accelerator, int(flag)))

    def hints(self, groups: Sequence[int]) -> list[str | None]:
        trainer, about = self.trainer, self.about
        away = trainer.num_generations if trainer.args.hint_source == "other" else 0  # the next group's row
        rows = [self.rows[(self.by_group[group] + away) % len(self.rows)] for group in groups]
        attempts = [None if about is None else about[group] for group in groups]
        asked = [hint_request(trainer.task, row, attempt) for row, attempt in zip(rows, attempts, strict=True)]
        # The same on all processes, whether they explore or not.
        first = hint_request(trainer.task, self.rows[0], None if about is None else "")
        if first is None:
            if any(prompt is not None for prompt in asked):
                raise ValueError(
                    "task.ask returned None for the first row but not for this one, expected the same for every row"
                )
            return [""] * len(groups)
        if trainer.teacher is None:
            raise ValueError("task.ask asks for a hint at this step, but teacher is None, expected a Teacher")
        if trainer.teacher.collective:
            spare = largest(trainer.accelerator, len(rows)) - len(rows)
            rows, asked = [*rows, *[self.rows[0]] * spare], [*asked, *[first] * spare]
        written = trainer.teacher.write_hints(
            [with_images(prompt, row) for prompt, row in zip(asked, rows, strict=True)],
            max_tokens=trainer.args.hint_max_tokens,
            seed=random.Random(self.seed).getrandbits(31),
            template=trainer.chat_template_kwargs,
        )
        return list(written[: len(groups)])

    def draw(self, requests: Sequence[Request]) -> list[Completion]:
        trainer = self.trainer
        places = [self.by_group[request.group] for request in requests]
        rows = [self.rows[place] for place in places]
        asked = [hint_aware_prompt(trainer, row, request.hint) for row, request in zip(rows, requests, strict=True)]
        spare = self.prompts[0]
        if trainer.use_vllm:  # a server answers all processes at once: each must send equally many prompts
            asked += [spare] * (largest(trainer.accelerator, len(asked)) - len(asked))
        prompt_ids, images, fields = trainer._tokenize_prompts(asked or [spare])
        ids, _ = trainer._generate_single_turn(prompt_ids, images, fields, 1)
        draws = read_completions(trainer, rows, ids[: len(rows)])
        self.tokens += sum(len(draw.ids) for draw in draws)
        return self._scored(places, draws)

    def _scored(self, places: list[int], draws: list[Completion]) -> list[Completion]:
        """The draws with their rewards, as answers to the plain prompts of the rows in ``places``."""
        # Rewards are gathered: a process with fewer draws scores its first rollout again and drops the result.
        count = largest(self.trainer.accelerator, len(draws))
        spare = count - len(draws)
        where = [*places, *[0] * spare]
        rewards, extras = self.trainer.score_apart(
            [self.rows[place] for place in where],
            [self.prompts[place] for place in where],
            [*draws, *[self.own[0]] * spare],
        )
        first = self.trainer.accelerator.process_index * count
        return [
            replace(
                draw,
                rewards=tuple(rewards[first + i].tolist()),
                extras={column: values[i] for column, values in extras.items() if len(values) == count},
            )
            for i, draw in enumerate(draws)
        ]

    def accept(self, requests: Sequence[Request], draws: Sequence[Completion]) -> list[bool]:
        right: list[bool] = []
        if draws:
            rewards = torch.tensor([draw.rewards for draw in draws])
            right = [reward > 0 for reward in self.trainer.signal("exploration_reward", rewards).tolist()]
        return self._bounded(requests, draws, right) if self.trainer.args.hint_reliance else right

    def _bounded(self, requests: Sequence[Request], draws: Sequence[Completion], right: list[bool]) -> list[bool]:
        """``right``, but False where the hint reliance exceeds the bound: one forward pass over the right draws."""
        trainer, chosen = self.trainer, [number for number, good in enumerate(right) if good]
        count = largest(trainer.accelerator, len(chosen))
        if not count:
            return right
        spare = count - len(chosen)  # every process must make equally many forward passes
        places = [*(self.by_group[requests[number].group] for number in chosen), *[0] * spare]
        ids = [*(draws[number].ids for number in chosen), *[self.own[0].ids] * spare]
        hints = [*(requests[number].hint for number in chosen), *[""] * spare]
        plain = [self.prompts[place] for place in places]
        aware = [hint_aware_prompt(trainer, self.rows[place], hint) for place, hint in zip(places, hints, strict=True)]
        logps, _, mask = log_probabilities(trainer, [*plain, *aware], [*ids, *ids])
        plain_logps, hinted_logps = logps.chunk(2)
        reliance = objective.hint_reliance(plain_logps, hinted_logps, mask[:count]).tolist()
        refused = {
            number
            for number, value in zip(chosen, reliance, strict=False)
            if not value <= trainer.args.hint_reliance  # NaN, too
        }
        self.refused += len(refused)
        return [good and number not in refused for number, good in enumerate(right)]


def hint_aware_prompt(trainer: Any, row: Row, hint: str) -> Prompt:
    """The prompt of π_θ(·|x, h, y) (Eq. 9) with its pictures."""
    return with_images(trainer.task.tell(row, hint), row)


@torch.no_grad()
def log_probabilities(
    trainer: Any, asked: Sequence[Any], ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's (log-probabilities, entropies, mask), each (R, T), of completions under given prompts.

    Args:
        asked: R prompts, with their pictures.
        ids: R completions.
    """
    device = trainer.accelerator.device
    prompt_ids, images, fields = trainer._tokenize_prompts(list(asked))
    pad_token = trainer._tokenizer.pad_token_id

    def padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
        tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
        return torch.as_tensor(pad(tensors, padding_value=value, padding_side=side)).to(device)

    prompts_, completions = padded(prompt_ids, pad_token, "left"), padded(ids, pad_token, "right")
    mask = padded([[1] * len(row) for row in ids], 0, "right")
    attention = torch.cat([padded([[1] * len(row) for row in prompt_ids], 0, "left"), mask], dim=1)
    counts = [len(images_in(prompt)) for prompt in asked]
    model_fields: dict[str, Any] = {}
    of_the_batch, trainer._further = trainer._further, {}
    if images is not None:
        image_processor = trainer.processing_class.image_processor
        model_fields = {"num_images": counts, "num_tiles": count_tiles(fields, images, image_processor)}
        trainer._further = further_inputs(fields, images, image_processor)
    for name in fields.keys() & MODEL_FIELDS:
        value = fields[name]
        if name.endswith(PER_TOKEN):
            value = torch.cat([padded(value, 0, "left"), torch.zeros_like(completions)], dim=1)
        model_fields[name] = as_tensor(value).to(device)
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompts_, completions], dim=1),
            attention,
            completions.shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
            compute_entropy=True,
            **model_fields,
        )
    trainer._further = of_the_batch
    return logps, entropies, mask
