"""Every gate by hand, by property and by limit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kepo_core.method import gates, options
from kepo_core.method.gates import GATES, Known

T = torch.tensor
NAN = math.nan


def known(rewards: list[float], group: int = 2, **given: torch.Tensor) -> Known:
    """Rows of three tokens, the last of them padding in every second row."""
    mask = torch.ones(len(rewards), 3)
    mask[1::2, 2] = 0
    zeros, right = torch.zeros(len(rewards), 3), torch.ones(len(rewards), dtype=torch.bool)
    kinds = {"student_logps_BT": zeros, "teacher_logps_BT": zeros, "teacher_right_B": right, "mask_BT": mask}
    return Known(T(rewards), 1.0, group, torch.zeros(len(rewards)), **(kinds | given))


def column(gate: gates.Gate, given: Known) -> list[float]:
    return gates.checked(gate(given), given)[:, 0].tolist()


def test_the_parameter_names_every_gate() -> None:
    assert tuple(GATES) == options.GATES
    costly = {name: set(gates.needs_of(gate)) for name, gate in GATES.items() if gates.needs_of(gate)}
    assert costly == {"corrective": {"logps"}, "unsure": {"logps"}, "aligned": {"logps"}, "teacher": {"answers"}}


def test_gates_that_say_yes_or_no_by_hand() -> None:
    given = known([0.0, 1.0, 2.0, NAN])
    assert column(gates.reward, given) == [0, 1, 1, 0]
    assert column(gates.below, given) == [1, 0, 0, 0]
    assert column(gates.always, given) == [1, 1, 1, 0]
    answers = known([0.0, 1.0, 2.0, NAN], teacher_right_B=T([True, True, False, True]))
    assert column(gates.teacher, answers) == [1, 1, 0, 0]


def test_scopes_weights_by_hand() -> None:
    """Token means −1, −2, −3 of three wrong rollouts; the longest log-probability is not the largest mean."""
    logps = T([[-1.0, -1.0, -1.0], [-2.0, -2.0, 99.0], [-3.0, -3.0, -3.0], [0.0, 0.0, 0.0]])
    powers = [math.exp(-1), math.exp(-2), math.exp(-3)]
    wrong = known([0.0, 0.0, 0.0, 1.0], 4, teacher_logps_BT=logps)
    assert column(gates.corrective, wrong) == pytest.approx([3 * p / sum(powers) for p in powers] + [0.0])
    right = known([1.0, 1.0, 1.0, 0.0], 4, student_logps_BT=logps)
    doubts = [1 / p for p in powers]
    assert column(gates.unsure, right) == pytest.approx([3 * d / sum(doubts) for d in doubts] + [0.0])


def test_tokens_where_teacher_and_verdict_agree_by_hand() -> None:
    push = T([[1.0, -1.0, 0.0], [1.0, -1.0, 5.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    given = known([1.0, 0.0, 0.0, NAN], teacher_logps_BT=push - 3, student_logps_BT=torch.full((4, 3), -3.0))
    weights = gates.checked(gates.aligned(given), given)
    assert weights.tolist() == [[1.0, 0.5, 1.0], [0.5, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]


@given(st.integers(0, 300), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_properties_of_all_gates(seed: int, group: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (3 * group,), generator=g).float()
    rewards[rewards == 2] = NAN
    logps = [-5 * torch.rand(3 * group, 3, generator=g) for _ in range(2)]
    given = known(rewards.tolist(), group, student_logps_BT=logps[0], teacher_logps_BT=logps[1])
    for name, gate in GATES.items():
        weights = gates.checked(gate(given), given)
        assert (weights[rewards.isnan()] == 0).all(), name
        if name in ("corrective", "unsure"):  # as much weight as there are chosen rollouts, in every group
            chosen = given.wrong_B if name == "corrective" else given.right_B
            sums, counts = weights.view(-1, group).sum(1), chosen.view(-1, group).sum(1)
            assert torch.allclose(sums, counts.float(), atol=1e-5) and (weights[~chosen] == 0).all()
        # Groups do not see each other.
        first = slice(0, group)
        alone = known(rewards[first].tolist(), group, **{
            "student_logps_BT": logps[0][first], "teacher_logps_BT": logps[1][first], "mask_BT": given.mask_BT[first],
        })  # fmt: skip
        assert torch.allclose(gates.checked(gate(alone), alone), weights[first], atol=1e-6), name


def test_limits() -> None:
    """Equal confidence is no weighting; a teacher that is the student never disagrees; one that knows all is a gate of
    everything; one rollout that is far likelier than the others takes all the weight."""
    rewards = [0.0, 1.0, 0.0, NAN, 1.0, 1.0]
    flat = known(rewards, 3, teacher_logps_BT=torch.full((6, 3), -2.0), student_logps_BT=torch.full((6, 3), -2.0))
    for gate, limit in ((gates.corrective, gates.below), (gates.unsure, gates.reward), (gates.teacher, gates.always)):
        assert column(gate, flat) == column(limit, flat)
    assert torch.equal(gates.aligned(flat), gates.always(flat).expand(6, 3))
    sure = torch.tensor([[-0.1], [-90.0], [-90.0]]).expand(3, 3)
    assert column(gates.corrective, known([0.0, 0.0, 0.0], 3, teacher_logps_BT=sure)) == pytest.approx([3, 0, 0])


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (torch.ones(4), r"the gate returned \(4,\), expected a tensor of shape \(4, 1\) or \(4, 3\)"),
        (torch.ones(2, 1), r"the gate returned \(2, 1\)"),
        ([1.0] * 4, "the gate returned list"),
        (T([[1.0], [-0.5], [1.0], [1.0]]), "the gate gave row 1, token 0 the weight -0.5, expected finite"),
        (T([[1.0, 1.0, NAN]] * 4), "the gate gave row 0, token 2 the weight nan"),
        (T([[1.0], [math.inf], [1.0], [1.0]]), "the gate gave row 1, token 0 the weight inf"),
    ],
)
def test_weights_that_are_none_are_refused(weights: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        gates.checked(weights, known([1.0] * 4))  # type: ignore[arg-type]


def test_weights_carry_no_gradient_and_padding_has_none() -> None:
    given = known([1.0, 1.0])
    weights = gates.checked(torch.full((2, 3), 2.0, requires_grad=True), given)
    assert not weights.requires_grad and weights.tolist() == [[2, 2, 2], [2, 2, 0]]
    behind_padding = gates.checked(T([[1.0, 1.0, 1.0], [1.0, 1.0, NAN]]), given)
    assert behind_padding[1].tolist() == [1, 1, 0]


def test_a_need_that_nobody_meets_is_refused() -> None:
    with pytest.raises(ValueError, match="a gate needs 'hints', expected 'logps' or 'answers'"):
        gates.needs("hints")
