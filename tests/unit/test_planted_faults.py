"""The list of planted faults keeps up with the code (`make faults` plants them)."""

import pytest
from planted_faults import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_each_fault_can_still_be_planted(fault: Fault) -> None:
    source = (ROOT / "kepo_core" / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.old) == 1 and fault.old != fault.new
    assert all((ROOT / "tests" / word).is_file() for word in fault.tests.split() if word.endswith(".py"))
