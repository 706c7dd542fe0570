"""Some rollouts to look at: picture, question, completions, and what became of each, as HTML.

Everything a model or a data file wrote is escaped. Each mark is a word as well as a colour. The style stands apart
(``STYLE``): a page that strips styles from outputs can carry it itself, and reads well without.
"""

import base64
import io
import random
from collections.abc import Sequence
from html import escape

import pandas as pd
from IPython.display import HTML

from kepo_core.data.images import load_image
from kepo_core.data.records import LETTERS, AnswerOutcome, Question
from kepo_core.method.exploration import GroupOutcome

STYLE = """
.kepo-card { border: 1px solid #bbb; border-radius: 6px; padding: .75rem 1rem; margin: 0 0 1rem; }
.kepo-card table { border-collapse: collapse; width: 100%; margin: .5rem 0 0; }
.kepo-card th, .kepo-card td { text-align: left; vertical-align: top; padding: .3rem .6rem; border: 0;
  border-top: 1px solid #ddd; white-space: normal; }
.kepo-card .kepo-question td { border: 0; }
.kepo-card img { image-rendering: pixelated; width: 192px; }
.kepo-card .kepo-question td:first-child { width: 200px; }
.kepo-card ul { list-style: none; padding: 0; margin: .3rem 0; }
.kepo-card .kepo-rollouts th:nth-child(-n+2) { width: 5em; }
.kepo-card .kepo-rollouts th:nth-child(3) { width: 15em; }
.kepo-text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85em; }
.kepo-mark { display: inline-block; padding: 0 .45em; margin: 0 .2em .2em 0; border-radius: .7em;
  font-size: .8em; white-space: nowrap; color: #fff; background: #666; }
.kepo-good { background: #00694d; }
.kepo-bad { background: #a83f00; }
.kepo-gate { background: #005a8f; }
.kepo-hint { background: #8a3f6d; }
.kepo-gone { opacity: .6; }
"""

_WIDTH = 192  # CSS pixels of a picture, here for pages without the style
_BECAME = {
    GroupOutcome.RESCUED: "rescued",
    GroupOutcome.EXHAUSTED: "none of them right",
    GroupOutcome.UNPARSABLE: "it could not be read",
}
_LARGEST = 384  # stored pixels: enough for its size on the page on any screen


def show_rollouts(rollouts: pd.DataFrame, questions: Sequence[Question], n: int = 4, seed: int = 0) -> HTML:
    """``n`` groups of rollouts as cards: those that were rescued by a hint, mixed ones and the others in turn.

    Args:
        rollouts: rows of ``method.rollouts.Rollout``, as ``collect_rollouts`` reads them.
        questions: the training questions; a rollout's ``id`` is that of its question.
        n: how many groups, or fewer when there are not so many.
        seed: which ones.

    Raises ``KeyError`` when a rollout's question is not among ``questions``.
    """
    by_id = {question.id: question for question in questions}
    groups = [group for _, group in rollouts.groupby(["step", "generation", "group"], sort=True)]
    cards = [_card(group, by_id[str(group["id"].iloc[0])]) for group in _choose(groups, n, seed)]
    body = "\n".join(cards) if cards else "<p>No rollouts to show.</p>"
    return HTML(f"<style>{STYLE}</style>\n{body}")


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


def _card(group: pd.DataFrame, question: Question) -> str:
    first = group.iloc[0]
    right = _mark("right answer", "good")
    options = "".join(
        f"<li>{escape(letter)}) {escape(text)} {right if letter == question.answer else ''}</li>"
        for letter, text in zip(LETTERS, question.options, strict=False)
    )
    title = f"Step {int(first['step'])}, {escape(question.modality)}, {escape(question.id)}"
    rows = "\n".join(_row(row) for _, row in group.sort_values(["replaced", "row"]).iterrows())
    return (
        f'<div class="kepo-card"><table class="kepo-question"><tr><td>{_picture(question)}</td>'
        f"<td><b>{title}</b><p>{escape(question.question)}</p><ul>{options}</ul>{_hint(first)}</td></tr></table>"
        '<table class="kepo-rollouts"><thead><tr><th>reward</th><th>advantage</th><th>what became of it</th>'
        "<th>completion</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _hint(row: pd.Series) -> str:
    """The teacher's hint for the group, if it explored."""
    if not row["exploration"]:
        return ""
    became = escape(_BECAME.get(row["exploration"], str(row["exploration"])))
    drawn = (
        became if row["exploration"] == GroupOutcome.UNPARSABLE else f"{int(row['draws'])} hint-aware draws, {became}"
    )
    text = f'<div class="kepo-text">{escape(str(row["hint"]))}</div>' if row["hint"] else ""
    return f"<p>{_mark('every rollout failed', 'bad')}{_mark('hint', 'hint')}{drawn}</p>{text}"


def _row(row: pd.Series) -> str:
    good = row["outcome"] == AnswerOutcome.CORRECT
    marks = [_mark(("✓ " if good else "✗ ") + str(row["outcome"]), "good" if good else "bad")]
    if not row["format_ok"]:
        marks.append(_mark("✗ format", "bad"))
    if row["injected"]:
        marks.append(_mark("drawn with the hint", "hint"))
    if row["replaced"]:
        marks.append(_mark("replaced, not trained on", "plain"))
    elif row["dropped"]:
        marks.append(_mark("dropped from the loss", "plain"))
    else:
        marks.append(_mark("gate open" if row["gate"] else "gate shut", "gate" if row["gate"] else "plain"))
    advantage = "–" if pd.isna(row["advantage"]) else f"{row['advantage']:+.2f}"
    tail = "" if row["finished"] else " " + _mark("cut at the limit", "bad")
    return (
        f'<tr class="{"kepo-gone" if row["replaced"] else "kepo-kept"}"><td>{row["reward"]:g}</td>'
        f'<td>{advantage}</td><td>{"".join(marks)}</td><td><div class="kepo-text">{escape(str(row["completion"]))}'
        f"{tail}</div></td></tr>"
    )


def _mark(text: str, kind: str) -> str:
    return f'<span class="kepo-mark kepo-{kind}">{escape(text)}</span> '


def _picture(question: Question) -> str:
    """The question's image, embedded; large ones scaled down."""
    image = load_image(question.image)
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    name = escape(f"{question.modality} image of question {question.id}")
    return f'<img src="data:image/png;base64,{data}" width="{_WIDTH}" alt="{name}">'
