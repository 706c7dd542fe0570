"""One step of KEPO on riddles, a custom task, on several processes, for two_processes_ordinary.py."""

import asyncio
from pathlib import Path
from typing import Any

import torch
from text_harness import WORDS, ScriptedText, brief, correct, make_trainer


def script(riddle: int, before: int, hinted: bool) -> str:
    """Riddle 0 is never solved, riddle 1 (whose group straddles two processes) only with a hint, riddle 2 always."""
    if riddle == 2 or (riddle == 1 and hinted):
        return f"a {WORDS[riddle]}"
    return "no idea"


async def correct_later(completions: list[Any], solution: list[str], **_: Any) -> list[float | None]:
    await asyncio.sleep(0.01)
    return correct(completions, solution)


def main(output_dir: Path, world_size: int) -> None:
    ScriptedText.script = staticmethod(script)
    trainer = make_trainer(
        output_dir, rewards=[brief, correct_later], per_device_train_batch_size=12 // world_size, optim="sgd",
        gate_reward="correct_later", exploration_reward="correct_later", max_grad_norm=1e9,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world_size
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    if trainer.accelerator.is_main_process:
        log = {k: v for k, v in trainer.state.log_history[0].items() if k.startswith(("kepo/", "reward"))}
        torch.save({"log": log, "weights": weights}, output_dir / "result.pt")
    trainer.accelerator.wait_for_everyone()
