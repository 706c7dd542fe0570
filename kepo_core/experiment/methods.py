"""The compared methods as data (``methods.yaml``), and the paper's Table 1."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kepo_core.errors import ParamError
from kepo_core.params import Params
from kepo_core.task.prompts import needs_hint

_HERE = Path(__file__).parent
#: Parameters of a method that its row does not set.
KEPO: dict[str, Any] = {"method": "kepo", "distill": True, "explore": True, "thinking": True, "tau": 1.0}


def needs_teacher(params: Params) -> bool:
    """Whether the method uses π_T, for guidance or hints."""
    hints = params.explore and needs_hint(params.hint_context)
    return params.method == "gkd" or (params.method == "kepo" and (params.distill or hints))


@dataclass(frozen=True)
class Method:
    """One method: its name, description, source, parameters, and its row in Table 1 if it has one.

    ``row`` is (method, size, mode) as in `paper_table`.
    """

    name: str
    what: str
    source: str
    parameters: dict[str, Any]
    row: tuple[str, str, str] | None = None

    def overrides(self, base: Params) -> dict[str, Any]:
        """Its parameters over ``base``, whose own method does not matter; ``student: teacher`` becomes the teacher."""
        given = KEPO | self.parameters
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
        raise ParamError(f"no method is called {name!r}, expected one of {', '.join(methods())}")
    return methods()[name]


def name_of(params: Params) -> str:
    """The method whose parameters ``params`` have; of several the one that sets most: ``grpo-std``, not ``grpo``.

    The paper's name of the method if no method fits, or several set equally many parameters.
    """
    asked = {name: row.overrides(params) for name, row in methods().items()}
    sizes = {name: len(given) for name, given in asked.items() if given.items() <= params.to_dict().items()}
    most = [name for name, size in sizes.items() if size == max(sizes.values())]
    return most[0] if len(most) == 1 else params.method_name


def choose(rows: str, base: Params) -> tuple[dict[str, Params], list[str]]:
    """The runs of ``rows`` over ``base`` (name → parameters), and the names of skipped rows.

    ``rows``: names separated by commas; ``table1``, the paper's 19 rows; or ``all``, including controls and rivals. The
    last two skip rows with other models from the hub if ``base`` has an embedded student: those models do not know
    PhantomVQA's fixed sentences, and there may be no network. Raises ``ParamError`` for an unknown name, or parameters
    that do not fit ``base``.
    """
    if not isinstance(rows, str):
        raise ParamError(f"rows is {rows!r}, expected table1, all, or names separated by commas")
    groups = {"table1": [m for m in methods().values() if m.row], "all": list(methods().values())}
    named = rows not in groups
    asked = [method(name.strip()) for name in rows.split(",") if name.strip()] if named else groups[rows]
    if not asked:
        raise ParamError(f"rows is {rows!r}, expected table1, all, or names separated by commas")
    foreign = [m.name for m in asked if "/" in m.parameters.get("student", "")]
    left_out = foreign if base.student.startswith("embedded:") and not named else []
    return {m.name: base.replace(**m.overrides(base)) for m in asked if m.name not in left_out}, left_out


def methods_table(chosen: Mapping[str, Params]) -> pd.DataFrame:
    """Description and source of the ``chosen`` methods, and the hash at the end of their run folders' names."""
    rows = {name: (method(name).what, method(name).source, params.hash) for name, params in chosen.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["what", "source", "parameters"])


def beside_paper(ours: pd.DataFrame) -> pd.DataFrame:
    """Our accuracies (``statistics.accuracy_table``, rows by method) beside Table 1's, in per cent.

    Columns: (ours or paper, modality or average); the paper's are NaN for methods that are not in it.
    """
    values: pd.DataFrame = 100 * ours.xs("accuracy", axis=1, level=1)  # type: ignore[assignment]  # of columns
    values.columns = pd.MultiIndex.from_product([["ours"], values.columns])
    table = paper_table().drop(columns="teacher")
    known = {str(name): table.loc[[row]].iloc[0] for name in ours.index if (row := method(str(name)).row)}
    theirs = pd.DataFrame(known, index=table.columns).T.reindex(ours.index)
    theirs.columns = pd.MultiIndex.from_product([["paper"], theirs.columns])
    return values.join(theirs.astype(float))


def paper_table() -> pd.DataFrame:
    """The paper's Table 1 (arXiv 2602.00400 v1), in per cent: a row per (method, size, mode).

    As printed, with one correction: the row KEPO-KE (τ=0), non-thinking, has its two averages swapped (printed: avg
    71.33, OOD 72.13; its columns give 72.12 and 71.33).
    """
    table = pd.read_csv(_HERE / "paper_table1.csv").set_index(["method", "size", "mode"])
    return table.drop(columns="category")


def released_curves() -> pd.DataFrame:
    """Accuracies of four runs in the authors' released notebook: columns run, step, modality, accuracy_percent.

    Five epochs, 300 questions per modality, every ten steps; none of them is KEPO. Runs have this package's names (the
    notebook's KDPO is GRPO with distillation, KEPO-KE).
    """
    names = {
        "Qwen3-VL-2B-GRPO-MRI-600-think": "GRPO",
        "Qwen3-VL-2B-KDPO-MRI-600-think-tau-0": "KEPO-KE τ = 0",
        "Qwen3-VL-2B-KDPO-MRI-600-think-tau-0-235b-a22b": "KEPO-KE τ = 0, teacher 235B",
        "Qwen3-VL-2B-KDPO-MRI-600-think-tau-1": "KEPO-KE τ = 1",
    }
    table = pd.read_csv(_HERE / "released_curves.csv")
    return table.assign(run=table["run"].map(names))
