"""The state of a generation batch, from the student's own rollouts to the final ones, and its record."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from kepo_core.method.exploration import Explored, GroupOutcome, failing_groups
from kepo_core.method.rollouts import Completion, Rollout, write_rollouts
from kepo_core.method.scoring import distinct
from kepo_core.method.task import Row

_MENTION = re.compile(r"\bhint(s|ed)?\b|\bground[ -]truth\b", re.IGNORECASE)


@dataclass
class Generation:
    """One generation batch on this process, between TRL's hooks. Rows are local; groups and tensors are global.

    Attributes:
        rows: the dataset rows, one per rollout.
        first: the global index of the first row.
        own: the student's own rollouts.
        final: the rollouts that are trained on, after injection.
        explored, draw_tokens, refused: see `hinted.explore_groups`.
        injected: rows whose original was replaced.
        scored: the rewards of ``own``, (all rows, reward functions).
        weights: the gate's, (B, 1) or (B, T); None without distillation.
        teacher_right: of each row, whether the teacher's own answer is right; empty unless the gate needs it.
    """

    rows: Sequence[Row]
    first: int
    own: list[Completion] = field(default_factory=list)
    final: list[Completion] = field(default_factory=list)
    explored: Sequence[Explored[Completion]] = ()
    draw_tokens: int = 0
    refused: int = 0
    injected: list[int] = field(default_factory=list)
    scored: Tensor | None = None
    weights: Tensor | None = None
    teacher_right: list[float] = field(default_factory=list)

    def gate(self) -> list[float]:
        """The mean weight of each row's tokens, 0 without distillation."""
        if self.weights is None:
            return [0.0] * len(self.rows)
        lengths = [len(completion.ids) for completion in self.final]
        return [float(row[:length].mean()) for row, length in zip(self.weights, lengths, strict=True)]


def record(
    trainer: Any,
    now: Generation,
    rewards: Tensor,
    advantages: Tensor,
    log_ratio: Mapping[int, float],
) -> None:
    """Log the metrics of a generation batch and write its rollouts.

    Args:
        trainer: a KEPOTrainer.
        rewards: of the rollouts that are trained on, (all rows, reward functions).
        advantages: for this process's rows, (B,).
        log_ratio: injected row → ``hint_log_ratio`` of `Rollout`.
    """
    before, replaced = rewards if now.scored is None else now.scored, set(now.injected)
    gate = now.gate()
    rollouts = [
        _rollout(
            trainer,
            now,
            row,
            completion,
            rewards,
            advantage=float(advantages[row]),
            gate=gate[row],
            teacher_right=now.teacher_right[row] if now.teacher_right else math.nan,
            injected=row in replaced,
            hint_log_ratio=log_ratio.get(row, math.nan),
        )
        for row, completion in enumerate(now.final)
    ]
    rollouts += [_rollout(trainer, now, row, now.own[row], before, replaced=True) for row in now.injected]
    rollouts = gather_object(rollouts)
    for name, value in _metrics(trainer, now, rollouts, before).items():
        trainer._metrics["train"][name].append(value)
    if trainer.args.log_rollouts and trainer.accelerator.is_main_process:
        write_rollouts(trainer.args.output_dir, rollouts)


def _metrics(trainer: Any, now: Generation, rollouts: Sequence[Rollout], before: Tensor) -> dict[str, float]:
    """The ``kepo/`` metrics of one generation batch over all processes; NaN for a mean of nothing.

    Args:
        trainer, now: as for `record`.
        rollouts: all rows, replaced originals included.
        before: the rewards of the student's own rollouts.
    """
    own, injected = [r for r in rollouts if not r.injected], [r for r in rollouts if r.injected]
    explored, size = now.explored, trainer.num_generations
    signal = trainer.signal("exploration_reward", before).tolist()
    trained = [r for r in rollouts if not r.replaced]
    reward = trainer.signal("gate_reward", trainer._rewards).tolist()
    metrics = {
        "kepo/reward": _mean([r.reward for r in own]),
        **{f"kepo/rewards/{name}": _mean([r.rewards[name] for r in own]) for name in rollouts[0].rewards},
        "kepo/length": _mean([r.tokens for r in own]),
        "kepo/gate_rate": _mean([r.gate > 0 for r in trained]),
        "kepo/gate_weight": sum(r.gate * r.tokens for r in trained) / sum(r.tokens for r in trained),
        "kepo/gate_rate/right": _mean([r.gate > 0 for r in trained if reward[r.row] > 0]),
        "kepo/gate_rate/wrong": _mean([r.gate > 0 for r in trained if reward[r.row] <= 0]),
        "kepo/teacher_right": _mean([r.teacher_right for r in trained]),
        "kepo/explored_groups": float(len(explored)),
        "kepo/unparsable_hints": float(sum(e.outcome is GroupOutcome.UNPARSABLE for e in explored)),
        "kepo/rescued_groups": float(sum(e.outcome is GroupOutcome.RESCUED for e in explored)),
        "kepo/draws": float(sum(e.draws for e in explored)),
        "kepo/accepted": float(sum(len(e.accepted) for e in explored)),
        "kepo/injected_log_ratio": _mean([r.hint_log_ratio for r in injected]),
        "kepo/injected_mentions_hint": _mean([_MENTION.search(r.completion) is not None for r in injected]),
        "kepo/all_fail_rate": len(failing_groups(signal, size)) * size / len(signal),
        "kepo/draw_tokens": float(now.draw_tokens),
        "kepo/refused_draws": float(now.refused),
    }
    if not trainer.args.distill:  # without distillation nothing is gated
        metrics = {name: value for name, value in metrics.items() if not name.startswith("kepo/gate_")}
    if not now.teacher_right:
        del metrics["kepo/teacher_right"]
    if trainer.task is not None:
        metrics |= trainer.task.metrics([rollout.facts for rollout in own])
    return metrics


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if all are."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _rollout(trainer: Any, now: Generation, row: int, completion: Completion, rewards: Tensor, **rest: Any) -> Rollout:
    """The record of one completion in local row ``row``; ``rewards`` are those of all rows."""
    place = now.first + row
    group, own = place // trainer.num_generations, rewards[place]
    result = next((e for e in now.explored if e.group == group), None)
    step, generation = trainer._generation_of_step
    return Rollout(
        step=step,
        generation=generation,
        row=place,
        group=group,
        id=str(now.rows[row].get("id", "")),
        completion=completion.text,
        tokens=len(completion.ids),
        finished=completion.finished,
        facts=completion.facts,
        rewards=dict(zip(distinct(trainer.reward_func_names), own.tolist(), strict=True)),
        reward=float(trainer.total(own.unsqueeze(0))),
        hint=(result.hint or "") if result else "",
        exploration=str(result.outcome) if result else "",
        draws=result.draws if result else 0,
        **rest,
    )
