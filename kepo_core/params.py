"""Typed, strict parameters: a YAML file, a notebook's namespace or the command line → one frozen object.

Names are flat, so that ``papermill -p`` reaches each of them. Each is declared once: the method's in
``method/options.py``, the study's here, TRL's in TRL (`params_trl`). A wrong name or value raises `ParamError`: one
sentence with the parameter, what was expected and where the value came from.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kepo_core import params_io, params_trl
from kepo_core.errors import ParamError
from kepo_core.method.options import (
    Count,
    MethodOptions,
    Natural,
    NotNegative,
    Positive,
    Share,
    check_option,
    check_options,
    declared,
    kind_of,
    option,
)
from kepo_core.params_io import check_names as check_names
from kepo_core.params_rules import check_together
from kepo_core.paths import anchored
from kepo_core.paths import at_root as at_root
from kepo_core.paths import from_root as from_root
from kepo_core.paths import project_root as project_root
from kepo_core.paths import resolve as resolve

#: Parameters that say where things are and how often they are saved, not what is computed: the hash leaves them out.
PLACES = ("results_dir", "run_dir", "save_steps", "teacher_url", "report_to", "project")

#: Parameters that may name a file or folder.
_FILES = ("data_root", "items_file", "student", "teacher", "accelerate_config")
#: Values of these that are not paths.
_OWN = ("phantom", "embedded:student", "embedded:teacher")
_PLAIN = (bool, int, float, str, list, dict, tuple, set, type(None))
#: Plain data that IPython itself puts into a notebook's namespace.
_IPYTHON_NAMES = ("In", "Out")


@dataclass
class DataParams:
    """Data."""

    data_root: str = option(
        "phantom", "phantom (synthetic), or a folder: OmniMedVQA, Med-R1's files, your own table; or hf:OWNER/NAME"
    )
    data_columns: str = option("", "columns of your table that have other names: question=stem, options=A+B+C")
    follow_links: bool = option(
        False, "also read files outside of data_root that links in it lead to, as in the Hub's cache"
    )
    data_seed: Natural = option(0, "seed of the synthetic data, of the split and of the questions sampled from it")
    split: str = option(
        "image",
        "unit kept disjoint between train and test; given: the data's own split",
        choices=("image", "question", "given"),
    )
    train_modality: str = option(
        "MRI", "the in-domain modality, on which the student trains (in your own data: a category)"
    )
    train_items: Count = option(600, "number of training questions, at most")
    eval_items: Count = option(300, "number of test questions per modality, at most")
    eval_split: str = option(
        "test", "evaluate on test, or on validation to choose settings", choices=("test", "validation")
    )
    items_file: str = option("", "items.csv of another run, to train and evaluate on its items")
    image_size: Natural = option(0, "size of the pictures in pixels, as image_fit says; 0: as stored")
    image_fit: str = option("squash", "resize to a square, or only the longest side", choices=("squash", "longest"))


@dataclass
class ModelParams:
    """Models."""

    student: str = option("embedded:student", "the student π_θ: embedded:student, a folder or a Hub name")
    teacher: str = option("embedded:teacher", "the teacher π_T: embedded:teacher, a folder or a Hub name")
    teacher_url: str = option("", "the teacher server, for example http://HOST:8000/v1; empty: load the teacher")
    teacher_top_k: Natural = option(0, "top-k log-probabilities requested from the teacher server; 0: load the teacher")
    teacher_quantization: str = option(
        "none", "quantise the loaded teacher's linear layers with bitsandbytes", choices=("none", "8bit", "4bit")
    )
    lora_rank: Natural = option(0, "rank of the trained LoRA adapters; 0: train all weights of the student")
    lora_alpha: Positive = option(32.0, "LoRA's scale: adapters are multiplied by lora_alpha / lora_rank")


@dataclass
class TaskParams:
    """Task, and what is trained."""

    method: str = option(
        "kepo",
        "kepo (without distill and explore it is GRPO), a baseline, or none: evaluate the untrained student",
        choices=("kepo", "sft", "gkd", "none"),
    )
    gkd_lambda: Share = option(
        1.0, "λ of gkd: share of batches with the student's own completions; the others have the right answers"
    )
    thinking: bool = option(True, "prompt for reasoning before the answer (Appendix C)")
    answer_format: str = option(
        "paper",
        "what counts as an answer: the paper's tags and letters, or also the formats of other model families",
        choices=("paper", "lenient"),
    )
    hint_context: str = option(
        "hint+answer",
        "what the hint-aware prompt contains; none: retry with the plain prompt; fading: hint and answer, then the "
        "hint, then none, for a third of training each",
        choices=("hint+answer", "hint", "answer", "none", "fading"),
    )


@dataclass
class TrainingParams:
    """Training."""

    group_size: int = option(8, "G: completions per prompt, at least 2")
    prompts_per_step: Count = option(8, "prompts per optimiser step, over all processes; an incomplete step is skipped")
    prompts_per_device: Count = option(8, "prompts per forward pass of a process; gradients accumulate to a step")
    learning_rate: NotNegative = option(3e-4, "learning rate of AdamW")
    epochs: Positive = option(1.0, "passes over the training questions")
    precision: str = option("fp32", "precision of the computation; trained weights stay fp32", choices=("fp32", "bf16"))
    seed: Natural = option(0, "seed of everything random in training")
    processes: Count = option(1, "training processes, one per GPU if there are GPUs; rollouts depend on it")
    accelerate_config: str = option(
        "", "how processes share models, for example params/accelerate/4gpu-fsdp2.yaml; empty: whole copies"
    )


@dataclass
class EvaluationParams:
    """Evaluation."""

    eval_max_tokens: Count = option(48, "maximum length of a completion in evaluation, in tokens")
    eval_batch_size: Count = option(100, "questions per evaluation batch")
    eval_samples: Count = option(1, "answers per question; above 1: mean@k, which needs an eval_temperature")
    eval_temperature: NotNegative = option(0.0, "sampling temperature of evaluation; 0: greedy")
    curve_steps: Natural = option(0, "optimiser steps between evaluations during training; 0: none")
    curve_items: Count = option(100, "questions per modality in evaluations during training, at most")


@dataclass
class RunParams:
    """Run folder."""

    results_dir: str = option("results", "folder of all runs, relative to the project's root")
    run_dir: str = option("", "the run's folder; empty: a new one")


#: The sections of a parameter file, in its order; a section's heading is its class's docstring.
SECTIONS = (DataParams, ModelParams, TaskParams, MethodOptions, TrainingParams, EvaluationParams, RunParams)


@dataclass
class Params(RunParams, EvaluationParams, TrainingParams, MethodOptions, TaskParams, ModelParams, DataParams):
    """Everything a run depends on. The defaults are ``params/phantom.yaml``, which a test keeps equal to them.

    ``trl`` holds the fields of TRL's ``GRPOConfig`` that differ from TRL's defaults, by TRL's names; everywhere else
    (files, ``-p``, notebooks, `to_dict`) they are beside the others. Dataclasses list the fields of the last base
    first, so the bases are `SECTIONS` backwards.
    """

    trl: Mapping[str, bool | int | float | str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(Params, self)
        options = {name: getattr(self, name) for name in declared(MethodOptions)}
        sizes = {"num_generations": self.group_size, "per_device_train_batch_size": self.group_size}
        object.__setattr__(self, "trl", params_trl.check(self.trl, declared(Params), options | sizes))
        check_together(self)
        object.__setattr__(self, "_sealed", True)

    def __setattr__(self, name: str, value: Any) -> None:
        # dataclass(frozen=True) cannot inherit from MethodOptions, which KEPOConfig lets its users change.
        if "_sealed" in self.__dict__:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    @classmethod
    def load(
        cls,
        file: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        *,
        cell: Mapping[str, Any] | None = None,
    ) -> Self:
        """Defaults, then a notebook's ``cell``, then ``file``, then ``overrides``.

        ``None`` means "not given", and for a field of TRL's that is not in a study's own defaults, TRL's default.

        A relative ``file`` is taken from the working directory, else from the project's root. Raises `ParamError` on
        anything that is not a parameter with a fitting value.
        """
        given, beneath = _given(overrides or {}), _given(_numbers(cell or {}))
        values = _read(resolve(file)) if file else {}
        for name in values.keys() - given.keys():
            checked(name, values[name], f"in {Path(str(file)).name}")
        return cls._of({**beneath, **values, **given})

    @classmethod
    def of_run(cls, file: Path) -> Self:
        """The parameters in a run's ``params.yaml``. They were checked when it was made, so TRL is not imported."""
        values = _read(file)
        ours = {name: value for name, value in values.items() if name in declared(Params)}
        return cls(**ours, trl=params_trl.Checked({n: v for n, v in values.items() if n not in ours}))

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Self:
        """From flat names, including TRL's; relative paths are anchored at the project's root."""
        ours = {name: value for name, value in values.items() if name in declared(Params)}
        files = {name: ours[name] for name in _FILES if isinstance(ours.get(name), str)}
        ours |= {name: anchored(path) for name, path in files.items() if path not in _OWN}
        return cls(**ours, trl={name: value for name, value in values.items() if name not in ours})

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters in a notebook's ``globals()``, after papermill's injected cell if there is one.

        A declared name counts wherever it was set, if its value is plain data. Any other plain public name that is set
        as a parameter (`params_io.meant_as_parameters`; outside of a live notebook, all of them) is a field of TRL's,
        or an error that names the nearest parameter; similar names set elsewhere give a warning. A text is read as a
        number where one is expected: papermill reads ``2e-6`` as a text.
        """
        plain = {
            name: value
            for name, value in namespace.items()
            if isinstance(value, _PLAIN) and not name.startswith("_") and name not in _IPYTHON_NAMES
        }
        cells, names = namespace.get("In"), declared(Params)
        set_here: Collection[str] = plain
        if isinstance(cells, list):
            known = params_trl.names(names, params_io.parameter_cells(cells))
            set_here = params_io.meant_as_parameters(cells, known, names)
        given = {name: value for name, value in plain.items() if name in names or name in set_here}
        try:
            return cls._of(_given(_numbers(given)))
        except params_trl.UnknownError as error:
            raise ParamError(f"{error.name} in the notebook is not a parameter{error.hint}") from error

    def replace(self, **changes: Any) -> Self:
        """A changed copy, checked like a new one."""
        return self._of({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, bool | int | float | str]:
        """All parameters by name, in the order of declaration, TRL's last."""
        return {name: getattr(self, name) for name in declared(Params)} | dict(self.trl)

    def to_yaml(self) -> str:
        """A commented file, in sections, that `load` reads back to the same parameters.

        ``run_dir`` is left out: it belongs to one run, and the file can start another.
        """
        lines = ["# Every parameter of a run, with its meaning. A parameter file may leave any of them out."]
        for section in SECTIONS:
            lines += ["", f"# -- {str(section.__doc__).rstrip('.')}"]
            for name, field in declared(section).items():
                if name != "run_dir":
                    choices = field.metadata.get("choices")
                    among = f" (one of: {', '.join(choices)})" if choices else ""
                    value = params_io.yaml_scalar(getattr(self, name))
                    lines += [f"# {field.metadata['help']}{among}", f"{name}: {value}"]
        lines += ["", "# -- TRL: any field of GRPOConfig, under its name and with its meaning"]
        lines += [f"{name}: {params_io.yaml_scalar(value)}" for name, value in self.trl.items()]
        return "\n".join(lines) + "\n"

    def differing(self, cell: Mapping[str, Any] | None = None) -> dict[str, bool | int | float | str]:
        """The parameters that differ from the defaults, or from what a notebook's ``cell`` sets instead.

        ``run_dir`` is left out. A field of TRL's that the cell sets and these parameters do not is TRL's default.
        """
        theirs = {**Params().to_dict(), **_given(_numbers(cell or {}))}
        ours = {**{name: params_trl.default(name) for name in theirs.keys() - self.to_dict().keys()}, **self.to_dict()}
        missing = object()
        return {name: v for name, v in ours.items() if name != "run_dir" and theirs.get(name, missing) != v}

    def to_arguments(self, cell: Mapping[str, Any] | None = None) -> list[str]:
        """``-p NAME VALUE …`` as ``kepo run`` takes them over a notebook with this parameters ``cell``: `differing`."""
        return [part for name, value in self.differing(cell).items() for part in ("-p", name, str(value))]

    def of_trl(self, name: str) -> Any:
        """The value of a field of TRL's: the given one, or TRL's default."""
        return self.trl[name] if name in self.trl else params_trl.default(name)

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits over everything that can change a result (`PLACES` are left out)."""
        return params_io.short_hash({name: value for name, value in self.to_dict().items() if name not in PLACES})

    @property
    def method_name(self) -> str:
        """The paper's name of the method, with τ if there is a gate: ``kepo-tau1``, ``grpo``, ``sft-nothink``."""
        mode = "" if self.thinking else "-nothink"
        if self.method != "kepo":
            return {"sft": "sft", "gkd": f"gkd-lambda{self.gkd_lambda:g}", "none": "zero-shot"}[self.method] + mode
        names = {(True, True): "kepo", (True, False): "kepo-ke", (False, True): "explore-only", (False, False): "grpo"}
        name = names[self.distill, self.explore]
        return name + (f"-tau{self.tau:g}" if self.distill else "") + mode


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the study's parameters that are None; TRL's fields stay, as None is a value there."""
    return {name: value for name, value in values.items() if value is not None or name not in declared(Params)}


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with texts read as numbers for the study's parameters that are numbers."""
    numeric = {name for name in values if name in declared(Params) and kind_of(Params, name)[0] in (int, float)}
    return {n: params_io.as_number(v) if n in numeric and isinstance(v, str) else v for n, v in values.items()}


def _read(path: Path) -> dict[str, Any]:
    """The names and values of a parameter file; `ParamError` for ``run_dir`` and for a name without a value."""
    values = params_io.read_yaml(path)
    for name, value in values.items():
        if name == "run_dir":
            raise ParamError(f"{name} belongs to one run and cannot be set in {path.name}")
        if value is None:
            raise ParamError(f"{name} in {path.name} has no value; leave the line out for the default")
    return values


def checked(name: str, value: Any, where: str = "") -> Any:
    """``value``, checked for the parameter ``name``; the `ParamError` ends with ``where``, such as "in x.yaml"."""
    try:
        if name in declared(Params):
            return check_option(Params, name, value)
        return params_trl.check({name: value}, declared(Params), {}).get(name, value)
    except params_trl.UnknownError as error:
        raise ParamError(f"{name} {where}".rstrip() + f" is not a parameter{error.hint}") from error
    except ParamError as error:
        raise ParamError(f"{error} ({where})" if where else str(error)) from error
