"""The four prompts of Appendix C, in the paper's wording, and a line of ours: a wrong attempt, for a hint about it.

The question and its options come first, then the instructions (the paper does not show where the
question stands; the authors' released code puts it first). ``{answer}`` is the bare option letter.
"""

from collections.abc import Sequence
from typing import Any

from kepo_core.data.records import LETTERS

Messages = list[dict[str, Any]]

THINKING = """Your task:
1. Think through the question step by step, enclose your reasoning process in <think>...</think> tags.
2. Then provide the correct single-letter choice (A, B, C, D, ...) inside <answer>...</answer> tags.
3. No extra information or text outside of these tags."""

NON_THINKING = """Your task:
1. Provide the correct single-letter choice (A, B, C, D, ...) inside <answer>...</answer> tags.
2. No extra information or text outside of this tag."""

HINT_WRITING = """Your task:
1. You will get a correct answer for the question.
2. Please provide a hint for the question based on the correct answer, inside <hint>...</hint> tags.
3. No extra information or text outside of these tags.
The ground truth answer is {answer}."""

# Ours: HiLL (arXiv 2604.00698) shows its hint writer a failed attempt with instructions of its own. It stands before
# the question, in few words, because the embedded teacher, which knows Appendix C's prompts and no other, then still
# writes hints.
WRONG_ATTEMPT = "Wrong attempt: {failure}\n\n"

HINT_AWARE = """Your task:
1. Read the hint provided in <hint>...</hint> tags and the ground truth answer provided in <answer>...</answer> tags.
2. Think through the question step by step but do not explicitly mention the hint or the ground truth answer, \
enclose your reasoning process in <think>...</think> tags.
3. Then provide the correct single-letter choice (A, B, C, D, ...) inside <answer>...</answer> tags.
4. No extra information or text outside of these tags.
"""

# Appendix C shows the last line with both facts; the two other contexts keep their half of it.
_CONTEXT_LINE = {
    "hint+answer": "The hint is <hint>{hint}</hint> and the ground truth answer is <answer>{answer}</answer>.",
    "hint": "The hint is <hint>{hint}</hint>.",
    "answer": "The ground truth answer is <answer>{answer}</answer>.",
}
TOLD_CONTEXTS = tuple(_CONTEXT_LINE)
#: "none" is no context: retries with the plain prompt. "fading" is one after another, see `context_at`.
HINT_CONTEXTS = (*TOLD_CONTEXTS, "none", "fading")
_FADING = ("hint+answer", "hint", "none")


def context_at(context: str, progress: float) -> str:
    """The context after a share ``progress`` of training, in [0, 1); one of HINT_CONTEXTS, but not "fading".

    "fading" withdraws help by thirds of training: first hint and answer, then the hint alone, at last only retries. The
    schedule is ours; it needs no state, so that a resumed run continues it exactly.
    """
    return _FADING[int(len(_FADING) * progress)] if context == "fading" else context


def needs_hint(context: str) -> bool:
    """Whether the hint-aware prompt of this context ever contains a hint, for which a teacher is needed."""
    return "hint" in context or context == "fading"


def render_question(question: str, options: Sequence[str]) -> str:
    """The question followed by one line per option: ``A) first option``."""
    return "\n".join([question, *(f"{letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))])


def _user(question: str, options: Sequence[str], instructions: str) -> Messages:
    text = f"{render_question(question, options)}\n\n{instructions}"
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def vqa_messages(question: str, options: Sequence[str], thinking: bool) -> Messages:
    """The plain prompt x, with or without explicit reasoning."""
    return _user(question, options, THINKING if thinking else NON_THINKING)


def hint_messages(question: str, options: Sequence[str], answer: str, failure: str | None = None) -> Messages:
    """The teacher's prompt for h ~ π_T(·|x, y) (Eq. 8); ``answer`` is a letter.

    With a ``failure``, a wrong attempt, one line before the question holds it; all else stays as it is.
    """
    before = "" if failure is None else WRONG_ATTEMPT.replace("{failure}", " ".join(failure.split()))
    return _user(before + question, options, HINT_WRITING.replace("{answer}", answer))


def hint_aware_messages(
    question: str, options: Sequence[str], hint: str, answer: str, context: str = "hint+answer"
) -> Messages:
    """The student's prompt for y_h ~ π_θ(·|x, h, y) (Eq. 9).

    ``context`` is one of TOLD_CONTEXTS or "none", the plain prompt x; else ``KeyError``. The
    replacement is literal, so braces inside a hint stay as they are.
    """
    if context == "none":
        return vqa_messages(question, options, thinking=True)
    line = _CONTEXT_LINE[context].replace("{answer}", answer).replace("{hint}", hint)
    return _user(question, options, HINT_AWARE + line)
