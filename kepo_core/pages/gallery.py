"""Some rollouts to look at: picture, question, completions, and what became of each, as HTML.

Everything a model or a data file wrote is escaped. Each mark is a word as well as a colour. The style stands apart
(``STYLE``): a page that strips styles from outputs can carry it itself, and reads well without.
"""

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape

import pandas as pd
from IPython.display import HTML

from kepo_core.data.images import load_image
from kepo_core.data.phantom import Facts
from kepo_core.data.records import LETTERS, AnswerOutcome, Question
from kepo_core.data.splits import image_key
from kepo_core.method.exploration import GroupOutcome

STYLE = """
.kepo-card { border: 1px solid #999; border-radius: 6px; padding: .75rem 1rem; margin: 0 0 1rem; line-height: 1.45; }
.kepo-question { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.kepo-question > * { flex: 1 1 16rem; min-width: 0; }
.kepo-question > .kepo-picture { flex: 0 0 auto; }
.kepo-card img { image-rendering: pixelated; width: 192px; }
.kepo-card p { margin: .3rem 0; }
.kepo-card ul, .kepo-card ol { list-style: none; padding: 0; margin: .3rem 0; }
.kepo-rollouts > li { display: flex; flex-wrap: wrap; gap: .1rem 1rem; border-top: 1px solid #999; padding: .35rem 0;
  margin: 0; break-inside: avoid; }
.kepo-rollouts > li > * { flex: 3 1 18rem; min-width: 0; }
.kepo-rollouts > li > :first-child { flex: 2 1 18rem; }
.kepo-scores { font-variant-numeric: tabular-nums; }
.kepo-text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85em; }
.kepo-mark { display: inline-block; padding: 0 .45em; margin: 0 .2em .2em 0; border-radius: .7em;
  font-size: .8em; white-space: nowrap; color: #fff; background: #5a5a5a; print-color-adjust: exact; }
.kepo-good { background: #00694d; }
.kepo-bad { background: #a83f00; }
.kepo-gate { background: #005a8f; }
.kepo-hint { background: #8a3f6d; }
.kepo-rollouts > .kepo-gone { border-top-style: dashed; padding-left: 1rem; }
"""

_WIDTH = 192  # CSS pixels of a picture, here for pages without the style
_BECAME = {
    GroupOutcome.RESCUED: "rescued",
    GroupOutcome.EXHAUSTED: "none of them right",
    GroupOutcome.UNPARSABLE: "it could not be read",
}
_LARGEST = 384  # stored pixels: enough for its size on the page on any screen


def show_rollouts(
    rollouts: pd.DataFrame,
    questions: Sequence[Question],
    n: int = 4,
    seed: int = 0,
    facts: Mapping[str, Facts] | None = None,
) -> HTML:
    """``n`` groups of rollouts as cards: those that were rescued by a hint, mixed ones and the others in turn.

    Args:
        rollouts: rows of ``method.rollouts.Rollout``, as ``collect_rollouts`` reads them.
        questions: the training questions; a rollout's ``id`` is that of its question.
        n: how many groups, or fewer when there are not so many.
        seed: which ones.
        facts: what is true of the pictures (``phantom.load_facts``), where it is known.

    Raises ``KeyError`` when a rollout's question is not among ``questions``.
    """
    by_id = {question.id: question for question in questions}
    chosen = _choose(groups_of(rollouts), n, seed)
    cards = [card(group, by_id[str(group["id"].iloc[0])], facts) for group in chosen]
    body = "\n".join(cards) if cards else "<p>No rollouts to show.</p>"
    return HTML(f"<style>{STYLE}</style>\n{body}")


def groups_of(rollouts: pd.DataFrame) -> list[pd.DataFrame]:
    """The groups among the rows of ``Rollout``, in the order of training; replaced originals belong to theirs."""
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


def card(group: pd.DataFrame, question: Question, facts: Mapping[str, Facts] | None = None) -> str:
    """One group as HTML: its question, what the teacher said, and a line per rollout. `STYLE` makes it pretty."""
    first = group.iloc[0]
    right = _mark("right answer", "good")
    options = "".join(
        f"<li>{escape(letter)}) {escape(text)} {right if letter == question.answer else ''}</li>"
        for letter, text in zip(LETTERS, question.options, strict=False)
    )
    title = f"Step {int(first['step'])}, {escape(question.modality)}, {escape(question.id)}"
    rows = "\n".join(_row(row) for _, row in group.sort_values(["replaced", "row"]).iterrows())
    return (
        f'<div class="kepo-card"><div class="kepo-question"><div class="kepo-picture">{_picture(question)}</div>'
        f"<div><b>{title}</b><p>{escape(question.question)}</p><ul>{options}</ul>{_facts(question, facts)}"
        f'{_hint(first)}</div></div><ol class="kepo-rollouts">{rows}</ol></div>'
    )


def _facts(question: Question, facts: Mapping[str, Facts] | None) -> str:
    """What is true of the picture, where it is known."""
    if not facts or (true := facts.get(image_key(question))) is None:
        return ""
    words = {**asdict(true), "diagnosis": true.diagnosis, "grade": true.grade}
    return f"<p>Facts: {escape('; '.join(f'{name} {word}' for name, word in words.items()))}</p>"


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
    marks.append(_mark("✓ format", "good") if row["format_ok"] else _mark("✗ format", "bad"))
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
        f'<li class="{"kepo-gone" if row["replaced"] else "kepo-kept"}"><div><div class="kepo-scores">'
        f"reward {row['reward']:g}, advantage {advantage}</div>{''.join(marks)}</div>"
        f'<div class="kepo-text">{escape(str(row["completion"]))}{tail}</div></li>'
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
