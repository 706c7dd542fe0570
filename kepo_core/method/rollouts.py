"""The record of training: the rollouts file, row by row, and the ``kepo/`` metrics.

All rates are of the student's own rollouts *before* injection, unless the glossary says otherwise. The rewards that
TRL logs (``reward``, ``rewards/*``) are measured after injection and flatter the policy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from kepo_core.files import in_place_of

#: Metric name → definition, for all that KEPOTrainer logs besides TRL's metrics and the task's.
GLOSSARY: dict[str, str] = {
    "kepo/reward": "mean reward of the student's own rollouts, before injection: TRL's weighted sum of all reward "
    "functions",
    "kepo/rewards/NAME": "mean of the reward function NAME over the student's own rollouts to which it applies",
    "kepo/length": "mean length of the student's own rollouts in tokens, end-of-text token included",
    "kepo/entropy": "mean entropy (nats) of the next-token distribution over all tokens of the student's own rollouts; "
    "replaced originals are measured when they are replaced, all others in the loss's forward pass",
    "kepo/all_fail_rate": "share of groups in which no rollout has an exploration_reward above 0 (rewards "
    "that do not apply are ignored)",
    "kepo/explored_groups": "number of groups that explored in this generation batch",
    "kepo/unparsable_hints": "number of explored groups for which no hint could be read; they keep their originals",
    "kepo/rescued_groups": "number of explored groups with at least one accepted draw",
    "kepo/draws": "number of hint-aware draws",
    "kepo/draw_tokens": "number of tokens in hint-aware draws; TRL's length and token counts do not include them",
    "kepo/accepted": "number of draws that were accepted and injected",
    "kepo/refused_draws": "number of hint-aware draws that are right but not accepted, because their hint reliance "
    "exceeds hint_reliance",
    "kepo/gate_rate": "share of the training sequences (after injection) that pass the gate (with distill): some of "
    "their tokens have a weight above 0",
    "kepo/gate_rate/right": "the same of those whose gate_reward is above 0",
    "kepo/gate_rate/wrong": "the same of those whose gate_reward is not",
    "kepo/gate_weight": "mean of the gate's weights over all tokens of the training sequences",
    "kepo/teacher_right": "share of the training sequences whose prompt the teacher itself answers right (with a gate "
    "that needs it)",
    "kepo/log_ratio": "mean of log π_T − log π_θ over the gated tokens, where the teacher scores them (guidance in the "
    "advantage, or a gate that needs it): minus an estimate of the reverse KL",
    "kepo/top_k_overlap/PART": "of the 8 most likely next tokens of student and teacher, the share that both have, on "
    "the first 16 rows of an optimiser step; PART: gated and ungated tokens, right and wrong rollouts (gate_reward "
    "above 0 or not); not with a served teacher",
    "kepo/top_k_teacher_mass/PART": "the teacher's probability of the student's 8 most likely next tokens there",
    "kepo/top_k_student_mass/PART": "the student's probability of the teacher's 8 most likely next tokens there",
    "kepo/injected_log_ratio": "mean over injected trajectories of the mean over their tokens of "
    "log π(y|x,h,a) − log π(y|x), both by the student that sampled them: how far the hint pulled them off-policy",
    "kepo/injected_mentions_hint": 'share of injected trajectories that say "hint", "hints", "hinted" or '
    '"ground truth"',
    "kepo/loss_policy": "the policy term of the loss: −w·Â, averaged by loss_type (by default over the tokens of a "
    "sequence, then over sequences), with TRL's entropy bonus and auxiliary loss if they are on; about 0 when "
    "on-policy, because advantages sum to 0 in a group (its gradient is not 0)",
    "kepo/loss_distill": "the gated divergence, normalised by distill_normalizer, before distill_coef; 0 if the "
    "guidance is in the advantage",
    "kepo/loss_kl": "the KL to the reference in the loss (the estimate times the ratio, unless "
    "use_bias_correction_kl is off), averaged by loss_type, before beta",
    "kepo/divergence": "mean D(π_T‖π_θ) per gated token; with a served teacher, over its top-k tokens and "
    "one bucket for the rest",
    "kepo/vllm_difference": "mean |log π_vLLM − log π_θ| per token of the student's own rollouts (with use_vllm); "
    "training stops if it exceeds 0.2",
    "kepo/unmoved_weights": "share of the weights with a gradient that an optimiser step leaves unchanged because "
    "rounding removes the update (from a sample of the weights)",
    "kepo/unasked": "number of sequences past the gate, or of all if the gate needs the teacher's log-probabilities, "
    "that a served teacher cannot score, because the text would be "
    "tokenized differently from what the student wrote; they are not guided",
}

ROLLOUTS_DIR = "rollouts"


@dataclass(slots=True)
class Rollout:
    """One row of the rollouts file: a completion that was trained on, or an original that was replaced.

    ``step`` is the optimiser step that first uses it (1, 2, …), ``generation`` numbers the generation batches of that
    step, ``row`` is its index in the generation batch over all processes, and ``group`` = row // G. ``facts`` are the
    results of the task's ``read``, a column each; ``gate`` is the mean of the gate's weights over its tokens;
    ``teacher_right`` is 1 or 0 by the teacher's own answer (NaN unless the gate needs it); ``rewards`` those of the
    reward functions, a column ``rewards/NAME`` each (NaN: the function does not apply); ``reward`` is their weighted
    sum, and ``advantage`` is Â (NaN for replaced originals, which are not trained on). ``hint``, ``exploration`` (a
    GroupOutcome, or "") and ``draws`` belong to the group. ``hint_log_ratio`` is the token mean of
    log π(y|x,h,a) − log π(y|x), NaN unless injected.
    """

    step: int
    generation: int
    row: int
    group: int
    id: str
    completion: str
    tokens: int
    finished: bool
    facts: Mapping[str, Any]
    rewards: Mapping[str, float]
    reward: float
    advantage: float = math.nan
    gate: float = 0.0
    teacher_right: float = math.nan
    injected: bool = False
    replaced: bool = False
    hint: str = ""
    exploration: str = ""
    draws: int = 0
    hint_log_ratio: float = math.nan

    def columns(self) -> dict[str, Any]:
        """The row of the file: column → value. Raises ``ValueError`` if a fact has the name of another column."""
        facts = {name: str(value) if isinstance(value, str) else value for name, value in self.facts.items()}
        rewards = {f"rewards/{name}": value for name, value in self.rewards.items()}
        spread: dict[str, dict[str, Any]] = {"facts": facts, "rewards": rewards}
        row: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            columns = spread.get(name, {name: getattr(self, name)})
            if taken := ", ".join(sorted(row.keys() & columns)):
                raise ValueError(f"task.read returns a column named {taken}, which the rollouts file already uses")
            row |= columns
        return row


@dataclass(frozen=True, slots=True)
class Completion:
    """One decoded completion.

    ``finished`` is whether it ended by itself, ``facts`` the result of the task's ``read``. Only hint-aware draws carry
    scores: ``rewards`` holds one number per reward function, ``extras`` the values that these logged for TRL's table of
    completions.
    """

    ids: list[int]
    text: str
    finished: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[float, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)


def write_rollouts(output_dir: str | Path, rollouts: Sequence[Rollout]) -> Path:
    """Write one generation batch to ``<output_dir>/rollouts/``; the same rows give the same bytes."""
    first = rollouts[0]
    folder = Path(output_dir) / ROLLOUTS_DIR
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{first.step:06d}_{first.generation:03d}.parquet"
    ordered = sorted(rollouts, key=lambda r: (r.row, r.replaced))
    with in_place_of(path) as partial:
        pd.DataFrame([rollout.columns() for rollout in ordered]).to_parquet(partial, index=False)
    return path


def forget_rollouts(output_dir: str | Path, step: int) -> None:
    """Remove the rollouts that an earlier training wrote for steps after ``step``, which will be trained again."""
    for shard in (Path(output_dir) / ROLLOUTS_DIR).glob("step_*.parquet"):
        if int(shard.stem.split("_")[1]) > step:
            shard.unlink()


def collect_rollouts(output_dir: str | Path) -> pd.DataFrame:
    """All rollouts of a training run, in order; an empty table with the same columns if it has none."""
    shards = sorted((Path(output_dir) / ROLLOUTS_DIR).glob("step_*.parquet"))
    if not shards:
        return pd.DataFrame(columns=[f.name for f in fields(Rollout) if f.name not in ("facts", "rewards")])
    return pd.concat([pd.read_parquet(shard) for shard in shards], ignore_index=True)
