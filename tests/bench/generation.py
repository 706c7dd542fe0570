"""What a step's rollouts cost: ours, which read a prompt once, beside GRPOTrainer's, which reads it G times.

``python tests/bench/generation.py`` (a part of ``make bench``) prints a table of seconds and their ratio, medians over
interleaved repetitions in one process, by the length of the prompt and the size of the groups.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from bench import CUDA, timed
from sizes import SIZES, Size, build, dataset_of, processor_of
from trl import GRPOTrainer

from kepo_core.method.task import with_images
from kepo_core.method.trainer import KEPOConfig, KEPOTrainer
from kepo_core.quiet import quiet_third_parties
from kepo_core.task.multiple_choice import MultipleChoice

#: (side of the square picture, new tokens, prompts), the prompt's length growing with its picture.
PROMPTS = ((64, 24, 8), (128, 24, 8), (224, 32, 4))
GROUPS = (2, 4, 8)


def sampler(size: Size, folder: Path) -> tuple[KEPOTrainer, list[Any]]:
    """A trainer of random weights that always draws ``size.tokens`` tokens, and its batch as it is tokenised."""
    processor, data = processor_of(size), dataset_of(size)
    task = MultipleChoice("answer")
    args = KEPOConfig(
        str(folder), num_generations=size.group, per_device_train_batch_size=size.prompts * size.group,
        max_completion_length=size.tokens, generation_kwargs={"min_new_tokens": size.tokens}, distill=False,
        explore=False, use_cpu=not CUDA, bf16=CUDA, report_to="none",
    )  # fmt: skip
    trainer = KEPOTrainer(build(size.student, size, 0), task.reward_funcs, args, data, processing_class=processor)
    rows = [data[i] for i in range(size.prompts) for _ in range(size.group)]
    return trainer, list(trainer._tokenize_prompts([with_images(row["prompt"], row) for row in rows]))


def compare(size: Size, repetitions: int) -> dict[str, Any]:
    """One row of the table; ``AssertionError`` where the two draw other tokens."""
    with TemporaryDirectory() as folder:
        trainer, batch = sampler(size, Path(folder))
        seconds: dict[str, list[float]] = {"GRPOTrainer's": [], "ours": []}
        draws = {"GRPOTrainer's": lambda: GRPOTrainer._generate_single_turn(trainer, *batch, size.group),
                 "ours": lambda: trainer._generate_single_turn(*batch, size.group)}  # fmt: skip
        said = []
        for draw in draws.values():  # which also warms up
            torch.manual_seed(0)
            said.append(draw()[0])
        assert said[0] == said[1], "the same random state drew other tokens"
        for _ in range(repetitions):
            for name, draw in draws.items():
                seconds[name].append(timed(draw))
    ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    return {"prompt": len(batch[0][0]), "new": size.tokens, "rows": f"{size.prompts} × {size.group}", **medians,
            "ratio": round(middle, 2), "quartiles": f"{low:.2f} to {high:.2f}"}  # fmt: skip


def main(repetitions: int = 9) -> None:
    """Print the table."""
    quiet_third_parties()
    rows = [
        compare(replace(SIZES["small"], side=side, tokens=tokens, prompts=prompts, group=group), repetitions)
        for side, tokens, prompts in PROMPTS
        for group in GROUPS
    ]
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"\nrollouts on {device}, seconds\n{pd.DataFrame(rows).to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
