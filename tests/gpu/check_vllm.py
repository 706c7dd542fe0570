"""Does the real vLLM do what the fake one in the tests does? On a machine with a GPU and vLLM installed:

    python tests/gpu/check_vllm.py [--student NAME --teacher NAME] [--steps 5]
    python tests/gpu/check_vllm.py --server http://localhost:8000      # beside `vllm serve`, on another GPU

Runs a few steps of KEPO on PhantomVQA with rollouts by vLLM and prints a line per check, PASS or FAIL; exit code 1 if
one fails, 2 if it cannot run here. The server is started as TRL wants it (params/README.md has the command).
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pandas as pd

from kepo_core.errors import ParamError
from kepo_core.experiment import experiment
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import Params
from kepo_core.quiet import quiet_third_parties
from kepo_core.runs.run import Run


def parameters(arguments: argparse.Namespace, folder: str) -> Params:
    """A few steps of many small groups, so that some of them fail and explore."""
    server = {"vllm_mode": "server", "vllm_server_base_url": arguments.server} if arguments.server else {}
    return Params.load(
        "params/phantom.yaml",
        {
            "student": arguments.student,
            "teacher": arguments.teacher,
            "max_steps": arguments.steps,
            "max_completion_length": arguments.tokens,
            "precision": arguments.precision,
            "use_vllm": True,
            "vllm_gpu_memory_utilization": arguments.memory,
            "vllm_max_model_length": arguments.length,
            "train_items": 64,
            "eval_items": 2,
            "save_steps": 0,
            "run_dir": f"{folder}/run",
            **server,
        },
    )


def checks(params: Params, rows: pd.DataFrame, steps: list[dict[str, Any]], tolerance: float) -> Iterator[tuple]:
    """(what, whether it holds, the numbers)."""
    own = rows[~rows["injected"]]
    expected = params.trl["max_steps"] * params.prompts_per_step * params.group_size
    yield "every rollout has arrived", len(own) == expected, f"{len(own)} of {expected}"
    lengths = own["tokens"].between(1, params.trl["max_completion_length"])
    yield "none is empty or too long", bool(lengths.all()), f"{own['tokens'].min()} to {own['tokens'].max()} tokens"
    copies = own.groupby(["step", "group"])["completion"].nunique().mean()
    yield "the draws of a group differ", copies > 1, f"{copies:.1f} of {params.group_size} distinct on average"
    off = [row.get("sampling/sampling_logp_difference/mean", math.nan) for row in steps]
    worst = max(off) if off and not any(map(math.isnan, off)) else math.nan
    yield "vLLM's log-probabilities are the trainer's", worst < tolerance, f"mean |Δ| at most {worst:.4f} in a step"
    later = off[-1] if off else math.nan
    yield "… and still after the weights moved", later < tolerance, f"{later:.4f} in the last step"
    finite = all(math.isfinite(row["loss"]) for row in steps)
    yield "the loss is finite", finite and len(steps) == params.trl["max_steps"], f"{len(steps)} steps"
    explored = rows[rows["exploration"] != ""]
    yield "groups that failed were asked again with a hint", len(explored) > 0, f"{len(explored)} rows of such groups"
    hints = explored["hint"].str.len().gt(0).sum()
    yield "hints were used", hints > 0, f"{hints} rows with a hint"
    injected = rows[rows["injected"]]
    yield "accepted draws were injected", len(injected) > 0, f"{len(injected)} injected"
    right = bool((injected["accuracy"] > 0).all()) and len(injected) > 0
    yield "… and are right", right, f"{injected['accuracy'].sum():.0f} of {len(injected)}"


def main() -> int:
    """Run and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="embedded:student")
    parser.add_argument("--teacher", default="embedded:teacher")
    parser.add_argument("--server", default="", help="a vLLM server's address; without it vLLM is colocated")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="longest completion")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the longest prompt and completion")
    parser.add_argument("--memory", type=float, default=0.3, help="share of the GPU for a colocated vLLM")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--tolerance", type=float, default=0.05, help="mean |Δ log-probability| that passes")
    arguments = parser.parse_args()
    quiet_third_parties()
    with tempfile.TemporaryDirectory() as folder:
        try:
            params = parameters(arguments, folder)
            models, data = experiment.load_to_run(params), experiment.load_data(params)
        except ParamError as error:
            print(f"cannot run here: {error}", file=sys.stderr)
            return 2
        run = Run.allocate(params)
        trainer = experiment.make_trainer(params, run, data, models)
        assert trainer is not None
        experiment.fit(trainer, run)
        rows = collect_rollouts(run.training_dir)
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [row for row in map(json.loads, lines) if "loss" in row]
        failed = 0
        for what, holds, numbers in checks(params, rows, steps, arguments.tolerance):
            failed += not holds
            print(f"{'PASS' if holds else 'FAIL'}  {what}: {numbers}", flush=True)
    print(f"{'PASS' if not failed else 'FAIL'}  {params.of_trl('vllm_mode')} mode, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
