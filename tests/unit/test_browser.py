"""The rollout browser without a front end: what its controls choose is what its card shows."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from kepo_core.data.records import Question
from kepo_core.errors import ParamError
from kepo_core.experiment import browser
from kepo_core.experiment.browser import FILTERS, RolloutBrowser, browse
from kepo_core.method.rollouts import Rollout, write_rollouts
from kepo_core.pages import gallery
from kepo_core.params import Params
from kepo_core.runs.run import Run

EVIL = "<script>alert(1)</script>"
RIGHT = Rollout(step=1, generation=0, row=0, group=0, id="q0", completion="x", tokens=9, finished=True,
                facts={"outcome": "correct", "letter": "B", "format_ok": True, "accuracy": 1.0},
                rewards={"accuracy_reward": 1.0, "format_reward": 1.0}, reward=2.0, gate=True)  # fmt: skip
WRONG = replace(RIGHT, facts=RIGHT.facts | {"outcome": "wrong", "accuracy": 0.0}, reward=1.0, gate=False)


def wrong(**facts):
    return replace(WRONG, facts=WRONG.facts | facts)


#: Groups by step, two rollouts each.
GROUPS = {
    "right": (1, RIGHT, RIGHT),
    "mixed": (1, RIGHT, WRONG),
    "wrong": (2, WRONG, wrong(outcome="ambiguous")),
    "rescued": (3, replace(RIGHT, injected=True, exploration="rescued"), replace(WRONG, exploration="rescued"),
                replace(WRONG, replaced=True, exploration="rescued")),
    "in vain": (3, replace(WRONG, exploration="exhausted"),
                replace(wrong(outcome="truncated", format_ok=False), exploration="exhausted")),
}  # fmt: skip


@pytest.fixture
def questions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    text = {"question": f"What? {EVIL}", "options": ("ring", "cross"), "answer": "B", "image": tmp_path / "x.png"}
    return [Question(f"q{k}", "d", "MRI", "t", **text) for k in range(len(GROUPS))]


def rollouts():
    return [
        replace(rollout, step=step, group=k, row=2 * k + min(i, 1), id=f"q{k}", completion=f"{name} {EVIL}")
        for k, (name, (step, *group)) in enumerate(GROUPS.items())
        for i, rollout in enumerate(group)
    ]


@pytest.fixture
def shown(questions):
    return RolloutBrowser(pd.DataFrame([rollout.columns() for rollout in rollouts()]), questions)


def name(shown):
    """Which of GROUPS the card is of."""
    (found,) = {name for name in GROUPS if f">{name} &lt;" in shown.card.value} or {None}
    return found


def walk(shown):
    """The groups from here on, by the button; a step's number is that of its card."""
    seen = [name(shown)]
    for _ in GROUPS:
        if not shown.next.disabled:
            shown.next.click()
            seen.append(name(shown))
            assert str(shown.step.value) == shown.card.value.split("<b>Step ")[1][0]
    return seen


def test_the_first_group_is_shown_as_the_report_shows_it(shown, questions):
    assert (name(shown), shown.place.value, shown.step.value) == ("right", "1 of 5", 1)
    frame = pd.DataFrame([rollout.columns() for rollout in rollouts()])
    assert gallery.card(frame[frame["group"] == 0], questions[0]) in shown.card.value
    assert gallery.STYLE in shown.card.value
    assert "<script" not in shown.card.value


def test_next_and_previous_go_over_the_borders_of_steps_and_stop_at_the_ends(shown):
    assert shown.previous.disabled
    assert walk(shown) == list(GROUPS)
    assert (shown.place.value, shown.step.value, shown.group.value) == ("5 of 5", 3, 4)
    shown.previous.click()
    shown.previous.click()
    assert (name(shown), shown.step.value) == ("wrong", 2)
    assert not shown.previous.disabled and not shown.next.disabled


def test_a_step_and_a_group_are_chosen(shown):
    shown.step.value = 3
    assert name(shown) == "rescued"
    assert [label for label, _ in shown.group.options] == ["1: q3", "2: q4"]
    shown.group.value = 4
    assert (name(shown), shown.place.value) == ("in vain", "5 of 5")


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("all groups", list(GROUPS)),
        ("every rollout right", ["right"]),
        ("some right, some wrong", ["mixed"]),
        ("every rollout wrong", ["wrong", "rescued", "in vain"]),
        ("rescued by a hint", ["rescued"]),
        ("hinted in vain", ["in vain"]),
        ("gate open somewhere", ["right", "mixed", "rescued"]),
        ("gate shut throughout", ["wrong", "in vain"]),
        ("not in the exact format", ["in vain"]),
        ("an answer missing", []),
        ("an ambiguous answer", ["wrong"]),
        ("a truncated answer", ["in vain"]),
    ],
)
def test_a_kind_of_groups_is_chosen(shown, kind, groups):
    shown.filter.value = "not in the exact format"  # elsewhere
    shown.filter.value = kind
    assert walk(shown) == (groups or [None])
    assert f"{kind} ({len(groups)})" in [label for label, _ in shown.filter.options]
    if not groups:
        assert (shown.place.value, shown.previous.disabled, shown.group.value) == ("no such group", True, None)


def test_every_kind_is_tested():
    (mark,) = test_a_kind_of_groups_is_chosen.pytestmark
    assert [kind for kind, _ in mark.args[1]] == list(FILTERS)


def test_a_run_is_browsed_while_it_trains_and_when_it_has_ended(tmp_path, questions, monkeypatch):
    run = Run.allocate(Params(results_dir=str(tmp_path / "results")))
    data = SimpleNamespace(train=questions, root=tmp_path)
    with pytest.raises(ParamError, match="has no rollouts to show, expected a run of GRPO or KEPO"):
        browse(run, data)
    write_rollouts(run.training_dir, rollouts()[:4])
    assert browse(run, data).place.value == "1 of 2"
    write_rollouts(run.training_dir, rollouts()[4:6])
    run.finish({})
    monkeypatch.setattr(browser, "load_data", lambda params: data)
    assert browse(run.path).place.value == "1 of 3"
    with pytest.raises(ParamError, match=r"has a rollout of question q2, expected the data that it was trained on"):
        browse(run.path, SimpleNamespace(train=questions[:2], root=tmp_path))
