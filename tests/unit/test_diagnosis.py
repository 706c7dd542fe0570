"""Failure signs: each is shown by a run that has it, with its numbers, and by no healthy one."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from kepo_core.analysis import diagnosis
from kepo_core.analysis.diagnosis import ACCEPTANCE, Sign, as_table, read_training, signs_of, training_table
from kepo_core.data.records import AnswerOutcome
from kepo_core.method.rollouts import GLOSSARY
from kepo_core.task.multiple_choice import GLOSSARY as TASK_GLOSSARY

STEPS = 40


def rows(**changes):
    """A healthy run's logged rows; a change is a value for all steps or a function of progress in [0, 1)."""
    healthy = {
        "loss": 0.1,
        "grad_norm": 1.0,
        "frac_reward_zero_std": 0.2,
        "kepo/accuracy": lambda t: 0.4 + 0.4 * t,
        "kepo/format": lambda t: 0.8 + 0.2 * t,
        "kepo/all_fail_rate": lambda t: 0.3 - 0.3 * t,
        "kepo/gate_rate": 0.6,
        "kepo/divergence": lambda t: 0.5 - 0.4 * t,
        "kepo/loss_kl": lambda t: 0.9 * t,
        "kepo/explored_groups": 3.0,
        "kepo/unparsable_hints": 1.0,
        "kepo/rescued_groups": 2.0,
        "kepo/draws": 8.0,
        "kepo/accepted": 2.0,
        "kepo/loss_policy": 0.0,
        "kepo/loss_distill": 0.1,
        f"kepo/outcome/{AnswerOutcome.TRUNCATED}": 0.02,
    } | {name.replace("kepo_", "kepo/"): value for name, value in changes.items()}
    return [
        {"step": i + 1} | {name: value(i / STEPS) if callable(value) else value for name, value in healthy.items()}
        for i in range(STEPS)
    ]


def signs(**changes):
    return signs_of(training_table(rows(**changes)))


def test_a_healthy_run_has_no_sign():
    assert signs() == []
    assert signs_of(training_table([])) == []


def test_every_metric_read_here_is_one_the_trainer_logs():
    read = {name for name in rows()[0] if name.startswith("kepo/")}
    assert read <= set(GLOSSARY) | set(TASK_GLOSSARY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kepo_rescued_groups": 0.2, "kepo_accepted": 0.2}, "accepted: 320 hint-aware draws rescued 8 of 120 groups"),
        ({"kepo_unparsable_hints": 2.5}, "Hints cannot be read: for 100 of 120 groups"),
        ({"kepo_all_fail_rate": 0.95}, "No reward: in the last quarter of training every rollout failed in 95%"),
        ({"frac_reward_zero_std": 0.92}, "equal within groups: in the last quarter of training in 92% of the groups"),
        ({"frac_reward_zero_std": 0.92, "kepo_entropy": 0.01}, "the entropy is 0.01 nats per token. Look at: accuracy"),
        ({"kepo_accuracy": 0.05, "kepo_format": 1.0}, "learned before the answer: format 100% but accuracy 5%"),
        ({"kepo_gate_rate": 0.0}, "The gate never opened: it let no sequence through"),
        ({"kepo_accuracy": lambda t: 0.7 if t < 0.5 else 0.5}, "accuracy fell from 70% in its best quarter"),
        ({"kepo_format": lambda t: 0.9 if t < 0.7 else 0.6}, "the rollouts' format fell from 90%"),
        ({"grad_norm": lambda t: math.nan if t > 0.5 else 1.0}, "grad_norm is not a finite number at step 22"),
        ({"kepo_loss_distill": lambda t: math.inf if t > 0.5 else 1}, "distill is not a finite number at step 22"),
        ({"kepo_divergence": lambda t: 0.2 if t < 0.7 else 4.0}, "the teacher explodes: kepo/divergence rose from 0.2"),
        ({"kepo_loss_kl": lambda t: 3 * t}, "from the reference explodes: kepo/loss_kl rose from 0.34 nats per token"),
        ({"kepo_outcome/truncated": 0.3}, "Completions are cut off: 30% of them reach the limit before an answer"),
        ({"kepo_unmoved_weights": 0.96}, "precision: on average, rounding left 96% of the weights"),
    ],
)  # fmt: skip
def test_each_sign_is_told_with_its_numbers_and_alone(changes, words):
    (sign,) = signs(**changes)
    assert words in str(sign) and len(sign.look_at) > 20


@pytest.mark.parametrize(
    "changes",
    [
        {"kepo_divergence": lambda t: 0.01 if t < 0.7 else 0.09},  # small, whatever it grows by
        {"kepo_divergence": lambda t: 2.0 if t < 0.3 else 1.0 + t},
        {"kepo_unmoved_weights": 0.4},
        {"completions/clipped_ratio": 0.9},  # behind an answer: the task's own outcome counts
        {"frac_reward_zero_std": 0.95, "kepo_accuracy": 0.95},  # there is nothing left to learn
    ],
)
def test_what_looks_like_a_sign_and_is_none(changes):
    assert signs(**changes) == []


def test_a_task_without_outcomes_is_judged_by_what_trl_counts():
    def of_other_task(clipped):
        outcome = f"kepo/outcome/{AnswerOutcome.TRUNCATED}"
        changed = rows(**{"completions/clipped_ratio": clipped})
        return signs_of(training_table([{k: v for k, v in row.items() if k != outcome} for row in changed]))

    (sign,) = of_other_task(0.8)
    assert str(sign).startswith("Completions are cut off: 80% of them reach the limit in the last quarter of training.")
    assert of_other_task(0.3) == []


def test_the_table_names_cause_numbers_and_where_to_look():
    table = as_table(signs(kepo_gate_rate=0.0, kepo_unmoved_weights=1.0))
    assert list(table) == ["cause", "seen", "look at"]
    assert table["cause"].tolist() == [
        "The gate never opened",
        "The learning rate is too small for the weights' precision",
    ]
    assert "tau" in table.loc[0, "look at"] and "float32" in table.loc[1, "look at"]
    assert as_table([]).empty and list(as_table([])) == list(table)


def test_the_end_of_training_counts_and_the_best_quarter_before_it():
    assert signs(kepo_all_fail_rate=lambda t: 1.0 if t < 0.5 else 0.1) == []
    assert len(signs(kepo_all_fail_rate=lambda t: 0.1 if t < 0.5 else 1.0)) == 1
    assert signs(kepo_gate_rate=lambda t: 0.0 if t < 0.9 else 0.1) == []
    (sign,) = signs(kepo_accuracy=lambda t: 0.4 if t < 0.25 else 0.7 if t < 0.5 else 0.4)
    assert "fell from 70%" in sign.seen


def test_a_little_less_than_a_sign_is_none():
    assert signs(kepo_rescued_groups=0.31) == []
    assert signs(kepo_all_fail_rate=0.89) == []
    assert signs(kepo_accuracy=lambda t: 0.7 if t < 0.5 else 0.61) == []


def test_a_method_without_a_part_is_not_judged_by_it():
    parts = ("kepo/explored_groups", "kepo/rescued_groups", "kepo/unparsable_hints", "kepo/draws", "kepo/accepted")
    plain = [{k: v for k, v in row.items() if k not in (*parts, "kepo/divergence")} for row in rows(kepo_gate_rate=0)]
    assert signs_of(training_table(plain)) == []
    # Exploration that had no reason to fire is no failure either.
    assert signs(**{part.replace("kepo/", "kepo_"): 0.0 for part in parts}) == []


def test_too_short_a_run_is_not_judged_by_its_quarters():
    assert signs_of(training_table(rows(kepo_all_fail_rate=1.0)[:7])) == []


def differences(**values):
    """A table of paired differences, ``name=(difference, low, high)``."""
    names = {"ood": "Avg. (OOD)", "mri": "MRI", "oct": "OCT"}
    return pd.DataFrame.from_dict(
        {names[name]: dict(zip(("difference", "low", "high"), v, strict=True)) for name, v in values.items()}, "index"
    )


def test_in_domain_up_while_out_of_domain_falls():
    table = training_table(rows())
    up, down, level = (0.2, 0.1, 0.3), (-0.1, -0.15, -0.05), (-0.01, -0.05, 0.03)
    (sign,) = signs_of(table, differences(mri=up, ood=down), "MRI")
    assert str(sign).startswith(
        "In-domain up, out-of-domain down: MRI +20.0 points [+10.0, +30.0], the other modalities on average "
        "-10.0 points [-15.0, -5.0]. Look at: "
    )
    assert signs_of(table, differences(mri=up, ood=level), "MRI") == []
    assert signs_of(table, differences(mri=level, ood=level), "MRI") == []
    (sign,) = signs_of(table, differences(mri=up, ood=level, oct=down), "MRI")
    assert (sign.cause, sign.seen) == ("Worse after training", "OCT -10.0 points [-15.0, -5.0]")
    (sign,) = signs_of(table, differences(mri=down, ood=level), "MRI")
    assert (sign.cause, sign.seen) == ("Training hurt in-domain", "MRI -10.0 points [-15.0, -5.0]")
    assert signs_of(table, differences(mri=(0.05, -0.01, 0.1), ood=down), "MRI") == []
    (sign,) = signs_of(table, differences(mri=down, ood=down, oct=up), in_domain="OCT")[:1]
    assert isinstance(sign, Sign) and str(sign).startswith("In-domain up, out-of-domain down: OCT")


def test_the_table_has_a_row_per_step_and_the_acceptance(tmp_path):
    logged = rows()
    logged[3] |= {"kepo/draws": 0.0, "kepo/accepted": 0.0, "kepo/divergence": None}
    logged.append({"step": STEPS, "train_loss": 0.1, "train_runtime": 3.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(logged)))
    table = read_training(path)
    assert list(table["step"]) == list(range(1, STEPS + 1))
    assert "train_loss" not in table
    assert np.isnan(table.loc[3, ACCEPTANCE])
    assert np.isnan(table.loc[3, "kepo/divergence"])
    assert (table[ACCEPTANCE].drop(3) == 0.25).all()
    assert pd.api.types.is_float_dtype(table["kepo/divergence"])


def test_a_metric_that_is_null_throughout_and_one_that_is_no_number_do_no_harm():
    table = training_table([row | {"kepo/entropy": None, "note": "x"} for row in rows()])
    assert table["kepo/entropy"].isna().all()
    assert "note" not in table
    assert diagnosis.signs_of(table) == []
