"""KEPOTrainer: TRL's GRPOTrainer with quality-gated distillation and knowledge-enhanced exploration.

Everything else (generation back ends, distributed training, PEFT, checkpoints, the clipped policy term) is TRL's.
KEPO extends four of TRL's hooks: `_generate` (exploration replaces rollouts before anything is computed from them:
student, reference and teacher score injected ones under the plain prompt x), the two steps that compute rewards and
advantages, and `_compute_loss` (the divergence, from the same forward pass). With ``distill`` and ``explore`` off,
weights and TRL's metrics are bit for bit those of GRPOTrainer.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import AutoConfig
from trl.trainer.utils import get_config_model_id

from kepo_core.method import hinted, objective
from kepo_core.method.checks import check_arguments, check_parts, first_row
from kepo_core.method.config import KEPOConfig
from kepo_core.method.exploration import leaving_members
from kepo_core.method.forward import add_distillation_head, check_plain_head, let_generate
from kepo_core.method.gates import GATES, Gate
from kepo_core.method.guidance import guide
from kepo_core.method.processor import image_only_processor
from kepo_core.method.recording import Generation, record
from kepo_core.method.rounding import RoundingWatch
from kepo_core.method.scoring import ScoringTrainer, as_trl, checked_reward
from kepo_core.method.served import ServedTeacher
from kepo_core.method.task import Prompt, Task, with_images
from kepo_core.method.teacher import Teacher
from kepo_core.method.vllm_rollouts import CheckedVLLM, making_engine

__all__ = ["KEPOConfig", "KEPOTrainer"]


class KEPOTrainer(ScoringTrainer):
    """GRPO with quality-gated distillation and knowledge-enhanced exploration. Use it instead of GRPOTrainer.

    Args:
        model: the student, as for GRPOTrainer: a text or vision-language model, or its name or path.
        reward_funcs: TRL's rewards: functions, coroutines, reward models. ``args.gate_reward`` and
            ``args.exploration_reward`` name those that the gate and exploration read (default: the first).
        args: a `KEPOConfig`. By default, ``distill`` is on with a teacher, and ``explore`` with a teacher and a task.
        train_dataset: rows as for GRPOTrainer: ``prompt`` (x, plain), optionally ``image`` or ``images``, and the
            columns that reward functions and ``task`` read.
        eval_dataset: as for GRPOTrainer. Evaluation never explores.
        teacher: π_T, in this process or served; required to distil and for hints.
        task: how hints are requested and given; required to explore. What its `Task.read` returns goes into the
            rollouts file. With a task, reward functions get completions as plain text, reasoning included.
        gate: a function of your own in place of ``args.gate``, `Known` → weights (B, 1) or (B, T); see `gates`.
        **kwargs: as for GRPOTrainer (``processing_class``, ``callbacks``, ``peft_config``, …).

    Raises:
        ValueError: a missing teacher, task or column, an unknown reward name, too few rows, a task that does not fit
            the rows or a teacher that does not fit the student; raised before anything is computed.

    Example:
    ```python
    >>> from datasets import Dataset
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> from kepo_core import KEPOConfig, KEPOTrainer, Teacher, Templates
    >>> from kepo_core.testbed.embedded import build_tokenizer
    >>> tokenizer = build_tokenizer()
    >>> def tiny():
    ...     return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
    ...         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16))
    >>> def correct(completions, solution, **_):
    ...     return [float(s in c) for c, s in zip(completions, solution)]
    >>> def gate(known):  # KEPO's own, written out
    ...     return (known.reward_B >= known.tau).float().unsqueeze(1)
    >>> trainer = KEPOTrainer(
    ...     model=tiny(),
    ...     reward_funcs=correct,
    ...     args=KEPOConfig(output_dir="/tmp/kepo-example", num_generations=2, per_device_train_batch_size=2,
    ...                     max_completion_length=4, max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True),
    ...     train_dataset=Dataset.from_list([{"prompt": "1 + 1 =", "solution": "2"}] * 4),
    ...     processing_class=tokenizer,
    ...     teacher=Teacher(tiny(), tokenizer),
    ...     task=Templates(asking="It is {solution}. Write a <hint>...</hint>.", telling="Hint: {hint}"),
    ...     gate=gate,
    ... )
    >>> trainer.train().global_step
    {'train_runtime': ...}
    1

    ```
    """

    _last_loaded_step: int  # the step whose weights vLLM has

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "kepo"]
    _name = "KEPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "KEPO: Knowledge-Enhanced Preference Optimization for Reinforcement Learning with Reasoning",
        "id": "2602.00400",
        "citation": "@article{yang2026kepo,\n    title = {{KEPO: Knowledge-Enhanced Preference Optimization for "
        "Reinforcement Learning with Reasoning}},\n    author = {Fan Yang and Rui Meng and Trudi Di Qi and Ali Ezzati "
        "and Yuxin Wen},\n    year = 2026,\n    eprint = {arXiv:2602.00400},\n}",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: KEPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        teacher: Teacher | ServedTeacher | None = None,
        task: Task | None = None,
        gate: Gate | None = None,
        **kwargs: Any,
    ) -> None:
        args = _default_config(model, teacher, task) if args is None else args
        if not isinstance(args, KEPOConfig):
            raise ValueError(f"args is a {type(args).__name__}, expected a KEPOConfig (it has all GRPOConfig's fields)")
        self.task, self.teacher, self.gate = task, teacher, GATES[args.gate] if gate is None else gate
        check_arguments(args, teacher, task, eval_dataset, self.gate)
        check_parts(args, teacher, task, train_dataset, kwargs)
        if reward_funcs is not None:
            given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            reward_funcs = [checked_reward(reward) for reward in given]
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = _processor_of(model, args)
        with making_engine(args):
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **kwargs)
        if self.use_vllm:
            self.vllm_generation: Any = CheckedVLLM(self.vllm_generation, self.processing_class)
        self._find_rewards()
        if args.scale_rewards == "rloo":
            self.scale_rewards = "none"  # TRL computes Eq. 6, which is rescaled to Eq. 4
        self._generation, self._window, self.answered = Generation([], 0), {}, {}
        self.add_callback(RoundingWatch(self))
        student = self.model.get_base_model() if is_peft_model(self.model) else self.model
        let_generate(student)
        inputs = self.picture_inputs(first_row(train_dataset))
        if teacher is None:
            return
        if isinstance(teacher, Teacher) and teacher.model is student:
            raise ValueError("teacher and student are one model, expected two: load it twice (the teacher is frozen)")
        teacher.check_fits(student, self.processing_class, inputs)
        if args.distill:
            check_plain_head(student, "student")
            add_distillation_head(student)
        teacher.prepare(self.accelerator, deepspeed=self.is_deepspeed_enabled, fsdp=self.is_fsdp_enabled)

    # Rollouts ---------------------------------------------------------------------------------------------------

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's rollouts (it logs their lengths here), then exploration for groups that failed."""
        ids_of_prompts, ids, mask, completions, sampling_logps, *rest = super()._generate(prompts)
        now = self._generation
        if self.model.training:
            now.own = hinted.read_completions(self, now.rows, ids)
            now.final = list(now.own)
            if self.args.explore:
                self._explore(now, prompts)
        for row in now.injected:
            ids[row] = now.final[row].ids
            if sampling_logps is not None:
                # Sampled from another prompt: NaN exempts a token from the sampler correction (its ratio is 1).
                sampling_logps[row] = [math.nan] * len(ids[row])
        if self.task is not None and not self.tools:
            # As text, even if the tokenizer parses the reasoning out of the message.
            read = now.final or hinted.read_completions(self, now.rows, ids)
            completions = [as_trl(prompt, completion) for prompt, completion in zip(prompts, read, strict=True)]
        return ids_of_prompts, ids, mask, completions, sampling_logps, *rest

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's generation back end; raises ``ValueError`` for a completion without tokens."""
        let_generate(self.accelerator.unwrap_model(self.model_wrapped))  # accelerate shards it when training begins
        ids, logps = super()._generate_single_turn(*args, **kwargs)
        empty = [row for row, tokens in enumerate(ids) if not tokens]
        if empty:
            raise ValueError(
                f"completion {empty[0]} of step {self.state.global_step + 1} has no tokens, expected at least one "
                "(an end-of-text token)"
            )
        return ids, logps

    def current_vllm(self) -> CheckedVLLM | None:
        """The vLLM engine with the student's current weights; None without ``use_vllm``. All processes must call it."""
        if not self.use_vllm:
            return None
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        return self.vllm_generation  # type: ignore[no-any-return]

    def _seed(self) -> str:
        """The seed of this generation batch, for every random choice except tokens."""
        return f"{self.args.seed}/{self._generation_of_step[0]}/{self._generation_of_step[1]}"

    def _explore(self, now: Generation, prompts: Sequence[Prompt]) -> None:
        """Score the student's own rollouts, explore, and replace originals by accepted draws."""
        now.scored = self.score(now.rows, prompts, now.own)
        now.explored, now.draw_tokens, now.refused = hinted.explore_groups(
            self, now.rows, prompts, now.own, now.scored, self._seed()
        )
        self._inject(now)
        local = now.scored[now.first : now.first + len(now.rows)].clone()
        for row in now.injected:
            draw = now.final[row]
            local[row] = torch.tensor(draw.rewards, device=local.device)
            for column, values in self._pending_extra_logs.items():  # TRL's table of completions shows the draw
                if len(values) == len(now.rows):
                    values[row] = draw.extras.get(column)
        self._scored = self.accelerator.gather(local)

    def _inject(self, now: Generation) -> None:
        """Replace distinct originals, chosen at random by the run's seed, by accepted draws (Algorithm 1, line 15)."""
        for result in now.explored:
            group = result.group
            rng = random.Random(f"{self._seed()}/leave/{group}")
            leaving = leaving_members(len(result.accepted), self.num_generations, rng)
            for member, draw in zip(leaving, result.accepted, strict=True):
                row = group * self.num_generations + member - now.first
                if 0 <= row < len(now.rows):
                    now.final[row] = draw
                    now.injected.append(row)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, plus the gate, Eq. 4's advantages if configured, and the loss's entries on injected rows."""
        training = self.model.training
        if training:  # evaluation neither explores nor writes rollouts
            step = self.state.global_step + 1
            repeated = self._generation_of_step[0] == step
            self._generation_of_step = (step, self._generation_of_step[1] + 1 if repeated else 0)
        self._generation = now = Generation(inputs, self.accelerator.process_index * len(inputs))
        self._scored = None
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not training:
            return output
        if self.args.scale_rewards == "rloo":
            local = slice(now.first, now.first + len(inputs))
            output["advantages"] = objective.leave_one_out(self.total(self._rewards), self.num_generations)[local]
            self._correct_table(output["advantages"])
        advantages = output["advantages"]
        if self.args.distill:
            guide(self, now, output)
        log_ratio = self._measure_injected(now, output) if self.args.explore else {}
        record(self, now, self._rewards, advantages, log_ratio)
        return output

    def _correct_table(self, advantages: Tensor) -> None:
        """Replace TRL's advantages in its table of completions by those that training uses."""
        table, trained = self._logs["advantages"], self.accelerator.gather(advantages).tolist()
        for _ in range(min(len(trained), len(table))):
            table.pop()
        table.extend(trained)

    def _measure_injected(self, now: Generation, output: dict[str, Any]) -> dict[int, float]:
        """How far hints pulled the injected rows off-policy: their hint reliance, by row.

        The same forward pass measures the entropies of replaced originals, which go into ``output``. Under
        ``hint_importance="truncated"``, the advantages in ``output`` are multiplied by the off-policy weights.
        """
        count = hinted.largest(self.accelerator, len(now.injected))
        if not count:
            return {}
        hints = {e.group: e.hint for e in now.explored}
        rows = now.injected + [0] * (count - len(now.injected))  # every process must make equally many forward passes
        plain = [with_images(now.rows[row]["prompt"], now.rows[row]) for row in rows]
        aware = [
            hinted.hint_aware_prompt(self, now.rows[row], hints.get((now.first + row) // self.num_generations) or "")
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
            weights = objective.hint_importance_weights(plain_logps, hinted_logps)
            weights = nn.functional.pad(weights, (0, width - weights.shape[1]), value=1.0)  # cut, or filled with ones
            advantages_BT = output["advantages"].view(size, -1).expand(size, width).clone()  # (B,), or with guidance
            advantages_BT[real] *= weights[: len(real)]
            output["advantages"] = advantages_BT
        means = objective.hint_reliance(plain_logps, hinted_logps, mask_y).tolist()
        return dict(zip(now.injected, means, strict=False))


def _processor_of(model: Any, args: KEPOConfig) -> Any:
    """The processor of a model for which ``AutoProcessor``, GRPOTrainer's way, gives a bare tokenizer; else None."""
    where = {k: v for k, v in (args.model_init_kwargs or {}).items() if k == "revision"}
    if isinstance(model, str):
        try:
            kind = AutoConfig.from_pretrained(model, **where).model_type
        except (OSError, ValueError):  # an adapter without its model, for example: GRPOTrainer handles it or raises
            return None
        return image_only_processor(kind, model, **where)
    return image_only_processor(model.config.model_type, get_config_model_id(model.config))


def _default_config(model: Any, teacher: Any, task: Task | None) -> KEPOConfig:
    """The default configuration: TRL's default folder, and the parts whose teacher and task are given."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return KEPOConfig(
        f"{name.split('/')[-1]}-KEPO", distill=teacher is not None, explore=teacher is not None and task is not None
    )
