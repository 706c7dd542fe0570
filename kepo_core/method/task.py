"""A task says how a hint is requested and given, and which facts about a completion are recorded.

Rewards are not part of it: they are TRL's reward functions, passed to the trainer.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

#: A dataset row, and a prompt as in TRL: text, or chat messages.
Row = Mapping[str, Any]
Prompt = str | list[dict[str, Any]]

_THOUGHT = re.compile(r"<think>(?:(?!</think>).)*(?:</think>|\Z)", re.DOTALL)
_STRUCTURE = ("<hint>", "</hint>", "<think>", "</think>", "<answer>", "</answer>")
_MARKUP = re.compile(r"<\S+>")


class Task(Protocol):
    """How hints are requested and given. Subclass it and write `ask` and `tell`; all other methods are optional.

    `ask`, `ask_about` and `tell` return the type of the dataset's ``prompt`` column (text or messages). They leave
    image parts empty; the trainer fills in the row's pictures.

    Attributes:
        columns: the dataset columns that its methods read, except ``prompt``.

    Example:
    ```python
    >>> from kepo_core.method.task import Task
    >>> class Riddles(Task):
    ...     columns = ("solution",)
    ...
    ...     def ask(self, row):
    ...         return f"{row['prompt']} The answer is {row['solution']}. Write a hint in <hint>...</hint>."
    ...
    ...     def tell(self, row, hint):
    ...         return f"{row['prompt']} Hint: {hint}"
    >>> Riddles().tell({"prompt": "What has keys but no locks?", "solution": "a piano"}, "It makes music.")
    'What has keys but no locks? Hint: It makes music.'

    ```
    """

    columns: tuple[str, ...] = ()

    def ask(self, row: Row) -> Prompt | None:
        """The teacher's prompt for h ~ π_T(·|x, y) (Eq. 8); None for every row if `tell` needs no hint.

        The hint is the text that the teacher writes inside ``<hint>...</hint>`` (the last pair, see `parse_hint`).
        """
        ...

    def tell(self, row: Row, hint: str) -> Prompt:
        """The student's prompt for y_h ~ π_θ(·|x, h, y) (Eq. 9); ``hint`` is "" if `ask` returned None."""
        ...

    def ask_about(self, row: Row, failure: str) -> Prompt | None:
        """As `ask`, with one of the student's failed attempts; needed for ``hint_source="failure"`` (as in HiLL).

        Args:
            row: the dataset row.
            failure: a completion of this row that failed, without special tokens and tags; the end of a long one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no ask_about(row, failure), which writes that prompt")

    def set_progress(self, progress: float) -> None:
        """Called before hints are requested, on every process. By default it does nothing.

        Args:
            progress: the share of the optimiser steps that is done, in [0, 1). A resumed run continues it.
        """

    def read(self, row: Row, text: str, finished: bool) -> Mapping[str, Any]:
        """Columns for the rollouts file: column name → value for this completion; the same names every time.

        Args:
            row: its dataset row.
            text: the completion, without special tokens.
            finished: False if the token limit cut it off.
        """
        return {}

    def metrics(self, facts: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """Metrics to log for a generation batch: metric name → value.

        Args:
            facts: the results of `read` for the student's own rollouts, over all processes, before injection.
        """
        return {}


class Templates(Task):
    r"""A task from two format strings, filled with the columns of a row.

    The filled string is appended to the row's prompt as a paragraph: to the text, or to the last user message of a
    conversation. A string that contains ``{prompt}`` replaces the prompt.

    Args:
        asking: the teacher's request for a hint (Eq. 8). It should ask for ``<hint>...</hint>``. With
            ``hint_source="failure"`` it must contain ``{failure}``, for one of the student's failed attempts.
        telling: what the student reads with a hint (Eq. 9); it must contain ``{hint}``.

    Raises:
        ValueError: a string is not a format string over plain column names, ``telling`` lacks ``{hint}``, or
            ``asking`` contains it.

    Example:
    ```python
    >>> from kepo_core import Templates
    >>> task = Templates(
    ...     asking="The answer is {solution}. Write a hint inside <hint>...</hint>.",
    ...     telling="Hint: {hint}",
    ... )
    >>> row = {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "solution": "5"}
    >>> task.tell(row, "Count on from 3.")
    [{'role': 'user', 'content': 'What is 2 + 3?\n\nHint: Count on from 3.'}]

    ```
    """

    def __init__(self, asking: str, telling: str) -> None:
        asked, told = _names("asking", asking), _names("telling", telling)
        if "hint" in asked:
            raise ValueError("asking names {hint}, expected it only in telling: asking is the request for the hint")
        if "hint" not in told:
            raise ValueError(f"telling is {telling!r}, expected {{hint}} in it: the student would not see the hint")
        self._asking, self._telling, self._about = asking, telling, "failure" in asked
        self.columns = tuple(sorted(((asked - {"failure"}) | told) - {"prompt", "hint"}))

    def ask(self, row: Row) -> Prompt:
        """The row's prompt with ``asking``; ``ValueError`` if that contains ``{failure}``."""
        if self._about:
            raise ValueError("asking names {failure}, the student's failed attempt, expected hint_source 'failure'")
        return _extended(row["prompt"], self._asking, row)

    def ask_about(self, row: Row, failure: str) -> Prompt:
        """The row's prompt with ``asking``; ``NotImplementedError`` if that lacks ``{failure}``."""
        if not self._about:
            raise NotImplementedError(f"asking is {self._asking!r}, without {{failure}}, the student's failed attempt")
        return _extended(row["prompt"], self._asking, {**row, "failure": failure})

    def tell(self, row: Row, hint: str) -> Prompt:
        """The row's prompt with ``telling``."""
        return _extended(row["prompt"], self._telling, {**row, "hint": hint})


def hint_request(task: Task, row: Row, failure: str | None = None) -> Prompt | None:
    """The teacher's prompt for a hint: `Task.ask`, or `Task.ask_about` the ``failure``."""
    return task.ask(row) if failure is None else task.ask_about(row, failure)


def _names(argument: str, template: str) -> set[str]:
    """The names in a format string; ValueError unless each is a plain name."""
    try:
        parts = [(name, spec) for _, name, spec, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{argument} is {template!r}, which is not a format string: {error}") from error
    for name, spec in parts:
        if not name.isidentifier() or "{" in (spec or ""):
            raise ValueError(
                f"{argument} names {{{name}}}, expected a column's name (write {{{{ and }}}} for plain braces)"
            )
    return {name for name, _ in parts}


def _filled(template: str, values: Mapping[str, Any]) -> str:
    """``template`` with ``values``; ValueError for a column that the row lacks, or that does not fit its format."""
    empty = [name for name in _names("template", template) if values.get(name) is None]
    if empty:
        raise ValueError(
            f"a row has no {sorted(empty)[0]}, which the template {template!r} uses: fill the column, or remove the "
            f"row (its prompt: {values['prompt'][:80]!r})"
        )
    try:
        return template.format_map(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the template {template!r} cannot be filled: {error}") from error


def _extended(prompt: Prompt, template: str, values: Mapping[str, Any]) -> Prompt:
    """``prompt`` with the filled ``template`` after its text, or around it if it contains ``{prompt}``."""
    replaces = "prompt" in _names("template", template)

    def new(text: str) -> str:
        filled = _filled(template, {**values, "prompt": text})
        return filled if replaces else f"{text}\n\n{filled}" if text else filled

    if isinstance(prompt, str):
        return new(prompt)
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError(f"the prompt has no user message, expected one to extend: {prompt!r}")
    message = {**prompt[last], "content": _extended_content(prompt[last]["content"], new, replaces)}
    return [*prompt[:last], message, *prompt[last + 1 :]]


def _extended_content(content: Any, new: Any, replaces: bool) -> Any:
    if isinstance(content, str):
        return new(content)
    texts = [i for i, part in enumerate(content) if part["type"] == "text"]
    if replaces:  # one text after the pictures
        kept = [part for part in content if part["type"] != "text"]
        return [*kept, {"type": "text", "text": new("\n\n".join(content[i]["text"] for i in texts))}]
    if not texts:
        return [*content, {"type": "text", "text": new("")}]
    parts = list(content)
    parts[texts[-1]] = {"type": "text", "text": new(content[texts[-1]]["text"])}
    return parts


def outside_thoughts(text: str) -> str:
    """``text`` without its reasoning, the part inside ``<think>…</think>``.

    An unclosed ``<think>`` reaches to the end. Everything before an unopened ``</think>`` is reasoning, because some
    chat templates open the tag in the prompt.
    """
    return _THOUGHT.sub(" ", text).rpartition("</think>")[2]


def neutral(text: str, markup: Sequence[str], instead: str = "") -> str:
    """``text`` with ``instead`` for markup and tags. It repeats, because removal can join two halves into a new tag."""
    before = ""
    while text != before:
        before = text
        for piece in (*_STRUCTURE, *markup):
            text = text.replace(piece, instead)
    return text.strip()


def markup_of(tokenizer: Any) -> tuple[str, ...]:
    """A tokenizer's special tokens, and its added tokens that look like tags, for `parse_hint`."""
    added = [text for text in tokenizer.get_added_vocab() if _MARKUP.fullmatch(text)]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


def images_of(row: Row) -> list[Any]:
    """A row's pictures, from ``images`` or ``image``, as TRL reads them; may be empty."""
    if "images" in row:
        return list(row["images"] or [])
    return [] if row.get("image") is None else [row["image"]]


def with_images(prompt: Prompt | None, row: Row) -> Prompt:
    """A prompt with the row's pictures in its image parts (before the text if it has no parts)."""
    from trl.data_utils import prepare_multimodal_messages  # takes seconds, and only training with pictures needs it

    images = images_of(row)
    if prompt is None:
        raise ValueError("task.ask returned None for this row but not for the first, expected the same for every row")
    if not images:
        return prompt
    messages: Prompt = prepare_multimodal_messages(prompt, images=images)
    return messages


def images_in(prompt: Prompt) -> list[Any]:
    """The pictures in a prompt's messages, in order."""
    if isinstance(prompt, str):
        return []
    contents = [message.get("content") for message in prompt]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image"] for part in parts if part["type"] == "image"]
