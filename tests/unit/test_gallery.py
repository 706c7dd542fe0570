"""Cards of rollouts: nothing a model or a file wrote becomes markup, and every mark is there in words."""

from dataclasses import replace
from html.parser import HTMLParser

import nh3
import pandas as pd
import pytest
from PIL import Image

from kepo_core.data.phantom import Facts
from kepo_core.data.records import Question
from kepo_core.data.splits import image_key
from kepo_core.method.rollouts import Rollout
from kepo_core.pages.gallery import show_rollouts
from kepo_core.pages.report import clean_html

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;<b>"
PLAIN = Rollout(
    step=1, generation=0, row=0, group=0, id="q0", completion="<think>bright</think><answer>B</answer>", tokens=9,
    finished=True, facts={"outcome": "correct", "letter": "B", "format_ok": True, "accuracy": 1.0},
    rewards={"accuracy_reward": 1.0, "format_reward": 1.0}, reward=2.0, advantage=0.5, gate=True,
)  # fmt: skip


@pytest.fixture
def question(tmp_path):
    Image.new("RGB", (500, 20)).save(tmp_path / "x.png")
    return Question("q0", "d", "MRI", "t", "What is it?", ("ring", "cross"), "B", tmp_path / "x.png")


def frame(*rollouts):
    return pd.DataFrame([rollout.columns() for rollout in rollouts])


class Reader(HTMLParser):
    """Tags and text of a page, as a browser sees them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_nothing_that_was_written_becomes_markup(question):
    evil = replace(question, id=EVIL, question=EVIL, options=(EVIL, "cross"), modality=EVIL)
    row = replace(
        PLAIN, id=EVIL, completion=EVIL, hint=EVIL, exploration="rescued", facts=PLAIN.facts | {"outcome": EVIL}
    )
    page = Reader(show_rollouts(frame(row), [evil]).data)
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {"style", "div", "b", "p", "ul", "ol", "li", "span", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert sum(tag == "b" for tag, _ in page.tags) == 1
    assert "".join(page.text).count(EVIL) == 7  # id and modality, question, option, hint, outcome, completion


def test_what_happened_is_said_in_words(question):
    wrong = PLAIN.facts | {"outcome": "wrong", "accuracy": 0.0}
    truncated = PLAIN.facts | {"outcome": "truncated", "format_ok": False, "accuracy": 0.0}
    explored = replace(PLAIN, row=0, exploration="rescued", hint="look left", draws=3)
    rows = [
        replace(explored, injected=True),
        replace(explored, replaced=True, facts=wrong, reward=1.0, advantage=float("nan"), gate=False,
                completion="the old one"),
        replace(explored, row=1, facts=truncated, reward=0.0, advantage=-0.5, gate=False, finished=False),
    ]  # fmt: skip
    page = show_rollouts(frame(*rows), [question]).data
    lines = page.split("<li")[-3:]  # of the card's last list
    injected, cut, old = lines
    assert "drawn with the hint" in injected
    assert "gate open" in injected
    assert "✓ correct" in injected
    assert "✓ format" in injected
    assert "reward 2, advantage +0.50" in injected
    for words in ("✗ truncated", "✗ format", "gate shut", "cut at the limit", "-0.50"):
        assert words in cut
    for words in ("the old one", "replaced, not trained on", "–", "✗ wrong"):
        assert words in old
    assert "gate" not in old.replace("kepo-gate", "")
    for words in ("What is it?", "A) ring", "look left", "3 hint-aware draws, rescued", "every rollout failed"):
        assert words in page
    assert page.index("right answer") > page.index("B) cross")
    assert "none of them right" in show_rollouts(frame(replace(PLAIN, exploration="exhausted")), [question]).data
    unread = show_rollouts(frame(replace(PLAIN, exploration="unparsable")), [question]).data
    assert "it was not readable" in unread
    assert "hint-aware" not in unread
    assert "hint-aware" not in show_rollouts(frame(PLAIN), [question]).data


def test_the_report_keeps_picture_marks_and_text(question):
    kept = clean_html(show_rollouts(frame(replace(PLAIN, completion=EVIL)), [question]).data)
    assert "data:image/png;base64," in kept
    assert 'class="kepo-mark kepo-good"' in kept
    assert "<script" not in kept
    assert nh3.clean_text(EVIL)[:5] == "&lt;s"
    assert "&lt;script&gt;" in kept


def test_the_facts_of_the_picture_stand_there_where_they_are_known(question):
    known = {image_key(question): Facts("MRI", "ring", "upper left", "small", "two", "dark")}
    page = show_rollouts(frame(PLAIN), [question], facts=known).data
    assert "Facts: modality MRI; kind ring; place upper left; size small; number two; contrast dark; diag" in page
    for unknown in (None, {}, {"another": known[image_key(question)]}):
        assert "Facts" not in show_rollouts(frame(PLAIN), [question], facts=unknown).data
    evil = {image_key(question): replace(known[image_key(question)], place=EVIL)}
    assert EVIL in "".join(Reader(show_rollouts(frame(PLAIN), [question], facts=evil).data).text)


def groups(kinds):
    """One group of two per letter: r(escued), m(ixed), o(ther)."""
    rows = []
    for i, kind in enumerate(kinds):
        for row in range(2):
            right = kind == "o" or row == 0
            facts = PLAIN.facts | {"accuracy": float(right)}
            rows.append(replace(PLAIN, step=i + 1, row=row, facts=facts, injected=kind == "r" and row == 0))
    return frame(*rows)


def steps(page):
    return [int(part.split(",")[0]) for part in page.split("<b>Step ")[1:]]


def test_every_kind_of_group_is_shown_in_the_order_of_training(question):
    rollouts = groups("oooooooormoooooo")
    for seed in range(5):
        shown = steps(show_rollouts(rollouts, [question], n=3, seed=seed).data)
        assert {9, 10} < set(shown)
        assert shown == sorted(shown)
    assert len({tuple(steps(show_rollouts(rollouts, [question], n=3, seed=s).data)) for s in range(5)}) > 1
    once, again = (show_rollouts(rollouts, [question], n=3, seed=0).data for _ in range(2))
    assert once == again
    assert len(steps(show_rollouts(rollouts, [question], n=99).data)) == 16
    assert "No rollouts" in show_rollouts(rollouts[:0], [question]).data


def test_a_rollout_of_an_unknown_question_is_refused(question):
    with pytest.raises(KeyError, match="q1"):
        show_rollouts(frame(replace(PLAIN, id="q1")), [question])
