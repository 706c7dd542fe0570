"""Typed, strict parameters: a YAML file, a notebook's namespace or the command line → one frozen object.

Names are flat, so that ``papermill -p`` reaches each of them. There is one declaration per parameter, in `Params`:
default, meaning, choices and range. Whatever does not fit it raises `ParamError`, a sentence that names the parameter,
what was expected and where the value came from. It imports nothing of the package but two helpers.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kepo_core.errors import ParamError
from kepo_core.params_io import TINY as _TINY
from kepo_core.params_io import check_range, parameter_cell_names, read_yaml, short_hash, yaml_scalar
from kepo_core.params_rules import SERVER, check_together
from kepo_core.paths import from_root as from_root
from kepo_core.paths import project_root as project_root
from kepo_core.paths import resolve as resolve

#: Parameters that say where things lie and how often, not what is computed: they leave the hash alone.
PLACES = ("results_dir", "run_dir", "params_file", "save_steps", *SERVER)

_PLAIN = (bool, int, float, str, list, dict, tuple, set, type(None))
_KIND = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
#: Plain data that IPython itself puts into a notebook's namespace.
_IPYTHON_NAMES = ("In", "Out")


def _p(default: Any, doc: str, *, choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf) -> Any:
    """Declare one parameter; ``low`` and ``high`` are both allowed values."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Params:
    """Everything a run depends on. The defaults are ``params/phantom.yaml``, which a test keeps equal to them."""

    # -- data
    data_root: str = _p("phantom", "\"phantom\" (rendered on first use), OmniMedVQA's folder or zip, or Med-R1's files")
    data_seed: int = _p(0, "seed of the rendering, the split and the samples drawn from it", low=0)
    split: str = _p(
        "image",
        "what train and test share none of; given: as Med-R1's files say",
        choices=("image", "question", "given"),
    )
    train_modality: str = _p(
        "MRI",
        "the in-domain modality",
        choices=("MRI", "CT", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus", "OCT", "Microscopy"),
    )
    train_items: int = _p(600, "training questions, at most", low=1)
    eval_items: int = _p(300, "test questions per modality, at most", low=1)
    eval_split: str = _p(
        "test", "evaluate on test, or on validation while settings are chosen", choices=("test", "validation")
    )
    items_file: str = _p("", "a run's items.csv: train and evaluate on its items, instead of drawing them")
    image_size: int = _p(0, "0: images as stored; N: resized to N pixels, as image_fit says", low=0)
    image_fit: str = _p("squash", "resize to N×N, or the longest side to N", choices=("squash", "longest"))

    # -- models
    student: str = _p("embedded:student", "π_θ: embedded:student, a folder or a hub name")
    teacher: str = _p("embedded:teacher", "π_T: embedded:teacher, a folder or a hub name")
    teacher_url: str = _p("", "where teacher is served under its name, like http://HOST:8000/v1; empty: it is loaded")
    teacher_top_k: int = _p(0, "likeliest next tokens that a served teacher tells; 0: the teacher is loaded", low=0)
    teacher_timeout: float = _p(300.0, "seconds that a served teacher has for one answer", low=_TINY)
    teacher_retries: int = _p(8, "further tries, after 1, 2, 4, … 60 s, until a served teacher counts as gone", low=0)
    teacher_concurrency: int = _p(32, "questions that each process has open with a served teacher, at most", low=1)
    teacher_quantization: str = _p(
        "none",
        "of the teacher's linear layers, by bitsandbytes",
        choices=("none", "8bit", "4bit"),
    )
    lora_rank: int = _p(0, "rank of the adapters (LoRA) that are trained; 0: all weights of the student are", low=0)
    lora_alpha: float = _p(32.0, "adapters count lora_alpha / lora_rank times", low=_TINY)

    # -- prompting
    thinking: bool = _p(True, "prompt for explicit reasoning (Appendix C)")

    # -- method
    method: str = _p(
        "kepo",
        "kepo (without distill and explore it is GRPO), a baseline, or none, the student as it is",
        choices=("kepo", "sft", "gkd", "none"),
    )
    gkd_lambda: float = _p(1.0, "λ of gkd: 1 on the student's own completions, 0 on the right answers", low=0, high=1)

    # -- method: quality-gated distillation (Eq. 7)
    distill: bool = _p(True, "add the gated divergence from the teacher")
    tau: float = _p(1.0, "the gate's threshold τ, between 0 and the largest gate_reward (accuracy 1, total 2)", low=0)
    gate_reward: str = _p("accuracy", "the reward that the gate looks at", choices=("accuracy", "total"))
    gate_compare: str = _p(
        "ge", "the gate is open where reward ≥ τ (ge), > τ (gt) or, as a control, < τ (lt)", choices=("ge", "gt", "lt")
    )
    distill_beta: float = _p(0.0, "0: forward KL(π_T‖π_θ); 1: reverse KL; between: generalised JSD", low=0, high=1)
    distill_coef: float = _p(1.0, "weight of the divergence in the loss", low=0)
    distill_temperature: float = _p(1.0, "softens both distributions in the divergence", low=_TINY)
    distill_normalizer: str = _p(
        "sequences", "what the gated divergences are divided by", choices=("sequences", "tokens", "gated_tokens")
    )

    # -- method: knowledge-enhanced exploration (Algorithm 1)
    explore: bool = _p(True, "where a whole group fails, draw again with the teacher's hint")
    exploration_reward: str = _p(
        "accuracy", "the reward whose absence triggers and whose presence accepts", choices=("accuracy", "total")
    )
    rejection_budget: int = _p(5, "B: rounds of hint-aware draws per failing group", low=1)
    injected_per_group: int = _p(1, "m: accepted draws that replace originals; also draws per round", low=1)
    on_exhausted: str = _p("keep", "a group without an accepted draw stays, or is dropped", choices=("keep", "drop"))
    hint_context: str = _p(
        "hint+answer",
        "what the hint-aware prompt tells; none: retries under the plain prompt",
        choices=("hint+answer", "hint", "answer", "none"),
    )
    hint_source: str = _p("own", "whose hint is told: as a control, another question's", choices=("own", "other"))
    hint_importance: str = _p(
        "none", "off-policy weight of injected sequences in the loss", choices=("none", "truncated")
    )
    hint_max_tokens: int = _p(32, "longest hint, in tokens", low=1)

    # -- method: policy term (Eq. 2-6)
    scale_rewards: str = _p(
        "none",
        "advantages: reward − group mean (Eq. 6), or that over the std of group or batch, or Eq. 4",
        choices=("none", "group", "batch", "rloo"),
    )
    zero_variance: str = _p(
        "keep",
        "groups whose rewards are all equal count in the policy term's mean, or are dropped from it",
        choices=("keep", "drop"),
    )
    ratio_clip: str = _p("ppo", "min(w·A, clip(w)·A), or min(w, clip(w))·A as Eq. 5 is printed", choices=("ppo", "eq5"))
    importance_sampling_level: str = _p(
        "token", "ratio w per token, or of whole sequences (Eq. 3)", choices=("token", "sequence")
    )
    epsilon: float = _p(0.2, "ε: the ratio is clipped to 1 ± ε", low=_TINY, high=1)
    beta: float = _p(0.0, "β: weight of the KL to the reference model", low=0)

    # -- optimisation
    group_size: int = _p(8, "G: completions per prompt", low=2)
    prompts_per_step: int = _p(8, "prompts per optimiser step, over all processes; an epoch's rest is left out", low=1)
    prompts_per_device: int = _p(8, "prompts in one forward pass of one process; the rest is accumulated", low=1)
    num_iterations: int = _p(1, "optimiser steps per rollout", low=1)
    learning_rate: float = _p(3e-4, "AdamW's step size", low=0)
    lr_scheduler: str = _p(
        "constant", "how the learning rate moves", choices=("constant", "constant_with_warmup", "linear", "cosine")
    )
    epochs: float = _p(1.0, "passes over the training questions", low=_TINY)
    max_steps: int = _p(-1, "stop after so many optimiser steps; -1: as epochs say", low=-1)
    max_completion_length: int = _p(48, "longest completion in training, in tokens", low=1)
    temperature: float = _p(1.0, "sampling temperature of rollouts", low=_TINY)
    top_p: float = _p(1.0, "nucleus sampling of rollouts", low=_TINY, high=1)
    max_grad_norm: float = _p(1.0, "gradients are clipped to this norm", low=_TINY)
    gradient_checkpointing: bool = _p(False, "recompute activations: less memory, more time")
    precision: str = _p("fp32", "of the computation; trained weights stay fp32", choices=("fp32", "bf16"))
    seed: int = _p(0, "seed of everything that training draws", low=0)

    # -- where training computes
    processes: int = _p(1, "training processes, a GPU each where there are GPUs; rollouts depend on it", low=1)
    accelerate_config: str = _p("", "a file of params/accelerate/: how they share the models; empty: whole copies")
    use_vllm: bool = _p(False, "draw rollouts with vLLM, on GPUs: faster, and not reproducible to the bit")
    vllm_mode: str = _p("colocate", "in the training processes, or on a server", choices=("colocate", "server"))
    vllm_server_base_url: str = _p("", "the server's address, http://HOST:PORT")
    vllm_gpu_memory_utilization: float = _p(0.3, "share of a GPU that a colocated vLLM takes", low=_TINY, high=1)
    vllm_max_model_length: int = _p(4096, "longest prompt and completion of a colocated vLLM; 0: the model's", low=0)

    # -- evaluation
    eval_max_tokens: int = _p(48, "longest completion in evaluation, in tokens", low=1)
    eval_batch_size: int = _p(100, "questions per evaluation batch", low=1)
    eval_samples: int = _p(1, "answers per question: more than 1 for mean@k, with an eval_temperature", low=1)
    eval_temperature: float = _p(0.0, "sampling temperature of evaluation; 0: greedy", low=0)

    curve_steps: int = _p(0, "optimiser steps between evaluations on the way; 0: none", low=0)
    curve_items: int = _p(100, "test questions per modality in each of these, at most", low=1)

    # -- run
    results_dir: str = _p("results", "where run folders are made, from the project's root")
    run_dir: str = _p("", "the run's folder; empty: a new one is made")
    save_steps: int = _p(25, "optimiser steps between checkpoints, from which `kepo resume` goes on; 0: none", low=0)
    params_file: str = _p("", "the file that this run's parameters came from")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        check_together(self)

    @classmethod
    def load(cls, file: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Self:
        """Defaults, then ``file``, then ``overrides``; ``None`` as a value means "as in the file".

        ``file=None`` is `default_params_file`; a relative path is taken from the working directory, else from the
        project's root. Raises `ParamError` on anything that is not a declared parameter with a fitting value.
        """
        path = resolve(file) if file else default_params_file()
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        _known(given)
        values = read_yaml(path)
        _known(values, f" in {path.name}")
        for name, value in values.items():
            if name in ("run_dir", "params_file"):
                raise ParamError(f"{name} belongs to one run and cannot stand in {path.name}")
            if value is None:
                raise ParamError(f"{name} in {path.name} has no value; leave the line out for the default")
            if name not in given:
                try:
                    checked(name, value)
                except ParamError as error:
                    raise ParamError(f"{error} (in {path.name})") from error
        return cls(**{**values, **given, "params_file": from_root(path)})

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters as a notebook's ``globals()`` hold them, over those of its ``params_file``.

        A declared name counts wherever it was set, if its value is plain data. Any other plain public name that a
        parameter cell sets is an error that names the nearest parameter: in a live notebook, parameter cells are
        those that do nothing but set names to literals (so the variables of later cells do not disturb when a cell
        is run again); elsewhere the whole namespace counts.
        """
        declared = {f.name for f in dataclasses.fields(cls)}
        plain = {
            name: value
            for name, value in namespace.items()
            if isinstance(value, _PLAIN) and not name.startswith("_") and name not in _IPYTHON_NAMES
        }
        cells = namespace.get("In")
        set_here = parameter_cell_names(cells) if isinstance(cells, list) else plain.keys()
        _known((name for name in plain if name in declared or name in set_here), " in the notebook")
        given = {name: value for name, value in plain.items() if name in declared}
        file = given.pop("params_file", None)
        if not isinstance(file, str | None):
            raise ParamError(f"params_file must be a path, got {file!r}")
        return cls.load(file or None, given)

    def replace(self, **changes: Any) -> Self:
        """A changed copy, validated anew."""
        _known(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, bool | int | float | str]:
        """All parameters by name, in the order of declaration."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """A commented file that `load` reads back to the same parameters.

        ``run_dir`` and ``params_file`` are left out: they belong to one run, and the file can start another.
        """
        lines = ["# Every parameter of a run, with its meaning. A parameter file may leave any of them out."]
        for f in dataclasses.fields(self):
            if f.name in ("run_dir", "params_file"):
                continue
            choices = f" (one of: {', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
            lines += [f"# {f.metadata['doc']}{choices}", f"{f.name}: {yaml_scalar(getattr(self, f.name))}"]
        return "\n".join(lines) + "\n"

    def to_arguments(self) -> list[str]:
        """``-f FILE -p NAME VALUE …`` as ``kepo run`` takes them: the file they came from, and what differs from it."""
        base = Params.load(self.params_file).to_dict() | {"run_dir": self.run_dir, "params_file": self.params_file}
        differing = {name: str(value) for name, value in self.to_dict().items() if value != base[name]}
        return ["-f", self.params_file, *(part for item in differing.items() for part in ("-p", *item))]

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits over everything that can change a result (`PLACES` are left out)."""
        return short_hash({name: value for name, value in self.to_dict().items() if name not in PLACES})

    @property
    def method_name(self) -> str:
        """The paper's name of what is selected, with τ where a gate works: ``kepo-tau1``, ``grpo``, ``sft-nothink``."""
        mode = "" if self.thinking else "-nothink"
        if self.method != "kepo":
            return {"sft": "sft", "gkd": f"gkd-lambda{self.gkd_lambda:g}", "none": "zero-shot"}[self.method] + mode
        names = {(True, True): "kepo", (True, False): "kepo-ke", (False, True): "explore-only", (False, False): "grpo"}
        name = names[self.distill, self.explore]
        return name + (f"-tau{self.tau:g}" if self.distill else "") + mode


def checked(name: str, value: Any) -> Any:
    """``value`` as the parameter ``name`` takes it; `ParamError` if there is none of that name, or it does not fit."""
    _known([name])
    return _checked(next(f for f in dataclasses.fields(Params) if f.name == name), value)


def _checked(f: "dataclasses.Field[Any]", value: Any) -> Any:
    """``value`` as the declared type, or `ParamError`: no bool is a number, and only whole numbers widen."""
    kind = f.type
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        hint = ""
        if kind is bool and str(value).lower() in ("true", "false"):
            hint = " (write it with a capital and without quotes)"
        raise ParamError(f"{f.name} must be {_KIND[kind]}, got {value!r}{hint}")  # type: ignore[index]
    if choices := f.metadata["choices"]:
        if value not in choices:
            raise ParamError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
    elif kind is str and not value.strip() and f.default:
        raise ParamError(f"{f.name} must not be empty")
    if kind in (int, float):
        check_range(f.name, value, f.metadata["low"], f.metadata["high"])
    return value


def check_names(namespace: Mapping[str, Any]) -> None:
    """Refuse what papermill lets pass: a name that the first parameter cell of a notebook does not set.

    For notebooks whose parameters are their own. ``namespace`` is the notebook's ``globals()``.

    Raises:
        ParamError: names the nearest parameter.
    """
    declared: set[str] = set()
    for source in namespace["In"]:
        names = parameter_cell_names([source])
        declared = declared or names
        _known(sorted(names), " in the notebook", sorted(declared))


def _known(names: Iterable[str], where: str = "", declared: Sequence[str] = ()) -> None:
    """Raise for the first name that is no parameter (of ``declared``, or of `Params`), and name the nearest one."""
    known = declared or [f.name for f in dataclasses.fields(Params)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            every = f"; expected one of {', '.join(known)}" if declared else "; `kepo params` lists them all"
            raise ParamError(f"{name}{where} is not a parameter{f'; the nearest is {near[0]}' if near else every}")


def default_params_file() -> Path:
    """``$KEPO_PARAMS`` where it is set, else ``params/phantom.yaml``."""
    return resolve(os.environ.get("KEPO_PARAMS") or "params/phantom.yaml")
