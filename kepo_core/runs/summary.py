"""Summary of a run for `kepo runs list` and the index: state, method, parameters, accuracies.

Reading takes a fraction of a millisecond per folder and never fails: lists show broken folders, too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kepo_core.errors import ParamError
from kepo_core.params import PLACES, Params
from kepo_core.params_io import parse_yaml
from kepo_core.paths import shown
from kepo_core.runs.run import Run


@dataclass(frozen=True)
class Accuracy:
    """One row of a headline: accuracies in [0, 1] and the 95 % interval of their difference, if known."""

    name: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None

    @property
    def change(self) -> str:
        """``50.7 → 98.0 %``."""
        return f"{100 * self.before:.1f} → {100 * self.after:.1f} %"

    @property
    def difference(self) -> str:
        """``+47.3 [+40.4, +53.5]`` points."""
        between = "" if self.low is None or self.high is None else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{100 * (self.after - self.before):+.1f}{between}"


@dataclass(frozen=True)
class Summary:
    """One run folder. ``state`` is `Run.state`, or ``unreadable``; ``error`` says why it failed or cannot be read."""

    name: str
    state: str = "unreadable"
    error: str = ""
    started: str = ""
    minutes: float | None = None  # None if the end is unknown
    method: str = ""
    seed: int | None = None
    steps: int | None = None  # in metrics.jsonl
    params_hash: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    accuracies: tuple[Accuracy, ...] = ()
    has_report: bool = False

    @property
    def changed(self) -> dict[str, Any]:
        """Parameters that differ from their defaults, without `PLACES`."""
        return _changed(self.params)

    def accuracy(self, name: str) -> Accuracy | None:
        """The accuracy in a modality, or an average; ``None`` if the headline does not have it."""
        return next((row for row in self.accuracies if row.name == name), None)


def summarize(folder: Path) -> Summary:
    """Read the small files of ``folder``; ``error`` says what cannot be read."""
    try:
        run = Run(folder, _defaults())  # its own parameters are read line by line below, which is much faster
        state, status, made = run.state, run.status, run.provenance
        timed = state == "running" or "finished" in status
        headline = status.get("headline") or {}
        return Summary(
            name=folder.name,
            state=state,
            error=_gone(folder, status) if state == "killed" else str(status.get("error", "")),
            started=status["started"],
            minutes=run.minutes if timed else None,
            method=str(made.get("method") or headline.get("method", "")),
            seed=made["seeds"]["seed"],
            steps=_steps(folder / "metrics.jsonl"),
            params_hash=str(made["params_hash"]),
            params=read_parameters((folder / "params.yaml").read_text("utf-8")),
            accuracies=accuracies(headline),
            has_report=(folder / "report.html").is_file(),
        )
    except ParamError as problem:
        return Summary(folder.name, error=str(problem))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return Summary(folder.name, error=f"{type(problem).__name__}: {problem}")


def accuracies(headline: Mapping[str, Any]) -> tuple[Accuracy, ...]:
    """The rows of ``diagnosis.headline`` that have an accuracy before and after; none for other headlines."""
    found = []
    for name in [key.removesuffix(" after") for key in headline if key.endswith(" after")]:
        before, after, low, high = (headline.get(f"{name} {part}") for part in ("before", "after", "low", "high"))
        bounds = all(x is None or isinstance(x, int | float) for x in (low, high))
        if isinstance(before, int | float) and isinstance(after, int | float) and bounds:
            found.append(Accuracy(name, before, after, low, high))
    return tuple(found)


def read_parameters(text: str) -> dict[str, Any]:
    """All parameters of a run's ``params.yaml``, with defaults for missing ones.

    The file has a line per parameter in the format of the defaults' lines: only lines that differ are parsed.
    """
    lines = [line for line in text.splitlines() if line not in _default_lines() and not line.startswith("#")]
    return _defaults().to_dict() | parse_yaml("\n".join(lines), "params.yaml")


def changed_parameters(text: str) -> dict[str, Any]:
    """The parameters of a run's ``params.yaml`` that differ from the defaults, without `PLACES`."""
    return _changed(read_parameters(text))


def _changed(params: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _defaults().to_dict()
    return {name: value for name, value in params.items() if name not in PLACES and value != defaults.get(name)}


@cache
def _defaults() -> Params:
    return Params()


@cache
def _default_lines() -> frozenset[str]:
    return frozenset(_defaults().to_yaml().splitlines())


def _gone(folder: Path, status: Mapping[str, Any]) -> str:
    resume = f": `kepo resume {shown(folder)}` resumes it" if status["owner"] == "kepo run" else ""
    return f"its process was killed{resume}"


def _steps(metrics: Path) -> int:
    """The last optimiser step with a whole line in ``metrics.jsonl``; `ParamError` if that line is invalid."""
    if not metrics.is_file():
        return 0
    whole = metrics.read_bytes().rsplit(b"\n", 2)[:-1]  # text after the last newline is not a whole line
    try:
        return int(json.loads(whole[-1])["step"]) if whole else 0
    except (ValueError, KeyError, TypeError) as error:
        raise ParamError(f"{metrics} ends in {whole[-1][:80]!r}, expected the numbers of a step") from error
