"""One optimiser step of a scripted KEPO run; started by test_processes.py with one or two processes.

Twelve rollouts: question 0 fails (the first process's group), question 1 fails and is spread over both processes,
question 2 does not (the second process has no failing group of its own).
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from kepo_harness import make_trainer, right, sharp_model, wrong
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from kepo_core.exit_codes import leave
from kepo_core.method.loss import _Forward
from kepo_core.params import project_root


def script(text: str, row: dict[str, Any], before: int, hinted: bool) -> str:
    if row["id"] == "q2":
        return right(row) if before % 2 else wrong(row)
    return right(row) if hinted and before >= int(row["id"][1]) else wrong(row)


def sharded(model: Any, folder: Path, world_size: int) -> Any:
    """``model`` reloaded, each process with its part of every parameter (FSDP2, by transformers itself)."""
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    parts = type(model).from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=world_size))
    assert all(isinstance(p, DTensor) for p in parts.parameters())
    return parts


def shared_out_by_accelerate(precision: str = "no") -> None:
    """Let accelerate shard models (FSDP2) as in params/accelerate/4gpu-fsdp2.yaml, without GPUs.

    Without a GPU it silently keeps whole models, although the sharding itself works with gloo. ``precision`` is passed
    to its plugin, as accelerate does with GPUs.
    """
    file = project_root() / "params/accelerate/4gpu-fsdp2.yaml"
    options = yaml.safe_load(file.read_text())["fsdp_config"]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ |= {name.upper(): str(value) for name, value in options.items()}
    make = AcceleratorState.__init__

    def told(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if plugin := kwargs.get("fsdp_plugin"):
            self.fsdp_plugin = plugin
            if precision != "no":
                plugin.set_mixed_precision(precision)

    AcceleratorState.__init__ = told
    AcceleratorState.is_fsdp2 = property(lambda self: True)
    Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def main(output_dir: Path, world_size: int, overrides: dict[str, Any]) -> None:
    way, precision = overrides.pop("shard", ""), overrides.pop("precision", "no")
    shard = bool(way)
    if way == "accelerate":
        shared_out_by_accelerate(precision)
    elif shard:
        torch.distributed.init_process_group("gloo")
    models = [sharp_model(0), sharp_model(1)]
    student, teacher = (sharded(m, output_dir / str(i), world_size) if way == "1" else m for i, m in enumerate(models))
    trainer = make_trainer(
        output_dir,
        script,
        student=student,
        teacher_model=teacher,
        hints=lambda row: f"hint for {row['id']}",
        per_device_train_batch_size=4 // world_size,
        gradient_accumulation_steps=3,
        optim="sgd",
        max_grad_norm=1e9,
        beta=0.0,
        bf16=precision == "bf16",
        **overrides,
    )
    assert trainer.accelerator.num_processes == world_size
    trainer.teacher.batch_size = 1
    gated: list[int] = []
    compute = trainer._compute_loss

    def remember(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        gated.append(int((inputs["kepo_gate"] > 0).any(1).sum()))
        return compute(model, inputs)

    trainer._compute_loss = remember
    call = _Forward.__call__

    def look(self: Any, **kwargs: Any) -> Any:
        output = call(self, **kwargs)
        given = output.log_probs, output.entropy, getattr(output, "divergence", None)
        assert {tensor.dtype for tensor in given if tensor is not None} == {torch.float32}  # whatever it computes in
        return output

    _Forward.__call__ = look  # type: ignore[method-assign]
    trainer.train()
    if world_size > 1:
        pairs = list(zip(*gather_object([gated]), strict=True))
        assert any(bool(a) != bool(b) for a, b in pairs)  # one process had gated rows, the other had none
        assert any(max(a, 1) != max(b, 1) for a, b in pairs)  # and one needed more forward passes than the other
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters()) == shard
    if way == "accelerate":  # layer by layer, both of them
        pieces = [sum(isinstance(m, FSDPModule) for m in model.modules()) for model in (student, teacher)]
        assert min(pieces) > 4, pieces
    weights = torch.cat([whole(p).flatten() for p in trainer.model.parameters()])  # every process must gather
    if trainer.accelerator.is_main_process:
        log = {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("kepo/") or k == "grad_norm"}
        torch.save({"log": log, "weights": weights}, output_dir / "result.pt")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), int(sys.argv[2]), dict(a.split("=") for a in sys.argv[3:]))
    leave(0)
