"""The methods that are compared, as data (``methods.yaml``), and the paper's Table 1 beside which they stand."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kepo_core.params import ParamError, Params

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One row: its name, what it is, its source, the parameters that make it, and its row in Table 1 if it has one.

    ``row`` is (method, size, mode) as in `paper_table`.
    """

    name: str
    what: str
    source: str
    parameters: dict[str, Any]
    row: tuple[str, str, str] | None = None

    def overrides(self, base: Params) -> dict[str, Any]:
        """Its parameters over ``base``: ``student: teacher`` becomes the teacher's name."""
        given = dict(self.parameters)
        if given.get("student") == "teacher":
            given["student"] = base.teacher
        return given


@cache
def methods() -> dict[str, Method]:
    """All methods by name, in the order of the file."""
    entries = yaml.safe_load((_HERE / "methods.yaml").read_text(encoding="utf-8"))
    found = [Method(**{**entry, "row": tuple(entry["row"]) if "row" in entry else None}) for entry in entries]
    return {method.name: method for method in found}


def method(name: str) -> Method:
    """The method called ``name``; raises ``ParamError`` naming them all."""
    if name not in methods():
        raise ParamError(f"there is no method {name!r}, expected one of {', '.join(methods())}")
    return methods()[name]


def paper_table() -> pd.DataFrame:
    """The paper's Table 1 (arXiv 2602.00400 v1), in per cent: a row per (method, size, mode).

    As printed but for one row: KEPO-KE (τ=0), non-thinking, prints its two averages in each other's place (avg 71.33,
    OOD 72.13, where its columns give 72.12 and 71.33); here each stands in its own.
    """
    table = pd.read_csv(_HERE / "paper_table1.csv").set_index(["method", "size", "mode"])
    swapped = ("KEPO-KE (tau=0)", "2B", "non-thinking")
    table.loc[swapped, ["avg", "avg_ood"]] = table.loc[swapped, ["avg_ood", "avg"]].to_numpy()
    return table.drop(columns=["category"]).rename(columns={"avg": "Avg.", "avg_ood": "Avg. (OOD)"})


def as_markdown() -> str:
    """The table of methods as the README shows it."""
    lines = ["| name | what | source | parameters |", "|---|---|---|---|"]
    for entry in methods().values():
        parameters = ", ".join(f"`{name}: {value}`" for name, value in entry.parameters.items())
        lines.append(f"| `{entry.name}` | {entry.what} | {entry.source} | {parameters} |")
    return "\n".join(lines) + "\n"
