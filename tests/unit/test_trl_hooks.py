"""The private names of TRL and transformers: each is there, and the package uses no other."""

import ast
import inspect
import pkgutil
import re
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kepo_core
from kepo_core.method.trl_hooks import HOOKS

PACKAGE = Path(kepo_core.__file__).parent
LISTED = {name for names in HOOKS.values() for name in names}
#: Those whose private names ours must not meet by chance: the trainers that the package's own derive from.
TRAINERS = ("transformers.Trainer", "trl.GRPOTrainer", "trl.DistillationTrainer", "trl.SFTTrainer")


@cache
def members(owner: str) -> frozenset[str]:
    """The private names of a module, or of a class and its bases: attributes, and what methods assign to ``self``."""
    found: Any = pkgutil.resolve_name(owner)
    if isinstance(found, types.ModuleType):
        return frozenset(vars(found))
    bases = [base for base in found.__mro__ if base.__module__.split(".")[0] in ("trl", "transformers", "accelerate")]
    assigned = re.compile(r"self\.(_\w+)(?:: [^=\n]+)? = |self\.(_\w+) \+= ")
    names = {name for base in bases for pair in assigned.findall(inspect.getsource(base)) for name in pair}
    return frozenset(names.union(*map(vars, bases)))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def uses(source: str) -> tuple[set[str], set[str], set[str]]:
    """The private names that a module defines, all that it uses as attributes or methods, and those it imports."""
    defined, used, imported = set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
            used.add(node.name)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
            if not isinstance(node.ctx, ast.Load):
                defined.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):  # of a class body, too
            defined.add(node.id)
            used.add(node.id)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            used |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
        elif isinstance(node, ast.ImportFrom):
            imported |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {part for alias in node.names for part in alias.name.split(".")}
    return tuple(set(filter(is_private, names)) for names in (defined, used, imported))  # type: ignore[return-value]


#: Documented, for all their underscore.
PUBLIC = {"_asdict", "_exit"}


def unlisted(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(file, name) of each foreign private name that `HOOKS` lacks."""
    found = {file: uses(source) for file, source in sources.items()}
    own = {name for defined, _, _ in found.values() for name in defined}
    theirs = frozenset().union(*map(members, TRAINERS))
    return {
        (file, name)
        for file, (_, used, imported) in found.items()
        for name in imported | {name for name in used if name not in own or name in theirs}
        if name not in LISTED | PUBLIC or (name in imported and file != "method/trl_hooks.py")
    }


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("owner", HOOKS)
def test_each_private_name_is_there(owner: str) -> None:
    assert not set(HOOKS[owner]) - members(owner)


def test_the_package_uses_no_other(package: dict[str, str]) -> None:
    assert not unlisted(package)


def test_each_is_used(package: dict[str, str]) -> None:
    found = [uses(source) for source in package.values()]
    assert not LISTED - {name for _, used, imported in found for name in used | imported}


@pytest.mark.parametrize(
    "source",
    [
        "def f(trainer):\n    return trainer._cache_of_something",
        "getattr(model, '_no_split_modules')",
        "from torch.utils._pytree import tree_leaves",
        "from trl.kernels.chunked_divergence import _project",
        "class Mine(GRPOTrainer):\n    def _prepare_inputs(self):\n        self._own = 1",
        "class Mine(GRPOTrainer):\n    def f(self):\n        self._current_train_step_time = 0",
    ],
)
def test_another_one_would_be_seen(source: str) -> None:
    assert len(unlisted({"method/new.py": source})) == 1
