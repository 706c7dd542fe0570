"""One forward pass of the student for everything: log-probabilities, entropy, and the divergence from the teacher.

TRL's fused head returns log-probabilities and entropies without ever holding (B, T, V) logits, but no hidden
states. `add_distillation_head` wraps its forward: called with ``distill=Targets(...)``, it keeps the backbone's
output and computes the divergence from it by TRL's chunked kernel. For a served teacher, which gives only its top-k
tokens (`TopTargets`), `top_k` has the kernel. All this happens inside the model's own forward, where DDP, FSDP and
ZeRO have gathered the weights and set their hooks. `add_hidden_state_output` is the teacher's half.
"""

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from kepo_core.method.agreement import Probe
from kepo_core.method.shared_scoring import Shared, SharedReading
from kepo_core.method.top_k import TopKDivergence, TopTargets, chunks, logits_of
from kepo_core.method.trl_hooks import compute_dtype

_LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass(frozen=True, eq=False)
class Targets:
    """The teacher's distributions at N completion tokens of a batch.

    Attributes:
        positions: (N,) which tokens, as flat indices into (B, T).
        hidden: (N, H_T) the teacher's hidden states that predict them, without gradient.
        head: the teacher's output embedding (weight and bias are read when used).
        completion_length: T.
        beta, temperature: see `objective.divergence`.
    """

    positions: Tensor
    hidden: Tensor
    head: Any
    completion_length: int
    beta: float
    temperature: float


@dataclass
class DistilledOutput(FusedCausalLMOutput):  # type: ignore[misc]  # trl is not followed by the type checker
    """TRL's output with ``divergence`` (B, T): D(π_T‖π_θ) at the distilled tokens, 0 elsewhere.

    ``agreement``: `Probe.compare` at the tokens of a probe, (N, 3).
    """

    divergence: Tensor | None = None
    agreement: Tensor | None = None


def keep_float32_outputs(accelerator: Any) -> None:
    """Under FSDP2 with bf16: do not cast the models' outputs, and sum gradients in float32.

    accelerate's policy rounds both to bf16, log-probabilities and entropies included; under DDP they are float32. Call
    this before anything is sharded.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None and accelerator.is_fsdp2:
        compute = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)


def check_plain_head(model: Any, role: str) -> None:
    """Raise ``ValueError`` for a model that scales or soft-caps its logits (they must be states times the head)."""
    config = model.config.get_text_config()
    for name in _LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"the {role}'s {name} is {getattr(config, name)}, expected a model with unscaled logits")


def _first(parameter: Any, rows: int) -> Any:
    """The first rows of a head's weight or bias; the parameter itself if it has no more."""
    return parameter if parameter is None or len(parameter) == rows else parameter[:rows]


def _whole(head: Any) -> tuple[Any, Any]:
    """Weight and bias of a head, gathered if they are sharded (FSDP2)."""
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, head.bias))
    return weight, bias


def predicting_states(hidden: Tensor, completion_length: int) -> Tensor:
    """The hidden states that predict the last T tokens, those one position earlier: (B, P+T, H) → (B, T, H)."""
    return hidden[:, -completion_length - 1 : -1]


def token_log_probs(hidden: Tensor, head: Any, ids: Tensor, temperature: float) -> Tensor:
    """The log-probabilities of N tokens from the states that predict them, (N, H) → (N,) in float32.

    No (N, V) logits are made. Where the head is sharded, all processes must call it.
    """
    weight, bias = _whole(head)
    parts = [hidden.new_empty(0, dtype=torch.float32)]
    with maybe_gather_lm_head_ctx(weight, bias):
        for chunk in chunks(len(hidden)):
            logits = logits_of(hidden[chunk], weight, bias, compute_dtype(hidden)).div_(temperature)
            parts.append(logits.gather(1, ids[chunk, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(parts)


def _divergence(hidden: Tensor, head: Any, targets: Targets | TopTargets) -> Tensor:
    """(B, P+T, H) student states → (B, T) divergence."""
    states = predicting_states(hidden, targets.completion_length)
    shape = states.shape[:2]
    states = states.reshape(-1, states.shape[-1])[targets.positions]
    weight, bias = _whole(head)
    if isinstance(targets, TopTargets):
        per_token = TopKDivergence.apply(states, weight, bias, targets.ids, targets.log_probs, targets.beta)
    else:
        teacher, teacher_bias = _whole(targets.head)
        # If heads are padded to different sizes, the rows of both cover all tokens (`Teacher.check_fits`).
        rows = min(len(weight), len(teacher))
        per_token, _ = ChunkedDivergenceFunction.apply(
            states,
            _first(weight, rows),
            _first(bias, rows),
            targets.hidden.to(hidden.device),
            _first(teacher, rows).to(hidden.device),
            None if teacher_bias is None else _first(teacher_bias, rows).to(hidden.device),
            targets.beta,
            targets.temperature,
        )
    flat = per_token.new_zeros(shape.numel()).scatter(0, targets.positions, per_token)
    divergence_BT: Tensor = flat.view(shape)
    return divergence_BT


def _agreement(hidden: Tensor, head: Any, probe: Probe) -> Tensor:
    """(B, P+T, H) student states → (N, 3)."""
    states = predicting_states(hidden, probe.completion_length)
    return probe.compare(states.reshape(-1, states.shape[-1])[probe.positions], (_whole(head), _whole(probe.head)))


def add_distillation_head(model: Any) -> None:
    """Let ``model(..., fused_lm_head=True, distill=targets, probe=probe)`` return a `DistilledOutput`.

    With ``shared`` prompts that the model can continue, the output covers only the last T tokens. ``model`` must have
    TRL's fused head already, and not be wrapped by PEFT, DDP or FSDP yet. Without these arguments its forward is
    unchanged.
    """
    fused_forward, reading = model.forward, SharedReading()

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: Any,
        *args: Any,
        distill: Targets | TopTargets | None = None,
        probe: Probe | None = None,
        shared: Shared | None = None,
        **kwargs: Any,
    ) -> Any:
        sharing: Any = nullcontext()
        if shared is not None:
            inputs = {name: value for name, value in kwargs.items() if name not in ("labels", "fused_lm_head")}
            if reading.works(self.base_model, shared, inputs):
                kwargs["labels"] = kwargs["labels"][:, shared.length - 1 :]
                sharing = reading.of(self.base_model, shared)
        with sharing:
            if distill is None and probe is None:
                return fused_forward(*args, **kwargs)
            kept: list[Tensor] = []
            hook = self.base_model.register_forward_hook(lambda *call: kept.append(call[2].last_hidden_state))
            try:
                output = fused_forward(*args, **kwargs)
            finally:
                hook.remove()
        head, further = self.get_output_embeddings(), {}
        if distill is not None:
            further["divergence"] = _divergence(kept[0], head, distill)
        if probe is not None:
            further["agreement"] = _agreement(kept[0].detach(), head, probe)
        return DistilledOutput(**output, **further)

    model.forward = types.MethodType(forward, model)


def add_hidden_state_output(model: Any) -> None:
    """Let ``model(..., completion_length=T)`` return the states that predict the last T tokens, (B, T, H)."""
    original_forward, reading = model.forward, SharedReading()

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, completion_length: int = 0, shared: Shared | None = None, **kwargs: Any) -> Any:
        if not completion_length:
            return original_forward(*args, **kwargs)
        continues = shared is not None and reading.works(self.base_model, shared, kwargs)
        with reading.of(self.base_model, shared) if shared is not None and continues else nullcontext():
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return predicting_states(hidden, completion_length)

    model.forward = types.MethodType(forward, model)


def let_generate(model: Any) -> None:
    """Let a sharded (FSDP2) model generate: `generate` encodes pictures outside the forward that gathers weights."""
    if isinstance(model, nn.Module) and isinstance(model, FSDPModule) and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")
