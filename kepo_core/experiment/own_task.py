"""Your own task for notebook 06: one Python file that defines its rewards, hints, data and models."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from kepo_core.errors import ParamError
from kepo_core.experiment.launch import check_alone
from kepo_core.method.task import Prompt, Row, Task, with_images
from kepo_core.params import at_root, resolve

#: Names that the file must define, with descriptions.
NEEDED = {
    "REWARDS": "a list of TRL reward functions",
    "TASK": "a task, like Templates(asking=..., telling=...)",
    "load_data": "a function that returns the training rows and the held-out rows",
    "load_models": "a function that returns student, teacher and processing class",
}


@dataclass(frozen=True)
class OwnTask:
    """The contents of a task file; see `NEEDED`."""

    rewards: Sequence[Any]
    task: Task
    load_data: Callable[[], tuple[Sequence[Row], Sequence[Row]]]
    load_models: Callable[[], tuple[Any, Any, Any]]


def read_task(file: str) -> OwnTask:
    """Run a task file and read its four names; a relative path starts here, or else at the project's root.

    Raises:
        ParamError: the file does not exist or lacks one of the names, or another launcher has set the environment.
            Errors of the file's own code are not caught.
    """
    check_alone()
    path = resolve(file)
    if not path.is_file():
        raise ParamError(f"task_file is {file!r}, which does not exist, expected a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ParamError(f"task_file is {file!r}, expected a Python file (.py)")
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, what in NEEDED.items():
        if not hasattr(module, name):
            raise ParamError(f"{path.name} does not define {name}, expected {what}")
    return OwnTask(module.REWARDS, module.TASK, module.load_data, module.load_models)


def new_folder(results: str) -> Path:
    """Make a new folder in ``results``, named by UTC time; nothing is ever overwritten."""
    parent, stamp = at_root(results), datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    for number in range(1000):
        folder = parent / f"own-task-{stamp}Z{f'-{number}' if number else ''}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ParamError(f"results_dir {parent} cannot be written: {error.strerror}") from error
        return folder
    raise ParamError(f"results_dir {parent} holds a thousand folders named own-task-{stamp}Z")


def check_untrained(trainer: Any) -> None:
    """Raise ``ParamError`` if a repeated cell would train the trained student again."""
    if trainer.state.global_step:
        raise ParamError("the student is trained in this kernel already: execute the cells from section 3 on again")


def reward_table(before: Mapping[str, float], after: Mapping[str, float], rows: int) -> pd.DataFrame:
    """Mean rewards on held-out rows before and after training, each with half the width of its 95 % interval.

    Args:
        before, after: results of ``trainer.evaluate()``, with one completion per row.
        rows: number of held-out rows.
    """
    names = ["eval_reward", *(name for name in before if name.startswith("eval_rewards/") and name.endswith("/mean"))]
    table = {}
    for name in names:
        spread = f"{name}_std" if name == "eval_reward" else name.removesuffix("mean") + "std"
        label = "sum" if name == "eval_reward" else name.removeprefix("eval_rewards/").removesuffix("/mean")
        table[label] = {
            column: value
            for when, numbers in (("before", before), ("after", after))
            for column, value in ((when, numbers[name]), (f"± {when}", 1.96 * numbers[spread] / math.sqrt(rows)))
        }
    return pd.DataFrame.from_dict(table, orient="index")


def text_of(prompt: Prompt) -> str:
    """The text of a prompt's last message, for display."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text") or "[picture]" for part in content)


def first_hint(trainer: Any, max_tokens: int, seed: int) -> tuple[str, list[str | None]]:
    """The teacher's prompt for the first training row, and the hint in its completion (None if unreadable)."""
    row = trainer.train_dataset[0]
    asked = trainer.task.ask(row)
    if asked is None:
        return "(this task asks for no hint)", [None]
    hints = trainer.teacher.write_hints(
        [with_images(asked, row)], max_tokens=max_tokens, seed=seed, template=trainer.chat_template_kwargs
    )
    return text_of(asked), hints
