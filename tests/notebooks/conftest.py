"""What the notebooks' tests share: a parameter file of the smallest size."""

from pathlib import Path

import pytest
import yaml

SMOKE = Path(__file__).parents[2] / "params" / "smoke.yaml"


@pytest.fixture
def smoke_file(tmp_path: Path) -> Path:
    """smoke.yaml with its results in a temporary folder."""
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SMOKE.read_text()), "results_dir": str(tmp_path / "results")}))
    return path
