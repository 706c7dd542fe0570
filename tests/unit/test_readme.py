"""README and the pages of docs/ describe what there is: files, modules, parameters, metrics, methods, links."""

import importlib.util
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from kepo_core.method.config import KEPOConfig
from kepo_core.params import Params

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("README.md", "CHANGELOG.md", "examples/own_data.md", "notebooks/README.md", "params/README.md",
         "results/README.md")  # fmt: skip
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in NAMES)])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short_enough_to_be_read() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 100


def test_the_pages_have_the_tables_that_the_package_declares(tables: ModuleType) -> None:
    """Parameters, commands, methods and metrics; after a change of them: ``python docs/tables.py``."""
    shown: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{name_of(page)} is out of date: run python docs/tables.py"
        shown |= set(re.findall(r"<!-- declared: (\w+) -->", text))
    assert shown == tables.TABLES.keys()


def test_a_table_takes_the_place_of_whatever_stood_there(tables: ModuleType) -> None:
    page = tables.filled("a\n<!-- declared: task_metrics -->\nold\n<!-- end -->\nb")
    assert page.startswith("a\n<!-- declared: task_metrics -->\n\n| metric |") and "old" not in page
    assert "| `kepo/accuracy` |" in page and page.endswith("|\n\n<!-- end -->\nb")


def test_every_module_is_in_the_tree_and_every_name_in_the_tree_exists() -> None:
    tree = (ROOT / "docs/reference/layout.md").read_text(encoding="utf-8").split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    parts = ("kepo_core", "examples", "docs")
    there = {path.name for part in parts for path in (ROOT / part).rglob("*.py")} - {"__init__.py"}
    assert named == there


def test_every_package_has_a_line_in_the_readme() -> None:
    named = re.findall(r"^\| `kepo_core/(\w+)` \|", README, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in (ROOT / "kepo_core").glob("*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_parameters_and_files_that_a_page_mentions_exist(page: Path) -> None:
    names = {field.name for kind in (Params, KEPOConfig) for field in fields(kind)} | {"cluster"}  # slurm.yaml's
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        (cell,) = (c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", []))
        names |= set(re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    mentioned = set(re.findall(r"-p (\w+) ", text)) | set(re.findall(r"`([a-z_]+): [\w+]+`", text))
    assert mentioned - {"NAME"} <= names
    folders = "notebooks|params|results/reference|tests|kepo_core|examples|docs"
    for path in re.findall(rf"\b((?:{folders})/[\w/*-]+\.(?:ipynb|yaml|png|py|md))", text):
        assert list(ROOT.glob(path)) or "-Copy" in path or "NAME" in path, path


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, part = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert part in map(anchor, headings), target


def test_every_page_of_the_site_is_in_its_contents() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(\w+(?:/\w+)?)$", index, flags=re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES if "docs" in page.parts}
    assert listed == pages - {"index"}


def test_the_sites_tools_change_no_version_of_the_environment() -> None:
    """``make docs`` installs its lock into the environment of everything else."""
    pin = re.compile(r"^(\S+)==(\S+)(.*?) \\$", re.MULTILINE)
    ours, docs = (
        {(name, version) for name, version, _ in pin.findall((ROOT / file).read_text(encoding="utf-8"))}
        for file in ("requirements.lock", "requirements-docs.lock")
    )
    shared = {name for name, _ in docs} & {name for name, _ in ours}
    assert {"jinja2", "pygments", "markdown-it-py"} <= shared
    assert {pair for pair in docs if pair[0] in shared} <= ours
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["docs"]
    assert {re.split(r"\W*[<>=]", name)[0] for name in wanted} <= {name for name, _ in docs}
