"""What `kepo plan` says against what is measured: ``python tests/bench/planned.py`` prints a row per item and case.

``python tests/bench/planned.py true`` does so at the paper's own shapes, as far as 24 GiB reach; others name cases.

Tiny models of several shapes are trained for a step by KEPOTrainer in this process, and every tensor that comes and
goes is counted, with every row reading its own prompt, as is planned. Two things differ from a GPU: here the kernels
score every position and not only completions, and they work on their tiles in several tensors; both are counted with
the plan's numbers, as `on_this_machine` says.
"""

import dataclasses
import gc
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from bench import CUDA, LiveBytes, Replay, peak_mib
from sizes import MIDDLE, SIZES, Shape, Size, build, config_of, dataset_of, processor_of

from kepo_core.experiment.adapters import lora_config
from kepo_core.method.shared_prompts import SharedPrompts
from kepo_core.method.task import with_images
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOConfig
from kepo_core.params import Params
from kepo_core.plan import memory
from kepo_core.plan.architecture import Architecture, architecture
from kepo_core.quiet import quiet_third_parties
from kepo_core.task.multiple_choice import MultipleChoice

BASE = dataclasses.replace(SIZES["small"], prompts=2, group=4, tokens=48, vocabulary=2048)
WIDE = Shape((96, 3, 8, 2, 16, 512), (48, 2, 4, 160))
DEEP = Shape((64, 10, 4, 2, 16, 160), (32, 6, 2, 96), (0, 2))
CASES: dict[str, tuple[Size, dict[str, Any]]] = {
    "small": (BASE, {}),
    "wide": (dataclasses.replace(BASE, student=WIDE, tokens=96), {}),
    "deep, large pictures": (dataclasses.replace(BASE, student=DEEP, side=128), {}),
    "many rows": (dataclasses.replace(BASE, student=MIDDLE, prompts=4, group=8), {}),
    "checkpointing": (dataclasses.replace(BASE, student=DEEP, tokens=96, side=128), {"checkpointing": True}),
    "LoRA": (BASE, {"lora_rank": 4}),
    "LoRA, checkpointing": (dataclasses.replace(BASE, student=DEEP), {"lora_rank": 4, "checkpointing": True}),
    "bf16": (dataclasses.replace(BASE, tokens=96), {"bf16": True}),
}


def layers(shape: Shape, number: int) -> Shape:
    """``shape`` with so many decoder layers and, to take as little, so many of the vision tower's."""
    hidden, _, *text = shape.text
    vision_hidden, _, *vision = shape.vision
    return dataclasses.replace(
        shape, text=(hidden, number, *text), vision=(vision_hidden, number, *vision), deepstack=(0,)
    )


TWO_B = SIZES["paper"].student
TRUE = dataclasses.replace(SIZES["paper"], prompts=1, group=2, tokens=64, teacher=layers(TWO_B, 2))
#: The paper's widths, vocabulary and pictures; whole models where they fit into 24 GiB, else fewer layers.
TRUE_CASES: dict[str, tuple[Size, dict[str, Any]]] = {
    "2B, LoRA": (TRUE, {"lora_rank": 16}),
    "2B, LoRA, checkpointing": (TRUE, {"lora_rank": 16, "checkpointing": True}),
    "2B of 4 layers": (dataclasses.replace(TRUE, student=layers(TWO_B, 4)), {}),
}  # fmt: skip


class Measured:
    """One case: a trainer, and a batch whose rollouts are all as long as allowed and all pass the gate."""

    def __init__(
        self,
        size: Size,
        folder: Path,
        checkpointing: bool = False,
        lora_rank: int = 0,
        bf16: bool = False,
        shared: bool = False,
    ) -> None:
        self.size, self.rows = size, size.prompts * size.group
        half = torch.bfloat16 if bf16 else torch.float32
        processor = processor_of(size)
        student = build(size.student, size, 0, half if lora_rank else torch.float32)
        self.teacher = build(size.teacher, size, 1, half)
        args = KEPOConfig(
            str(folder), num_generations=size.group, per_device_train_batch_size=self.rows, bf16=bf16, tau=0.0,
            max_completion_length=size.tokens, explore=False, log_rollouts=False, use_cpu=not CUDA, report_to="none",
            gradient_checkpointing=checkpointing, learning_rate=1e-3,
        )  # fmt: skip
        data = dataset_of(size, uneven=True)
        lora = lora_config(student, Params(lora_rank=lora_rank))
        task = MultipleChoice()
        self.trainer = Replay(
            student, task.reward_funcs, args, data, teacher=Teacher(self.teacher, processor), task=task,
            processing_class=processor, peft_config=lora,
        )  # fmt: skip
        self.own = self.trainer.model
        self.model = self.trainer.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.model.train()
        if checkpointing:  # which `train` does
            self.own.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.data = [data[i] for i in range(size.prompts) for _ in range(size.group)]
        g = torch.Generator().manual_seed(0)
        words = torch.randint(300, 500, (self.rows, size.tokens), generator=g).tolist()
        self.trainer.said = [[*row[:-1], processor.tokenizer.eos_token_id] for row in words]
        self.trainer._step, self.trainer._buffered_inputs = 0, None
        self.batch = self.trainer._prepare_inputs(self.data)
        if not shared:  # as is planned
            del self.batch["kepo_prompt"]
            self.trainer._sharing = SharedPrompts()
            self.trainer._sharing.refused = "measured without"
        side = size.side // size.patch
        self.planned = memory.Batch(
            rows=self.rows, windows=1, prompt=self.batch["prompt_ids"].shape[1], completion=size.tokens,
            patches=side * side, compute=2 if bf16 else 4, lora_rank=lora_rank, checkpointing=checkpointing,
        )  # fmt: skip

    def loss(self) -> torch.Tensor:
        """The forward pass."""
        loss: torch.Tensor = self.trainer._compute_loss(self.model, self.batch)
        return loss

    def update(self) -> None:
        """Forward and backward pass."""
        self.trainer.accelerator.backward(self.loss())

    def generate(self) -> None:
        """As many tokens as are planned with, whatever is said."""
        said, self.trainer.said = self.trainer.said, None
        self.trainer.generation_config.min_new_tokens = self.size.tokens
        asked = [with_images(row["prompt"], row) for row in self.data]
        prompt_ids, images, fields = self.trainer._tokenize_prompts(asked)
        self.trainer._generate_single_turn(prompt_ids, images, fields, 1)
        self.trainer.said = said

    def read(self) -> None:
        """The teacher's forward pass over all rows."""
        self.trainer.teacher.hidden_states(self.batch, list(range(self.rows)))


def size_of(tensors: Any) -> int:
    """Bytes of several tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def on_this_machine(a: Architecture, teacher: Architecture, batch: memory.Batch) -> tuple[float, float]:
    """(kept, passing) of the scores without a GPU: every position is scored, and a tile is worked on in six tensors."""
    everywhere = batch.rows * (batch.length - 1)
    kept, passing = memory.scores(a, batch, teacher.hidden, everywhere)
    tile = min(everywhere, memory.TILE_TOKENS) * min(a.vocabulary, memory.TILE_WORDS)
    return kept, passing + 6 * 4 * tile


def compare(name: str) -> pd.DataFrame:
    """Planned and measured MiB of one case, item by item."""
    size, options = (CASES | TRUE_CASES)[name]
    with TemporaryDirectory() as folder:
        case = Measured(size, Path(folder), **options)
        a, t, b = architecture(config_of(size.student, size)), architecture(config_of(size.teacher, size)), case.planned
        old = [*case.own.parameters(), *case.teacher.parameters()]
        with LiveBytes(old) as live:
            loss = case.loss()
            kept = live.now
        del loss
        peak = peak_mib(case.update, old) * 2**20
        gradients = size_of(p.grad for p in case.model.parameters() if p.grad is not None)
        case.trainer.optimizer.step()
        states = size_of(s for e in case.trainer.optimizer.state.values() for n, s in e.items() if n != "step")
        weights = size_of(case.model.parameters())
        teacher = size_of(case.teacher.parameters())
        generation, reading = (peak_mib(w, old) * 2**20 for w in (case.generate, case.read))
    trained = memory.trained(a, b)
    cpu_kept, cpu_passing = on_this_machine(a, t, b)
    copy = memory.compute_copy(a, b)
    everything = sum(memory.activations(a, b)) + cpu_kept
    at_end = memory.update(a, b, t.hidden, 4 * trained, copy)
    rows = {
        "student's weights": (memory.student_weights(a, b), weights),
        "gradients": (4 * trained, gradients),
        "optimizer": (8 * trained, states),
        "teacher's weights": (memory.teacher_weights(t, b.compute), teacher),
        "kept by the forward pass": (everything + (0 if b.checkpointing else copy), kept),
        "update, at its largest": (max(everything + max(cpu_passing, memory.recomputed(a, b)) + copy, at_end), peak),
        "rollouts": (memory.rollouts(a, b, b.rows, b.completion) + copy, generation),
        "teacher's forward pass": (memory.teacher_forward(t, b), reading),
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["planned", "measured"]) / 2**20
    table["planned / measured"] = table["planned"] / table["measured"]
    return table.assign(case=name).set_index("case", append=True).swaplevel()


def main(names: list[str]) -> None:
    """Print a table for each of the cases called ``names``, or of all tiny ones."""
    quiet_third_parties()
    for name in TRUE_CASES if names == ["true"] else names or CASES:
        print(compare(name).round(3).to_string(), flush=True)
        gc.collect()  # trainers hold themselves


if __name__ == "__main__":
    main(sys.argv[1:])
