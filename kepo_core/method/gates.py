"""Gates: which of the student's own tokens the teacher guides, and how much. One pure function per published answer.

A gate is a function of what the trainer knows of a generation batch (`Known`) that returns weights: (B, 1), one per
sequence, or (B, T), one per token; finite, at least 0, without gradient. A yes or no is a weight of 1 or 0. It is
called once per generation batch with the rows of all processes, so that it sees whole groups. Its name is the value of
the parameter ``gate``; a function of your own is ``KEPOTrainer(gate=...)``.

A *right* rollout is one whose ``gate_reward`` reaches τ. A rollout that has no such reward (NaN) passes none of the
gates below. To compare them on equal terms, gates that weigh rollouts have a mean weight of 1 over those that they
choose, so that ``distill_coef`` means the same under each.

Example, two groups of two: all that is right, and a gate of one's own that leaves out what everyone gets right.

```python
>>> import torch
>>> from kepo_core import gates
>>> known = gates.Known(
...     reward_B=torch.tensor([0.0, 1.0, 1.0, 1.0]), tau=1.0, group_size=2,
...     advantages_B=torch.tensor([-0.5, 0.5, 0.0, 0.0]), mask_BT=torch.ones(4, 3),
... )
>>> gates.reward(known).flatten().tolist()
[0.0, 1.0, 1.0, 1.0]
>>> def contested(known):
...     return (known.right_B & (known.advantages_B > 0)).float().unsqueeze(1)
>>> contested(known).flatten().tolist()
[0.0, 1.0, 0.0, 0.0]

```
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kepo_core.method.objective import sequence_mean

#: What a gate may need besides rewards: log-probabilities of the sampled tokens, or the teacher's own answers.
LOGPS, ANSWERS = "logps", "answers"
#: The weight, under `aligned`, of tokens at which teacher and verifier disagree.
CONFLICT = 0.5


@dataclass(frozen=True, eq=False)
class Known:
    """What a gate may know of the B rows of a generation batch, those of all processes, members of a group adjacent.

    Attributes:
        reward_B: ``gate_reward``, (B,); NaN where it does not apply, and for rows without tokens or that a served
            teacher cannot score.
        tau: τ, the threshold from which a rollout is right.
        group_size: G.
        advantages_B: Â of Eq. 6 (or as ``scale_rewards`` says), (B,).
        mask_BT: 1 on the tokens of a completion, (B, T).
        student_logps_BT, teacher_logps_BT: log-probabilities of the sampled tokens under the policy that sampled them
            (given the plain prompt) and under the teacher, (B, T), meaningless where the mask is 0; None unless the
            gate needs "logps".
        teacher_right_B: whether the teacher's own greedy answer to the row's prompt is right, (B,) booleans; None
            unless the gate needs "answers".
    """

    reward_B: Tensor
    tau: float
    group_size: int
    advantages_B: Tensor
    mask_BT: Tensor
    student_logps_BT: Tensor | None = None
    teacher_logps_BT: Tensor | None = None
    teacher_right_B: Tensor | None = None

    @property
    def right_B(self) -> Tensor:
        """r_i ≥ τ, (B,) booleans."""
        return self.reward_B >= self.tau

    @property
    def wrong_B(self) -> Tensor:
        """r_i < τ, (B,) booleans; a rollout without a reward is neither right nor wrong."""
        return self.reward_B < self.tau


Gate = Callable[[Known], Tensor]


def needs(*what: str) -> Callable[[Gate], Gate]:
    """Declare what a gate needs besides rewards: "logps", "answers" or both; each costs passes of the teacher.

    Example:
    ```python
    >>> from kepo_core import gates
    >>> @gates.needs("logps")
    ... def surprised(known):
    ...     return (known.teacher_logps_BT < -5.0).float()
    >>> sorted(gates.needs_of(surprised))
    ['logps']

    ```
    """
    if unknown := set(what) - {LOGPS, ANSWERS}:
        raise ValueError(f"a gate needs {sorted(unknown)[0]!r}, expected {LOGPS!r} or {ANSWERS!r}")

    def declare(gate: Gate) -> Gate:
        gate.needs = frozenset(what)  # type: ignore[attr-defined]
        return gate

    return declare


def needs_of(gate: Gate) -> frozenset[str]:
    """What `needs` declared for a gate; nothing for a plain function."""
    return getattr(gate, "needs", frozenset())


def reward(known: Known) -> Tensor:
    """KEPO's gate, I[r_i ≥ τ] of Eq. 7 (arXiv 2602.00400): (B, 1)."""
    return _column(known.right_B)


def below(known: Known) -> Tensor:
    """The opposite gate, I[r_i < τ]: guidance where the student fails, as KDRL argues (arXiv 2506.02208): (B, 1)."""
    return _column(known.wrong_B)


def always(known: Known) -> Tensor:
    """On-policy distillation without a gate (GKD, arXiv 2306.13649): 1 for every rollout with a reward, (B, 1)."""
    return _column(~known.reward_B.isnan())


@needs(LOGPS)
def corrective(known: Known) -> Tensor:
    """SCOPE's path for wrong rollouts (arXiv 2604.10688, Eq. 5): those that do not confuse the teacher count more.

    w_i = n · PPL_T(y_i|x)⁻¹ / Σ_j PPL_T(y_j|x)⁻¹ over the n wrong rollouts j of the group, 0 for others: (B, 1), where
    PPL_T(y|x) is the teacher's perplexity of the completion. The paper's weights sum to 1 in a group (its temperature
    is 1 as here); the factor n is ours.
    """
    assert known.teacher_logps_BT is not None
    return _shared_out(sequence_mean(known.teacher_logps_BT, known.mask_BT), known.wrong_B, known.group_size)


@needs(LOGPS)
def unsure(known: Known) -> Tensor:
    """SCOPE's path for right rollouts (arXiv 2604.10688, Eq. 4): those that were unlikely to the student count more.

    w_i = n · PPL_S(y_i|x) / Σ_j PPL_S(y_j|x) over the n right rollouts j of the group, 0 for others: (B, 1). The paper
    weighs the rollout's own likelihood by it; here it weighs the teacher's guidance, and the factor n is ours.
    """
    assert known.student_logps_BT is not None
    return _shared_out(-sequence_mean(known.student_logps_BT, known.mask_BT), known.right_B, known.group_size)


@needs(ANSWERS)
def teacher(known: Known) -> Tensor:
    """A verified teacher: every rollout of a prompt that the teacher itself answers right, none of others: (B, 1).

    As in teacher-gated distillation (arXiv 2609.02998), which probes the teacher with several answers; here it is one
    greedy answer, right if its ``gate_reward`` reaches τ.
    """
    assert known.teacher_right_B is not None
    return _column(known.teacher_right_B & ~known.reward_B.isnan())


@needs(LOGPS)
def aligned(known: Known) -> Tensor:
    """SG-OPD's gate (arXiv 2606.09304): tokens where the teacher's push and the verdict have one sign; (B, T).

    The push at a token is log π_T − log π_θ, the verdict +1 for a right rollout and −1 for a wrong one. Weight 1 where
    their product is not negative, `CONFLICT` elsewhere, 0 for rollouts without a reward. The paper extrapolates the
    update towards the teacher where they agree, and interpolates it elsewhere; its equations could not be found.
    That the gate changes weights alone, and the weight ½, are ours. Its phased teacher sampling is not part of this.
    """
    assert known.teacher_logps_BT is not None and known.student_logps_BT is not None
    verdict_B = known.right_B.float() - known.wrong_B.float()
    agreeing_BT = (known.teacher_logps_BT - known.student_logps_BT) * verdict_B.unsqueeze(1) >= 0
    return torch.where(agreeing_BT, 1.0, CONFLICT) * always(known)


#: Every gate by its name, a value of the parameter ``gate``.
GATES: dict[str, Gate] = {gate.__name__: gate for gate in (reward, below, always, corrective, unsure, teacher, aligned)}


def checked(weights: Tensor, known: Known) -> Tensor:
    """A gate's weights as float32, without gradient and 0 where the mask is.

    Raises:
        ValueError: they have another shape than (B, 1) or (B, T), or one is negative, infinite or NaN.
    """
    shape = tuple(known.mask_BT.shape)
    found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    if found not in ((shape[0], 1), shape):
        raise ValueError(f"the gate returned {found}, expected a tensor of shape {(shape[0], 1)} or {shape}")
    weights = weights.detach().float()
    if weights.shape[1] > 1:
        weights = torch.where(known.mask_BT.bool(), weights, 0.0)
    if not (good := torch.isfinite(weights) & (weights >= 0)).all():
        row, token = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"the gate gave row {row}, token {token} the weight {weights[row, token]:g}, expected finite numbers of at "
            "least 0"
        )
    return weights


def _column(chosen_B: Tensor) -> Tensor:
    return chosen_B.float().unsqueeze(1)


def _shared_out(scores_B: Tensor, chosen_B: Tensor, group_size: int) -> Tensor:
    """Softmax of the scores over the chosen members of each group, times their number; 0 for others: (B, 1)."""
    chosen = chosen_B.view(-1, group_size)
    shares = scores_B.float().view(-1, group_size).masked_fill(~chosen, -torch.inf).softmax(1)
    return torch.where(chosen, shares * chosen.sum(1, keepdim=True), 0.0).view(-1, 1)
