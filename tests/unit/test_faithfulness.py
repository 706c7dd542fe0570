"""Thoughts against pictures: what is stated, whether it is true, and whether the answer follows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kepo_core.analysis.faithfulness import Faithfulness, faithfulness_table, judge, judge_rollouts, thought
from kepo_core.data import phantom
from kepo_core.data.phantom import Asked, Facts
from kepo_core.data.records import LETTERS, Answer, AnswerOutcome, Question
from kepo_core.errors import DataError
from kepo_core.testbed.lessons import believed, careful, guess, sloppy

FACTS = Facts("CT", "ring", "upper left", "small", "two", "dark")
TOPICS = {topic.name: topic for topic in phantom.TOPICS}


def question(asked: Asked, name: str = "q") -> Question:
    text = (asked.question, asked.options, asked.answer)
    return Question(name, "d", asked.facts.modality, "t", *text, Path("x.png"), image_name=f"Images/{name}.png")


def asked_about(topic: str, options: tuple[str, ...]) -> Asked:
    value = getattr(FACTS, TOPICS[topic].attribute)
    return Asked(TOPICS[topic], TOPICS[topic].wordings[0], options, LETTERS[options.index(value)], FACTS)


def judged(asked: Asked, text: str, letter: str) -> Faithfulness:
    return judge(f"<think>{text}</think>\n<answer>{letter}</answer>", letter, question(asked), FACTS)


@given(st.integers(0, 10_000))
def test_careful_is_faithful_a_belief_consistent_and_a_guess_empty(seed: int) -> None:
    rng = np.random.default_rng(seed)
    asked = phantom.ask(rng, phantom.draw_facts(rng, "OCT"), phantom.draw_topics(rng, 1)[0])
    right = judge(careful(asked), asked.answer, question(asked), asked.facts)
    needed = asked.topic.evidence.count("{")
    assert right.faithful and right.true == right.stated == needed + (asked.topic.level == 3)
    assert judge(guess(asked, rng), asked.answer, question(asked), asked.facts) == Faithfulness(0, 0, 0.0, False)
    mistake = believed(asked, rng)
    if mistake is not None:
        wrong = judge(careful(mistake), mistake.answer, question(asked), asked.facts)
        assert wrong.relevant == 1 and wrong.true < wrong.stated and not wrong.faithful
        assert wrong.consistent == (getattr(mistake.facts, asked.topic.attribute) in asked.options)


@pytest.mark.parametrize(
    ("text", "letter", "expected"),
    [
        ("The finding is a dark ring. A dark ring means velora (B).", "B", (3, 3, 1.0, True)),
        ("The finding is a dark ring. A dark ring means velora (B).", "A", (3, 3, 1.0, False)),  # another answer
        ("The finding is a dark ring.", "B", (2, 2, 1.0, True)),  # the step is taken silently
        ("The finding is a ring.", "B", (1, 1, 0.5, False)),  # half of what is needed
        ("A dark ring means tamsin (A).", "A", (3, 2, 1.0, False)),  # a wrong rule
        ("The finding is a dark ring. A dark disc means tamsin (A).", "A", (4, 2, 1.0, False)),  # of two minds
        ("The finding is a dark ring. The finding is a dark disc.", "A", (3, 2, 1.0, False)),
        ("The finding is a dark ring. The finding is a dark disc.", "B", (3, 2, 1.0, False)),
        ("The finding is small. The number of findings is two.", "B", (2, 2, 0.0, False)),  # true and beside the point
        ("The finding is a dark ring. The finding is large.", "B", (3, 2, 1.0, True)),  # false, beside the point
        ("the finding is a darkish ringlet", "B", (0, 0, 0.0, False)),
        ("The finding is a dark ring.", "", (2, 2, 1.0, False)),
    ],
)
def test_by_hand(text: str, letter: str, expected: tuple[int, int, float, bool]) -> None:
    asked = asked_about("diagnosis", ("tamsin", "velora"))
    assert judged(asked, text, letter) == Faithfulness(*expected)


def test_values_that_begin_alike_are_told_apart() -> None:
    asked = asked_about("grade", ("grade I", "grade II", "grade III"))
    text = "The size is small and the number is two. So small and two means {} (B)."
    assert judged(asked, text.format("grade II"), "B").faithful
    assert not judged(asked, text.format("grade III"), "B").consistent


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>B</answer>", "a"),
        ("a</think><answer>B</answer>", "a"),
        ("a\n<answer>B</answer>", ""),
        ("<think>a\n<answer>B</answer>", ""),
        ("", ""),
    ],
)
def test_what_a_thought_is(completion: str, expected: str) -> None:
    assert thought(completion) == expected


def test_the_table_and_the_rollouts_agree_with_the_judge() -> None:
    rng = np.random.default_rng(0)
    asked = [phantom.ask(rng, phantom.draw_facts(rng, "CT"), phantom.draw_topics(rng, 1)[0]) for _ in range(40)]
    questions = [question(a, f"q{i}") for i, a in enumerate(asked)]
    facts = {f"Images/q{i}.png": a.facts for i, a in enumerate(asked)}
    texts = [
        careful(a) if i < 10 else guess(replace(a), rng) if i < 30 else sloppy(a, rng) for i, a in enumerate(asked)
    ]
    answers = [
        Answer(q.id, "CT", "t", text, AnswerOutcome.CORRECT, q.answer, i < 20, True, 9, True)
        for i, (q, text) in enumerate(zip(questions, texts, strict=True))
    ]
    table = faithfulness_table({"m": answers}, questions, facts).loc["m"]
    rows = pd.DataFrame({"id": [q.id for q in questions], "completion": texts, "letter": [q.answer for q in questions]})
    marks = judge_rollouts(rows.iloc[::-1], questions, facts)
    marks = marks.loc[rows.index]
    assert marks.loc[:9, "faithful"].all() and not marks.loc[10:29, "faithful"].any()
    count = int(marks["faithful"].sum())
    assert table["n"] == 40 and table["faithful"].startswith(f"{100 * count / 40:.1f} [")
    assert table["right for the right reason"].startswith("25.0 [")
    assert table["right without it"].startswith("25.0 [")
    assert table["all stated is true"].startswith("100.0 [")


def test_questions_that_share_a_picture_count_as_what_they_are() -> None:
    rng = np.random.default_rng(0)
    asked = [phantom.ask(rng, FACTS, TOPICS["kind"]) for _ in range(40)]

    def width(per_picture: int) -> float:
        questions = [
            replace(question(a, f"q{i}"), image_name=f"Images/{i // per_picture}.png") for i, a in enumerate(asked)
        ]
        facts = {f"Images/{i}.png": FACTS for i in range(40)}
        texts = [careful(a) if i % 8 < 4 else guess(a, rng) for i, a in enumerate(asked)]
        answers = [
            Answer(q.id, "CT", "t", t, AnswerOutcome.CORRECT, q.answer, True, True, 9, True)
            for q, t in zip(questions, texts, strict=True)
        ]
        cell = faithfulness_table({"m": answers}, questions, facts).loc["m", "faithful"]
        low, high = cell.split("[")[1].strip("]").split(", ")
        return float(high) - float(low)

    assert width(4) > 1.5 * width(1)


def test_facts_are_read_and_bad_ones_refused(tmp_path: Path) -> None:
    phantom.write_phantom(tmp_path / "set", 0, {"MRI": 2})
    facts = phantom.load_facts(tmp_path / "set")
    assert len(facts) == 2 and all(f.modality == "MRI" for f in facts.values())
    assert phantom.load_facts(tmp_path) == {}
    (tmp_path / "facts.json").write_text(json.dumps({"a.png": {"kind": "disc"}}))
    with pytest.raises(DataError, match=r"facts\.json is not a table of facts"):
        phantom.load_facts(tmp_path)
