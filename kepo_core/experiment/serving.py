"""A served teacher: connect by parameters, try it before a run begins, and check it with ``kepo check-teacher``."""

import math
import time
from typing import Any

import numpy as np
from PIL import Image

from kepo_core.data import phantom
from kepo_core.data.source import in_cache
from kepo_core.errors import ParamError
from kepo_core.method.chat_client import PATIENCE, RETRIES, ChatClient, TeacherServerError
from kepo_core.method.served import Completion, ServedTeacher, chat
from kepo_core.method.task import Prompt, with_images
from kepo_core.method.teacher import parse_hint
from kepo_core.params import Params
from kepo_core.task.prompts import hint_messages, needs_hint, vqa_messages

#: The question for trying a teacher, from PhantomVQA; its answer is true or false of the picture.
_QUESTION: dict[str, Any] = {
    "question": "Where does the finding lie?",
    "options": ["lower right", "upper left"],
    "answer": "B",
}
_SAID = "<think>The finding lies in the upper left (B).</think><answer>B</answer>"


def patience(params: Params) -> int:
    """Seconds of retries until an unreachable served teacher counts as failed; 0 if ``params`` name none.

    Processes that wait for the one that asks must have a longer timeout.
    """
    return math.ceil(PATIENCE) if params.teacher_url else 0


def connect(params: Params, processor: Any, retries: int = RETRIES) -> ServedTeacher:
    """The served teacher of ``params``, without a request. ``processor`` is the student's."""
    client = ChatClient(params.teacher_url, retries=retries)
    return ServedTeacher(client, params.teacher, processor, top_k=params.teacher_top_k, hints=in_cache("hints"))


def reach(params: Params, processor: Any, student: Any) -> ServedTeacher:
    """`connect`, and make one request of each kind that the run makes.

    Raises:
        ParamError: the server is unreachable or refuses, or its tokens are not the student's.
    """
    try:
        teacher = connect(params, processor)
        teacher.check_fits(student, processor)
        if params.explore and needs_hint(params.hint_context):
            teacher.try_hint(_hint_prompt(params), 1)
        if params.distill and params.gate == "teacher":
            teacher.answer([_hint_prompt(params)], max_tokens=1)
        if params.distill:
            teacher.score([_completion(params, processor)])
    except (TeacherServerError, ValueError) as error:
        raise ParamError(f"teacher_url: {error}") from error
    return teacher


def report(params: Params, processor: Any) -> tuple[str, bool]:
    """A check of a served teacher: a line per trial, up to the first that fails (``FAIL``), and whether all passed."""
    try:
        teacher = connect(params, processor, retries=2)  # the user waits
    except TeacherServerError as error:
        raise ParamError(f"teacher_url: {error}") from error
    lines: list[str] = []
    for name, trial in {"hint": _try_hint, "alignment": _try_alignment, "picture": _try_picture}.items():
        started = time.monotonic()
        try:
            said = trial(params, teacher)
        except TeacherServerError as error:
            return "\n".join([*lines, f"FAIL  {name:<10} {error}"]), False
        lines.append(f"pass  {name:<10} {time.monotonic() - started:6.2f} s  {said}")
    return "\n".join(lines), True


def _row(params: Params, place: str = "upper left") -> dict[str, Any]:
    """The question, with a picture of the size that the run uses."""
    facts = phantom.Facts("MRI", "disc", place, "large", "one", "bright")
    picture = Image.fromarray(phantom.picture(np.random.default_rng(0), facts))
    if params.image_size:
        picture = picture.resize((params.image_size, params.image_size))
    return _QUESTION | {"image": picture}


def _hint_prompt(params: Params) -> Prompt:
    row = _row(params)
    return with_images(hint_messages(row["question"], row["options"], row["answer"]), row)


def _completion(params: Params, processor: Any, place: str = "upper left") -> Completion:
    row = _row(params, place)
    messages = with_images(vqa_messages(row["question"], row["options"], params.thinking), row)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer = processor.tokenizer
    return Completion(
        name="of a trial",
        messages=chat(messages),
        prompt_ids=processor(text=[text], images=[[row["image"]]])["input_ids"][0],
        completion_ids=[*tokenizer(_SAID, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
    )


def _try_hint(params: Params, teacher: ServedTeacher) -> str:
    text = teacher.try_hint(_hint_prompt(params), params.hint_max_tokens)
    if parse_hint(text) is None:
        raise TeacherServerError(f"no <hint>…</hint> within {params.hint_max_tokens} tokens: {text!r}")
    return repr(text)


def _try_alignment(params: Params, teacher: ServedTeacher) -> str:
    one = _completion(params, teacher.processor)
    ((_, log_probs, _),) = teacher.score([one])
    mass = log_probs[:, : teacher.top_k].exp().sum(1)
    return (
        f"{len(one.prompt_ids)} tokens of prompt and picture and {len(one.completion_ids)} of the completion are the "
        f"student's; the {teacher.top_k} most likely tokens have {mass.mean():.4f} of the probability on average, "
        f"{mass.min():.4f} at least"
    )


def _try_picture(params: Params, teacher: ServedTeacher) -> str:
    both = [_completion(params, teacher.processor, place) for place in ("upper left", "lower right")]
    one, other = (dict(zip(s.ids[0].tolist(), s.log_probs[0].tolist(), strict=False)) for s in teacher.score(both))
    if one == other:
        raise TeacherServerError("another picture gives the same log-probabilities: the server ignores pictures")
    return "another picture gives other log-probabilities"
