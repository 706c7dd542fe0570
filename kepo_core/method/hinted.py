"""Exploration with a real student: what `exploration.explore` calls, over TRL's generation back ends.

A group may be spread over processes. The one that holds its first row takes care of it; hints and accepted draws
are then shared, and every process replaces the rows it holds. All processes make the same sequence of calls (with
a dummy row where they have nothing to ask), so nothing hangs when only some of them explore.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.data_utils import prepare_multimodal_messages
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from kepo_core.data.records import LETTERS
from kepo_core.method import exploration
from kepo_core.method.exploration import Explored, Request
from kepo_core.method.rollouts import Completion
from kepo_core.task import prompts
from kepo_core.task.rewards import score

Row = Mapping[str, Any]
_NO_REWARD_COLUMNS = ("prompt", "completion", "completion_ids")


def read_completions(trainer: Any, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> list[Completion]:
    """Decode and score one completion per dataset row; there may be none."""
    if not ids:
        return []  # a tokenizer makes one empty text of no completions
    texts = trainer.processing_class.batch_decode(list(ids), skip_special_tokens=True)
    read = []
    for row, tokens, text in zip(rows, ids, texts, strict=True):
        finished = bool(tokens) and tokens[-1] in trainer.eos_token_ids
        letters = LETTERS[: len(row["options"])]
        scored = score(text, row["answer"], letters, thinking=trainer.args.thinking, finished=finished)
        read.append(Completion(list(tokens), text, finished, scored))
    return read


def exploration_rewards(trainer: Any, rows: Sequence[Row], completions: Sequence[Completion]) -> list[float]:
    """The reward that triggers and accepts: the accuracy, or the weighted sum of all reward functions.

    Only local rows are scored, without any collective operation; what reward functions log about them is left to
    TRL's own call.
    """
    if trainer.args.exploration_reward == "accuracy" or not completions:
        return [c.score.accuracy for c in completions]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in _NO_REWARD_COLUMNS}
    total = np.zeros(len(completions))
    for function, weight in zip(trainer.reward_funcs, trainer.reward_weights.tolist(), strict=True):
        values = function(
            prompts=[row["prompt"] for row in rows],
            completions=[[{"role": "assistant", "content": c.text}] for c in completions],
            completion_ids=[c.ids for c in completions],
            trainer_state=trainer.state,
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
            **columns,
        )
        total += weight * np.array(values)
    return [float(value) for value in total]


def with_image(messages: prompts.Messages, row: Row) -> Any:
    """A prompt's messages with the row's picture in its place."""
    return prepare_multimodal_messages(messages, images=[row["image"]])


def hint_aware_prompt(trainer: Any, row: Row, hint: str) -> Any:
    """The prompt of π_θ(·|x, h, y) (Eq. 9) with its image."""
    context = trainer.args.hint_context
    return with_image(prompts.hint_aware_messages(row["question"], row["options"], hint, row["answer"], context), row)


def largest(accelerator: Any, number: int) -> int:
    """The largest ``number`` over all processes."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


@dataclass(frozen=True, slots=True)
class Exploration:
    """What happened in all groups that explored, over all processes, in the order of the groups.

    ``all_fail_rate`` is the share of groups that failed, whether they explored or not; ``draw_tokens`` counts the
    tokens of all hint-aware draws.
    """

    explored: tuple[Explored[Completion], ...] = ()
    all_fail_rate: float = math.nan
    draw_tokens: int = 0


def explore_groups(trainer: Any, rows: Sequence[Row], own: Sequence[Completion], seed: str) -> Exploration:
    """Run Algorithm 1 over the generation batch of all processes.

    Args:
        trainer: a KEPOTrainer (its generation, accelerator, teacher and configuration are used).
        rows: this process's dataset rows, one per rollout.
        own: this process's rollouts.
        seed: names this generation batch; hints depend on it.
    """
    accelerator, size = trainer.accelerator, trainer.num_generations
    local = torch.tensor(exploration_rewards(trainer, rows, own), device=accelerator.device)
    rewards = accelerator.gather(local).tolist()
    failing = exploration.failing_groups(rewards, size)
    rate = len(failing) * size / len(rewards)
    if not trainer.args.explore or not failing:
        return Exploration(all_fail_rate=rate)
    first = accelerator.process_index * len(rows)
    by_group = {group: rows[group * size - first] for group in failing if 0 <= group * size - first < len(rows)}
    others = {group: rows[(group * size - first + size) % len(rows)] for group in by_group}
    alone = any(others[group]["id"] == row["id"] for group, row in by_group.items())
    if trainer.args.hint_source == "other" and alone:
        raise ValueError("hint_source is 'other' but a process has one question alone, expected several")
    sampler = _Sampler(trainer, by_group, others, rows[0], f"{seed}/{accelerator.process_index}")
    results = exploration.explore(
        list(by_group),
        hinter=sampler.hints,
        sampler=sampler.draw,
        accept=sampler.accept,
        rejection_budget=trainer.args.rejection_budget,
        injected_per_group=trainer.args.injected_per_group,
        anyone=sampler.anyone,
    )
    tokens = accelerator.gather(torch.tensor([sampler.tokens], device=accelerator.device)).sum()
    return Exploration(tuple(sorted(gather_object(results), key=lambda e: e.group)), rate, int(tokens))


class _Sampler:
    """The three callables of `exploration.explore` for one process's groups."""

    def __init__(
        self, trainer: Any, by_group: Mapping[int, Row], others: Mapping[int, Row], spare: Row, seed: str
    ) -> None:
        self._trainer, self._by_group, self._others = trainer, by_group, others
        self._spare, self._seed = spare, seed
        self.tokens = 0  # of all draws

    def anyone(self, flag: bool) -> bool:
        return bool(largest(self._trainer.accelerator, int(flag)))

    def hints(self, groups: Sequence[int]) -> list[str | None]:
        if not prompts.needs_hint(self._trainer.args.hint_context):
            return [""] * len(groups)
        source = self._by_group if self._trainer.args.hint_source == "own" else self._others
        rows = [source[group] for group in groups]
        padded = rows
        if self._trainer.teacher.collective:
            padded = rows + [self._spare] * (largest(self._trainer.accelerator, len(rows)) - len(rows))
        seed = random.Random(self._seed).getrandbits(31)
        written = self._trainer.teacher.write_hints(padded, max_tokens=self._trainer.args.hint_max_tokens, seed=seed)
        return list(written[: len(rows)])

    def draw(self, requests: Sequence[Request]) -> list[Completion]:
        rows = [self._by_group[request.group] for request in requests]
        asked = [hint_aware_prompt(self._trainer, row, r.hint) for row, r in zip(rows, requests, strict=True)]
        spare = with_image(self._spare["prompt"], self._spare)
        if self._trainer.use_vllm:  # a server answers all processes at once, and each takes out as many as it asked for
            asked += [spare] * (largest(self._trainer.accelerator, len(asked)) - len(asked))
        prompt_ids, images, fields = self._trainer._tokenize_prompts(asked or [spare])
        ids, _ = self._trainer._generate_single_turn(prompt_ids, images, fields, 1)
        draws = read_completions(self._trainer, rows, ids[: len(rows)])
        self.tokens += sum(len(draw.ids) for draw in draws)
        return draws

    def accept(self, requests: Sequence[Request], draws: Sequence[Completion]) -> list[bool]:
        rows = [self._by_group[request.group] for request in requests]
        return [reward > 0 for reward in exploration_rewards(self._trainer, rows, draws)]


@torch.no_grad()
def log_probabilities(
    trainer: Any, asked: Sequence[Any], ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's (log-probabilities, entropies, mask), each (R, T), of completions under given prompts.

    Args:
        asked: R prompts as messages with their images.
        ids: R completions.
    """
    device = trainer.accelerator.device
    prompt_ids, _, fields = trainer._tokenize_prompts(list(asked))
    pad_token = trainer._tokenizer.pad_token_id

    def padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
        tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
        return torch.as_tensor(pad(tensors, padding_value=value, padding_side=side)).to(device)

    prompts_, completions = padded(prompt_ids, pad_token, "left"), padded(ids, pad_token, "right")
    mask = padded([[1] * len(row) for row in ids], 0, "right")
    attention = torch.cat([padded([[1] * len(row) for row in prompt_ids], 0, "left"), mask], dim=1)
    model_fields: dict[str, Any] = {"num_images": [1] * len(prompt_ids)}
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], list):  # one entry per prompt token
            value = torch.cat([padded(value, 0, "left"), torch.zeros_like(completions)], dim=1)
        model_fields[name] = torch.as_tensor(value if isinstance(value, Tensor) else np.array(value)).to(device)
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
    return logps, entropies, mask


def fit_width(values_RT: Tensor, width: int) -> Tensor:
    """(R, T) cut or filled up with ones to ``width`` tokens; what is cut must be padding."""
    filled = values_RT.new_ones(values_RT.shape[0], width)
    shared = min(width, values_RT.shape[1])
    filled[:, :shared] = values_RT[:, :shared]
    return filled
