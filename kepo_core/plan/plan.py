"""``kepo plan``: the memory of a run on each GPU, before anything is loaded, and what to change if it does not fit.

Every item is a formula of `memory`. This module adds them up for each way of running: the memory needed is everything
held throughout, plus the largest moment of a step. `tests/bench/planned.py` compares the plan with measured peaks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kepo_core.errors import ParamError
from kepo_core.experiment.methods import needs_teacher
from kepo_core.params import Params
from kepo_core.plan import memory
from kepo_core.plan.architecture import Architecture, architecture, load_config

GIB = 2**30
#: Assumed overhead: CUDA's context and libraries, and the share lost to fragmentation of the allocator.
CONTEXT, FALLOW = 1.0 * GIB, 0.06
#: Embedded model or not → tokens of a prompt's text (the embedded tokenizer has single tokens for fixed sentences).
TEXT_TOKENS = {True: 72, False: 288}
#: Maximum number of parameters that ZeRO-3 keeps gathered (its stage3_max_live_parameters).
ZERO3_LIVE = 1_000_000_000
#: Way of running → how weights, gradients and optimizer are distributed.
WAYS = {"one process": "", "replicated": "DDP", "FSDP2": "sharded", "ZeRO-3": "sharded"}
#: The moments of a step; the largest counts.
MOMENTS = (
    "rollouts", "hints", "teacher's answers", "teacher's forward pass", "reference's forward pass", "update",
    "evaluation",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """The run to plan: parameters, both models (None: no teacher here), tokens of a prompt's text, bytes of a GPU."""

    params: Params
    student: Architecture
    teacher: Architecture | None
    text_tokens: int = 288
    gpu: float = 80e9

    @property
    def gpus(self) -> int:
        """Number of GPUs: one per process."""
        return self.params.processes

    @property
    def ways(self) -> list[str]:
        """The ways of running that this number of GPUs allows; DeepSpeed does not support quantised models."""
        if self.gpus == 1:
            return ["one process"]
        quantised = self.teacher and self.params.teacher_quantization != "none"
        return ["replicated", "FSDP2"] if quantised else ["replicated", "FSDP2", "ZeRO-3"]

    @property
    def side(self) -> int:
        """A picture's side in pixels; without ``image_size``, 64 for PhantomVQA, and 384 is assumed for other data."""
        return self.params.image_size or (64 if self.params.data_root == "phantom" else 384)

    @property
    def batch(self) -> memory.Batch:
        """The batch sizes of one process."""
        p = self.params
        windows = p.prompts_per_step // (p.prompts_per_device * p.processes)
        patches = (self.side // self.student.patch) ** 2
        return memory.Batch(
            rows=p.prompts_per_device * p.group_size,
            windows=windows,
            prompt=self.text_tokens + patches // self.student.merge**2,
            completion=p.of_trl("max_completion_length"),
            patches=patches,
            compute=2 if p.precision == "bf16" else 4,
            lora_rank=p.lora_rank,
            checkpointing=p.of_trl("activation_checkpointing"),
        )


def read(params: Params, prompt_tokens: int | None = None, gpu: float = 80e9) -> tuple[Setting, list[str]]:
    """The setting of ``params``, and a line per model with its size and origin. Only configurations are read.

    Args:
        params: of the run; each of ``params.processes`` has a GPU.
        prompt_tokens: tokens of a prompt's text, without its picture; None: `TEXT_TOKENS`.
        gpu: memory of one GPU in bytes.

    Raises:
        ParamError: a configuration is not available, or the method is not KEPO or GRPO.
    """
    if params.method != "kepo":
        raise ParamError(f"method is {params.method}, expected kepo (or GRPO, its parts off), the only ones planned")
    wanted = {"student": params.student}
    if needs_teacher(params) and not params.teacher_url:
        wanted["teacher"] = params.teacher
    found, told = {}, []
    for role, name in wanted.items():
        config, origin = load_config(name, role)
        found[role] = a = architecture(config)
        told.append(
            f"{role} {name}: {a.parameters / 1e9:.3g} billion parameters ({a.language / 1e9:.3g} language, "
            f"{a.vision / 1e9:.3g} vision), from {origin}"
        )
    tokens = prompt_tokens or TEXT_TOKENS[params.student.startswith("embedded:")]
    return Setting(params, found["student"], found.get("teacher"), tokens, gpu), told


def held(setting: Setting, way: str) -> dict[str, float]:
    """Bytes held throughout, by item; a shard is 1/N of the whole.

    Optimizer: 8 bytes per trained weight (AdamW's two moments). ZeRO-3 keeps a bf16 copy besides its float32 master
    weights. A reference (β > 0) is a second student in float32; LoRA needs none. A quantised teacher is never sharded.
    Colocated vLLM takes its share of the GPU and generates the rollouts in it.
    """
    p, a, t, batch = setting.params, setting.student, setting.teacher, setting.batch
    share = setting.gpus if WAYS[way] == "sharded" else 1
    trained = memory.trained(a, batch)
    own = memory.student_weights(a, batch)
    if way == "ZeRO-3" and memory.compute_copy(a, batch):
        own += 2 * a.parameters
    if p.lora_rank and p.of_trl("use_vllm"):  # in float32 then, see `pair.load_models`
        own += (4 - batch.compute) * a.parameters
    items = {"student's weights": own / share, "optimizer": 8 * trained / share}
    if way == "replicated":
        items["gradient buckets of DDP"] = 4.0 * trained
    if p.of_trl("beta") and not p.lora_rank:
        items["reference"] = 4 * a.parameters / share
    if p.of_trl("use_vllm") and p.of_trl("vllm_mode") == "colocate":
        items["vLLM"] = p.of_trl("vllm_gpu_memory_utilization") * setting.gpu
    if t:
        whole = memory.teacher_weights(t, batch.compute, p.teacher_quantization)
        items["teacher's weights"] = whole / (share if p.teacher_quantization == "none" else 1)
    return items


def gathered(setting: Setting, way: str, model: Architecture, compute: int) -> float:
    """Bytes of a sharded model's weights that are gathered at a time.

    FSDP2: two layers, and everything outside layers (embedding, head, tower). ZeRO-3: at most a billion weights.
    """
    if way == "FSDP2":
        return compute * (model.parameters - (model.layers - 2) * model.layer)
    return compute * min(model.parameters, ZERO3_LIVE) if way == "ZeRO-3" else 0.0


def moments(setting: Setting, way: str) -> dict[str, float]:
    """Bytes of each of the `MOMENTS` of a step, assuming that all rows pass the gate."""
    p, a, t, batch = setting.params, setting.student, setting.teacher, setting.batch
    sharded = WAYS[way] == "sharded"
    # FSDP2 shards gradients only in the last window of a step: until then each GPU holds all of its own.
    shared_out = sharded and not (way == "FSDP2" and batch.windows > 1)
    gradients = 4.0 * memory.trained(a, batch) / (setting.gpus if shared_out else 1)
    copy = gathered(setting, way, a, batch.compute) if sharded else memory.compute_copy(a, batch)
    whole = batch.compute * a.parameters if way == "ZeRO-3" else copy  # ZeRO-3 gathers all weights to generate
    rows = batch.rows * batch.windows
    teacher_hidden = t.hidden if t and p.distill else 0
    found = {
        "rollouts": memory.rollouts(a, batch, rows, batch.completion) + whole,
        "update": memory.update(a, batch, teacher_hidden, gradients, copy),
        "evaluation": memory.rollouts(a, batch, p.eval_batch_size, p.eval_max_tokens) + whole,
    }
    if t:
        teacher_copy = 0.0 if p.teacher_quantization != "none" else gathered(setting, way, t, batch.compute)
        prompts = p.prompts_per_device * batch.windows
        if p.explore:
            found["hints"] = memory.rollouts(t, batch, prompts, p.hint_max_tokens) + teacher_copy
        if p.distill and p.gate == "teacher":
            found["teacher's answers"] = memory.rollouts(t, batch, prompts, batch.completion) + teacher_copy
        if p.distill:
            found["teacher's forward pass"] = memory.teacher_forward(t, batch) + teacher_copy
    if p.of_trl("beta") and not p.lora_rank:
        working = memory.forward_only(a, batch.rows * batch.length, batch.rows * batch.patches, batch.compute, 4)
        # Under FSDP2, TRL wraps the reference as one unit: all of it is gathered.
        found["reference's forward pass"] = working + (batch.compute * a.parameters if way == "FSDP2" else copy)
    by_vllm = ("rollouts", "evaluation") if p.of_trl("use_vllm") else ()
    return {name: found[name] for name in MOMENTS if name in found and name not in by_vllm}


def total(setting: Setting, way: str) -> float:
    """Bytes on each GPU: everything held, the largest moment, and overhead (`CONTEXT`, and `FALLOW` of the rest)."""
    counted = sum(held(setting, way).values()) + max(moments(setting, way).values())
    return counted * (1 + FALLOW) + CONTEXT


def evaluating(setting: Setting) -> float:
    """Bytes on a GPU while `launch.evaluate` evaluates there, before and after training; 0 if it is not used.

    The evaluation holds the whole student in float32, whatever the precision of training, or vLLM's share.
    """
    p, a = setting.params, setting.student
    if p.of_trl("use_vllm"):
        return float(p.of_trl("vllm_gpu_memory_utilization") * setting.gpu)
    if p.processes == 1 and not p.accelerate_config:
        return 0.0
    batch = replace(setting.batch, compute=4, lora_rank=0)
    counted = 4 * a.parameters + memory.rollouts(a, batch, p.eval_batch_size, p.eval_max_tokens)
    return counted * (1 + FALLOW) + CONTEXT


def loading(setting: Setting, way: str) -> float:
    """Bytes on each GPU while ZeRO-3 shards the teacher, which DeepSpeed first loads whole; 0 for other ways."""
    if way != "ZeRO-3" or not setting.teacher:
        return 0.0
    return memory.teacher_weights(setting.teacher, setting.batch.compute, "none") * (1 + FALLOW) + CONTEXT


def fits(setting: Setting, way: str) -> bool:
    """Whether the peaks of the run, of evaluation before and after, and of loading fit on a GPU."""
    return max(total(setting, way), evaluating(setting), loading(setting, way)) <= setting.gpu


def changes(setting: Setting) -> dict[str, Setting]:
    """Single changes that may save memory: what to do → setting. Smaller batches may not: gradients are then kept."""
    p, found = setting.params, {}
    if not p.of_trl("activation_checkpointing"):
        found["activation_checkpointing True"] = p.replace(activation_checkpointing=True)
    if not p.lora_rank:
        found["lora_rank 16"] = p.replace(lora_rank=16)
    if setting.teacher and p.teacher_quantization == "none":
        found |= {f"teacher_quantization {q}": p.replace(teacher_quantization=q) for q in ("8bit", "4bit")}
    if p.prompts_per_device > 1:
        found["prompts_per_device 1"] = p.replace(prompts_per_device=1)
    if p.precision == "fp32":
        found["precision bf16"] = p.replace(precision="bf16")
    found["half of max_completion_length"] = p.replace(
        max_completion_length=max(1, p.of_trl("max_completion_length") // 2)
    )
    made = {name: _with(setting, params=params) for name, params in found.items()}
    if setting.teacher:
        made["teacher on another machine"] = _with(setting, teacher=None)
    return made


def _with(setting: Setting, **changed: object) -> Setting:
    values: dict[str, object] = {name: getattr(setting, name) for name in Setting.__dataclass_fields__}
    return Setting(**(values | changed))  # type: ignore[arg-type]


def as_text(setting: Setting, told: list[str]) -> tuple[str, bool]:
    """(the plan as text, in GiB; whether it fits in at least one way of running)."""
    p, batch, ways, gpu = setting.params, setting.batch, setting.ways, setting.gpu
    lines = [
        f"{setting.gpus} × {gpu / GIB:.1f} GiB; nothing is loaded", *told,
        f"each process: {p.prompts_per_device} prompts × {p.group_size} completions per forward pass, {batch.windows} "
        f"forward passes per step; prompts of {batch.prompt} tokens (assumed: {setting.text_tokens} of text, pictures "
        f"of {setting.side} pixels), completions of {batch.completion} tokens",
        "",
        _row("GiB on each GPU", ways),
        "held throughout",
    ]  # fmt: skip
    parts, peaks = ({way: kind(setting, way) for way in ways} for kind in (held, moments))
    lines += [*_rows(parts), "moments of a step (the largest counts)", *_rows(peaks)]
    totals = {way: total(setting, way) for way in ways}
    first = evaluating(setting)
    fitting = {way: fits(setting, way) for way in ways}
    taken = {way: loading(setting, way) for way in ways}
    lines += [
        _row(f"assumed {CONTEXT / GIB:.0f} GiB CUDA, {FALLOW:.0%} fragmentation", [
            f"{(totals[w] - sum(parts[w].values()) - max(peaks[w].values())) / GIB:.2f}" for w in ways]),
        _row("total", [f"{value / GIB:.2f}" for value in totals.values()]),
        *[_row("evaluation before and after", [f"{first / GIB:.2f}"] * len(ways))] * (first > 0),
        *[_row("while the teacher is sharded", [f"{v / GIB:.2f}" if v else "–" for v in taken.values()])]
        * any(taken.values()),
        _row("", [_verdict(fit) for fit in fitting.values()]),
        "", "total after a single change:",
    ]  # fmt: skip
    best = min(totals, key=lambda way: totals[way])
    saving = {name: other for name, other in changes(setting).items() if total(other, best) < totals[best]}
    for name, other in sorted(saving.items(), key=lambda item: total(item[1], best)):
        cells = [
            f"{total(other, way) / GIB:.2f} {'fits' if fits(other, way) else 'no'}" if way in other.ways else "–"
            for way in ways
        ]
        lines.append(_row(name, cells))
    return "\n".join(lines), any(fitting.values())


def _verdict(fit: bool) -> str:
    return "fits" if fit else "does not fit"


def _rows(items: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for column in items.values() for name in column))
    return [
        _row(f"  {n}", [f"{column[n] / GIB:.2f}" if n in column else "–" for column in items.values()]) for n in names
    ]


def _row(name: str, cells: list[str]) -> str:
    return (f"{name:<36}" + "".join(f"{cell:>14}" for cell in cells)).rstrip()


def gpu_bytes(text: str) -> float:
    """``80GB`` (10⁹ bytes), ``80GiB`` (2³⁰) or ``80`` (GB) as bytes.

    Raises:
        ParamError: ``text`` has another form.
    """
    for unit, size in (("GiB", GIB), ("GB", 10**9), ("", 10**9)):
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return float(number) * size
    raise ParamError(f"--gpu is {text!r}, expected the memory of one GPU, for example 80GB or 79.6GiB")
