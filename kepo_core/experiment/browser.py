"""A run's rollouts in JupyterLab, a group at a time: ``browser.browse(run)``."""

from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML, display

from kepo_core.data import phantom
from kepo_core.errors import ParamError
from kepo_core.experiment.experiment import StudyData, load_data
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.pages import gallery
from kepo_core.params import resolve
from kepo_core.runs.run import Run


def browse(run: Run | str | Path, data: StudyData | None = None, where: str = "") -> widgets.interactive:
    """A slider over the groups of a run, finished or running, and the card of the selected group.

    Args:
        run: the run, or its folder.
        data: its data; by default they are read again, which takes some seconds.
        where: show only groups with a rollout that meets this condition on the columns of ``rollouts.parquet``, in the
            syntax of pandas' ``eval``: ``exploration == 'rescued'``, ``outcome == 'missing' and not injected``,
            ``~format_ok``.

    Raises `ParamError` if no rollouts fit (baselines keep none), or if ``data`` lacks one of their questions.
    """
    if not isinstance(run, Run):
        run = Run.open(resolve(run))
    table = run.path / "rollouts.parquet"
    rollouts = pd.read_parquet(table) if table.is_file() else collect_rollouts(run.training_dir)
    if rollouts.empty:
        raise ParamError(f"{run.path} has no rollouts, expected a run of GRPO or KEPO that has begun training")
    data = data or load_data(run.params)
    if unknown := sorted(set(rollouts["id"]) - {question.id for question in data.train}):
        raise ParamError(f"{table} has question {unknown[0]}, which data lacks, expected the run's training data")
    groups = _having(where, rollouts)
    facts = phantom.load_facts(data.root)

    def show(group: int) -> HTML:
        card = gallery.cards([groups[group - 1]], data.train, facts)
        display(card)  # type: ignore[no-untyped-call]
        return card

    return widgets.interactive(show, group=widgets.IntSlider(1, 1, len(groups), description=f"of {len(groups)}"))


def _having(where: str, rollouts: pd.DataFrame) -> list[pd.DataFrame]:
    """The groups with a rollout that meets the condition."""
    try:
        met = rollouts[rollouts.eval(where)] if where else rollouts
    except (NameError, SyntaxError, TypeError, ValueError, KeyError) as error:
        columns = ", ".join(map(str, rollouts.columns))
        raise ParamError(f"where={where!r} is not a condition on {columns}: {error}") from error
    if met.empty:
        raise ParamError(f"where={where!r}: none of {len(rollouts)} rollouts meets it")
    return [group for group in gallery.groups_of(rollouts) if group.index.isin(met.index).any()]
