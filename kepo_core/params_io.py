"""How parameters are read and written: strict YAML, and the parameter cells of a notebook."""

import ast
import difflib
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kepo_core.errors import ParamError

_NUMBER = re.compile(r"[-+.0-9eE]+")


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars instead of 1.1: ``1e-6`` is a number, ``yes`` and ``on`` are texts, names occur once."""


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
    """The names and values of a parameter file; `ParamError` where it is missing, no flat mapping or repeats a name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ParamError(f"the parameter file {path} cannot be read: {reason}") from error
    return parse_yaml(text, path.name)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The names and values of ``text``, which is the file ``name`` or a part of it; `ParamError` as `read_yaml`."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ParamError(f"the parameter file {name} must hold one `name: value` per line")
        keys = [str(key.value) for key, _ in node.value]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ParamError(f"{repeated[0]} stands twice in {name}")
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
    """The number that ``text`` writes, as YAML 1.2 reads it; ``text`` itself where it is none."""
    value = yaml.load(text, _StrictLoader) if _NUMBER.fullmatch(text) else text
    return value if isinstance(value, int | float) else text


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a sentence that names the nearest of ``known``; empty where none is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def tagged_cell(notebook: Path) -> dict[str, Any]:
    """What the cell of a notebook sets that is tagged ``parameters``; `ParamError` for a file that is no notebook."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
        return parameter_cells("".join(cell["source"]) for cell in tagged)
    except (ValueError, KeyError, TypeError) as error:
        raise ParamError(f"notebook {notebook.name} cannot be read as a notebook: {type(error).__name__}") from error


def parameter_cells(cells: Iterable[str]) -> dict[str, Any]:
    """What those cells set that do nothing but set names to literals (papermill's injected cell is one)."""
    found: dict[str, Any] = {}
    for source in cells:
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a cell that never ran
            continue
        values = [_literals(statement) for statement in body]
        if None not in values:
            found |= {name: value for value in values if value for name, value in value.items()}
    return found


def _literals(statement: ast.stmt) -> dict[str, Any] | None:
    """The names that a statement sets to literals; none for a docstring, None for any other statement."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return {}
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return None
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    try:
        value = ast.literal_eval(statement.value)
    except ValueError:
        return None
    return {node.id: value for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
