"""conda's environment has the versions that everybody else's has."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_conda_installs_what_the_lock_names_then_torch_and_this_package() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *others, pip = environment["dependencies"]
    assert environment["name"] == "kepo" and {"pip", "make", "git"} < set(others)
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = re.findall(r"^(\w\S*==\S+(?: ; .*?)?) \\$", lock, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (name for name in project["dependencies"] if name.startswith("torch=="))
    assert len(locked) > 150 and pip["pip"] == [*locked, torch, "--editable ."]
