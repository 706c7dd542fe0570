"""The loss of Eq. 7 inside TRL's: the gated divergence joins policy term and KL, from one forward pass."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kepo_core.method import objective
from kepo_core.method.agreement import Probe, log_agreement
from kepo_core.method.config import KEPOConfig
from kepo_core.method.forward import Targets, keep_float32_outputs
from kepo_core.method.hinted import largest
from kepo_core.method.served import ServedTeacher
from kepo_core.method.shared_prompts import SharingTrainer, is_sharded
from kepo_core.method.shared_scoring import Shared, shared_rows
from kepo_core.method.teacher import Teacher
from kepo_core.method.top_k import TopTargets, gather_targets
from kepo_core.method.vllm_rollouts import most_difference


class _Forward:
    """Replaces the model in TRL's loss: passes further arguments to it and keeps its output."""

    def __init__(self, model: Any, **extra: Any) -> None:
        self._model, self._extra = model, {name: value for name, value in extra.items() if value is not None}
        self.output: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        self.output = self._model(**kwargs, **self._extra)
        return self.output


class GatedLossTrainer(SharingTrainer):
    """GRPOTrainer whose batches may carry a gate.

    It reads these entries of a batch besides TRL's (all optional, (B, …) on this process):

    - ``kepo_gate``: a gate's weights, (B, 1) or (B, T), I[r_i ≥ τ] of Eq. 7; without it nothing is distilled.
    - ``kepo_gated_tokens``: sum of these weights over the tokens of the generation batch, over all processes.
    - ``kepo_right``: (B,) 1 if ``gate_reward`` is above 0, else 0; NaN if it does not apply. Only for logs.
    - ``kepo_top_ids``, ``kepo_top_log_probs``: a served teacher's answers, see `top_k.gather_targets`.
    - ``kepo_replaced_entropy``: (B, 2), summed entropy and tokens of the original that an injected row replaced.
    """

    args: KEPOConfig
    teacher: Teacher | ServedTeacher | None

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator of transformers, before TRL shards the reference with it."""
        super().create_accelerator_and_postprocess()
        keep_float32_outputs(self.accelerator)

    def _targets(self, inputs: dict[str, Any]) -> Targets | TopTargets | None:
        """The teacher's targets for the gated tokens of a micro-batch; None without any, or if the advantages guide.

        They are kept with the buffered rollouts while ``num_iterations`` reuses them.
        """
        if "kepo_gate" not in inputs or not self.model.training or self.args.guidance != "loss":
            return None
        if "kepo_targets" in inputs:
            return inputs["kepo_targets"]  # type: ignore[no-any-return]
        mask = inputs["completion_mask"] * (inputs["kepo_gate"] > 0)
        rows = mask.any(1).nonzero().flatten().tolist()
        # With several processes always, because all must gather a sharded head.
        targets = self._ask(inputs, mask, rows) if rows or self.accelerator.num_processes > 1 else None
        if self.num_iterations > 1:
            inputs["kepo_targets"] = targets
        return targets

    def _probe(self, inputs: dict[str, Any]) -> Probe | None:
        """What is measured on the first micro-batch of each optimiser step; None with a served teacher."""
        first = self.model.training and "train" not in self._window
        if not first or "kepo_gate" not in inputs or not isinstance(self.teacher, Teacher):
            return None
        return Probe.of(self.teacher, inputs)

    def _shared(self, inputs: dict[str, Any]) -> Shared | None:
        """The batch's distinct prompts, if the student may read each one only once; else None.

        It may not where the divergence adds nothing and the step must equal GRPOTrainer's bit for bit; under gradient
        checkpointing, where gradients do not reach a cache; if the model is sharded; or if old log-probabilities,
        computed row by row, enter the ratio.
        """
        apart = is_sharded(self.model) or "old_per_token_logps" in inputs
        if apart or self.args.gradient_checkpointing or not self.args.distill_coef:
            return None
        return shared_rows(inputs, range(len(inputs["prompt_ids"])))

    def _ask(self, inputs: dict[str, Any], mask: Tensor, rows: list[int]) -> Targets | TopTargets:
        assert self.teacher is not None
        if isinstance(self.teacher, ServedTeacher):  # it has scored the whole generation batch already
            top = inputs["kepo_top_ids"], inputs["kepo_top_log_probs"]
            return gather_targets(*top, mask, self.teacher.top_k, self.args.distill_beta)
        # A sharded teacher needs every process equally often: one without gated rows passes its first row and drops
        # the result.
        asked = rows or [0]
        passes = largest(self.accelerator, math.ceil(len(asked) / self.teacher.batch_size))
        hidden = self.teacher.hidden_states(inputs, asked, passes)
        return Targets(
            positions=mask.flatten().nonzero().flatten(),
            hidden=hidden[mask[asked].bool()],
            head=self.teacher.head,
            completion_length=mask.shape[1],
            beta=self.args.distill_beta,
            temperature=self.args.distill_temperature,
        )

    def _denominator(self, inputs: Mapping[str, Any], scale: float) -> Tensor | float:
        """The divisor of this micro-batch's divergences, with which the terms of an optimiser step add up."""
        if self.args.distill_normalizer == "sequences":
            return float(inputs["completion_ids"].shape[0] * scale)
        name = "num_items_in_batch" if self.args.distill_normalizer == "tokens" else "kepo_gated_tokens"
        # They count over the generation batch and all processes, whose gradients are averaged.
        count: Tensor = inputs[name]
        windows = float(self.args.steps_per_generation * self.accelerator.num_processes)
        return count * scale / windows

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """GRPO's loss plus distill_coef times the gated divergence, from one forward pass of the student (Eq. 7)."""
        training = self.model.training
        targets = self._targets(inputs)
        shared = None if targets is None else self._shared(inputs)
        forward = _Forward(model, distill=targets, probe=self._probe(inputs), shared=shared)
        loss: Tensor = super()._compute_loss(forward, inputs)
        scale = self.current_gradient_accumulation_steps if training else 1
        terms = {"policy": loss.detach() * scale, "distill": loss.new_zeros(()), "kl": loss.new_zeros(())}
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        width = mask.shape[1]
        if self.beta:
            terms["kl"] = self._kl(forward.output.log_probs[:, -width:].detach(), mask, inputs)
            terms["policy"] = terms["policy"] - self.beta * terms["kl"]
        # Sums of entropy, divergence and vLLM's difference, each followed by its number of tokens.
        sums = loss.new_zeros(6, dtype=torch.float32)
        if getattr(forward.output, "divergence", None) is not None:
            divergence_BT, weights = forward.output.divergence, inputs["kepo_gate"]
            distill = objective.distillation_term(
                divergence_BT, mask, weights, self.args.distill_normalizer, self._denominator(inputs, scale)
            )
            loss = loss + self.args.distill_coef * distill
            terms["distill"] = distill.detach() * scale
            gated_BT = mask * (weights > 0)
            sums[2:4] = torch.stack([(divergence_BT.detach() * gated_BT).sum(), gated_BT.sum()])
        if getattr(forward.output, "agreement", None) is not None:
            log_agreement(self, forward.output.agreement, inputs)
        replaced = inputs.get("kepo_replaced_entropy")
        own_BT = mask if replaced is None else mask * (replaced[:, 1:] == 0)
        sums[:2] = torch.stack([(forward.output.entropy[:, -width:].detach() * own_BT).sum(), own_BT.sum()])
        if replaced is not None:
            sums[:2] += replaced.sum(0)
        if "sampling_per_token_logps" in inputs:  # only rows that were sampled from the plain prompt count
            now_BT = inputs.get("old_per_token_logps", forward.output.log_probs[:, -width:].detach())
            off_BT = (now_BT - inputs["sampling_per_token_logps"]).abs()
            sums[4:] = torch.stack([torch.where(own_BT.bool(), off_BT, 0.0).sum(), own_BT.sum()])
        if not training:
            del terms["distill"]  # evaluation does not use the teacher
        self._log_loss("train" if training else "eval", terms, sums)
        return loss

    def _kl(self, logps_BT: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The KL to the reference as in TRL's loss, averaged as its loss type does, before β."""
        ratio: Tensor | float = 1.0
        if self.args.use_bias_correction_kl:
            old_BT = inputs.get("old_per_token_logps")
            level = self.importance_sampling_level
            ratio = objective.importance_ratio(logps_BT, logps_BT if old_BT is None else old_BT, mask, level)
        kl_BT = objective.kl_to_reference(logps_BT, inputs["ref_per_token_logps"], ratio)
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:  # they count over the generation batch
            tokens = tokens / self.args.steps_per_generation
        return objective.aggregate(kl_BT, mask, self.loss_type, tokens=tokens, longest=self.max_completion_length)

    def _log_loss(self, mode: str, terms: Mapping[str, Tensor], sums: Tensor) -> None:
        """Average the terms over processes and log them.

        Raises:
            FloatingPointError: a term is not finite.
        """
        packed = torch.cat([torch.stack(list(terms.values())), sums])
        values = self.accelerator.reduce(packed, reduction="sum").tolist()
        means = {name: value / self.accelerator.num_processes for name, value in zip(terms, values, strict=False)}
        for name, value in means.items():
            if not math.isfinite(value):  # before it reaches the weights
                step = self.state.global_step + 1
                raise FloatingPointError(f"the {name} loss is {value} at step {step}, expected a finite number")
        logged = {f"kepo/loss_{name}": value for name, value in means.items()}
        # Sums since the last optimiser step.
        window = self._window.setdefault(mode, [0.0] * len(sums))
        window[:] = [total + value for total, value in zip(window, values[len(terms) :], strict=True)]
        if self.accelerator.sync_gradients:  # one mean per optimiser step, not one per micro-batch
            entropy, tokens, divergence, gated, off, drawn = self._window.pop(mode)
            logged["kepo/entropy"] = entropy / tokens if tokens else math.nan
            logged["kepo/divergence"] = divergence / gated if gated else math.nan
            if self.use_vllm:
                logged["kepo/vllm_difference"] = off / drawn if drawn else math.nan
                if drawn:
                    self._stop_if_apart(off / drawn)
        for name, value in logged.items():
            self._metrics[mode][name].append(value)

    def _stop_if_apart(self, difference: float) -> None:
        """Raise ``FloatingPointError`` if vLLM samples from another distribution than the trainer scores."""
        most = most_difference(self.args)
        if not difference <= most:  # NaN must raise, too
            raise FloatingPointError(
                f"vLLM's log-probabilities differ from the trainer's by {difference:.2f} on average at step "
                f"{self.state.global_step + 1}, expected at most {most:.2f}: vLLM has other weights, another precision "
                "or other pictures than the student. Compare its model and dtype, or set use_vllm to False"
            )
