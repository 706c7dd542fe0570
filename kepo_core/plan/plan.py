"""``kepo plan``: what a run would take on each GPU, before anything is loaded, and what to change if it does not fit.

Every item is a formula of `memory`; here they are added up for each way of running, for a GPU's memory is a sum of what
is always held and of the largest moment of a step. `tests/bench/planned.py` sets them against measured peaks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kepo_core.errors import ParamError
from kepo_core.experiment.methods import needs_teacher
from kepo_core.params import Params
from kepo_core.plan import memory
from kepo_core.plan.architecture import Architecture, architecture, load_config

GIB = 2**30
#: Assumed beside what is counted: CUDA's context and libraries, and blocks of the allocator that lie fallow.
CONTEXT, FALLOW = 1.0 * GIB, 0.06
#: Tokens of a prompt's text, with the embedded models' tokenizer (fixed sentences are single tokens) or with another.
TEXT_TOKENS = {True: 72, False: 288}
#: Parameters that ZeRO-3 keeps gathered at a time (its stage3_max_live_parameters).
ZERO3_LIVE = 1_000_000_000
#: Ways of running → where weights, gradients and optimizer are.
WAYS = {"one process": "", "replicated": "DDP", "FSDP2": "sharded", "ZeRO-3": "sharded"}
#: The items of a step, of which the largest counts.
MOMENTS = ("rollouts", "hints", "teacher's forward pass", "reference's forward pass", "update", "evaluation")


@dataclass(frozen=True)
class Setting:
    """What is planned: parameters, both models (None: no teacher here), tokens of a prompt's text, bytes of a GPU."""

    params: Params
    student: Architecture
    teacher: Architecture | None
    text_tokens: int = 288
    gpu: float = 80e9

    @property
    def gpus(self) -> int:
        """A process has one to itself."""
        return self.params.processes

    @property
    def ways(self) -> list[str]:
        """The ways of running that so many GPUs allow; DeepSpeed takes no quantised models."""
        if self.gpus == 1:
            return ["one process"]
        quantised = self.teacher and self.params.teacher_quantization != "none"
        return ["replicated", "FSDP2"] if quantised else ["replicated", "FSDP2", "ZeRO-3"]

    @property
    def side(self) -> int:
        """Pixels of a picture's side; PhantomVQA's 64 and, of others that are not resized, 384 are assumed."""
        return self.params.image_size or (64 if self.params.data_root == "phantom" else 384)

    @property
    def batch(self) -> memory.Batch:
        """The tensors of one process."""
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
    """The setting of ``params`` and where both models' shapes came from, a line each; configurations alone are read.

    There is a GPU of ``gpu`` bytes for each of ``params.processes``. ``prompt_tokens`` are those of a prompt's text,
    without its picture; None: `TEXT_TOKENS`.

    Raises:
        ParamError: a configuration cannot be had, or the method is no training by KEPO.
    """
    if params.method != "kepo":
        raise ParamError(f"method is {params.method}, expected kepo (or GRPO, its parts off): others are not planned")
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
    """Bytes that are held all the time, by item; shards are 1/N of the whole.

    Optimizer: 8 bytes (AdamW's two moments) a trained weight. ZeRO-3 keeps a bf16 copy beside its float32 masters. A
    reference (β > 0) is a second student in float32; LoRA needs none. A quantised teacher is never sharded. A colocated
    vLLM takes its share of the GPU, and draws the rollouts in it.
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
    """Bytes of a sharded model's weights that are whole for a moment.

    FSDP2: two layers, and what is in no layer (embedding, head, tower). ZeRO-3: at most a billion weights.
    """
    if way == "FSDP2":
        return compute * (model.parameters - (model.layers - 2) * model.layer)
    return compute * min(model.parameters, ZERO3_LIVE) if way == "ZeRO-3" else 0.0


def moments(setting: Setting, way: str) -> dict[str, float]:
    """Bytes of each moment of a step that is large, by `MOMENTS`; all rows are taken to pass the gate."""
    p, a, t, batch = setting.params, setting.student, setting.teacher, setting.batch
    sharded = WAYS[way] == "sharded"
    # FSDP2 shares out gradients with the last window of a step alone: until then each GPU has all of its own.
    shared_out = sharded and not (way == "FSDP2" and batch.windows > 1)
    gradients = 4.0 * memory.trained(a, batch) / (setting.gpus if shared_out else 1)
    copy = gathered(setting, way, a, batch.compute) if sharded else memory.compute_copy(a, batch)
    whole = batch.compute * a.parameters if way == "ZeRO-3" else copy  # which gathers all of it to generate
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
        if p.distill:
            found["teacher's forward pass"] = memory.teacher_forward(t, batch) + teacher_copy
    if p.of_trl("beta") and not p.lora_rank:
        working = memory.forward_only(a, batch.rows * batch.length, batch.rows * batch.patches, batch.compute, 4)
        # TRL shares a reference out in one piece under FSDP2: all of it is gathered.
        found["reference's forward pass"] = working + (batch.compute * a.parameters if way == "FSDP2" else copy)
    by_vllm = ("rollouts", "evaluation") if p.of_trl("use_vllm") else ()
    return {name: found[name] for name in MOMENTS if name in found and name not in by_vllm}


def total(setting: Setting, way: str) -> float:
    """Bytes on each GPU: all that is held, the largest moment, and overhead (`CONTEXT`, and `FALLOW` of the rest)."""
    counted = sum(held(setting, way).values()) + max(moments(setting, way).values())
    return counted * (1 + FALLOW) + CONTEXT


def evaluating(setting: Setting) -> float:
    """Bytes on a GPU while a process of `launch.evaluate` evaluates there, before and after training; else 0.

    It has the whole student in float32, whatever the precision of training, or vLLM's share.
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
    """Bytes on each GPU while ZeRO-3 cuts its part out of the teacher: DeepSpeed puts all of it there first; else 0."""
    if way != "ZeRO-3" or not setting.teacher:
        return 0.0
    return memory.teacher_weights(setting.teacher, setting.batch.compute, "none") * (1 + FALLOW) + CONTEXT


def fits(setting: Setting, way: str) -> bool:
    """Whether a GPU holds the run at its largest, what evaluates before and after, and what loading takes."""
    return max(total(setting, way), evaluating(setting), loading(setting, way)) <= setting.gpu


def changes(setting: Setting) -> dict[str, Setting]:
    """Single changes that may save memory, by what to do; smaller batches need not, as gradients then wait."""
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
        made["a teacher that is served elsewhere"] = _with(setting, teacher=None)
    return made


def _with(setting: Setting, **changed: object) -> Setting:
    values: dict[str, object] = {name: getattr(setting, name) for name in Setting.__dataclass_fields__}
    return Setting(**(values | changed))  # type: ignore[arg-type]


def as_text(setting: Setting, told: list[str]) -> tuple[str, bool]:
    """(the plan in words and GiB, whether it fits in one of the ways)."""
    p, batch, ways, gpu = setting.params, setting.batch, setting.ways, setting.gpu
    lines = [
        f"{setting.gpus} × {gpu / GIB:.1f} GiB; nothing is loaded", *told,
        f"each process: {p.prompts_per_device} prompts × {p.group_size} completions in a forward pass, {batch.windows} "
        f"forward passes a step; prompts of {batch.prompt} tokens (assumed: {setting.text_tokens} of text, pictures of "
        f"{setting.side} pixels), completions of {batch.completion}",
        "",
        _row("GiB on each GPU", ways),
        "held all the time",
    ]  # fmt: skip
    parts, peaks = ({way: kind(setting, way) for way in ways} for kind in (held, moments))
    lines += [*_rows(parts), "the largest of these moments of a step", *_rows(peaks)]
    totals = {way: total(setting, way) for way in ways}
    first = evaluating(setting)
    fitting = {way: fits(setting, way) for way in ways}
    taken = {way: loading(setting, way) for way in ways}
    lines += [
        _row(f"assumed: {CONTEXT / GIB:.0f} GiB of CUDA, {FALLOW:.0%} fallow", [
            f"{(totals[w] - sum(parts[w].values()) - max(peaks[w].values())) / GIB:.2f}" for w in ways]),
        _row("total", [f"{value / GIB:.2f}" for value in totals.values()]),
        *[_row("evaluation before and after", [f"{first / GIB:.2f}"] * len(ways))] * (first > 0),
        *[_row("while its part is cut out of the teacher", [f"{v / GIB:.2f}" if v else "–" for v in taken.values()])]
        * any(taken.values()),
        _row("", [_verdict(fit) for fit in fitting.values()]),
        "", "with one thing changed, the total:",
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
        ParamError: it is none of them.
    """
    for unit, size in (("GiB", GIB), ("GB", 10**9), ("", 10**9)):
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return float(number) * size
    raise ParamError(f"--gpu is {text!r}, expected the memory of one GPU, such as 80GB or 79.6GiB")
