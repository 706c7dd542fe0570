"""The shipped models: small, safe, and what their cards say they are."""

import pytest

from kepo_core.experiment import experiment
from kepo_core.experiment.models import EMBEDDED_DIR, load_processor
from kepo_core.params import Params
from kepo_core.testbed.calibration import Calibration, Measured
from kepo_core.testbed.embedded import build_tokenizer


def test_files_are_small_and_safe() -> None:
    files = [path for path in EMBEDDED_DIR.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(path.stat().st_size for path in files) <= 15e6


def test_shipped_tokenizers_are_the_built_one() -> None:
    for name in ("student", "teacher"):
        assert load_processor(f"embedded:{name}").tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    params = Params.load(overrides={"eval_items": 50, "train_items": 150})
    return {m.what: m for m in Calibration(params, experiment.load_data(params), groups=150).measure()}


@pytest.mark.slow
def test_no_measurement_contradicts_its_target(measured: dict[str, Measured]) -> None:
    assert len(measured) == 19
    apart = [m for m in measured.values() if m.high < m.target[0] or m.low > m.target[1]]
    assert not apart


@pytest.mark.slow
def test_the_student_is_clearly_below_its_teacher(measured: dict[str, Measured]) -> None:
    teacher = [m.value for name, m in measured.items() if name.startswith("teacher, greedy")]
    assert len(teacher) == 8 and measured["student, greedy"].high < sum(teacher) / 8 - 0.1


@pytest.mark.slow
def test_a_hint_alone_helps_and_that_of_another_question_less(measured: dict[str, Measured]) -> None:
    assert measured["own hint − another's (hint)"].low > 0
