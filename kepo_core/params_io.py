"""How parameters are read and written: strict YAML, and the parameter cells of a notebook."""

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kepo_core.errors import ParamError

#: "Greater than zero", as an allowed lower bound.
TINY = 1e-12


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `ParamError` unless ``low`` ≤ ``value`` ≤ ``high``."""
    if math.isfinite(value) and low <= value <= high:
        return
    above = "greater than 0" if low == TINY else f"at least {low:g}"
    upto = f" and at most {high:g}" if high < math.inf else ""
    raise ParamError(f"{name} must be {above}{upto}, got {value:g}")


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
        raise ParamError(f"params_file {path} cannot be read: {reason}") from error
    return parse_yaml(text, path.name)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The names and values of ``text``, which is the file ``name`` or a part of it; `ParamError` as `read_yaml`."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ParamError(f"params_file {name} must hold one `name: value` per line")
        keys = [str(key.value) for key, _ in node.value]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ParamError(f"{repeated[0]} stands twice in {name}")
        return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}
    except yaml.YAMLError as error:
        raise ParamError(f"params_file {name} is not YAML: {' '.join(str(error).split())}") from error
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


def parameter_cell_names(cells: Iterable[str]) -> set[str]:
    """The names set by those cells that do nothing but set names to literals (papermill's injected cell is one)."""
    names: set[str] = set()
    for source in cells:
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a cell that never ran
            continue
        if all(_is_literal_assignment(statement) for statement in body):
            names |= {node.id for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names


def _is_literal_assignment(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):  # a docstring
        return isinstance(statement.value, ast.Constant)
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return False
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        return False
    return True
