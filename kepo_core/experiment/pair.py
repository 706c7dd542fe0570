"""Student and teacher together: load them and check that they fit, before either is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kepo_core.errors import ParamError
from kepo_core.experiment import serving
from kepo_core.experiment.methods import needs_teacher
from kepo_core.experiment.models import check_quantizes, check_same_vocabulary, load_model, load_processor
from kepo_core.experiment.threads import suit_threads
from kepo_core.method.forward import check_plain_head
from kepo_core.method.served import ServedTeacher
from kepo_core.method.teacher import Teacher
from kepo_core.params import Params
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import Messages, vqa_messages


@dataclass(frozen=True)
class Models:
    """π_θ, its processor, and π_T if the method needs one."""

    student: PreTrainedModel
    processor: Any
    teacher: Teacher | ServedTeacher | None


@contextmanager
def in_our_words() -> Iterator[None]:
    """Turn errors by which TRL, transformers or the method refuse a parameter's value into a `ParamError`."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        raise ParamError(" ".join(str(error).split())) from error


def load_models(params: Params, *, with_teacher: bool = True) -> Models:
    """Load and check the models of ``params``; the teacher, loaded or served, only if the method needs it.

    Under LoRA the student's own weights are not trained, so they have the compute precision (float32 with vLLM).
    ``with_teacher=False``: the teacher is checked, but not loaded.
    """
    loads = needs_teacher(params) and not params.teacher_url
    if loads:
        check_quantizes(params.teacher_quantization)
    processor = load_processor(params.student, "student")
    _check_template(params, "student", processor)
    # For vLLM, adapters are merged into these weights and removed again: in 16 bits, rounding would accumulate.
    whole = not params.lora_rank or bool(params.of_trl("use_vllm"))
    student = load_model(params.student, "student", trained=whole, precision=params.precision)
    if params.method == "gkd" or (params.method == "kepo" and params.distill):
        with in_our_words():
            check_plain_head(student, "student")
    if not loads:
        suit_threads(student)
        served = serving.reach(params, processor, student) if needs_teacher(params) else None
        return Models(student, processor, served)
    teacher_processor = load_processor(params.teacher, "teacher")
    _check_template(params, "teacher", teacher_processor)
    check_same_vocabulary(processor, teacher_processor)
    model = load_model(params.teacher, "teacher", trained=False, precision=params.precision,
                       quantization=params.teacher_quantization if with_teacher else "none",
                       only_looked_at=not with_teacher)  # fmt: skip
    suit_threads(student, model)
    with in_our_words():
        teacher = Teacher(model, teacher_processor)
        teacher.check_fits(student, processor)
    rows = [each.get_output_embeddings().weight.shape[0] for each in (student, model)]
    if params.method == "gkd" and rows[0] != rows[1]:
        raise ParamError(
            f"the student's head has {rows[0]} rows and the teacher's {rows[1]}, expected equally many for method gkd: "
            "TRL's DistillationTrainer compares all of them"
        )
    return Models(student, processor, teacher if with_teacher else None)


def _check_template(params: Params, role: str, processor: Any) -> None:
    """Apply a model's chat template to the study's prompts; `ParamError` if it refuses one."""
    row: dict[str, Any] = {"question": "What is seen?", "options": ["nothing", "a nodule"], "answer": "A"}
    task = MultipleChoice(params.hint_context, params.thinking, params.answer_format)
    prompts: dict[str, Messages | None] = {}
    if role == "student":
        prompts["asks a question"] = vqa_messages(row["question"], row["options"], params.thinking)
    if params.method == "kepo" and params.explore:
        if role == "student":
            prompts["gives a hint"] = task.tell(row, "Look at the left.")
        else:
            about_one = params.hint_source == "failure"
            prompts["asks for a hint"] = task.ask_about(row, "B") if about_one else task.ask(row)
    for does, prompt in prompts.items():
        try:
            if prompt is not None:
                processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of any type: templates are programs
            name, reason = getattr(params, role), " ".join(str(error).split())
            raise ParamError(
                f"{role} is {name!r}, whose chat template refuses the prompt that {does}: {reason}"
            ) from error
