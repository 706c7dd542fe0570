"""How parameters are read and written: strict YAML, and the parameter cells of a notebook."""

import ast
import difflib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kepo_core.errors import ParamError

_NUMBER = re.compile(r"[-+.0-9eE]+")


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars instead of 1.1: ``1e-6`` is a number, ``yes`` and ``on`` are texts."""


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(path: Path) -> dict[str, Any]:
    """The names and values of a parameter file; `ParamError` if it is missing, not a mapping or repeats a name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ParamError(f"the parameter file {path} cannot be read: {reason}") from error
    return parse_yaml(text, path.name)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The names and values in ``text``, the file ``name`` or a part of it; `ParamError` as in `read_yaml`."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ParamError(f"the parameter file {name} must hold one `name: value` per line")
        keys = [str(key.value) for key, _ in node.value]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ParamError(f"{repeated[0]} appears twice in {name}")
        return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}
    except yaml.YAMLError as error:
        raise ParamError(f"the parameter file {name} is not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def yaml_scalar(value: bool | int | float | str) -> str:
    """One value, on one line, as `read_yaml` reads it back; texts are quoted."""
    style = '"' if isinstance(value, str) else None
    text: str = yaml.safe_dump(value, default_style=style, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")


def short_hash(values: Mapping[str, bool | int | float | str]) -> str:
    """Eight hexadecimal digits over names and values, in whatever order they come."""
    return hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:8]


def as_number(text: str) -> int | float | str:
    """``text`` as a number of YAML 1.2; ``text`` itself if it is not a number."""
    value = yaml.load(text, _StrictLoader) if _NUMBER.fullmatch(text) else text
    return value if isinstance(value, int | float) else text


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a sentence that names the nearest of ``known``; empty if none is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def tagged_cell(notebook: Path) -> dict[str, Any]:
    """What the notebook's cell with the tag ``parameters`` sets.

    Raises `ParamError` for a file that is not a notebook, and for a cell that does more than set names to constants.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    except (ValueError, KeyError, TypeError) as error:
        raise ParamError(f"notebook {notebook.name} cannot be read as a notebook: {type(error).__name__}") from error
    if any(_constants(source) is None for source in tagged):
        raise ParamError(
            f"the parameters cell of {notebook.name} does more than set names to constants, like tau = 1.0"
        )
    return parameter_cells(tagged)


def parameter_cells(cells: Iterable[str]) -> dict[str, Any]:
    """The values in all cells that only set names to constants (papermill's injected cell is one)."""
    return {name: value for source in cells for name, value in (_constants(source) or {}).items()}


def is_injected(source: str) -> bool:
    """Whether a cell is papermill's."""
    return source.startswith("# Parameters\n")


def meant_as_parameters(cells: Sequence[str], known: Collection[str], anywhere: Collection[str]) -> set[str]:
    """The names that the executed ``cells`` of a notebook set as parameters, misspelt ones among them.

    These are the names in papermill's cell and in the parameters cell, in their last executed versions. The parameters
    cell is the cell that only sets names to constants and sets the most ``known`` ones; a cell that sets more than half
    of these is an edited version of it. All other cells belong to the user. If one sets a ``known`` name, or nearly
    one, that does not count ``anywhere``, a warning says so.
    """
    found = [(is_injected(source), parameter_cells([source]).keys()) for source in cells]
    papermills = next((names for injected, names in reversed(found) if injected), set[str]())
    own = [names for injected, names in found if not injected]
    known_ones = max(({*names} & {*known} for names in own), key=len, default=set[str]())
    edited = [names for names in own if 2 * len(known_ones & names) > len(known_ones)]
    meant = {*papermills, *(edited[-1] if edited else ())}
    for name in sorted({name for _, names in found for name in names} - meant - {*anywhere}):
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            is_meant = f" (is {near[0]} meant?)" * (near[0] != name)
            warnings.warn(
                f"{name}{is_meant} is set in a cell of its own and is not taken as a parameter: write it into the "
                "parameters cell if it is one",
                stacklevel=3,
            )
    return meant


def check_names(namespace: Mapping[str, Any]) -> None:
    """Refuse what papermill lets pass: a name that the parameters cell of a notebook does not set.

    For notebooks whose parameters are their own: that cell is the one that sets most names to constants. ``namespace``
    is the notebook's ``globals()``. A misspelt name in a cell of its own gives a warning.

    Raises:
        ParamError: names the nearest parameter.
    """
    cells = namespace["In"]
    known = max((parameter_cells([cell]) for cell in cells if not is_injected(cell)), key=len)
    for name in sorted(meant_as_parameters(cells, known, known) - known.keys()):
        every = f"; expected one of {', '.join(sorted(known))}"
        raise ParamError(f"{name} in the notebook is not a parameter{nearest(name, known) or every}")


#: Allowed parts of a constant: papermill writes an infinity as ``float('inf')``.
_PARTS = (ast.Constant, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.List, ast.Tuple,
          ast.Dict, ast.Set, ast.Call, ast.Name, ast.Load)  # fmt: skip


def _constants(source: str) -> dict[str, Any] | None:
    """The names that a cell sets to constants; None if it does anything else, or does not parse."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a cell that never ran
        return None
    found: dict[str, Any] = {}
    for statement in body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            return None
        parts = list(ast.walk(statement.value))
        if not all(isinstance(part, _PARTS) and getattr(part, "id", "float") == "float" for part in parts):
            return None
        try:
            value = eval(compile(ast.Expression(statement.value), "cell", "eval"), {"__builtins__": {}, "float": float})
        except (TypeError, ValueError, ArithmeticError):  # as it will in the notebook
            return None
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        found |= {node.id: value for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return found
