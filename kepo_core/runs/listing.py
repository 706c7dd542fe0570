"""The runs of a results folder, for reading: listed, found by name, shown, compared."""

import difflib
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kepo_core.analysis.statistics import AVG, accuracy_table, compare, format_table
from kepo_core.data.items import read_images
from kepo_core.data.records import Answer
from kepo_core.errors import ParamError
from kepo_core.params import PLACES, Params, from_root, resolve
from kepo_core.runs import shelf
from kepo_core.runs.run import Run

#: A folder's name as `Run.allocate` makes it; its group is the parameters' hash.
NAME = re.compile(r"\d{8}T\d{6}Z-.+-([0-9a-f]{8})(?:-\d+)?")
#: What a row of the list has beside the folder's name, its state and start, and what is wrong with it.
_KNOWN = ("method", "seed", "steps", "in_domain", "in_domain_before", "in_domain_after", "average_before",
          "average_after", "minutes")  # fmt: skip
#: What every run folder has; with none of them, and another name, a folder is no run folder.
FIRST_FILES = ("status.json", "params.yaml", "provenance.json")


def is_run_folder(path: Path) -> bool:
    """Whether a folder is one of a run, or was going to be one."""
    return bool(NAME.fullmatch(path.name)) or any((path / name).exists() for name in FIRST_FILES)


def folders(results: Path) -> list[Path]:
    """The folders of a results folder in the order of their names, but for hidden ones, ``reference``, ``studies``."""
    there = sorted(results.iterdir()) if results.is_dir() else []
    return [
        path
        for path in there
        if path.is_dir() and path.name not in ("reference", "studies") and not path.name.startswith(".")
    ]


def find(name: str, results: Path) -> Path:
    """The run folder that ``name`` means: a folder's name in ``results``, the beginning or end of one, or a path.

    The parameters' hash is such an end. Raises `ParamError` naming the candidates unless it is exactly one.
    """
    there = {path.name: path for path in folders(results) if is_run_folder(path)}
    if name in there:
        return there[name]
    if "/" in name and resolve(name).is_dir():
        return resolve(name)
    unnumbered = {folder: re.sub(r"(?<=-[0-9a-f]{8})-\d+$", "", folder) for folder in there}
    fitting = [f for f in there if name and (f.startswith(name) or f.endswith(name) or unnumbered[f].endswith(name))]
    if len(fitting) == 1:
        return there[fitting[0]]
    if fitting:
        more = f" and {len(fitting) - 5} older ones" if fitting[5:] else ""
        raise ParamError(f"{name} is the beginning or end of several runs: {', '.join(fitting[-5:])}{more}; say which")
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.3) or list(there)[-3:]
    like = f", such as {', '.join(near)}" if near else ", which holds none"
    where = f"{from_root(results)}{like}, its beginning or end"
    raise ParamError(f"no run is called {name!r}, expected a folder of {where}")


# Listed ----------------------------------------------------------------------------------------------------------


def overview(
    results: Path, state: str | None = None, method: str | None = None, values: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A row per run folder, newest first: what `row` says of those that fit.

    ``method`` is the one in the folder's name, ``values`` are resolved parameters. Folders that cannot be read fit
    every method and value, so that none is overlooked.
    """
    rows = [row(path) for path in folders(results) if is_run_folder(path)]
    wanted = {**({"method": method} if method else {}), **({"state": state} if state else {})}
    fitting = []
    for found in rows:
        params = found.pop("params")
        readable = found["state"] != "unreadable"
        same = all(found[name] == value for name, value in wanted.items() if readable or name == "state")
        if same and all(params[name] == value for name, value in (values or {}).items() if readable):
            fitting.append(found)
    return sorted(fitting, key=lambda found: (found["started"], found["id"]), reverse=True)


def row(path: Path) -> dict[str, Any]:
    """What is to be known of a run at a glance; accuracies in [0, 1], before and after training, ``None`` if unknown.

    ``params`` are its parameters. A folder that cannot be read has the state ``unreadable`` and a ``problem``.
    """
    found: dict[str, Any] = {"id": path.name, "state": "unreadable", "started": "", **dict.fromkeys(_KNOWN)}
    try:
        run = Run.open(path)
        status, params = run.status, run.params
        found |= {"state": run.state, "params": params.to_dict(), "started": status["started"]}
        found |= {"method": params.method_name, "seed": params.seed, "in_domain": params.train_modality}
        for side in ("before", "after"):
            for name, where in (("in_domain", params.train_modality), ("average", AVG)):
                value = (run.headline or {}).get(f"{where} {side}")
                found[f"{name}_{side}"] = value if isinstance(value, float | int) else None
        problem = f"nobody is at work on it: {next_step(run)}" if run.state == "killed" else status.get("error", "")
        return found | {"steps": steps(run), "minutes": minutes(run), "problem": problem}
    except (ValueError, OSError) as error:
        return found | {"state": "unreadable", "params": {}, "problem": str(error)}


def steps(run: Run) -> int:
    """Optimiser steps that ``metrics.jsonl`` has a whole line of; `ParamError` if its last one is no such line."""
    path = run.path / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    try:
        return int(json.loads(whole[-1])["step"]) if whole else 0
    except (ValueError, KeyError, TypeError) as error:
        raise ParamError(f"{path} ends in {whole[-1][:80]!r}, expected the numbers of a step") from error


def minutes(run: Run) -> float | None:
    """From start to end, or until now, by the clock; ``None`` where nobody noted the end."""
    if run.state == "running":
        return (time.time() - pd.Timestamp(run.status["started"]).timestamp()) / 60
    return shelf.minutes(run) if "finished" in run.status else None


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """`overview` as a table, accuracies in per cent; under it, why runs failed or cannot be read."""
    if not rows:
        return "no runs"
    width = max(len(found["id"]) for found in rows)
    table = pd.DataFrame([
        {"run": found["id"].ljust(width), "state": found["state"], "method": found["method"] or "–",
         "seed": _or_dash(found["seed"]), "steps": _or_dash(found["steps"]),
         "in-domain": _change(found, "in_domain"), AVG: _change(found, "average"),
         "min": _or_dash(found["minutes"], ".1f")}
        for found in rows
    ])  # fmt: skip
    if all(f"-{found['method']}-" in found["id"] for found in rows if found["method"]):
        table = table.drop(columns="method")  # the names say it
    problems = [f"{found['id']}: {found['problem']}" for found in rows if found["problem"]]
    return "\n".join([table.to_string(index=False), *([""] if problems else []), *problems])


def _or_dash(value: float | None, form: str = "") -> str:
    return "–" if value is None else format(value, form)


def _change(found: Mapping[str, Any], name: str) -> str:
    before, after = found[f"{name}_before"], found[f"{name}_after"]
    return "–" if before is None or after is None else f"{100 * before:.1f}→{100 * after:.1f}"


# Shown -----------------------------------------------------------------------------------------------------------


def show(path: Path) -> str:
    """All about one run. Raises `ParamError` if its folder cannot be read."""
    run = Run.open(path)
    status, found = run.status, run.provenance
    defaults = Params().to_dict()
    changed = {n: f"{v!r} (default {defaults.get(n, 'of TRL')!r})" for n, v in run.params.differing().items()}
    times = {"started": status["started"], "resumed": ", ".join(status.get("resumed", [])),
             "finished": status.get("finished", ""), "minutes": _or_dash(minutes(run), ".1f")}  # fmt: skip
    parts = {
        f"{path.name}": {"folder": from_root(path), "state": run.state, "error": status.get("error", ""),
                         "next": next_step(run), **times},
        "parameters that are not the defaults": changed,
        "where it came from": _flat({n: v for n, v in found.items() if n not in ("params_hash", "seeds")}),
        "headline": {name: str(value) for name, value in (run.headline or {}).items()},
        "files": _sizes(path),
        "to repeat it": {"": repeat(run)},
    }  # fmt: skip
    return "\n\n".join(f"{title}\n{_lines(entries)}" for title, entries in parts.items() if entries)


def _sizes(folder: Path) -> dict[str, str]:
    """What lies in a folder, with sizes; what lies deeper is added up."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        count = f"  {len(files)} files" if path.is_dir() else ""
        sizes[path.name + "/" * path.is_dir()] = f"{sum(file.stat().st_size for file in files):>13,} bytes{count}"
    return sizes


def next_step(run: Run) -> str:
    """What to do with a run, in words."""
    state = run.state
    if state == "completed":
        return "nothing, it has completed"
    if state == "running":
        return f"wait: {run.worker or 'a process'} is at work"
    if run.status["owner"] == "notebook":
        return "start it anew: a run that a notebook made by itself is not resumed"
    first = "put params.yaml back, which was edited since it began; then " if run.is_edited else ""
    return f"{first}kepo resume {shlex.quote(from_root(run.path))}"


def repeat(run: Run) -> str:
    """The command that makes such a run again."""
    notebook = run.provenance.get("notebook", "NOTEBOOK")
    return shlex.join(["kepo", "run", notebook, *run.params.to_arguments()])


def _flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested entries under joined names, without empty ones."""
    flat: dict[str, str] = {}
    for name, value in entries.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return {name: value for name, value in flat.items() if value not in ("", "[]")}


def _lines(entries: Mapping[str, str]) -> str:
    width = max(map(len, entries))
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in entries.items() if value)


# Compared --------------------------------------------------------------------------------------------------------


def comparison(paths: Sequence[Path]) -> str:
    """Runs side by side: parameters, origins, and what they answered to the same questions, against the first.

    Raises `ParamError` for fewer than two, and for a folder that cannot be read.
    """
    if len(paths) < 2:
        raise ParamError("one run alone cannot be compared, expected at least two")
    runs = {f"[{number}]": Run.open(path) for number, path in enumerate(paths, start=1)}
    parts = ["\n".join(f"{label} {run.path.name}  {run.state}" for label, run in runs.items())]
    params = {label: {n: v for n, v in run.params.to_dict().items() if n not in PLACES} for label, run in runs.items()}
    parts += [_differing("parameters", params), _differing("origins", {n: _origin(run) for n, run in runs.items()})]
    answers, reasons = comparable_answers(runs)
    if len(answers) > 1:
        parts += _accuracies(answers, runs)
    return "\n\n".join([*parts, *reasons])


def comparable_answers(runs: Mapping[str, Run]) -> tuple[dict[str, list[Answer]], list[str]]:
    """The answers of those completed runs that were asked what the first was, and sentences on the others.

    Questions are the same if their ids are and the data's hash is: other data can have the same ids.
    """
    answers: dict[str, list[Answer]] = {}
    reasons, asked = [], None
    for label, run in runs.items():
        if run.state != "completed":
            reasons.append(f"{label} has no accuracies to compare: it is {run.state}")
            continue
        try:
            given = list(shelf.read_answers(run).values())[-1]
        except (OSError, ValueError, KeyError, IndexError) as problem:
            reasons.append(f"{label} has no accuracies to compare: predictions.parquet cannot be read ({problem})")
            continue
        questions = (run.provenance.get("data", {}).get("test_sha256"), {(a.question_id, a.sample) for a in given})
        asked = asked or questions
        if questions == asked:
            answers[label] = given
        else:
            reasons.append(f"{label} was asked other questions than {next(iter(answers))}: accuracies do not compare")
    return answers, reasons


def _accuracies(answers: Mapping[str, list[Answer]], runs: Mapping[str, Run]) -> list[str]:
    """Tables, turned so that runs are columns, which stay narrow."""
    first = next(iter(answers))
    in_domain = runs[first].params.train_modality
    images = read_images(runs[first].path / "items.csv")
    known = images if all(answer.question_id in images for answer in answers[first]) else None
    accuracies = format_table(accuracy_table(answers, known, in_domain)).T
    differences = compare(answers, first, known, in_domain).T
    caution = "" if known else "; which questions share a picture is not known, so intervals may be too narrow"
    return [
        f"accuracy in per cent with 95 % intervals{caution}\n{accuracies.to_string()}",
        f"less that of {first}, in points, paired by question ({in_domain}: in-domain)\n{differences.to_string()}",
    ]


def _origin(run: Run) -> dict[str, str]:
    """What of a run's provenance can change a number."""
    names = ("code", "notebook", "notebook_sha256", "versions", "data", "hardware")
    return _flat({name: run.provenance[name] for name in names if name in run.provenance})


def _differing(what: str, columns: Mapping[str, Mapping[str, object]]) -> str:
    """A table of the entries that are not the same in all columns, long ones cut."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = {name: {label: str(column.get(name, "–"))[:40] for label, column in columns.items()}
            for name in names if len({str(column.get(name, "–")) for column in columns.values()}) > 1}  # fmt: skip
    if not rows:
        return f"{what}: the same"
    return f"{what} that differ\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}"
