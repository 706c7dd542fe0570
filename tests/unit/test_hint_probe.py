"""What is measured of a hint, and what its measures have to do with the draws that follow it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from kepo_core.analysis.claims import Outcome
from kepo_core.analysis.starts import gain_by_start, starts_of
from kepo_core.data import phantom
from kepo_core.data.records import Answer, AnswerOutcome
from kepo_core.experiment import experiment, hint_probe
from kepo_core.params import Params
from kepo_core.runs import curves
from kepo_core.task.prompts import vqa_messages


@pytest.mark.parametrize(
    ("hint", "letter", "named"),
    [
        ("The answer is B.", "B", True),
        ("(A)", "A", True),
        ("A finding is a ring.", "A", False),
        ("The kind is C", "C", True),
        ("Option B is correct.", "B", True),
        ("Choose C or look", "C", True),
        ("The answer is A because it is dark.", "A", True),
        ("T-B cells, Bob's CT", "B", False),
        ("The kind is C", "B", False),
    ],
)
def test_a_letter_is_named_where_it_stands_alone(hint: str, letter: str, named: bool) -> None:
    assert hint_probe.names_letter(hint, letter) == named


def test_the_correlation_is_spearmans_within_modalities() -> None:
    rng = np.random.default_rng(0)
    gain = rng.normal(size=60)
    found = pd.DataFrame({"modality": "MRI", "image": [f"i{i}" for i in range(60)], "gain": gain, "tokens": 5,
                          "leaks letter": 0.0, "stated": np.nan, "true": rng.random(60), "relevant": 1.0,
                          "accepted": gain + rng.normal(size=60)})  # fmt: skip
    table = hint_probe.correlations(found)
    rho = stats.spearmanr(found["gain"], found["accepted"]).statistic
    assert table.loc["MRI", "gain"].startswith(f"{rho:+.2f} [") and table.loc["all", "gain"] == table.loc["MRI", "gain"]
    assert (table.loc["MRI", ["tokens", "leaks letter", "stated", "relevant"]] == "–").all()
    low, high = map(float, table.loc["MRI", "gain"][7:-1].split(","))
    assert low < rho - 0.1 and high > rho + 0.05
    # Copies of every image's questions add no certainty.
    twice = hint_probe.correlations(pd.concat([found, found]))
    width = np.ptp(list(map(float, twice.loc["MRI", "gain"][7:-1].split(","))))
    assert width == pytest.approx(high - low, abs=0.06)
    # A second modality with another level changes nothing within.
    other = found.assign(modality="CT", gain=gain + 100, accepted=found["accepted"] - 100)
    assert hint_probe.correlations(pd.concat([found, other])).loc["all", "gain"].startswith(f"{rho:+.2f}")


@pytest.fixture(scope="module")
def probed():
    params = Params.load("params/smoke.yaml")
    data, models = experiment.load_data(params), experiment.load_models(params)
    asked = curves.asked(data.tests, 1)
    facts = phantom.load_facts(data.root)
    return params, models, asked, hint_probe.probe(params, models, asked, facts, draws=2)


def test_a_probe_measures_every_readable_hint(probed) -> None:
    params, models, asked, found = probed
    assert set(found["id"]) <= {q.id for q in asked} and len(found) >= 6
    assert set(hint_probe.MEASURES) < set(found.columns)
    assert found[["accepted", "plain"]].isin([0, 0.5, 1]).all().all()
    assert (found["stated"] >= 1).all() and found["tokens"].between(2, params.hint_max_tokens).all()
    again = hint_probe.probe(params, models, asked, None, draws=2)
    assert again["accepted"].equals(found["accepted"]) and again[["stated", "true", "relevant"]].isna().all().all()
    with pytest.raises(ValueError, match="no teacher"):
        hint_probe.probe(params, replace(models, teacher=None), asked)


def test_log_probabilities_of_letters_are_those_of_one_row_alone(probed) -> None:
    params, models, asked, _ = probed
    messages = [vqa_messages(q.question, q.options, thinking=True) for q in asked]
    found = hint_probe.letter_log_probs(params, models, asked, messages)
    q, prompt = asked[3], messages[3]
    text = models.processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text += "<think></think><answer>"
    inputs = models.processor(text=[text], images=[[hint_probe.load_image(q.image)]], return_tensors="pt")
    ids = [models.processor.tokenizer.convert_tokens_to_ids(letter) for letter in q.letters]
    with torch.no_grad():
        logits = models.student.eval()(**inputs).logits[0, -1, ids]
    assert found[3] == pytest.approx(float(logits.log_softmax(-1)[q.letters.index(q.answer)]), abs=1e-4)
    assert (found < 0).all()


MADE = Answer("", "MRI", "", "", AnswerOutcome.CORRECT, "A", True, True, 5, True)


def test_gains_by_start_add_up() -> None:
    def answered(right):
        return [replace(MADE, question_id=f"q{i}", modality="MRI" if i < 4 else "CT", correct=bool(x))
                for i, x in enumerate(right)]  # fmt: skip

    samples = [replace(a, sample=s) for s in range(2) for a in answered([0, 0, s, 1, 0, s, 1, 1])]
    starts = starts_of(samples)
    wrong, mixed, right = "all wrong", "mixed", "all right"
    assert [starts[f"q{i}"] for i in range(8)] == [wrong, wrong, mixed, right, wrong, mixed, right, right]
    before = answered([0, 0, 0, 1, 0, 1, 1, 1])
    after = [answered([1, 0, 1, 1, 1, 1, 1, 0]), answered([1, 1, 1, 1, 1, 1, 1, 0])]
    outcomes = {"kepo": [Outcome(given, {}, before) for given in after], "zero-shot": [Outcome(before, {})]}
    images = {f"q{i}": f"i{i}" for i in range(8)}
    table = gain_by_start(starts, outcomes, images)
    gains = {start: float(table.loc[("kepo", start), "gain"].split(" ")[0]) for _, start in table.index}
    # Run 1: MRI +1 of 4 all wrong, +1 mixed; CT +1 all wrong, −1 all right. Run 2: one more of MRI's all wrong.
    assert gains == {"all wrong": 31.2, "mixed": 12.5, "all right": -12.5, "together": 31.2}
    assert table["questions"].tolist() == [3, 2, 3, 8]
