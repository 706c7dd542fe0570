"""Algorithm 1 as a specification: the trainer, scripted, against `algorithm_1.expected` through every path."""

import random
from collections import Counter

import pytest
from algorithm_1 import (
    HINTS,
    Group,
    Scenario,
    check_attempts,
    check_buffer,
    check_prompts,
    draw_scenario,
    drawn,
    expected,
    play,
)
from kepo_harness import ScriptedTrainer, make_trainer, right

NEVER = (False,) * 4


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> ScriptedTrainer:
    folder = tmp_path_factory.mktemp("algorithm")
    return make_trainer(folder, lambda *a: right(a[1]), per_device_train_batch_size=4, log_rollouts=False)


def check(trainer: ScriptedTrainer, scenario: Scenario) -> None:
    want = expected(scenario)
    batch = play(trainer, scenario)
    assert trainer.teacher.asked == ([[f"q{question}" for question in want.hinted]] if want.hinted else [])
    assert list(drawn(trainer)) == want.rounds  # one call of the generation back end a round
    check_prompts(trainer)
    check_attempts(trainer, scenario)
    check_buffer(trainer, scenario, batch, want)


PATHS = {
    "no failure": Scenario((Group(0, (True, False, False, False), "no tags at all", ()),)),
    "success at the first draw": Scenario((Group(0, NEVER, "<hint>look left</hint>", (True, False)),)),
    "success at draw 3": Scenario((Group(1, NEVER, "<hint>look left</hint>", (False, False, True, True, True)),)),
    "exhausted": Scenario((Group(1, NEVER, "<hint>look left</hint>", (False,) * 5),)),
    "unparsable": Scenario((Group(2, NEVER, "<hint>open", ()),)),
    "m = 3 over two rounds, surplus left out": Scenario(
        (Group(0, NEVER, "<hint>look left</hint>", (True, False, True, True, True, False)),), budget=2, m=3
    ),
    "m = 2, one found": Scenario((Group(3, NEVER, "<hint>look left</hint>", (False, False, False, True)),), 2, 2),
    "several failing groups": Scenario(
        (
            Group(3, NEVER, "<hint>look left</hint>", (False, True, True)),
            Group(0, (False, False, False, True), "<hint>look left</hint>", ()),
            Group(2, NEVER, "no tags at all", ()),
            Group(1, NEVER, "Well: <hint>not</hint> or <hint>\nlook\nright\n</hint>", (False,) * 3),
        ),
        budget=3,
    ),
} | {
    f"hint {raw!r} in context {context}": Scenario((Group(0, NEVER, raw, (True,)),), context=context)
    for raw in HINTS
    for context in ("hint+answer", "hint", "answer")
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path(trainer: ScriptedTrainer, path: str) -> None:
    check(trainer, PATHS[path])


def test_random_batches(trainer: ScriptedTrainer) -> None:
    rng, seen = random.Random(0), Counter()
    for _ in range(60):
        scenario = draw_scenario(rng, rng.randint(1, 4))
        check(trainer, scenario)
        counts = expected(scenario).counts
        seen.update({name for name, value in counts.items() if value})
        seen["exhausted"] += counts["explored"] > counts["rescued"] + counts["unparsable"]
        seen["several"] += counts["explored"] > 1
    assert min(seen.values()) >= 10 and len(seen) == 7
