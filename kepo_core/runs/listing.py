"""List, find by name, show and compare the runs of a results folder."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kepo_core import params_trl
from kepo_core.analysis.statistics import AVG, accuracy_table, compare, format_table
from kepo_core.data.items import read_images
from kepo_core.data.records import Answer
from kepo_core.errors import ParamError
from kepo_core.params import PLACES, Params, at_root, from_root, resolve
from kepo_core.params_io import tagged_cell
from kepo_core.paths import shown
from kepo_core.runs import shelf
from kepo_core.runs.run import Run
from kepo_core.runs.summary import Summary, summarize

#: A folder's name as `Run.allocate` makes it; the regular expression's group is the parameters' hash.
NAME = re.compile(r"\d{8}T\d{6}Z-.+-([0-9a-f]{8})(?:-\d+)?")


def is_run_folder(path: Path) -> bool:
    """Whether the folder is a run folder, also an incomplete one."""
    return bool(NAME.fullmatch(path.name)) or (path / "status.json").is_file()


def folders(results: Path) -> list[Path]:
    """The folders of a results folder, sorted by name, without hidden ones, ``reference`` and ``studies``."""
    there = sorted(results.iterdir()) if results.is_dir() else []
    return [
        path
        for path in there
        if path.is_dir() and path.name not in ("reference", "studies") and not path.name.startswith(".")
    ]


def find(name: str, results: Path) -> Path:
    """The run folder with this ``name``: a folder's name in ``results``, the beginning or end of one, or a path.

    The parameters' hash is such an end. Raises `ParamError` naming the candidates unless exactly one folder fits.
    """
    there = {path.name: path for path in folders(results) if is_run_folder(path)}
    if name in there:
        return there[name]
    path = resolve(name)
    if path.is_dir() and ("/" in name or is_run_folder(path)):
        return path
    unnumbered = {folder: re.sub(r"(?<=-[0-9a-f]{8})-\d+$", "", folder) for folder in there}
    fitting = [f for f in there if name and (f.startswith(name) or f.endswith(name) or unnumbered[f].endswith(name))]
    if len(fitting) == 1:
        return there[fitting[0]]
    if fitting:
        more = f" and {len(fitting) - 5} older ones" if fitting[5:] else ""
        raise ParamError(f"{name} fits several runs: {', '.join(fitting[-5:])}{more}: write more of the name")
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.3) or list(there)[-3:]
    like = f", for example {', '.join(near)}" if near else ", which has none"
    where = f"{shown(results)}{like}"
    raise ParamError(f"no run is called {name!r}, expected the name, its beginning or its end, of a folder in {where}")


# Listed ----------------------------------------------------------------------------------------------------------


def overview(
    results: Path, state: str | None = None, method: str | None = None, values: Mapping[str, Any] | None = None
) -> list[Summary]:
    """The runs that fit all filters, newest first.

    ``method`` is the one in the folder's name, ``values`` are resolved parameters. Unreadable folders fit every method
    and value, so they are always listed.
    """
    runs = [summarize(path) for path in folders(results) if is_run_folder(path)]
    fitting = [run for run in runs if state in (None, run.state) and _fits(run, method, values or {})]
    return sorted(fitting, key=lambda run: (run.started, run.name), reverse=True)


def _fits(run: Summary, method: str | None, values: Mapping[str, Any]) -> bool:
    same = method in (None, run.method) and all(_value(run, name) == value for name, value in values.items())
    return same or run.state == "unreadable"


def _value(run: Summary, name: str) -> Any:
    """A parameter of a run; TRL's default for a field of TRL's that the run does not set."""
    return run.params[name] if name in run.params else params_trl.default(name)


def as_row(run: Summary) -> dict[str, Any]:
    """A run for JSON: accuracies in [0, 1], before and after training; ``None`` if unknown."""
    trained_on = run.params.get("train_modality")
    row = {"id": run.name, "state": run.state, "started": run.started, "method": run.method, "seed": run.seed,
           "steps": run.steps, "in_domain": trained_on}  # fmt: skip
    for side, found in {"in_domain": run.accuracy(str(trained_on)), "average": run.accuracy(AVG)}.items():
        row |= {f"{side}_before": found and found.before, f"{side}_after": found and found.after}
    return row | {"minutes": run.minutes, "problem": run.error}


def as_text(runs: Sequence[Summary]) -> str:
    """`overview` (at least one run) as a table with accuracies in per cent, followed by the errors of failed runs."""
    width = max(len(run.name) for run in runs)
    columns = {
        "run": [run.name.ljust(width) for run in runs],
        "state": [run.state for run in runs],
        "method": [run.method or "–" for run in runs],
        "seed": [_or_dash(run.seed) for run in runs],
        "steps": [_or_dash(run.steps) for run in runs],
        "in-domain": [_change(run, str(run.params.get("train_modality"))) for run in runs],
        AVG: [_change(run, AVG) for run in runs],
        "min": [_or_dash(run.minutes, ".1f") for run in runs],
    }
    if all(f"-{run.method}-" in run.name for run in runs if run.method):
        del columns["method"]  # it is in the names
    problems = [f"{run.name}: {run.error}" for run in runs if run.error]
    return "\n".join([pd.DataFrame(columns).to_string(index=False), *([""] if problems else []), *problems])


def _or_dash(value: float | None, form: str = "") -> str:
    return "–" if value is None else format(value, form)


def _change(run: Summary, name: str) -> str:
    found = run.accuracy(name)
    return "–" if found is None else found.change


# Shown -----------------------------------------------------------------------------------------------------------


def show(path: Path) -> str:
    """A description of one run. Raises `ParamError` if its folder cannot be read."""
    run = Run.open(path)
    status, found = run.status, run.provenance
    defaults = Params().to_dict()
    changed = {n: f"{v!r} (default {defaults.get(n, 'of TRL')!r})" for n, v in run.params.differing().items()}
    times = {"started": status["started"], "resumed": ", ".join(status.get("resumed", [])),
             "finished": status.get("finished", ""), "minutes": _or_dash(summarize(path).minutes, ".1f")}  # fmt: skip
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
    """The files of a folder with their sizes; a subfolder has the sum of its files."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        count = f"  {len(files)} files" if path.is_dir() else ""
        sizes[path.name + "/" * path.is_dir()] = f"{sum(file.stat().st_size for file in files):>13,} bytes{count}"
    return sizes


def next_step(run: Run) -> str:
    """The next step for a run, as a sentence."""
    state = run.state
    if state == "completed":
        return "nothing, it has completed"
    if state == "running":
        return f"wait: {run.worker} is making it"
    if run.status["owner"] == "notebook":
        return "start it again: only runs of `kepo run` can be resumed"
    if not run.can_be_resumed:
        return "start it again with other parameters or data: its own were refused"
    first = "undo the edits of params.yaml; then " if run.is_edited else ""
    return f"{first}kepo resume {shlex.quote(shown(run.path))}"


def repeat(run: Run) -> str:
    """The command that repeats the run."""
    notebook = run.provenance.get("notebook", "NOTEBOOK")
    try:
        cell = tagged_cell(at_root(notebook)) if at_root(notebook).is_file() else {}
    except ParamError as error:
        return f"no command: {error}"
    return shlex.join(["kepo", "run", notebook, *run.params.to_arguments(cell)])


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
    """Runs side by side: parameters, origins, and accuracies on the same questions, against the first run.

    Raises `ParamError` for fewer than two runs, and for a folder that cannot be read.
    """
    if len(paths) < 2:
        raise ParamError("a single run cannot be compared, expected at least two")
    runs = {f"[{number}]": Run.open(path) for number, path in enumerate(paths, start=1)}
    parts = ["\n".join(f"{label} {run.path.name}  {run.state}" for label, run in runs.items())]
    params = {label: {n: v for n, v in run.params.to_dict().items() if n not in PLACES} for label, run in runs.items()}
    parts += [_differing("parameters", params), _differing("origins", {n: _origin(run) for n, run in runs.items()})]
    answers, reasons = comparable_answers(runs)
    if len(answers) > 1:
        parts += _accuracies(answers, runs)
    return "\n\n".join([*parts, *reasons])


def comparable_answers(runs: Mapping[str, Run]) -> tuple[dict[str, list[Answer]], list[str]]:
    """The answers of the completed runs with the first one's questions, and a sentence on each of the other runs.

    Questions are the same if their ids and the data's hash are: other data can have the same ids.
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
            reasons.append(f"{label} has other questions than {next(iter(answers))}: its accuracies are not compared")
    return answers, reasons


def _accuracies(answers: Mapping[str, list[Answer]], runs: Mapping[str, Run]) -> list[str]:
    """Tables with a column per run, which stay narrow."""
    first = next(iter(answers))
    in_domain = runs[first].params.train_modality
    images = read_images(runs[first].path / "items.csv")
    known = images if all(answer.question_id in images for answer in answers[first]) else None
    accuracies = format_table(accuracy_table(answers, known, in_domain)).T
    differences = compare(answers, first, known, in_domain).T
    caution = "" if known else "; it is unknown which questions share a picture, so intervals may be too narrow"
    return [
        f"accuracy in per cent with 95 % intervals{caution}\n{accuracies.to_string()}",
        f"difference from {first} in points, paired by question ({in_domain}: in-domain)\n{differences.to_string()}",
    ]


def _origin(run: Run) -> dict[str, str]:
    """The parts of a run's provenance that can change a number."""
    names = ("code", "notebook", "notebook_sha256", "versions", "data", "hardware")
    return _flat({name: run.provenance[name] for name in names if name in run.provenance})


def _differing(what: str, columns: Mapping[str, Mapping[str, object]]) -> str:
    """A table of the entries that differ between columns, cut to 40 characters."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = {name: {label: str(column.get(name, "–"))[:40] for label, column in columns.items()}
            for name in names if len({str(column.get(name, "–")) for column in columns.values()}) > 1}  # fmt: skip
    if not rows:
        return f"{what}: the same"
    return f"{what} that differ\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}"
