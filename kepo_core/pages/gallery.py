"""Sample rollouts as HTML cards (``cards.html.j2``): picture, question, completions and the outcome of each.

Texts of models and data files are escaped. Each mark is a word as well as a colour.
"""

import base64
import io
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import HTML

from kepo_core.data.images import load_image
from kepo_core.data.phantom import Facts
from kepo_core.data.records import LETTERS, Question
from kepo_core.data.splits import image_key
from kepo_core.pages import shell

_LARGEST = 384  # stored pixels of a picture: enough for its size on the page on any screen


def show_rollouts(
    rollouts: pd.DataFrame,
    questions: Sequence[Question],
    n: int = 4,
    seed: int = 0,
    facts: Mapping[str, Facts] | None = None,
) -> HTML:
    """``n`` groups of rollouts as cards: in turn one rescued by a hint, one with mixed outcomes, and another one.

    Args:
        rollouts: rows of ``method.rollouts.Rollout``, as ``collect_rollouts`` reads them.
        questions: the training questions; a rollout's ``id`` is that of its question.
        n: number of groups; fewer if ``rollouts`` has fewer.
        seed: of the choice of groups.
        facts: true facts of the pictures (``phantom.load_facts``), if known.

    Raises ``KeyError`` when a rollout's question is not among ``questions``.
    """
    return cards(_choose(groups_of(rollouts), n, seed), questions, facts)


def cards(
    groups: Sequence[pd.DataFrame], questions: Sequence[Question], facts: Mapping[str, Facts] | None = None
) -> HTML:
    """A card per group: its question, the teacher's hint, and a line per rollout. See `show_rollouts`."""
    by_id = {question.id: question for question in questions}
    return HTML(
        shell.render("cards.html.j2", cards=[_card(g, by_id[str(g["id"].iloc[0])], facts or {}) for g in groups])
    )


def groups_of(rollouts: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of ``Rollout`` by group, in the order of training; a group includes its replaced originals."""
    return [group for _, group in rollouts.groupby(["step", "generation", "group"], sort=True)]


def _choose(groups: list[pd.DataFrame], n: int, seed: int) -> list[pd.DataFrame]:
    """A seeded sample over three kinds of groups in turn, then in the order of training."""
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    kinds: dict[str, list[int]] = {"rescued": [], "mixed": [], "other": []}
    for i in order:
        trained = groups[i][~groups[i]["replaced"]]
        mixed = 0 < trained["accuracy"].mean() < 1
        kinds["rescued" if trained["injected"].any() else "mixed" if mixed else "other"].append(i)
    chosen: list[int] = []
    while len(chosen) < min(n, len(groups)):
        for queue in kinds.values():
            if queue and len(chosen) < n:
                chosen.append(queue.pop())
    return [groups[i] for i in sorted(chosen)]


def _card(group: pd.DataFrame, question: Question, facts: Mapping[str, Facts]) -> dict[str, Any]:
    """The template's values for a group; trained rollouts first."""
    true = facts.get(image_key(question))
    return {
        "question": question,
        "options": list(zip(LETTERS, question.options, strict=False)),
        "picture": _picture(question),
        "facts": true.words if true else {},
        "rows": group.sort_values(["replaced", "row"]).to_dict("records"),
    }


def _picture(question: Question) -> str:
    """The question's image as base64 of a PNG; large ones scaled down."""
    image = load_image(question.image)
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
