"""Every equation by hand, by property, by limit and against float64 finite differences."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kepo_core.method import objective

T = torch.tensor


def test_sequence_mean_by_hand_and_with_an_empty_row() -> None:
    values = T([[1.0, 3.0, float("nan")], [4.0, 9.0, 9.0], [float("inf"), 1.0, 1.0]])
    mask = T([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert objective.sequence_mean(values, mask).tolist() == [2.0, 4.0, 0.0]


# Eq. 3 ------------------------------------------------------------------------------------------------------------


def test_ratio_by_hand() -> None:
    logps, old = T([[math.log(0.5), math.log(0.2)]]), T([[math.log(0.25), math.log(0.4)]])
    mask = T([[1, 1]])
    assert objective.importance_ratio(logps, old, mask)[0].tolist() == pytest.approx([2.0, 0.5])
    assert objective.importance_ratio(logps, old, mask, "sequence").tolist() == [[pytest.approx(1.0)]]
    only_first = objective.importance_ratio(logps, old, T([[1, 0]]), "sequence")
    assert only_first.tolist() == [[pytest.approx(2.0)]]


def test_ratio_is_one_on_policy_and_old_log_probabilities_get_no_gradient() -> None:
    logps = torch.randn(2, 3, requires_grad=True)
    old = logps.detach().clone().requires_grad_()
    for level in ("token", "sequence"):
        ratio = objective.importance_ratio(logps, old, torch.ones(2, 3), level)
        assert torch.equal(ratio, torch.ones_like(ratio))
        ratio.sum().backward()
    assert old.grad is None and logps.grad is not None and logps.grad.abs().sum() > 0


# Eq. 5 ------------------------------------------------------------------------------------------------------------


def test_ppo_and_eq5_differ_where_they_should() -> None:
    """A = −1, ε = 0.2. ppo: min(−0.5, −0.8) and min(−1.5, −1.2); eq5: −min(0.5, 0.8) and −min(1.5, 1.2)."""
    ratio, minus = T([[0.5, 1.5]]), T([-1.0])
    assert reference.weighted_advantage(ratio, minus, 0.2, "ppo")[0].tolist() == pytest.approx([-0.8, -1.5])
    assert reference.weighted_advantage(ratio, minus, 0.2, "eq5")[0].tolist() == pytest.approx([-0.5, -1.2])
    for clip in ("ppo", "eq5"):  # for A = +1 both are min(r, 1.2)
        assert reference.weighted_advantage(ratio, T([1.0]), 0.2, clip)[0].tolist() == pytest.approx([0.5, 1.2])


@given(st.floats(0.01, 5), st.floats(-3, 3), st.floats(0.01, 0.9))
@settings(deadline=None)
def test_clipping_never_promises_more_than_the_ratio_and_is_silent_near_one(r: float, a: float, eps: float) -> None:
    ratio, adv = T([[r]], dtype=torch.float64), T([a], dtype=torch.float64)
    ppo = reference.weighted_advantage(ratio, adv, eps, "ppo").item()
    assert ppo <= r * a + 1e-12
    if 1 - eps <= r <= 1 + eps:
        assert ppo == pytest.approx(r * a)
        assert reference.weighted_advantage(ratio, adv, eps, "eq5").item() == pytest.approx(r * a)


def test_advantages_carry_no_gradient_through_the_policy_term() -> None:
    ratio, adv = torch.ones(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    reference.weighted_advantage(ratio, adv, 0.2).sum().backward()
    assert adv.grad is None
    assert ratio.grad is not None
    assert torch.allclose(ratio.grad, adv.detach().unsqueeze(-1).expand(2, 3))


# Eq. 4, 6 ---------------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = T([2.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert reference.advantages(rewards, 3, "none").tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    assert objective.leave_one_out(rewards, 3).tolist() == [1.5, -1.5, 0.0, 0.0, 0.0, 0.0]
    assert reference.advantages(rewards, 3, "group")[:3].tolist() == pytest.approx([1 / 1.0001, -1 / 1.0001, 0.0])


@given(st.integers(2, 6), st.lists(st.floats(-2, 2), min_size=12, max_size=12))
@settings(deadline=None)
def test_advantages_sum_to_zero_in_each_group_and_rloo_leaves_one_out(group: int, values: list[float]) -> None:
    rewards = T(values[: 12 // group * group], dtype=torch.float64)
    for kind in objective.ADVANTAGES:
        sums = reference.advantages(rewards, group, kind).view(-1, group).sum(1)
        assert torch.allclose(sums, torch.zeros_like(sums), atol=1e-9)
    rloo = objective.leave_one_out(rewards, group)
    for i, r in enumerate(rewards):
        members = rewards.view(-1, group)[i // group]
        assert rloo[i].item() == pytest.approx((r - (members.sum() - r) / (group - 1)).item(), abs=1e-9)


def test_advantages_are_constants() -> None:
    rewards = T([2.0, 0.0], requires_grad=True)
    for advantages in (objective.advantages, objective.leave_one_out):
        assert not advantages(rewards, 2).requires_grad


def test_groups_do_not_see_each_other() -> None:
    a = objective.advantages(T([1.0, 0.0, 5.0, 9.0]), 2)
    b = objective.advantages(T([1.0, 0.0, -7.0, 2.0]), 2)
    assert torch.equal(a[:2], b[:2])


@pytest.mark.parametrize(("count", "group"), [(5, 2), (4, 1), (3, 4)])
def test_incomplete_groups_raise(count: int, group: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        objective.advantages(torch.zeros(count), group)


# KL ---------------------------------------------------------------------------------------------------------------


def test_kl_estimate_is_unbiased_zero_at_equality_and_pushes_towards_the_reference() -> None:
    logits_s, logits_r = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    log_s, log_r = logits_s.log_softmax(0), logits_r.log_softmax(0)
    expected = (log_s.exp() * objective.kl_to_reference(log_s, log_r)).sum()
    assert expected.item() == pytest.approx((log_s.exp() * (log_s - log_r)).sum().item())
    assert torch.equal(objective.kl_to_reference(log_s, log_s), torch.zeros_like(log_s))
    assert (objective.kl_to_reference(log_s, log_r) >= 0).all()
    x = T([-1.0], requires_grad=True)
    objective.kl_to_reference(x, T([-2.0])).sum().backward()
    assert x.grad is not None and x.grad.item() > 0  # descending lowers log π_θ towards the reference


# The teacher in the advantage -------------------------------------------------------------------------------------


def test_the_log_ratio_as_advantage_has_the_gradient_of_the_reverse_kl_in_expectation() -> None:
    """Over all tokens of a vocabulary, each as often as the student samples it."""
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, dtype=torch.float64)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    advantage = objective.teacher_advantage(log_t, log_s)
    assert not advantage.requires_grad and torch.equal(advantage, log_t - log_s)
    (log_s.detach().exp() * advantage * log_s).sum().backward()  # E[Â ∇ log π]
    by_sampling, student.grad = student.grad, None
    objective.divergence(student, teacher, beta=1.0).sum().backward()
    assert torch.allclose(by_sampling, -student.grad, atol=1e-12) and student.grad.abs().max() > 1e-2


@given(st.floats(-40, 0), st.floats(-40, 0))
@settings(deadline=None)
def test_the_bounded_form_has_the_sign_of_the_log_ratio_and_stays_in_its_bounds(teacher: float, student: float) -> None:
    """(π_T^α − π_θ^α) / α, whose limit α → 0 is the log-ratio, at α = 1."""
    log_t, log_s = T([[teacher]], dtype=torch.float64), T([[student]], dtype=torch.float64)
    ratio, bounded = (objective.teacher_advantage(log_t, log_s, bounded=b).item() for b in (False, True))
    assert -1 <= bounded <= 1 and (bounded == 0 or math.copysign(1, bounded) == math.copysign(1, ratio))
    assert bounded == pytest.approx(math.exp(teacher) - math.exp(student), abs=1e-12)
    alpha = 1e-6
    assert ((alpha * log_t).exp() - (alpha * log_s).exp()).item() / alpha == pytest.approx(ratio, abs=1e-2)


# Divergence -------------------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    """p_T = (3/4, 1/4), p_θ = (1/2, 1/2)."""
    teacher, student = T([0.75, 0.25]).log(), T([0.5, 0.5]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    m = (0.625, 0.375)
    jsd = 0.5 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1])) + 0.5 * (
        0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    )
    for beta, expected in ((0.0, forward), (1.0, reverse), (0.5, jsd)):
        assert objective.divergence(student, teacher, beta).item() == pytest.approx(expected, rel=1e-5)
    assert objective.divergence(student, teacher).item() == pytest.approx(forward, rel=1e-5)
    # a skewed mixture distinguishes β from 1 − β: m = 0.25·p_T + 0.75·p_θ
    m = (0.25 * 0.75 + 0.75 * 0.5, 0.25 * 0.25 + 0.75 * 0.5)
    skewed = 0.25 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1])) + 0.75 * (
        0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    )
    assert objective.divergence(student, teacher, 0.25).item() == pytest.approx(skewed, rel=1e-5)


@given(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.floats(0.2, 5), st.integers(0, 1000))
@settings(deadline=None)
def test_divergence_is_zero_only_at_equality(beta: float, temperature: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    assert objective.divergence(a, a + 3.0, beta, temperature).abs().max() < 1e-12
    assert (objective.divergence(a, b, beta, temperature) > 0).all()
    scaled = objective.divergence(a * temperature, b * temperature, beta, temperature)
    assert torch.allclose(scaled, objective.divergence(a, b, beta))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_gradient_matches_finite_differences_and_spares_the_teacher(beta: float) -> None:
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s: objective.divergence(s, teacher.detach(), beta, 1.7), (student,))
    objective.divergence(student, teacher, beta).sum().backward()
    assert teacher.grad is None


# Normalisers ------------------------------------------------------------------------------------------------------


def test_distillation_term_by_hand() -> None:
    divergence = T([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0], [5.0, 7.0, 9.0]])
    mask = T([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    gate = T([[1.0], [1.0], [0.0]])
    assert objective.distillation_term(divergence, mask, gate, "sequences").item() == pytest.approx((2 + 4) / 3)
    assert objective.distillation_term(divergence, mask, gate, "tokens").item() == pytest.approx((1 + 3 + 4) / 6)
    assert objective.distillation_term(divergence, mask, gate, "gated_tokens").item() == pytest.approx((1 + 3 + 4) / 3)
    assert objective.distillation_term(divergence, mask, gate, "tokens", 16).item() == pytest.approx(0.5)
    assert objective.distillation_term(divergence, mask, gate, "tokens", 0.5).item() == pytest.approx(16)


def test_weights_per_sequence_and_per_token_by_hand() -> None:
    divergence, mask = T([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0], [5.0, 7.0, 9.0]]), T([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    by_row, by_token = T([[0.5], [2.0], [0.0]]), T([[1.0, 0.5, 7.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    for weights, sums, means in ((by_row, (0.5 * 4, 8.0, 0.0), 3.0), (by_token, (1 + 1.5, 0.0, 9.0), 2.5)):
        term = [objective.distillation_term(divergence, mask, weights, n).item() for n in objective.NORMALIZERS]
        assert term[0] == pytest.approx((sums[0] / 2 + sums[1] / 1 + sums[2] / 3) / 3)
        assert term[1] == pytest.approx(sum(sums) / 6) and term[2] == pytest.approx(sum(sums) / means)
    ones = [objective.distillation_term(divergence, mask, torch.ones(shape)) for shape in ((3, 1), (3, 3))]
    assert torch.equal(*ones)


@pytest.mark.parametrize("normalizer", objective.NORMALIZERS)
def test_a_closed_gate_gives_zero_and_zero_gradient_whatever_stands_behind_it(normalizer: str) -> None:
    divergence = torch.full((2, 3), float("nan"), requires_grad=True)
    term = objective.distillation_term(divergence, torch.ones(2, 3), torch.zeros(2, 1), normalizer)
    assert term.item() == 0.0
    term.backward()
    assert divergence.grad is not None and torch.equal(divergence.grad, torch.zeros(2, 3))


@given(st.integers(0, 500), st.sampled_from(objective.NORMALIZERS))
@settings(max_examples=40, deadline=None)
def test_padding_changes_nothing_and_micro_batches_add_up(seed: int, normalizer: str) -> None:
    g = torch.Generator().manual_seed(seed)
    divergence = torch.rand(4, 5, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, 6, (4, 1), generator=g)
    mask = (torch.arange(5) < lengths).long()
    gate = torch.randint(0, 2, (4, 1), generator=g).double()
    whole = objective.distillation_term(divergence, mask, gate, normalizer)
    padded = objective.distillation_term(
        torch.cat([divergence, torch.full((4, 2), 99.0)], 1), torch.cat([mask, torch.zeros(4, 2)], 1), gate, normalizer
    )
    assert torch.allclose(whole, padded.to(whole.dtype))
    denominator = {"sequences": 4.0, "tokens": mask.sum(), "gated_tokens": (mask * gate).sum()}[normalizer]
    parts = [
        objective.distillation_term(divergence[i : i + 2], mask[i : i + 2], gate[i : i + 2], normalizer, denominator)
        for i in (0, 2)
    ]
    assert torch.allclose(whole, parts[0] + parts[1])


# Hint importance --------------------------------------------------------------------------------------------------


def test_hint_importance_is_truncated_at_one_and_carries_no_gradient() -> None:
    plain, hinted = T([[math.log(0.1), math.log(0.9)]], requires_grad=True), T([[math.log(0.4), math.log(0.3)]])
    weights = objective.hint_importance_weights(plain, hinted)
    assert weights[0].tolist() == pytest.approx([0.25, 1.0]) and not weights.requires_grad


# Eq. 2, 7 ---------------------------------------------------------------------------------------------------------


def test_kepo_loss_by_hand() -> None:
    policy, mask = T([[1.0, 2.0], [4.0, 9.0]]), T([[1, 1], [1, 0]])
    kl = T([[0.5, 0.5], [1.5, 9.0]])
    loss = reference.kepo_loss(policy, mask, T(2.0), kl, coef=0.5, beta=0.1)
    assert loss.item() == pytest.approx(-(1.5 + 4.0) / 2 + 0.5 * 2.0 + 0.1 * (0.5 + 1.5) / 2)
    assert reference.kepo_loss(T([[1.0], [3.0]]), mask).item() == pytest.approx(-2.0)  # sequence-level weights
    assert reference.kepo_loss(torch.zeros(2, 1), mask, T(2.0)).item() == 2.0  # the default coefficient is 1


def test_signs_descending_the_loss_favours_good_answers_and_approaches_teacher_and_reference() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher, prior = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    tokens, mask, adv = torch.randint(0, 5, (2, 3)), torch.ones(2, 3), T([1.0, -1.0], dtype=torch.float64)

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logps = x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        ref = prior.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        policy = reference.weighted_advantage(objective.importance_ratio(logps, logps, mask), adv, 0.2)
        return logps, policy, objective.kl_to_reference(logps, ref)

    def step(loss: torch.Tensor) -> torch.Tensor:
        return (logits - 0.01 * torch.autograd.grad(loss, logits)[0]).detach()

    before, policy, kl = parts(logits)
    after, _, _ = parts(step(reference.kepo_loss(policy, mask)))
    assert after[0].sum() > before[0].sum() and after[1].sum() < before[1].sum()
    d = objective.divergence(logits, teacher)
    closer = step(
        reference.kepo_loss(policy.detach() * 0, mask, objective.distillation_term(d, mask, torch.ones(2, 1)))
    )
    assert objective.divergence(closer, teacher).sum() < d.sum()
    _, policy, kl = parts(logits)
    _, _, kl_after = parts(step(reference.kepo_loss(policy.detach() * 0, mask, kl_BT=kl, beta=1.0)))
    assert kl_after.sum() < kl.sum()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("level", lambda: objective.importance_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "word")),
        ("normalizer", lambda: objective.distillation_term(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "mean")),
    ],
)
def test_an_unknown_choice_names_the_argument_and_the_choices(name: str, call) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*, expected one of"):
        call()


# KL to the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_kl_estimate_times_the_ratio_is_the_kl_in_value_and_gradient(on_policy: bool) -> None:
    """In expectation over samples from π_old, summed exactly over a vocabulary of seven."""
    g = torch.Generator().manual_seed(0)
    logits, old, reference = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    old = logits.detach().log_softmax(-1) if on_policy else old.log_softmax(-1)
    reference = reference.log_softmax(-1)
    kl = (logits.softmax(-1) * (logits.log_softmax(-1) - reference)).sum()
    (wanted,) = torch.autograd.grad(kl, logits)

    def expectation(corrected: bool) -> tuple[torch.Tensor, torch.Tensor]:
        logps = logits.log_softmax(-1)
        ratio = (logps - old).exp() if corrected else 1.0
        value = (old.exp() * objective.kl_to_reference(logps, reference, ratio)).sum()
        return value, torch.autograd.grad(value, logits)[0]

    value, gradient = expectation(True)
    assert torch.allclose(value, kl) and torch.allclose(gradient, wanted)
    plain, other = expectation(False)
    assert not torch.allclose(other, wanted, rtol=0.1)
    if on_policy:  # the right value, but the gradient of the other direction
        assert torch.allclose(plain, kl)
        backward = (reference.exp() * (reference - logits.log_softmax(-1))).sum()
        assert torch.allclose(other, torch.autograd.grad(backward, logits)[0])


@pytest.mark.parametrize("loss_type", objective.LOSS_TYPES)
def test_aggregate_by_hand(loss_type: str) -> None:
    values, mask = T([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    wanted = {
        "grpo": (1.5 + 4) / 2,
        "sapo": (1.5 + 4) / 2,
        "luspo": (3 + 4) / 2,
        "dr_grpo": (3 + 4) / 2 / 5,
        "bnpo": 7 / 3,
    }
    got = objective.aggregate(values, mask, loss_type, tokens=8.0, longest=5)
    assert got.item() == pytest.approx(wanted.get(loss_type, 7 / 8))
    assert objective.aggregate(values, torch.zeros_like(mask), loss_type).item() == 0
    assert objective.aggregate(values[1:], mask[1:], loss_type).item() == 4  # one token, divided by one


def test_an_unknown_loss_type_is_named() -> None:
    with pytest.raises(ValueError, match="loss_type is 'ppo', expected one of grpo"):
        objective.aggregate(T([[1.0]]), torch.ones(1, 1), "ppo")


def test_rewards_that_do_not_apply_are_left_out_of_advantages() -> None:
    rewards = T([2.0, math.nan, 0.0, math.nan, math.nan, math.nan])
    assert objective.advantages(rewards, 3).tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0]
    assert objective.leave_one_out(rewards, 3).tolist() == [2.0, 0.0, -2.0, 0.0, 0.0, 0.0]
    scaled = reference.advantages(rewards, 3, "group")[:3].tolist()
    assert scaled == pytest.approx([1 / (2**0.5 + 1e-4), 0.0, -1 / (2**0.5 + 1e-4)])
