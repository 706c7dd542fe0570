"""Which run folders can be trusted: torn, edited and orphaned ones are found, each with what to do about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from kepo_core.errors import ParamError
from kepo_core.params import from_root
from kepo_core.runs import checksums
from kepo_core.runs.listing import FIRST_FILES, NAME, is_run_folder, next_step, repeat
from kepo_core.runs.run import Run

Kind = Literal["torn", "edited", "orphaned", "note"]


@dataclass(frozen=True)
class Finding:
    """Something about a folder: a file that is not whole, a later change, a run that nobody makes, or a note."""

    kind: Kind
    what: str
    to_do: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}" + (f" → {self.to_do}" if self.to_do else "")


def verify(path: Path) -> list[Finding]:
    """What is found in one folder of a results folder; notes are no fault."""
    if not is_run_folder(path):
        if any(is_run_folder(child) for child in path.iterdir() if child.is_dir()):
            return [Finding("note", "holds run folders itself", f"kepo runs verify --results {from_root(path)}")]
        return [Finding("orphaned", "no run folder", "move it away or delete it")]
    try:
        run = _opened(path)
    except ParamError as problem:
        return [Finding("torn", str(problem), "nothing can go on with it: delete it, and start the run anew")]
    state = run.state
    found = [] if state == "running" else list(_torn(run, state))  # whoever is at work may be writing
    found += _edited_parameters(run)
    if state == "completed":
        found += _edited_files(run, [finding.what.split()[0] for finding in found])
    if state == "killed":
        found.append(Finding("orphaned", "says running, but nobody is at work", next_step(run)))
    return found


def report(paths: Sequence[Path]) -> tuple[str, bool]:
    """What is found in each folder, as text, and whether that is nothing but notes; a note is told once for all."""
    found = {path.name: verify(path) for path in paths}
    faults = {name: [finding for finding in there if finding.kind != "note"] for name, there in found.items()}
    faults = {name: there for name, there in faults.items() if there}
    lines = [line for name, there in faults.items() for line in (name, *(f"  {finding}" for finding in there))]
    notes: dict[str, list[str]] = {}
    for name, there in found.items():
        for note in (finding for finding in there if finding.kind == "note"):
            notes.setdefault(str(note), []).append(name)
    lines += [f"{note} ({names[0] if len(names) == 1 else f'{len(names)} folders'})" for note, names in notes.items()]
    return "\n".join([*lines, f"{len(paths)} folders looked at, {len(faults) or 'none'} with a fault"]), not faults


def _opened(path: Path) -> Run:
    """The run, if the files that every run has can be read."""
    if missing := [name for name in FIRST_FILES if not (path / name).is_file()]:
        raise ParamError(f"{missing[0]} is missing")
    run = Run.open(path)
    _ = run.status, run.provenance, run.headline
    return run


def _torn(run: Run, state: str) -> Iterator[Finding]:
    """Files that are missing or not whole."""
    for partial in sorted(run.path.rglob("*.partial")):
        if not any(left in (partial, *partial.parents) for left in run.leftovers):
            yield Finding("torn", f"{partial.relative_to(run.path)} was never finished", "delete it")
    for table in sorted(run.path.glob("*.parquet")):
        try:
            pd.read_parquet(table)
        except (OSError, ValueError) as problem:
            yield Finding("torn", f"{table.name} cannot be read ({str(problem).splitlines()[0]})", _anew(run, state))
    if state != "completed":
        return
    needed = ["headline.json"]
    needed += ["notebook.ipynb", "report.html"] if run.status["owner"] == "kepo run" else []
    needed += ["items.csv", "predictions.parquet"] if "data" in run.provenance else []
    for name in needed:
        if not (run.path / name).is_file():
            yield Finding("torn", f"{name} is missing", _anew(run, state))
    for left in run.leftovers:
        what = f"{left.relative_to(run.path)} was left when the run was killed after it had completed"
        yield Finding("torn", what, "delete it")


def _edited_parameters(run: Run) -> Iterator[Finding]:
    """Parameters that are not those of which provenance and the folder's name hold the hash."""
    noted, name = run.provenance.get("params_hash"), NAME.fullmatch(run.path.name)
    if run.is_edited:
        yield Finding("edited", f"params.yaml has no longer the hash {noted} of provenance.json", "put it back")
    if name and name[1] != noted:
        yield Finding("edited", f"the folder is named after the hash {name[1]}, provenance.json has {noted}",
                      "give it its name back, or put provenance.json back")  # fmt: skip


def _edited_files(run: Run, known: list[str]) -> Iterator[Finding]:
    """Files that are not what they were when the run completed; those in ``known`` were spoken of already."""
    if run.status.get("headline") != (run.headline or {}):
        yield Finding("edited", "status.json and headline.json hold different headlines", _anew(run, "completed"))
    if not (run.path / checksums.NAME).is_file():
        yield Finding("note", f"has no {checksums.NAME}, as runs of earlier versions have none")
        return
    try:
        differences = checksums.differences(run.path, run.unsealed)
    except ParamError as problem:
        yield Finding("torn", str(problem), _anew(run, "completed"))
        return
    words = {"changed": "was changed", "missing": "is missing", "new": "was added"}
    for kind, names in differences.items():
        names = [name for name in names if name not in known]
        for name in names[:5]:
            yield Finding("edited", f"{name} {words[kind]} after the run had completed",
                          "delete it" if kind == "new" else _anew(run, "completed"))  # fmt: skip
        if names[5:]:
            yield Finding("edited", f"{len(names) - 5} more files: the same")


def _anew(run: Run, state: str) -> str:
    """A run that has completed is not gone on with: it is made again, beside this one."""
    return f"put it back, or make the run anew: {repeat(run)}" if state == "completed" else next_step(run)
