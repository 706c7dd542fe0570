"""The library's floors: what a package may import, read from the sources themselves."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "kepo_core"
#: From the ground up. Modules beside the packages are the ground, but for the parameters, which take those of the
#: method from it, and the command line, which is the roof.
FLOORS = (
    "",
    "method",
    "params",
    "data",
    "task",
    "baselines",
    "analysis",
    "runs",
    "pages",
    "experiment",
    "study",
    "testbed",
    "plan",
    "cli",
)
MODULES = {
    ".".join(("kepo_core", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imported(module: str) -> Iterator[str]:
    """The package's own modules that one of them imports, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} has a relative import"
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kepo_core":
            yield from {
                name if (name := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names
            } & set(MODULES)


def floor(module: str) -> int:
    """How high a module stands."""
    parts = module.split(".")[1:]
    if len(parts) > 1 or parts == ["cli"]:
        return FLOORS.index(parts[0])
    return FLOORS.index("params" if parts[0].startswith("params") else "")


def test_a_module_imports_from_its_own_floor_and_from_below() -> None:
    above = {module: [name for name in imported(module) if floor(name) > floor(module)] for module in MODULES}
    assert not {module: names for module, names in above.items() if names}


def test_the_method_imports_the_ground_floor_alone() -> None:
    """It is a library for any task: nothing of the study reaches into it."""
    own = {module: set(imported(module)) for module in MODULES if module.startswith("kepo_core.method.")}
    foreign = {name for names in own.values() for name in names if not name.startswith("kepo_core.method.")}
    assert len(own) > 10 and foreign == {"kepo_core.errors", "kepo_core.files"}
    assert set(imported("kepo_core.files")) == {"kepo_core.errors"} and not set(imported("kepo_core.errors"))


def test_nothing_imports_the_planner_but_the_command() -> None:
    importers = {module for module in MODULES for name in imported(module) if name.startswith("kepo_core.plan.")}
    assert {module for module in importers if not module.startswith("kepo_core.plan.")} == {"kepo_core.cli"}


def test_no_import_runs_in_a_circle() -> None:
    graph = {module: set(imported(module)) for module in MODULES}
    assert sum(map(len, graph.values())) > 2 * len(graph)  # they were found
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)  # raises CycleError
