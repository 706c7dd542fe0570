"""The rollout browser without a front end: the group its slider points at is the one its card shows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from kepo_core.data.records import Question
from kepo_core.errors import ParamError
from kepo_core.experiment import browser
from kepo_core.experiment.browser import browse
from kepo_core.method.rollouts import Rollout, write_rollouts
from kepo_core.params import Params
from kepo_core.runs.run import Run

EVIL = "<script>alert(1)</script>"
RIGHT = Rollout(step=1, generation=0, row=0, group=0, id="q0", completion="x", tokens=9, finished=True,
                facts={"outcome": "correct", "letter": "B", "format_ok": True, "accuracy": 1.0},
                rewards={"accuracy_reward": 1.0, "format_reward": 1.0}, reward=2.0, gate=True)  # fmt: skip
WRONG = replace(RIGHT, facts=RIGHT.facts | {"outcome": "wrong", "accuracy": 0.0}, reward=1.0, gate=False)
#: Groups by step, two rollouts each.
GROUPS = {
    "right": (1, RIGHT, RIGHT),
    "mixed": (1, RIGHT, WRONG),
    "rescued": (3, replace(RIGHT, injected=True, exploration="rescued"), replace(WRONG, exploration="rescued"),
                replace(WRONG, replaced=True, exploration="rescued")),
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    text = {"question": f"What? {EVIL}", "options": ("ring", "cross"), "answer": "B", "image": tmp_path / "x.png"}
    return SimpleNamespace(
        train=[Question(f"q{k}", "d", "MRI", "t", **text) for k in range(len(GROUPS))], root=tmp_path
    )


@pytest.fixture
def run(tmp_path):
    return Run.allocate(Params(results_dir=str(tmp_path / "results")))


def rollouts():
    return [
        replace(rollout, step=step, group=k, row=2 * k + min(i, 1), id=f"q{k}", completion=f"{name} {EVIL}")
        for k, (name, (step, *group)) in enumerate(GROUPS.items())
        for i, rollout in enumerate(group)
    ]


def walk(shown):
    """The groups that the slider leads to, by what their cards say."""
    (slider,) = shown.kwargs_widgets
    found = []
    for number in range(slider.min, slider.max + 1):
        slider.value = number
        shown.update()
        card = shown.result.data
        assert "<script" not in card and "&lt;script&gt;" in card
        found += [name for name in GROUPS if f">{name} &lt;" in card]
    return found


@pytest.mark.parametrize(
    ("where", "groups"),
    [
        ("", list(GROUPS)),
        ("outcome == 'wrong'", ["mixed", "rescued"]),
        ("exploration == 'rescued'", ["rescued"]),
        ("outcome == 'wrong' and not replaced and exploration == ''", ["mixed"]),
    ],
)
def test_the_slider_leads_through_the_groups_with_such_a_rollout(run, data, where, groups):
    write_rollouts(run.training_dir, rollouts())
    assert walk(browse(run, data, where)) == groups


def test_a_run_is_browsed_while_it_trains_and_when_it_has_ended(run, data, monkeypatch):
    with pytest.raises(ParamError, match="has no rollouts, expected a run of GRPO or KEPO"):
        browse(run, data)
    write_rollouts(run.training_dir, rollouts()[:4])
    assert walk(browse(run, data)) == ["right", "mixed"]
    write_rollouts(run.training_dir, rollouts()[4:])
    run.finish({})
    monkeypatch.setattr(browser, "load_data", lambda params: data)
    assert walk(browse(run.path)) == list(GROUPS)
    with pytest.raises(ParamError, match=r"has question q2, which data lacks"):
        browse(run.path, SimpleNamespace(train=data.train[:2], root=data.root))


@pytest.mark.parametrize("where", ["colour == 'red'", "outcome ==", "outcome == 'missing'", "group + 1", "outcome > 3"])
def test_a_question_that_no_rollout_answers_is_refused(run, data, where):
    write_rollouts(run.training_dir, rollouts())
    with pytest.raises(ParamError, match=r"^where="):
        browse(run, data, where)
