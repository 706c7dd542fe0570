"""A run's rollouts in JupyterLab, a group at a time: ``browser.browse(run)``.

The cards are those of the report (`gallery.card`), in which everything a model or a data file wrote is escaped.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd

from kepo_core.data import phantom
from kepo_core.data.phantom import Facts
from kepo_core.data.records import AnswerOutcome, Question
from kepo_core.errors import ParamError
from kepo_core.experiment.experiment import StudyData, load_data
from kepo_core.method.exploration import GroupOutcome
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.pages import gallery
from kepo_core.params import resolve
from kepo_core.runs.run import Run


def _trained(group: pd.DataFrame) -> pd.DataFrame:
    return group[~group["replaced"]]


def _own(group: pd.DataFrame) -> pd.DataFrame:
    return group[~group["injected"]]


#: What the filter offers: label → whether a group belongs to it. "Wrong" is about the student's own rollouts.
FILTERS: dict[str, Callable[[pd.DataFrame], bool]] = {
    "all groups": lambda group: True,
    "every rollout right": lambda group: bool((_own(group)["accuracy"] > 0).all()),
    "some right, some wrong": lambda group: bool(0 < (_own(group)["accuracy"] > 0).mean() < 1),
    "every rollout wrong": lambda group: bool((_own(group)["accuracy"] == 0).all()),
    "rescued by a hint": lambda group: bool((group["exploration"] == GroupOutcome.RESCUED).any()),
    "hinted in vain": lambda group: bool(group["exploration"].isin(list(GroupOutcome)[1:]).any()),
    "gate open somewhere": lambda group: bool(_trained(group)["gate"].any()),
    "gate shut throughout": lambda group: not _trained(group)["gate"].any(),
    "not in the exact format": lambda group: not group["format_ok"].all(),
    "an answer missing": lambda group: bool((group["outcome"] == AnswerOutcome.MISSING).any()),
    "an ambiguous answer": lambda group: bool((group["outcome"] == AnswerOutcome.AMBIGUOUS).any()),
    "a truncated answer": lambda group: bool((group["outcome"] == AnswerOutcome.TRUNCATED).any()),
}


class RolloutBrowser(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Controls for filter, step and group over the card of one group.

    Args:
        rollouts: rows of ``method.rollouts.Rollout``.
        questions: among which every rollout's ``id`` is found.
        facts: what is true of the pictures, where it is known.
    """

    def __init__(
        self, rollouts: pd.DataFrame, questions: Sequence[Question], facts: Mapping[str, Facts] | None = None
    ) -> None:
        self._by_id = {question.id: question for question in questions}
        self._facts = facts
        self._groups = gallery.groups_of(rollouts)
        self._kinds = {name: [i for i, g in enumerate(self._groups) if fits(g)] for name, fits in FILTERS.items()}
        self.filter = widgets.Dropdown(
            options=[(f"{name} ({len(kind)})", name) for name, kind in self._kinds.items()], description="show"
        )
        self.step = widgets.Dropdown(description="step")
        self.group = widgets.Dropdown(description="group")
        self.previous = widgets.Button(description="previous", icon="arrow-left")
        self.next = widgets.Button(description="next", icon="arrow-right")
        self.place = widgets.Label()
        self.card = widgets.HTML()
        self.filter.observe(self._filtered, "value")
        self.step.observe(self._stepped, "value")
        self.group.observe(self._show, "value")
        self.previous.on_click(lambda _: self._move(-1))
        self.next.on_click(lambda _: self._move(1))
        super().__init__([
            widgets.HBox([self.filter, self.step, self.group], layout={"flex_flow": "row wrap"}),
            widgets.HBox([self.previous, self.next, self.place]),
            self.card,
        ])  # fmt: skip
        self._filtered()

    @property
    def _shown(self) -> list[int]:
        """Which groups are of the chosen kind."""
        return self._kinds[self.filter.value]

    def _step_of(self, index: int) -> int:
        return int(self._groups[index]["step"].iloc[0])

    def _filtered(self, _: Any = None) -> None:
        """Offer the steps that have groups of the chosen kind, and show the first."""
        _offer(self.step, list(dict.fromkeys(map(self._step_of, self._shown))))
        self._stepped()

    def _stepped(self, _: Any = None) -> None:
        """Offer the groups of the chosen step, and show the first."""
        own = [i for i in self._shown if self._step_of(i) == self.step.value]
        _offer(self.group, [(f"{k}: {self._groups[i]['id'].iloc[0]}", i) for k, i in enumerate(own, start=1)])
        self._show()

    def _move(self, by: int) -> None:
        """To the neighbour among the groups of the chosen kind, over the borders of steps."""
        to = self._shown[self._shown.index(self.group.value) + by]
        self.step.value = self._step_of(to)
        self.group.value = to

    def _show(self, _: Any = None) -> None:
        shown, chosen = self._shown, self.group.value
        at = shown.index(chosen) if chosen in shown else -1
        self.previous.disabled, self.next.disabled = at < 1, not -1 < at < len(shown) - 1
        if at < 0:
            self.place.value, self.card.value = "no such group", "<p>No rollouts to show.</p>"
            return
        group = self._groups[chosen]
        self.place.value = f"{at + 1} of {len(shown)}"
        card = gallery.card(group, self._by_id[str(group["id"].iloc[0])], self._facts)
        self.card.value = f"<style>{gallery.STYLE}</style>\n{card}"


def _offer(control: widgets.Dropdown, options: list[Any]) -> None:
    """New options, the first of them chosen; one that had none before would choose none."""
    control.options = options
    control.index = 0 if options else None


def browse(run: Run | str | Path, data: StudyData | None = None) -> RolloutBrowser:
    """The rollouts of a run, finished or at work.

    Args:
        run: it, or its folder.
        data: what it was trained on; by default it is read as the run read it, in some seconds.

    Raises `ParamError` if the run has no rollouts (baselines keep none), or questions that ``data`` has not.
    """
    if not isinstance(run, Run):
        run = Run.open(resolve(run))
    table = run.path / "rollouts.parquet"
    rollouts = pd.read_parquet(table) if table.is_file() else collect_rollouts(run.training_dir)
    if rollouts.empty:
        raise ParamError(f"{run.path} has no rollouts to show, expected a run of GRPO or KEPO that has begun to train")
    data = data or load_data(run.params)
    if unknown := sorted(set(rollouts["id"]) - {question.id for question in data.train}):
        raise ParamError(f"{table} has a rollout of question {unknown[0]}, expected the data that it was trained on")
    return RolloutBrowser(rollouts, data.train, phantom.load_facts(data.root))
