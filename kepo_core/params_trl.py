"""TRL's own parameters: any field of GRPOConfig, taken under TRL's name and with TRL's meaning.

TRL declares them, so they are not declared again. Importing it takes seconds, so it is imported only where a field is
given that is not in `DEFAULTS`.
"""

import os
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any

from kepo_core.errors import ParamError
from kepo_core.method.options import KINDS, MethodOptions
from kepo_core.params_io import as_number, nearest
from kepo_core.quiet import quiet_third_parties

#: TRL's fields whose default is different in a study, and max_steps, which short runs set.
DEFAULTS: dict[str, bool | int | float | str] = {
    "lr_scheduler_type": "constant",
    "max_completion_length": 48,
    "max_steps": -1,
    "save_steps": 25,
    "vllm_max_model_length": 4096,
}
#: Fields that a study sets itself, and the parameter to use instead; "" if there is none.
SET_BY = {
    "output_dir": "results_dir",
    "num_generations": "group_size",
    "per_device_train_batch_size": "prompts_per_device",
    "gradient_accumulation_steps": "prompts_per_step",
    "num_train_epochs": "epochs",
    "gradient_checkpointing": "activation_checkpointing",
    "remove_unused_columns": "",
    "resume_from_checkpoint": "",
    "load_best_model_at_end": "",
    "deepspeed": "accelerate_config",
    "fsdp": "accelerate_config",
    "fsdp_config": "accelerate_config",
    "accelerator_config": "accelerate_config",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "",
    "log_rollouts": "",
    "logging_steps": "",
    "save_strategy": "save_steps",
    "save_total_limit": "",
    "run_name": "",
    "disable_tqdm": "",
    "dataloader_pin_memory": "",
}
#: Families of such fields: the study evaluates and logs by itself, and no token may be written into a run folder.
_NOT_HERE = re.compile(r"eval_|do_|per_device_eval_|logging_|log_|hub_|push_to_hub")
#: Parameters of earlier versions, and what to use.
GONE = {
    "lr_scheduler": "set lr_scheduler_type",
    "ratio_clip": "for eq5 set epsilon 1, epsilon_high 0.2 and delta 1.2",
    "gate_compare": "gate below is its lt; for gt set a larger tau, or give KEPOTrainer a gate of your own",
    "zero_variance": "for a larger policy term set a larger learning_rate, or a smaller distill_coef and beta",
    "on_exhausted": "leave it out, such groups stay",
    "params_file": "-f FILE names it",
    "teacher_timeout": "it is TIMEOUT in kepo_core/method/chat_client.py",
    "teacher_retries": "it is RETRIES in kepo_core/method/chat_client.py",
    "teacher_concurrency": "it is CONCURRENCY in kepo_core/method/chat_client.py",
}
_SCALARS = (bool, int, float, str)


class Checked(dict[str, Any]):
    """Fields that were checked before."""


class UnknownError(ParamError):
    """An unknown name: ``hint`` ends the sentence, for example with the nearest parameter."""

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(f"{name} is not a parameter{hint}")
        self.name, self.hint = name, hint


def check(
    given: Mapping[str, Any], ours: Collection[str], options: Mapping[str, Any]
) -> dict[str, bool | int | float | str]:
    """All of `DEFAULTS`, and the ``given`` fields that differ from TRL's defaults, each of the type that TRL declares.

    Args:
        given: by name; None is TRL's default. `Checked` ones are taken as they are.
        ours: the names of all other parameters.
        options: the fields of ``KEPOConfig`` that these set, by name: ``given`` must not contradict them.

    Raises:
        UnknownError: a name that is neither TRL's nor among ``ours``.
        ParamError: a field that the study sets itself, or a value that TRL refuses.
    """
    if isinstance(given, Checked):
        return {**DEFAULTS, **given}
    values = {**DEFAULTS, **{name: _like_default(name, value) for name, value in given.items() if name in DEFAULTS}}
    new = {name: value for name, value in given.items() if name not in DEFAULTS}
    if not new:
        return values
    for name in new:
        check_name(name, ours)
    values |= {name: _fitting(name, value) for name, value in new.items() if value is not None}
    config, environment = _config(), dict(os.environ)
    try:
        config(output_dir="", use_cpu=True, **options, **values | {"save_steps": 1})  # save_steps 0: no checkpoints
    except (ValueError, TypeError, ImportError, OSError) as error:  # ParamError is a ValueError
        raise ParamError(" ".join(str(error).split())) from error
    finally:  # transformers may set variables to ask for a compiler; later runs and child processes would inherit them
        for name in os.environ.keys() - environment:
            del os.environ[name]
        os.environ.update(environment)
    return {name: value for name, value in values.items() if name in DEFAULTS or not _is_default(name, value)}


def check_name(name: str, ours: Collection[str]) -> None:
    """Raise unless ``name`` is among ``ours`` or a field of TRL's that may be given; as `check`."""
    if name in ours or name in DEFAULTS:
        return
    if name in GONE:
        raise UnknownError(name, f" (it was removed): {GONE[name]}")
    if name in SET_BY or _NOT_HERE.match(str(name)):
        instead = f"set {SET_BY[name]} instead" if SET_BY.get(name) else "leave it out"
        raise ParamError(f"{name} is set by the study itself: {instead}")
    if name not in _known():
        known = {*ours, *DEFAULTS, *(known for known in _known() - SET_BY.keys() if not _NOT_HERE.match(known))}
        raise UnknownError(name, nearest(name, known) or "; `kepo params` lists them, and TRL's GRPOConfig has more")


def names(ours: Collection[str], asked: Collection[str]) -> set[str]:
    """``ours`` and TRL's names; TRL is imported only if one of ``asked`` is not known without it."""
    here = {*ours, *DEFAULTS, *SET_BY, *GONE}
    return here if here.issuperset(asked) else here | _known()


def _is_default(name: str, value: bool | int | float | str) -> bool:
    """Whether a field with this value does nothing: a switch that TRL leaves at None is off."""
    return bool(value == default(name)) or (value is False and default(name) is None)


def _like_default(name: str, value: Any) -> bool | int | float | str:
    """A value for one of `DEFAULTS`, with the type of the default; None is the default."""
    if value is None:
        return DEFAULTS[name]
    kind = type(DEFAULTS[name])
    if isinstance(value, str) and kind is int:
        value = as_number(value)
    if type(value) is not kind:
        raise ParamError(f"{name} must be {KINDS[kind]}, got {value!r}")
    return value  # type: ignore[no-any-return]


@cache
def default(name: str) -> Any:
    """TRL's default of a field."""
    return next(field.default for field in fields(_config()) if field.name == name)


def _config() -> Any:
    quiet_third_parties()
    from kepo_core.method.config import KEPOConfig

    return KEPOConfig


@cache
def _known() -> frozenset[str]:
    own = {field.name for field in fields(MethodOptions)}
    return frozenset(field.name for field in fields(_config())) - own


@cache
def _kinds(name: str) -> tuple[type, ...]:
    """The scalar types that a field takes; text for those that TRL names by an enumeration."""
    hint = typing.get_type_hints(_config())[name]
    members = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    named = any(isinstance(kind, type) and issubclass(kind, Enum) for kind in members)
    return tuple(kind for kind in _SCALARS if kind in members or (kind is str and named))


def _fitting(name: str, value: Any) -> bool | int | float | str:
    kinds = _kinds(name)
    if isinstance(value, str) and str not in kinds and bool not in kinds:
        value = as_number(value)
    if type(value) is int and int not in kinds and float in kinds:
        value = float(value)
    if type(value) not in kinds:
        expected = " or ".join(KINDS[kind] for kind in kinds) or "set in a script, as it is not a single value"
        raise ParamError(f"{name} must be {expected}, as in TRL's GRPOConfig, got {value!r}")
    return value  # type: ignore[no-any-return]
