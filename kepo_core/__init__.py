"""KEPO: quality-gated on-policy distillation and knowledge-enhanced exploration, as one more trainer of TRL's.

The names below are the public face. Each is imported when it is first used: ``import kepo_core`` alone loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kepo_core.method import gates as gates
    from kepo_core.method import objective as objective
    from kepo_core.method.config import KEPOConfig as KEPOConfig
    from kepo_core.method.exploration import explore as explore
    from kepo_core.method.served import ServedTeacher as ServedTeacher
    from kepo_core.method.task import Task as Task
    from kepo_core.method.task import Templates as Templates
    from kepo_core.method.teacher import Teacher as Teacher
    from kepo_core.method.trainer import KEPOTrainer as KEPOTrainer
    from kepo_core.task.multiple_choice import MultipleChoice as MultipleChoice

#: Public name → the module that has it.
_HOMES = {
    "KEPOConfig": "method.config",
    "KEPOTrainer": "method.trainer",
    "MultipleChoice": "task.multiple_choice",
    "ServedTeacher": "method.served",
    "Task": "method.task",
    "Teacher": "method.teacher",
    "Templates": "method.task",
    "explore": "method.exploration",
    "gates": "method.gates",
    "objective": "method.objective",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kepo_core' has no attribute {name!r}, expected one of {', '.join(__all__)}")
    module = importlib.import_module(f"kepo_core.{_HOMES[name]}")
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
