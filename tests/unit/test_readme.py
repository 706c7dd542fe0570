"""The README speaks of what is there: metrics, files and parameters by their names."""

import re
from dataclasses import fields
from pathlib import Path

import nbformat

from kepo_core.method.config import KEPOConfig
from kepo_core.method.rollouts import GLOSSARY
from kepo_core.params import Params
from kepo_core.task.multiple_choice import GLOSSARY as TASK_GLOSSARY

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_metric_has_a_row_in_the_glossary() -> None:
    rows = re.findall(r"^\| `(kepo/[^`]+)` \| .+ \|$", README, flags=re.MULTILINE)
    assert len(rows) == len(set(rows)) and set(rows) == TASK_GLOSSARY.keys() | GLOSSARY.keys()


def test_every_module_is_in_the_tree_and_every_name_in_the_tree_exists() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {path.name for part in ("kepo_core", "examples") for path in (ROOT / part).rglob("*.py")} - {"__init__.py"}
    assert named == there


def test_parameters_and_files_that_it_mentions_exist() -> None:
    names = {field.name for kind in (Params, KEPOConfig) for field in fields(kind)}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        (cell,) = (c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", []))
        names |= set(re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE))
    mentioned = set(re.findall(r"-p (\w+) ", README)) | set(re.findall(r"`(\w+): [\w+]+`", README))
    assert mentioned and mentioned <= names
    for path in re.findall(r"(?:notebooks|params|results/reference|tests)/[\w/*]+\.(?:ipynb|yaml|png|py)", README):
        assert list(ROOT.glob(path)), path
