"""KEPOTrainer: TRL's GRPOTrainer with quality-gated distillation and knowledge-enhanced exploration.

Everything that is not KEPO (generation back ends, distribution, PEFT, checkpoints, the clipped policy term) is
TRL's. Four of its hooks are extended: `_generate` (exploration replaces rollouts before anything is computed from
them, so that student, reference and teacher all score injected ones under the plain prompt x), the two steps
around rewards and advantages, and `_compute_loss` (the divergence, from the same forward). With ``distill`` and
``explore`` off nothing that reaches the weights or TRL's metrics differs from GRPOTrainer by a bit.
"""

import inspect
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor

from kepo_core.method import hinted, objective
from kepo_core.method.config import KEPOConfig
from kepo_core.method.exploration import GroupOutcome, leaving_members
from kepo_core.method.forward import add_distillation_head, check_plain_head, let_generate
from kepo_core.method.loss import GatedLossTrainer
from kepo_core.method.rollouts import Completion, Rollout, rollout_metrics, write_rollouts
from kepo_core.method.served import ServedTeacher
from kepo_core.method.teacher import Teacher
from kepo_core.task.prompts import needs_hint
from kepo_core.task.rewards import RewardFunction, checked_reward, reward_functions

__all__ = ["KEPOConfig", "KEPOTrainer"]

#: What a dataset row needs for a completion to be scored, and beside it for a hint to be asked for.
SCORED_COLUMNS = ("answer", "options")
HINT_COLUMNS = (*SCORED_COLUMNS, "question", "image", "id")


@dataclass
class _Generation:
    """One generation batch on this process, between TRL's hooks. Rows are local; groups are global."""

    rows: Sequence[Mapping[str, Any]]
    own: list[Completion] = field(default_factory=list)  # the student's own rollouts
    final: list[Completion] = field(default_factory=list)  # after injection
    exploration: hinted.Exploration = field(default_factory=hinted.Exploration)
    injected: list[int] = field(default_factory=list)  # rows whose original was replaced
    rewards: Tensor | None = None  # (all rows, reward functions)


def _checked(reward: Any, args: KEPOConfig) -> Any:
    """A reward function that is checked at every call; reward models and asynchronous functions are TRL's affair."""
    if inspect.isroutine(reward) and not inspect.iscoroutinefunction(reward):
        return checked_reward(reward)
    if args.explore and args.exploration_reward == "total":
        raise ValueError(f"exploration_reward is 'total' but {reward} is a reward model, expected plain functions")
    return reward


class KEPOTrainer(GatedLossTrainer):
    """GRPO with the two parts of KEPO, each of which can be switched off.

    Args:
        model: the student, a model or its name or path.
        reward_funcs: TRL reward functions; by default Appendix B's [accuracy, format].
        args: a `KEPOConfig`.
        train_dataset: rows with ``prompt`` (messages of the plain prompt x), ``image`` (PIL), ``question``,
            ``options`` (texts), ``answer`` (letter) and ``id``.
        teacher: π_T, in process or served, needed to distil and for hints.
        **kwargs: as for GRPOTrainer (``processing_class``, ``eval_dataset``, ``callbacks``, ``peft_config``, …).

    Raises:
        ValueError: a missing teacher or column, too few rows, or a teacher that does not fit the student.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "kepo"]

    def __init__(
        self,
        model: Any,
        reward_funcs: list[RewardFunction] | RewardFunction | None = None,
        args: KEPOConfig | None = None,
        train_dataset: Any = None,
        *,
        teacher: Teacher | ServedTeacher | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, KEPOConfig):
            raise ValueError(f"args is {type(args).__name__}, expected a KEPOConfig")
        self._check_parts(args, train_dataset, teacher, kwargs)
        given = reward_functions(args.thinking) if reward_funcs is None else reward_funcs
        reward_funcs = [_checked(f, args) for f in (given if isinstance(given, list) else [given])]
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        self.teacher = teacher
        self._generation, self._window = _Generation([]), {}
        self._generation_of_step = (-1, 0)
        if args.ratio_clip == "eq5":
            # min(r, clip(r)) = min(r, 1 + ε): no lower bound, and the upper one for either sign of the advantage.
            self.epsilon_low, self.epsilon_high, args.delta = 1.0, args.epsilon, 1 + args.epsilon
        student = self.model.get_base_model() if is_peft_model(self.model) else self.model
        let_generate(student)
        if teacher is None:
            return
        teacher.check_fits(student, self.processing_class)
        if args.distill:
            check_plain_head(student, "student")
            add_distillation_head(student)
        teacher.prepare(self.accelerator, deepspeed=self.is_deepspeed_enabled, fsdp=self.is_fsdp_enabled)

    @staticmethod
    def _check_parts(args: KEPOConfig, dataset: Any, teacher: Any, kwargs: Mapping[str, Any]) -> None:
        parts = [name for name in ("distill", "explore") if getattr(args, name)]
        if not parts:
            return
        if teacher is None and (args.distill or needs_hint(args.hint_context)):
            raise ValueError(f"{parts[0]} is True but teacher is None, expected a Teacher")
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{name} is set, expected it unset: {parts[0]} knows single-turn completions only")
        if args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation is {args.multi_objective_aggregation!r}, expected 'sum_then_normalize'"
            )
        if hasattr(dataset, "__getitem__") and len(dataset):
            needed = ("prompt", *(HINT_COLUMNS if args.explore else SCORED_COLUMNS))
            missing = [name for name in needed if name not in dataset[0]]
            if missing:
                raise ValueError(f"train_dataset lacks {', '.join(missing)}, expected columns {', '.join(needed)}")
            if len(dataset) < (least := args.generation_batch_size // args.num_generations):
                raise ValueError(f"train_dataset has {len(dataset)} rows, expected {least} or more, a generation batch")

    # Rollouts ---------------------------------------------------------------------------------------------------

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's rollouts (whose lengths it logs here), then exploration where a whole group failed."""
        ids_of_prompts, ids, mask, completions, sampling_logps, *rest = super()._generate(prompts)
        now = self._generation
        if not all(column in now.rows[0] for column in SCORED_COLUMNS):
            return ids_of_prompts, ids, mask, completions, sampling_logps, *rest
        now.own = hinted.read_completions(self, now.rows, ids)
        now.final = list(now.own)
        if self.model.training:
            now.exploration = hinted.explore_groups(self, now.rows, now.own, self._seed())
            self._inject(now)
        for row in now.injected:
            ids[row] = now.final[row].ids
            if sampling_logps is not None:
                # Drawn from another prompt: NaN exempts a token from the sampler correction (its ratio is 1).
                sampling_logps[row] = [math.nan] * len(ids[row])
        if not isinstance(completions[0], str):
            # As text, also where a tokenizer would have parsed the reasoning out of the message.
            completions = [[{"role": "assistant", "content": c.text}] for c in now.final]
        return ids_of_prompts, ids, mask, completions, sampling_logps, *rest

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's generation back end, refused if it gives a completion of no tokens."""
        let_generate(self.accelerator.unwrap_model(self.model_wrapped))  # accelerate shares it out when training begins
        ids, logps = super()._generate_single_turn(*args, **kwargs)
        empty = [row for row, tokens in enumerate(ids) if not tokens]
        if empty:
            raise ValueError(
                f"completion {empty[0]} of step {self.state.global_step + 1} has no tokens, expected at least one "
                "(an end-of-text token)"
            )
        return ids, logps

    def _seed(self) -> str:
        """Names this generation batch: what is drawn for it besides tokens depends on nothing else."""
        return f"{self.args.seed}/{self._generation_of_step[0]}/{self._generation_of_step[1]}"

    def _inject(self, now: _Generation) -> None:
        """Put accepted draws in the place of distinct originals, drawn by the run's seed (line 15 of Algorithm 1)."""
        first = self.accelerator.process_index * len(now.rows)
        for result in now.exploration.explored:
            group = result.group
            rng = random.Random(f"{self._seed()}/leave/{group}")
            leaving = leaving_members(len(result.accepted), self.num_generations, rng)
            for member, draw in zip(leaving, result.accepted, strict=True):
                row = group * self.num_generations + member - first
                if 0 <= row < len(now.rows):
                    now.final[row] = draw
                    now.injected.append(row)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's gathered rewards, refused if any is not a number: never a silent 0."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        bad = (~torch.isfinite(rewards)).nonzero().tolist()
        if bad:
            row, function = bad[0]
            raise ValueError(
                f"the reward function {self.reward_func_names[function]} returned {rewards[row, function].item()} or "
                f"None for row {row} of step {self.state.global_step + 1}, expected a finite number"
            )
        self._generation.rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with Eq. 4's advantages if asked for, the gate, and what the loss has to know of injection."""
        if self.model.training:  # evaluation draws none of what is named by it
            step = self.state.global_step + 1
            repeated = self._generation_of_step[0] == step
            self._generation_of_step = (step, self._generation_of_step[1] + 1 if repeated else 0)
        now = self._generation = _Generation(inputs)
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        local = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        assert now.rewards is not None
        totals = (now.rewards * self.reward_weights.to(now.rewards.device)).sum(1)
        if self.model.training and self.args.advantage == "rloo":
            output["advantages"] = objective.advantages(totals, self.num_generations, "rloo")[local]
        if self.model.training and self.args.zero_variance == "drop":
            output["advantages"] = objective.without_equal_groups(output["advantages"], totals, self.num_generations)
        if not now.own:
            return output
        advantages, keep = output["advantages"], self._kept(now)
        signal = totals[local]
        if self.args.gate_reward == "accuracy":
            signal = torch.tensor([c.score.accuracy for c in now.final], device=signal.device)
        gate = objective.gate(signal, self.args.tau, self.args.gate_compare) & keep & self.args.distill
        log_ratio = self._measure_injected(now, output) if self.model.training and self.args.explore else {}
        if self.model.training and self.args.distill:
            output["kepo_gate"] = self._ask_served(now, output, gate)
            gated_tokens = (output["completion_mask"] * output["kepo_gate"].unsqueeze(1)).sum()
            output["kepo_gated_tokens"] = self.accelerator.gather(gated_tokens).sum()
        if not keep.all():
            output["tool_mask"] = keep.unsqueeze(1).expand_as(output["completion_mask"]).long()
        if self.model.training:
            self._record(now, totals[local], advantages, gate, keep, log_ratio)
        return output

    def _ask_served(self, now: _Generation, output: dict[str, Any], gate: Tensor) -> Tensor:
        """The rows to be guided, (B,): those past the gate, but for those that a served teacher cannot be asked about.

        A served teacher is asked here, about all rows of the generation batch at once; ``output`` gets its answers.
        """
        if not isinstance(self.teacher, ServedTeacher):
            return gate
        mask = output["completion_mask"] * gate.unsqueeze(1)
        output["kepo_top_ids"], output["kepo_top_log_probs"], left_out = self.teacher.score_batch(
            now.rows, output, mask
        )
        count = self.accelerator.gather(left_out.sum()).sum()
        self._metrics["train"]["kepo/unasked"].append(float(count))
        return gate & ~left_out

    def _kept(self, now: _Generation) -> Tensor:
        """Which rows stay in the loss: all, but for exhausted groups under ``on_exhausted="drop"``, (B,)."""
        first = self.accelerator.process_index * len(now.rows)
        dropped = {
            e.group
            for e in now.exploration.explored
            if self.args.on_exhausted == "drop" and e.outcome is GroupOutcome.EXHAUSTED
        }
        flags = [(first + row) // self.num_generations not in dropped for row in range(len(now.rows))]
        return torch.tensor(flags, device=self.accelerator.device)

    def _measure_injected(self, now: _Generation, output: dict[str, Any]) -> dict[int, float]:
        """How far hints pulled the injected rows off-policy: token means of log π(y|x,h,a) − log π(y|x), by row.

        In the same forward pass the replaced originals' entropies are measured; ``output`` gets them, and the
        off-policy weights in its advantages under ``hint_importance="truncated"``.
        """
        count = hinted.largest(self.accelerator, len(now.injected))
        if not count:
            return {}
        hints = {e.group: e.hint for e in now.exploration.explored}
        first = self.accelerator.process_index * len(now.rows)
        rows = now.injected + [0] * (count - len(now.injected))  # every process makes as many forward passes
        plain = [hinted.with_image(now.rows[row]["prompt"], now.rows[row]) for row in rows]
        aware = [
            hinted.hint_aware_prompt(self, now.rows[row], hints.get((first + row) // self.num_generations) or "")
            for row in rows
        ]
        ids = [now.final[row].ids for row in rows]
        logps, entropies, mask = hinted.log_probabilities(
            self, [*aware, *plain, *plain], [*ids, *ids, *(now.own[row].ids for row in rows)]
        )
        (hinted_logps, plain_logps, _), (_, mask_y, mask_own) = logps.chunk(3), mask.chunk(3)
        own_entropy = (entropies.chunk(3)[2] * mask_own).sum(1)
        real = torch.tensor(now.injected, dtype=torch.long, device=logps.device)
        size, width = output["completion_ids"].shape
        sums = logps.new_zeros(size, 2)
        sums[real] = torch.stack([own_entropy, mask_own.sum(1)], dim=1)[: len(real)].to(sums.dtype)
        output["kepo_replaced_entropy"] = sums
        if self.args.hint_importance == "truncated":
            weights = hinted.fit_width(objective.hint_importance_weights(plain_logps, hinted_logps), width)
            advantages_BT = output["advantages"].unsqueeze(1).repeat(1, width)
            advantages_BT[real] *= weights[: len(real)]
            output["advantages"] = advantages_BT
        means = objective.sequence_mean(hinted_logps - plain_logps, mask_y).tolist()
        return dict(zip(now.injected, means, strict=False))

    def _record(
        self,
        now: _Generation,
        rewards: Tensor,
        advantages: Tensor,
        gate: Tensor,
        keep: Tensor,
        log_ratio: Mapping[int, float],
    ) -> None:
        """Log the metrics of this generation batch and write its rollouts."""
        first, replaced = self.accelerator.process_index * len(now.rows), set(now.injected)
        rollouts = []
        for row, completion in enumerate(now.final):
            rollout = self._rollout(now, first, row, completion)
            rollout.reward, rollout.advantage = float(rewards[row]), float(advantages[row])
            rollout.gate, rollout.dropped = bool(gate[row]), not bool(keep[row])
            rollout.injected, rollout.hint_log_ratio = row in replaced, log_ratio.get(row, math.nan)
            rollouts.append(rollout)
        for row in now.injected:
            rollout = self._rollout(now, first, row, now.own[row])
            rollout.replaced = True
            rollouts.append(rollout)
        rollouts = gather_object(rollouts)
        exploration = now.exploration
        metrics = rollout_metrics(rollouts, exploration.explored) | {
            "kepo/all_fail_rate": exploration.all_fail_rate,
            "kepo/draw_tokens": float(exploration.draw_tokens),
        }
        if not self.args.distill:  # without guidance there is no gate
            del metrics["kepo/gate_rate"]
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        if self.args.log_rollouts and self.accelerator.is_main_process:
            write_rollouts(self.args.output_dir, rollouts)

    def _rollout(self, now: _Generation, first: int, row: int, completion: Completion) -> Rollout:
        """The record of one completion in local row ``row``, with what is known before rewards and gate."""
        group = (first + row) // self.num_generations
        result = next((e for e in now.exploration.explored if e.group == group), None)
        return Rollout(
            step=self._generation_of_step[0],
            generation=self._generation_of_step[1],
            row=first + row,
            group=group,
            id=str(now.rows[row].get("id", "")),
            completion=completion.text,
            tokens=len(completion.ids),
            finished=completion.finished,
            outcome=str(completion.score.outcome),
            letter=completion.score.letter,
            format_ok=completion.score.format_ok,
            accuracy=completion.score.accuracy,
            reward=completion.score.total,
            hint=(result.hint or "") if result else "",
            exploration=str(result.outcome) if result else "",
            draws=result.draws if result else 0,
        )
