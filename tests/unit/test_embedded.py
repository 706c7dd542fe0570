"""The shipped models: small, safe, and what their cards say they are."""

import pytest

from kepo_core.experiment.models import EMBEDDED_DIR, load_processor
from kepo_core.testbed import zero_shot
from kepo_core.testbed.embedded import build_tokenizer


def test_files_are_small_and_safe() -> None:
    files = [path for path in EMBEDDED_DIR.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(path.stat().st_size for path in files) <= 25e6


def test_shipped_tokenizers_are_the_built_one() -> None:
    for name in ("student", "middle", "teacher"):
        assert load_processor(f"embedded:{name}").tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.slow
def test_no_measurement_contradicts_its_target() -> None:
    _, measured, _ = zero_shot.measure(EMBEDDED_DIR, items=100, groups=150)
    apart = [
        m.what for m in measured
        if not m.what.endswith("spread") and (m.high < m.target[0] or m.low > m.target[1])  # it has no interval
    ]  # fmt: skip
    assert len(measured) > 20 and not apart
