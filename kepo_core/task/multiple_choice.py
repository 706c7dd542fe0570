"""The paper's task for KEPO's trainer: lettered multiple choice, with Appendix C's prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kepo_core.data.records import AnswerOutcome
from kepo_core.method.task import Row, Task
from kepo_core.task.prompts import HINT_CONTEXTS, Messages, context_at, hint_aware_messages, hint_messages, needs_hint
from kepo_core.task.rewards import ANSWER_FORMATS, RewardFunction, reward_functions, score

#: The metrics that this task adds to KEPOTrainer's, all of the student's own rollouts before injection.
GLOSSARY: dict[str, str] = {
    "kepo/accuracy": "share of right answers among the student's own rollouts, before injection",
    "kepo/format": "share of them in the exact format",
    **{f"kepo/outcome/{o}": f"share of them whose answer was {o}" for o in AnswerOutcome},
}


class MultipleChoice(Task):
    """Multiple choice by letter: columns ``question``, ``options`` (texts), ``answer`` (a letter) and ``image``.

    Args:
        context: what the hint-aware prompt adds to the question: "hint+answer", "hint", "answer", "none" (retry with
            the plain prompt), or "fading": "hint+answer" in the first third of training, "hint" in the second, and
            "none" in the third. Without a hint, no teacher is asked.
        thinking: whether prompts ask for explicit reasoning. The paper has no hint-aware prompt without it.
        answer_format: what counts as an answer: "paper", or "lenient" (see ``task.lenient``).

    Raises:
        ValueError: an unknown context or answer format.

    Example:
    ```python
    >>> from kepo_core import MultipleChoice
    >>> task = MultipleChoice()
    >>> row = {"question": "Which colour?", "options": ["red", "blue"], "answer": "B"}
    >>> facts = task.read(row, "<think>It is blue.</think><answer>B</answer>", finished=True)
    >>> str(facts["outcome"]), facts["accuracy"]
    ('correct', 1.0)
    >>> [f.__name__ for f in task.reward_funcs]
    ['accuracy_reward', 'format_reward']

    ```
    """

    columns = ("question", "options", "answer", "image")

    def __init__(self, context: str = "hint+answer", thinking: bool = True, answer_format: str = "paper") -> None:
        for name, value, known in (
            ("context", context, HINT_CONTEXTS),
            ("answer_format", answer_format, ANSWER_FORMATS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        self.context, self.thinking, self.answer_format = context, thinking, answer_format
        self._progress = 0.0

    @property
    def reward_funcs(self) -> list[RewardFunction]:
        """Appendix B's two rewards, [accuracy, format]."""
        return reward_functions(self.thinking, self.answer_format)

    def ask(self, row: Row) -> Messages | None:
        """Appendix C's teacher prompt (Eq. 8); None if the context has no hint."""
        return hint_messages(row["question"], row["options"], row["answer"]) if needs_hint(self._now) else None

    def ask_about(self, row: Row, failure: str) -> Messages | None:
        """As `ask`, with one of the student's wrong attempts before the question."""
        asked = row["question"], row["options"], row["answer"]
        return hint_messages(*asked, failure) if needs_hint(self._now) else None

    def set_progress(self, progress: float) -> None:
        """The share of training that is done, by which "fading" chooses the context."""
        self._progress = progress

    @property
    def _now(self) -> str:
        return context_at(self.context, self._progress)

    def tell(self, row: Row, hint: str) -> Messages:
        """Appendix C's hint-aware prompt (Eq. 9). Raises ``ValueError`` without thinking."""
        if not self.thinking:
            raise ValueError("thinking is False, expected True: the paper has no hint-aware prompt without reasoning")
        return hint_aware_messages(row["question"], row["options"], hint, row["answer"], self._now)

    def read(self, row: Row, text: str, finished: bool) -> Mapping[str, Any]:
        """The answer's outcome, the letter that was read, whether the format is exact, and the accuracy."""
        scored = score(text, row["answer"], row["options"], thinking=self.thinking, finished=finished,
                       answer_format=self.answer_format)  # fmt: skip
        return {
            "outcome": scored.outcome,
            "letter": scored.letter,
            "format_ok": scored.format_ok,
            "accuracy": scored.accuracy,
        }

    def metrics(self, facts: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """See `GLOSSARY`."""

        def share(flags: Sequence[float]) -> float:
            return sum(flags) / len(flags) if flags else math.nan

        metrics = {
            "kepo/accuracy": share([f["accuracy"] for f in facts]),
            "kepo/format": share([f["format_ok"] for f in facts]),
        }
        return metrics | {f"kepo/outcome/{o}": share([f["outcome"] == o for f in facts]) for o in AnswerOutcome}
