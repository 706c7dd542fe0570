"""How the teacher guides a generation batch: the gate's weights, and what gate and guidance need of the teacher.

With ``guidance="loss"`` the divergence is computed in the loss (`loss`). With "advantage" or "bounded", and for gates
that need log-probabilities, the teacher scores the sampled tokens here, once per generation batch.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from kepo_core.method import gates, objective
from kepo_core.method.forward import token_log_probs
from kepo_core.method.hinted import largest
from kepo_core.method.recording import Generation
from kepo_core.method.rollouts import Completion
from kepo_core.method.served import ServedTeacher
from kepo_core.method.task import Row, images_of, with_images
from kepo_core.method.vision import FURTHER, MODEL_FIELDS


def guide(trainer: Any, now: Generation, output: dict[str, Any]) -> None:
    """Weigh the rows of a generation batch by the gate, and add what their guidance needs to ``output``.

    Entries of ``output`` are those that `GatedLossTrainer` reads. Unless the guidance is in the loss, the advantages
    become (B, T). The gate's weights are kept in ``now``.

    Args:
        trainer: a KEPOTrainer, whose last rewards are those of this batch.

    Raises:
        ValueError: the gate returns something else than weights.
    """
    args, gate, mask = trainer.args, trainer.gate, output["completion_mask"]
    need, local = gates.needs_of(gate), slice(now.first, now.first + len(now.rows))
    signal = trainer.signal("gate_reward", trainer._rewards)[local]
    usable = mask.any(1)  # under mask_truncated_completions some rows have no tokens
    student = teacher = right = None
    scores: Sequence[Any] = ()
    if gates.LOGPS in need or args.guidance != "loss":
        student = _student_logps(trainer, output)
    if gates.LOGPS in need:
        teacher, scores, usable = _ask(trainer, now, output, usable)
    if gates.ANSWERS in need:
        right = teacher_right(trainer, now.rows)
        now.teacher_right = right.tolist()
    known = gates.Known(
        reward_B=_whole(trainer, signal.masked_fill(~usable, math.nan)),
        tau=args.tau,
        group_size=trainer.num_generations,
        advantages_B=_whole(trainer, output["advantages"]),
        mask_BT=_whole(trainer, mask),
        student_logps_BT=None if gates.LOGPS not in need or student is None else _whole(trainer, student),
        teacher_logps_BT=None if teacher is None else _whole(trainer, teacher),
        teacher_right_B=None if right is None else _whole(trainer, right) > 0,
    )
    # Another process may have longer completions.
    weights = gates.checked(gate(known), known)[local, : mask.shape[1]] * usable.unsqueeze(1)
    now.weights = weights
    if gates.LOGPS not in need and (args.guidance != "loss" or isinstance(trainer.teacher, ServedTeacher)):
        teacher, scores, askable = _ask(trainer, now, output, (weights > 0).any(1))
        weights = weights * askable.unsqueeze(1)
    gated_BT = mask * weights
    if scores:
        output["kepo_top_ids"], output["kepo_top_log_probs"] = _guided_tokens(scores, mask, gated_BT)
    output["kepo_gate"] = weights
    output["kepo_gated_tokens"] = trainer.accelerator.gather(gated_BT.sum()).sum()
    output["kepo_right"] = torch.where(signal.isnan(), math.nan, (signal > 0).float())
    if teacher is not None and student is not None:
        _log_ratio(trainer, teacher - student, gated_BT)
        if args.guidance != "loss":
            extra = objective.teacher_advantage(teacher, student, bounded=args.guidance == "bounded")
            added = torch.where(gated_BT > 0, gated_BT * extra, 0.0)
            output["advantages"] = output["advantages"].unsqueeze(1) + args.distill_coef * added


def _log_ratio(trainer: Any, ratio_BT: Tensor, gated_BT: Tensor) -> None:
    sums = torch.stack([torch.where(gated_BT > 0, ratio_BT, 0.0).sum(), (gated_BT > 0).sum()])
    total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    trainer._metrics["train"]["kepo/log_ratio"].append(total / count if count else math.nan)


def _whole(trainer: Any, tensor: Tensor) -> Tensor:
    """The rows of all processes, padded to equal lengths with zeros."""
    if trainer.accelerator.num_processes == 1:
        return tensor
    if tensor.dim() > 1:
        tensor = trainer.accelerator.pad_across_processes(tensor, dim=1)
    whole: Tensor = trainer.accelerator.gather(tensor)
    return whole


# Log-probabilities of the sampled tokens ----------------------------------------------------------------------------


def _ask(
    trainer: Any, now: Generation, output: dict[str, Any], asked_B: Tensor
) -> tuple[Tensor | None, Sequence[Any], Tensor]:
    """The teacher's log-probabilities of the sampled tokens of some rows, (B, T), 0 elsewhere.

    Returns them, a served teacher's scores of the B rows (``()`` otherwise), and which of the asked rows it could
    score, (B,).
    """
    mask = output["completion_mask"] * asked_B.unsqueeze(1)
    logps = torch.zeros(mask.shape, device=mask.device)
    if not isinstance(trainer.teacher, ServedTeacher):
        _score_tokens(trainer, output, asked_B.nonzero().flatten().tolist(), logps)
        return logps, (), asked_B
    scores, left_out = trainer.teacher.score_batch(now.rows, output, mask, trainer.chat_template_kwargs)
    count = trainer.accelerator.gather(left_out.sum()).sum()
    trainer._metrics["train"]["kepo/unasked"].append(float(count))
    scored = mask.bool() & ~left_out.unsqueeze(1)
    logps[scored] = torch.cat([score.own for score in scores]).to(mask.device)
    return logps, scores, asked_B & ~left_out


@torch.no_grad()
def _score_tokens(trainer: Any, output: dict[str, Any], rows: list[int], logps_BT: Tensor) -> None:
    """Fill in the log-probabilities of ``rows`` under a loaded teacher, at the temperature that the student samples at.

    A sharded teacher needs every process equally often: one without rows passes its first row and drops the result.
    """
    teacher, size = trainer.teacher, trainer.teacher.batch_size
    for part in range(largest(trainer.accelerator, math.ceil(len(rows) / size))):
        own = rows[part * size : (part + 1) * size]
        asked = own or [0]
        ids = output["completion_ids"][asked]
        hidden = teacher.hidden_states(output, asked).flatten(0, 1)
        found = token_log_probs(hidden, teacher.head, ids.flatten(), trainer.temperature)
        if own:
            logps_BT[own] = found.view(ids.shape).to(logps_BT.device)


@torch.no_grad()
def _student_logps(trainer: Any, output: dict[str, Any]) -> Tensor:
    """The student's own, log π_θ_old under the plain prompt, (B, T): TRL's if it has computed them."""
    if (old := output.get("old_per_token_logps")) is not None:
        return old  # type: ignore[no-any-return]
    names = (*MODEL_FIELDS, "num_images", "num_tiles")
    fields = {name: output[name] for name in names if output.get(name) is not None}
    trainer._further = {name.removeprefix(FURTHER): output[name] for name in output if name.startswith(FURTHER)}
    ids, attention = (
        torch.cat([output[f"prompt_{part}"], output[f"completion_{part}"]], dim=1) for part in ("ids", "mask")
    )
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids,
            attention,
            output["completion_ids"].shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
            **fields,
        )
    return logps  # type: ignore[no-any-return]


def _guided_tokens(scores: Sequence[Any], mask_BT: Tensor, gated_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A served teacher's top tokens at the gated tokens of each row, for `top_k.gather_targets`."""
    ids, log_probs = [], []
    for score, mask, gated in zip(scores, mask_BT.bool().cpu(), (gated_BT > 0).cpu(), strict=True):
        kept = gated[mask] if len(score.ids) else torch.zeros(0, dtype=torch.bool)
        ids.append(score.ids[kept])
        log_probs.append(score.log_probs[kept])
    return ids, log_probs


# The teacher's own answers ------------------------------------------------------------------------------------------


def teacher_right(trainer: Any, rows: Sequence[Row]) -> Tensor:
    """Whether the teacher's own answer to each row's prompt is right, (B,) of 1 and 0: its ``gate_reward`` reaches τ.

    The teacher answers greedily, once for each prompt that this process meets in a run.
    """
    keys = [_key(row) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if key not in trainer.answered}
    # Rewards are gathered, and a sharded teacher must be called equally often: spare rows fill up.
    count = largest(trainer.accelerator, len(new))
    if count:
        asked = [*new.values(), *[rows[0]] * (count - len(new))]
        prompts = [with_images(row["prompt"], row) for row in asked]
        wanted = prompts if trainer.teacher.collective else prompts[: len(new)]
        template = trainer.chat_template_kwargs
        texts = trainer.teacher.answer(wanted, max_tokens=trainer.max_completion_length, template=template)
        texts += [""] * (count - len(texts))
        said = [Completion(_tokens(trainer, text), text, finished=True) for text in texts]
        rewards, _ = trainer.score_apart(asked, prompts, said)
        signal = trainer.signal("gate_reward", rewards)[trainer.accelerator.process_index * count :]
        trainer.answered |= {key: bool(signal[i] >= trainer.args.tau) for i, key in enumerate(new)}
    return torch.tensor([float(trainer.answered[key]) for key in keys], device=trainer.accelerator.device)


def _tokens(trainer: Any, text: str) -> list[int]:
    return [*trainer._tokenizer(text, add_special_tokens=False)["input_ids"], trainer._tokenizer.eos_token_id]


def _key(row: Row) -> str:
    """A digest of a row: its prompt, its pictures, and the columns that reward functions read."""
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in row.items() if k not in ("image", "images"))).encode())
    for image in images_of(row):
        shape = repr((getattr(image, "mode", ""), getattr(image, "size", ""))).encode()
        digest.update(shape + (image.tobytes() if hasattr(image, "tobytes") else repr(image).encode()))
    return digest.hexdigest()
