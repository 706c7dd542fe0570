"""Checks of KEPOTrainer's arguments before a model is loaded: each error is one sentence that says what to do."""

from collections.abc import Mapping
from typing import Any

from kepo_core.method.config import KEPOConfig
from kepo_core.method.gates import LOGPS, needs_of
from kepo_core.method.served import ServedTeacher
from kepo_core.method.task import Row, Task, hint_request
from kepo_core.method.teacher import Teacher


def check_arguments(args: KEPOConfig, teacher: Any, task: Any, eval_dataset: Any, gate: Any) -> None:
    """Raise ``ValueError`` for a teacher, task or gate of the wrong type, or one that cannot do what ``args`` asks."""
    if not callable(gate):
        raise ValueError(f"gate is {gate!r}, expected a function of Known; one by name is args.gate")
    sampled = args.guidance != "loss" or LOGPS in needs_of(gate)
    if isinstance(teacher, ServedTeacher) and args.distill and sampled and args.temperature != 1:
        raise ValueError(
            f"temperature is {args.temperature:g}, expected 1 if log-probabilities of a served teacher are compared "
            "with the student's (guidance, or a gate that needs them): the server computes them at 1"
        )
    if not isinstance(teacher, Teacher | ServedTeacher | None):
        kind = type(teacher).__name__
        raise ValueError(f"teacher is a {kind}, expected a Teacher(model, tokenizer) or a ServedTeacher")
    if isinstance(task, type):
        raise ValueError(f"task is the class {task.__name__}, expected an instance: {task.__name__}(...)")
    if isinstance(teacher, ServedTeacher) and args.distill and args.distill_temperature != 1:
        raise ValueError(
            f"distill_temperature is {args.distill_temperature:g}, expected 1 with a served teacher: another "
            "temperature needs all logits, and the server returns only its top-k log-probabilities"
        )
    for name, part in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
        if task is not None and (first := first_row(part)) is not None:
            check_columns(task, first, f"eval_dataset {name}".strip())


def check_parts(args: KEPOConfig, teacher: Any, task: Task | None, dataset: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a part of KEPO lacks something.

    ``dataset`` holds the training rows, ``arguments`` the arguments for GRPOTrainer.
    """
    first = first_row(dataset)
    if task is not None and first is not None:
        check_columns(task, first)
    parts = [name for name in ("distill", "explore") if getattr(args, name)]
    if not parts:
        return
    for name in ("tools", "rollout_func", "environment_factory"):
        if arguments.get(name):
            raise ValueError(f"{name} is set, expected it unset: {parts[0]} supports single-turn completions only")
    if args.explore and task is None:
        raise ValueError(
            "explore is True but task is None, expected a task that says how hints are requested and given, like "
            "Templates(asking=..., telling=...)"
        )
    failure = "an attempt" if args.hint_source == "failure" else None
    asks = task is not None and args.explore and first is not None and check_task(task, first, failure)
    if teacher is None and (args.distill or asks):
        raise ValueError(f"{parts[0]} is True but teacher is None, expected a Teacher")
    if asks and first is not None:
        teacher.check_prompt(first["prompt"])
    if hasattr(dataset, "__len__") and len(dataset) < (least := args.generation_batch_size // args.num_generations):
        raise ValueError(f"train_dataset has {len(dataset)} rows, expected {least} or more (one generation batch)")


def check_task(task: Task, row: Row, failure: str | None = None) -> bool:
    """Whether hints are requested, about a ``failure`` if one is given. Tries the task's prompts on a first row.

    Raises:
        ValueError: they are text and the row's prompt is a chat, or the reverse; or the task cannot ask about failures.
    """
    try:
        asked, told = hint_request(task, row, failure), task.tell(row, "a hint")
    except NotImplementedError as error:
        raise ValueError(f"hint_source is 'failure', but the task cannot ask about one: {error}") from error
    for name, prompt in (("ask", asked), ("tell", told)):
        if prompt is not None and isinstance(prompt, str) != isinstance(row["prompt"], str):
            kinds = [type(value).__name__ for value in (prompt, row["prompt"])]
            raise ValueError(
                f"the task's {name} returns {kinds[0]} but the prompt column holds {kinds[1]}, expected both to be "
                "text, or both chats"
            )
    return asked is not None


def check_columns(task: Task, row: Row, dataset: str = "train_dataset") -> None:
    """Raise ``ValueError`` if the first ``row`` of a data set lacks columns; the message lists those that it has."""
    missing = [name for name in ("prompt", *task.columns) if name not in row]
    if missing:
        raise ValueError(f"{dataset} lacks {', '.join(missing)}, which the task needs: it has {', '.join(row)}")


def first_row(dataset: Any) -> Row | None:
    """The first row of a data set; None if it has no rows or is None."""
    return None if dataset is None else next(iter(dataset), None)
