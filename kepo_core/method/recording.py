"""A generation batch from the student's rollouts to what is trained on, and the record of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from kepo_core.method.exploration import failing_groups
from kepo_core.method.hinted import Exploration
from kepo_core.method.rollouts import Completion, Rollout, rollout_metrics, write_rollouts
from kepo_core.method.scoring import distinct
from kepo_core.method.task import Row


@dataclass
class Generation:
    """One generation batch on this process, between TRL's hooks. Rows are local; groups and tensors are global.

    Attributes:
        rows: the dataset rows, one per rollout.
        own: the student's own rollouts.
        final: what is trained on, after injection.
        injected: rows whose original was replaced.
        scored: the rewards of ``own``, (all rows, reward functions).
    """

    rows: Sequence[Row]
    own: list[Completion] = field(default_factory=list)
    final: list[Completion] = field(default_factory=list)
    exploration: Exploration = field(default_factory=Exploration)
    injected: list[int] = field(default_factory=list)
    scored: Tensor | None = None


def record(
    trainer: Any,
    now: Generation,
    rewards: Tensor,
    advantages: Tensor,
    gate: Tensor,
    keep: Tensor,
    log_ratio: Mapping[int, float],
) -> None:
    """Log the metrics of a generation batch and write its rollouts.

    Args:
        trainer: a KEPOTrainer.
        rewards: of what is trained on, (all rows, reward functions).
        advantages, gate, keep: of this process's rows, (B,) or for advantages (B, T).
        log_ratio: by injected row, see `Rollout`.
    """
    before, replaced = rewards if now.scored is None else now.scored, set(now.injected)
    rollouts = [
        _rollout(
            trainer,
            now,
            row,
            completion,
            rewards,
            advantage=float(advantages[row].flatten()[0]),
            gate=bool(gate[row]),
            injected=row in replaced,
            dropped=not bool(keep[row]),
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
    size = trainer.num_generations
    signal = trainer.signal("exploration_reward", before).tolist()
    metrics = rollout_metrics(rollouts, now.exploration.explored) | {
        "kepo/all_fail_rate": len(failing_groups(signal, size)) * size / len(signal),
        "kepo/draw_tokens": float(now.exploration.draw_tokens),
    }
    if trainer.task is not None:
        metrics |= trainer.task.metrics([rollout.facts for rollout in rollouts if not rollout.injected])
    if not trainer.args.distill:  # without guidance there is no gate
        del metrics["kepo/gate_rate"]
    return metrics


def _rollout(trainer: Any, now: Generation, row: int, completion: Completion, rewards: Tensor, **rest: Any) -> Rollout:
    """The record of one completion in local row ``row``; ``rewards`` are those of all rows."""
    place = trainer.accelerator.process_index * len(now.rows) + row
    group, own = place // trainer.num_generations, rewards[place]
    result = next((e for e in now.exploration.explored if e.group == group), None)
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
