"""Eq. 2 and 7 as a whole, for any shape: against plain Python loops, and against finite differences."""

import math
from typing import Any

import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kepo_core.method import objective


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Groups, lengths (0 included), policies, rewards and choices; float64 throughout."""
    groups, size, width, vocabulary = (draw(st.integers(*r)) for r in ((1, 3), (2, 4), (1, 5), (2, 6)))
    rows = groups * size
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    rewards = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=rows, max_size=rows)))
    return {
        "size": size,
        "student": 2 * torch.randn(rows, width, vocabulary, generator=g, dtype=torch.float64),
        "teacher": 2 * torch.randn(rows, width, vocabulary, generator=g, dtype=torch.float64),
        "old": -3 * torch.rand(rows, width, generator=g, dtype=torch.float64),
        "reference": -3 * torch.rand(rows, width, generator=g, dtype=torch.float64),
        "tokens": torch.randint(0, vocabulary, (rows, width), generator=g),
        "mask": (torch.arange(width) < lengths[:, None]).long(),
        "rewards": rewards.double(),
        "tau": draw(st.sampled_from([0.0, 1.0, 2.0])),
        "weights": torch.randint(0, 3, (rows, width), generator=g).double() / 2,
        "kind": draw(st.sampled_from(objective.ADVANTAGES)),
        "corrected": draw(st.booleans()),
        "clip": draw(st.sampled_from(["ppo", "eq5"])),
        "level": draw(st.sampled_from(["token", "sequence"])),
        "normalizer": draw(st.sampled_from(objective.NORMALIZERS)),
        "divergence": draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "temperature": draw(st.sampled_from([0.5, 1.0, 3.0])),
        "epsilon": draw(st.sampled_from([0.1, 0.2, 0.5])),
        "coef": draw(st.sampled_from([0.0, 0.7, 1.0])),
        "beta": draw(st.sampled_from([0.0, 0.1])),
    }


def by_functions(b: dict[str, Any], student: torch.Tensor) -> torch.Tensor:
    """The loss from the package's functions."""
    logps = student.log_softmax(-1).gather(-1, b["tokens"].unsqueeze(-1)).squeeze(-1)
    ratio = objective.importance_ratio(logps, b["old"], b["mask"], b["level"])
    advantages = reference.advantages(b["rewards"], b["size"], b["kind"])
    policy = reference.weighted_advantage(ratio, advantages, b["epsilon"], b["clip"])
    divergence = objective.divergence(student, b["teacher"], b["divergence"], b["temperature"])
    weights = b["weights"] * (b["rewards"] >= b["tau"]).unsqueeze(1)
    term = objective.distillation_term(divergence, b["mask"], weights, b["normalizer"])
    kl = objective.kl_to_reference(logps, b["reference"], ratio if b["corrected"] else 1.0)
    return reference.kepo_loss(policy, b["mask"], term, kl, coef=b["coef"], beta=b["beta"])


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def kl_divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def advantage_by_loops(b: dict[str, Any], i: int) -> float:
    start = i // b["size"] * b["size"]
    group = b["rewards"].tolist()[start : start + b["size"]]
    reward = group[i - start]
    if b["kind"] == "rloo":
        return reward - (sum(group) - reward) / (len(group) - 1)
    mean = sum(group) / len(group)
    if b["kind"] == "none":
        return reward - mean
    others = group if b["kind"] == "group" else b["rewards"].tolist()
    centre = sum(others) / len(others)
    return (reward - mean) / (math.sqrt(sum((r - centre) ** 2 for r in others) / (len(others) - 1)) + 1e-4)


def clipped_by_loops(b: dict[str, Any], ratio: float, advantage: float) -> float:
    clipped = min(max(ratio, 1 - b["epsilon"]), 1 + b["epsilon"])
    if b["clip"] == "ppo":
        return min(ratio * advantage, clipped * advantage)
    return min(ratio, clipped) * advantage


def divergence_by_loops(b: dict[str, Any], i: int, t: int) -> float:
    student, teacher = (softmax([x / b["temperature"] for x in b[k][i, t].tolist()]) for k in ("student", "teacher"))
    beta = b["divergence"]
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    middle = [beta * x + (1 - beta) * y for x, y in zip(teacher, student, strict=True)]
    return beta * kl_divergence(teacher, middle) + (1 - beta) * kl_divergence(student, middle)


def by_loops(b: dict[str, Any]) -> float:
    """The same from the printed equations, token by token, without tensor arithmetic."""
    rows, policy, kl, distill, tokens, gated_tokens = len(b["mask"]), 0.0, 0.0, 0.0, 0, 0.0
    for i in range(rows):
        length = int(b["mask"][i].sum())
        tokens += length
        if not length:
            continue
        logps = [math.log(softmax(b["student"][i, t].tolist())[int(b["tokens"][i, t])]) for t in range(length)]
        changes = [logps[t] - float(b["old"][i, t]) for t in range(length)]
        if b["level"] == "sequence":
            changes = [sum(changes) / length] * length
        advantage = advantage_by_loops(b, i)
        policy += sum(clipped_by_loops(b, math.exp(c), advantage) for c in changes) / length
        apart = [float(b["reference"][i, t]) - logps[t] for t in range(length)]
        ratios = [math.exp(c) if b["corrected"] else 1.0 for c in changes]
        kl += sum(w * (math.exp(d) - d - 1) for w, d in zip(ratios, apart, strict=True)) / length
        if float(b["rewards"][i]) >= b["tau"]:
            weights = b["weights"][i].tolist()
            own = sum(weights[t] * divergence_by_loops(b, i, t) for t in range(length))
            gated_tokens += sum(weights[:length])
            distill += own / length if b["normalizer"] == "sequences" else own
    whole = {"sequences": rows, "tokens": tokens, "gated_tokens": gated_tokens}[b["normalizer"]]
    return -policy / rows + b["coef"] * (distill / whole if whole else 0.0) + b["beta"] * kl / rows


@given(batches())
@settings(max_examples=300, deadline=None)
def test_the_functions_give_what_the_equations_say(b: dict[str, Any]) -> None:
    assert math.isclose(by_functions(b, b["student"]).item(), by_loops(b), rel_tol=1e-9, abs_tol=1e-9)


@given(batches())
@settings(max_examples=40, deadline=None)
def test_gradients_match_finite_differences_and_reach_the_student_alone(b: dict[str, Any]) -> None:
    fixed = ("teacher", "old", "reference", "rewards")
    for name in fixed:
        b[name].requires_grad_()
    student = b["student"].requires_grad_()
    by_functions(b, student).backward()
    assert student.grad is not None and all(b[name].grad is None for name in fixed)
    assert not student.grad[b["mask"] == 0].any()  # masked tokens have no gradient
    for name in fixed:
        b[name] = b[name].detach()
    b["epsilon"] = 0.2
    logps = student.detach().log_softmax(-1).gather(-1, b["tokens"].unsqueeze(-1)).squeeze(-1)
    ratio = objective.importance_ratio(logps, b["old"], b["mask"], b["level"])
    if ((ratio - 0.8).abs() > 1e-4).all() and ((ratio - 1.2).abs() > 1e-4).all():  # the clip has kinks
        assert gradcheck(lambda x: by_functions(b, x), (student,))


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_groups_and_of_members_does_not_matter(b: dict[str, Any], rng: Any) -> None:
    """Groups, and members within a group, may be permuted: the sum over i does not depend on their order."""
    size, rows = b["size"], len(b["mask"])
    order = []
    for group in rng.sample(range(rows // size), rows // size):
        order += rng.sample(range(group * size, (group + 1) * size), size)
    by_row = ("student", "teacher", "old", "reference", "tokens", "mask", "rewards", "weights")
    moved = b | {name: b[name][order] for name in by_row}
    was, now = by_functions(b, b["student"]).item(), by_functions(moved, moved["student"]).item()
    assert math.isclose(was, now, rel_tol=1e-9, abs_tol=1e-9)
