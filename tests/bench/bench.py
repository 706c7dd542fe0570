"""What a step of KEPO costs, against GRPO's, GRPO plus DistillationTrainer's, and a plain reading of the paper.

``python tests/bench/bench.py [small middle large paper]`` (``make bench``) prints one table per size: medians over
interleaved repetitions in one process, with quartiles, and ratios as medians over the same repetitions. All variants
train one student (at learning rate 0, so that every repetition does the same work) on the same completions, half of
which pass the gate. Generation is measured only where exploration is.
"""

import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from sizes import SIZES, Size, build, dataset_of, processor_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import DistillationConfig, DistillationTrainer, GRPOTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from kepo_core.method import hinted, objective
from kepo_core.method.shared_scoring import select_rows
from kepo_core.method.task import with_images
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOConfig, KEPOTrainer
from kepo_core.quiet import quiet_third_parties
from kepo_core.task.multiple_choice import MultipleChoice

CUDA = torch.cuda.is_available()
Batch = dict[str, Any]


class Replay(KEPOTrainer):
    """KEPOTrainer that says given completions instead of generating."""

    said: list[list[int]] | None = None

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.said is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return [list(ids) for ids in self.said[: len(prompt_ids)]], None


class Bench:
    """One size: the models, a batch, and one method per thing that is measured."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, processor = size, processor_of(size)
        student = build(size.student, size, 0)
        teacher = build(size.teacher, size, 1, torch.bfloat16 if CUDA else torch.float32)
        rows = size.prompts * size.group
        shared: dict[str, Any] = {
            "per_device_train_batch_size": rows, "max_completion_length": size.tokens, "learning_rate": 0.0,
            "use_cpu": not CUDA, "bf16": CUDA, "report_to": "none",
        }  # fmt: skip
        data = dataset_of(size)
        self.distiller = DistillationTrainer(
            student, teacher, DistillationConfig(str(folder / "d"), beta=0.0, gradient_checkpointing=CUDA, **shared),
            data, processing_class=processor,
        )  # fmt: skip
        # None as TRL's default says: on; it is needed at the paper's size alone.
        shared["gradient_checkpointing"] = CUDA
        args = KEPOConfig(
            str(folder / "k"), num_generations=size.group, rejection_budget=5, hint_max_tokens=16,
            log_rollouts=False, **shared,
        )  # fmt: skip
        task = MultipleChoice("answer")
        self.trainer = Replay(
            student, task.reward_funcs, args, data, teacher=Teacher(teacher, processor), task=task,
            processing_class=processor,
        )  # fmt: skip
        self.student = self.trainer.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.student.train()
        self.teacher = teacher
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.rows = [data[i] for i in range(size.prompts) for _ in range(size.group)]
        self.said = self._completions(processor.tokenizer)

    def _completions(self, tokenizer: Any) -> list[list[int]]:
        """Right and wrong answers in turn, from half as long as allowed to as long."""
        g = torch.Generator().manual_seed(0)
        said = []
        for row in range(len(self.rows)):
            head = tokenizer("<think>")["input_ids"]
            tail = [*tokenizer(f"</think><answer>{'AB'[row % 2]}</answer>")["input_ids"], tokenizer.eos_token_id]
            length = self.size.tokens // 2 + int(torch.randint(self.size.tokens // 2, (1,), generator=g))
            words = torch.randint(300, 500, (max(length - len(head) - len(tail), 1),), generator=g).tolist()
            said.append([*head, *words, *tail])
        return said

    # Scoring and update, generation replayed

    def scored(self) -> Batch:
        """What is computed once a generation batch."""
        self.trainer.said, self.trainer.args.explore = self.said, False
        self.trainer._step, self.trainer._buffered_inputs = 0, None
        batch: Batch = self.trainer._prepare_inputs(self.rows)
        return batch

    def step(self, *losses: Callable[[], torch.Tensor]) -> float:
        """Backward through each loss in turn, then one optimiser step; the losses' sum."""
        total = 0.0
        for compute in losses:
            loss = compute()
            self.trainer.accelerator.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.trainer._metrics["train"].clear()
        return total

    def kepo(self) -> float:
        """Scoring and update as this package does it."""
        batch = self.scored()
        return self.step(lambda: self.trainer._compute_loss(self.student, batch))

    def grpo(self) -> None:
        """TRL's own: the same batch without a gate, through GRPOTrainer's loss."""
        self.trainer.args.distill = False
        batch = self.scored()
        self.trainer.args.distill = True
        self.step(lambda: GRPOTrainer._compute_loss(self.trainer, self.student, batch))

    def grpo_and_distillation(self) -> None:
        """GRPO's loss and, on the same completions, DistillationTrainer's."""
        batch = self.scored()
        self.step(
            lambda: GRPOTrainer._compute_loss(self.trainer, self.student, batch),
            lambda: self.distiller.compute_loss(self.student, batch),
        )

    def gated_teacher(self) -> None:
        """The teacher's forward on the gated rows alone, to its logits of their completions."""
        batch = self._batch
        hidden = self.trainer.teacher.hidden_states(batch, batch["kepo_gate"][:, 0].nonzero().flatten().tolist())
        with torch.no_grad():
            self.teacher.lm_head(hidden)

    def divergence(self) -> None:
        """Forward and backward of the divergence alone, at the gated tokens: what no part of GRPO's step has."""
        mask = self._batch["completion_mask"] * (self._batch["kepo_gate"] > 0)
        head, teacher_head = self.student.get_output_embeddings(), self.trainer.teacher.head
        count, device = int(mask.sum()), mask.device
        states = torch.randn(count, head.weight.shape[1], device=device, requires_grad=True)
        teacher_states = torch.randn(
            count, teacher_head.weight.shape[1], device=device, dtype=teacher_head.weight.dtype
        )
        per_token, _ = ChunkedDivergenceFunction.apply(
            states, head.weight, None, teacher_states, teacher_head.weight, None, 0.0, 1.0
        )
        per_token.sum().backward()
        self.trainer.optimizer.zero_grad()

    def plain(self) -> float:
        """The paper read plainly: two student forwards, the teacher on all rows, all logits."""
        batch = self.scored()
        mask, everything = batch["completion_mask"], list(range(len(self.rows)))

        def logits(model: Any) -> torch.Tensor:
            out = model(**select_rows(batch, everything), use_cache=False)
            kept: torch.Tensor = out.logits[:, -mask.shape[1] - 1 : -1].float()
            return kept

        def policy() -> torch.Tensor:
            logps = logits(self.student).log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
            ratio = objective.importance_ratio(logps, logps.detach(), mask)
            gain = batch["advantages"].unsqueeze(1)
            return -objective.sequence_mean(torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain), mask).mean()

        def distillation() -> torch.Tensor:
            with torch.no_grad():
                teacher = logits(self.teacher)
            divergence = objective.divergence(logits(self.student), teacher)
            return objective.distillation_term(divergence, mask, batch["kepo_gate"])

        return self.step(policy, distillation)

    # Exploration: half of the groups fail, and go on failing for all B rounds

    def _failing(self) -> tuple[list[Mapping[str, Any]], list[str]]:
        rows = self.rows[:: self.size.group][: max(self.size.prompts // 2, 1)]
        return rows, ["look"] * len(rows)

    def _draw(self, asked: list[Any]) -> None:
        prompt_ids, images, fields = self.trainer._tokenize_prompts(asked)
        self.trainer.said = None
        self.trainer._generate_single_turn(prompt_ids, images, fields, 1)

    def explore(self) -> None:
        """B rounds over all failing groups at once, hints included."""
        rows, _ = self._failing()
        hints = self.trainer.teacher.write_hints([hint_prompt(row) for row in rows], max_tokens=16, seed=0)
        asked = [
            hinted.hint_aware_prompt(self.trainer, row, hint or "look") for row, hint in zip(rows, hints, strict=True)
        ]
        for _ in range(5):
            self._draw(asked)

    def explore_one_by_one(self) -> None:
        """The same hints and draws, each on its own."""
        for row in self._failing()[0]:
            (hint,) = self.trainer.teacher.write_hints([hint_prompt(row)], max_tokens=16, seed=0)
            for _ in range(5):
                self._draw([hinted.hint_aware_prompt(self.trainer, row, hint or "look")])

    def plain_generations(self) -> None:
        """As many rounds of as many rows under the plain prompt."""
        asked = [with_images(row["prompt"], row) for row in self._failing()[0]]
        for _ in range(5):
            self._draw(asked)

    def draws(self) -> None:
        """The rounds of `explore` alone."""
        asked = [hinted.hint_aware_prompt(self.trainer, row, "look") for row in self._failing()[0]]
        for _ in range(5):
            self._draw(asked)

    # Phases of one KEPO step

    def scoring(self) -> None:
        """Rewards, advantages, gate: what comes before the loss."""
        self._batch = self.scored()

    def generation(self) -> None:
        """The rollouts of a whole step: prompts × G rows."""
        self._draw([with_images(row["prompt"], row) for row in self.rows])


def hint_prompt(row: Mapping[str, Any]) -> Any:
    """What the teacher is asked with, the picture included."""
    return with_images(MultipleChoice().ask(row), row)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that operations make while it is active, and their peak.

    Views count as what they show, but for that of ``old`` tensors.
    """

    def __init__(self, old: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in old}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_mib(work: Callable[[], object], old: Iterable[torch.Tensor] = ()) -> float:
    """The most memory that ``work`` held beyond what was there before, in MiB; see `LiveBytes` for ``old``."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with LiveBytes(old) as live:
        work()
    return live.peak / 2**20


MEASURED = (
    "kepo", "grpo", "gated_teacher", "divergence", "grpo_and_distillation", "plain", "scoring", "generation", "explore",
    "explore_one_by_one", "draws", "plain_generations",
)  # fmt: skip


def measure(size: Size, repetitions: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(medians and quartiles per variant, ratios with their goals) of one size."""
    with TemporaryDirectory() as folder:
        bench = Bench(size, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in MEASURED}
        bench.scoring()
        peaks = {name: peak_mib(getattr(bench, name)) for name in MEASURED}  # which also warms up
        for _ in range(repetitions):
            for name in MEASURED:
                seconds[name].append(timed(getattr(bench, name)))
    rows = []
    for name in MEASURED:
        low, middle, high = statistics.quantiles(seconds[name], n=4)
        rows.append({"measured": name, "median ms": 1e3 * middle, "quartiles": f"{1e3 * low:.0f} to {1e3 * high:.0f}",
                     "peak MiB": peaks[name]})  # fmt: skip
    table = pd.DataFrame(rows).set_index("measured")
    each, mib = pd.DataFrame(seconds), table["peak MiB"]

    def ratio(ours: str, *theirs: str) -> float:
        # Of one repetition, whose parts were measured side by side, so that a busy machine slows both.
        return float((each[ours] / each[list(theirs)].sum(axis=1)).median())

    ratios = {
        "scoring + update, of the plain reading's": (ratio("kepo", "plain"), 0.7),
        "scoring + update, of GRPO's + the gated teacher's": (ratio("kepo", "grpo", "gated_teacher"), 1.05),
        "scoring + update, of GRPO's + DistillationTrainer's": (ratio("kepo", "grpo_and_distillation"), 1.0),
        "exploration, of one-by-one": (ratio("explore", "explore_one_by_one"), 0.4),
        "its draws, of plain generations of as many rows": (ratio("draws", "plain_generations"), 1.3),
        "peak memory, of GRPO's + the gated teacher's": (mib["kepo"] / (mib["grpo"] + mib["gated_teacher"]), 1.1),
    }
    goals = pd.DataFrame([{"ratio": name, "value": value, "goal at most": goal, "met": "yes" if value <= goal else "no"}
                          for name, (value, goal) in ratios.items()]).set_index("ratio")  # fmt: skip
    return table.round(1), goals.round(2)


def main(names: list[str]) -> None:
    """Print the tables of the sizes called ``names``."""
    quiet_third_parties()
    for name in names or ["small", "middle", "large"]:
        table, goals = measure(SIZES[name], 9 if name == "small" else 5)
        device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
        print(f"\n{name} on {device}\n{table.to_string()}\n\n{goals.to_string()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
