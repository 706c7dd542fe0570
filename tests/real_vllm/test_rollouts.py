"""Rollouts by a real, colocated vLLM: right prompts, weights that arrive, exploration, LoRA, bf16."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
from prompts import PROMPTS, as_prompt, difference

from kepo_core.experiment import experiment
from kepo_core.experiment.evaluation import evaluate
from kepo_core.method import vllm_rollouts
from kepo_core.method.rollouts import collect_rollouts
from kepo_core.params import Params
from kepo_core.runs.run import Run


def train(params: Params) -> tuple[Any, pd.DataFrame, list[dict[str, Any]]]:
    """The trainer, its rollouts, and what it logged of each step."""
    models, data = experiment.load_models(params), experiment.load_data(params)
    run = Run.allocate(params)
    trainer = experiment.make_trainer(params, run, data, models)
    assert trainer is not None
    experiment.fit(trainer, run)
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return trainer, collect_rollouts(run.training_dir), [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def asking(small: Callable[..., Params]) -> Params:
    """What an evaluation is asked with; made before any trainer, whose accelerator new parameters would take away."""
    return small(eval_items=25, eval_batch_size=64)


@pytest.fixture(scope="module")
def trained(small: Callable[..., Params], asking: Params) -> Iterator[Any]:
    yield train(small(max_steps=10))
    gc.collect()


def test_over_ten_steps_vllm_draws_from_the_student_as_it_is(trained: Any) -> None:
    _, rows, steps = trained
    own = rows[~rows["injected"]]
    assert len(own) == 10 * 4 * 4 and own["tokens"].between(1, 48).all()
    assert own.groupby(["step", "group"])["completion"].nunique().mean() > 1
    off = [step["kepo/vllm_difference"] for step in steps]
    print(f"\nmean |Δ log p| over ten steps: at most {max(off):.5f}, {off[-1]:.5f} in the last")
    assert len(off) == 10 and max(off) < 0.005
    assert max(step["sampling/sampling_logp_difference/max"] for step in steps) < 0.1


def test_groups_that_fail_explore_by_vllm(trained: Any) -> None:
    _, rows, _ = trained
    explored, injected = rows[rows["exploration"] != ""], rows[rows["injected"]]
    assert explored["hint"].str.len().gt(0).any() and len(injected) > 0
    assert (injected["accuracy"] > 0).all() and injected["hint_log_ratio"].notna().all()


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_the_same_in_vllm(trained: Any, name: str) -> None:
    assert difference(trained[0], [as_prompt(PROMPTS[name])] * 2) < 0.005


def test_prompts_of_all_kinds_go_together(trained: Any) -> None:
    assert difference(trained[0], [as_prompt(parts) for parts in PROMPTS.values()]) < 0.005


def test_the_engine_of_the_rollouts_answers_too(trained: Any, asking: Params) -> None:
    """Greedy: as transformers but for ties. Sampled: each sample is another, and the engine is left as it was."""
    trainer, questions = trained[0], experiment.load_data(asking).test
    engine, processor = trainer.current_vllm(), trainer.processing_class
    own = dict(vars(engine._inner))
    said, seconds = {}, {}
    for name, model in {"vLLM": engine, "transformers": trainer.model}.items():
        start = time.monotonic()
        said[name] = experiment.evaluate_student(asking, experiment.Models(model, processor, None), questions)
        seconds[name] = time.monotonic() - start
    apart = sum(a.completion != b.completion for a, b in zip(*said.values(), strict=True))
    print(
        f"\n{len(questions)} questions: {apart} answers differ; "
        + ", ".join(f"{n} {s:.1f} s" for n, s in seconds.items())
    )
    assert apart <= len(questions) // 50 and vars(engine._inner) == own
    drawn = evaluate(
        engine, processor, questions[:20], thinking=True, max_tokens=48, batch_size=64, temperature=2.0, samples=4
    )
    assert len({answer.completion for answer in drawn}) > 10 and [a.sample for a in drawn[:4]] == [0, 1, 2, 3]


def test_trls_own_prompts_are_corrupted_and_found_out(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the one placeholder per picture: refused by name, and past that by the guard over log-probabilities."""
    trainer = trained[0]
    asked = [as_prompt([80, "What is it?"])] * 4  # a picture that it has not seen yet
    monkeypatch.setattr(vllm_rollouts, "one_placeholder_each", lambda ids, *_: ids)
    with pytest.raises(ValueError, match=r"row 0 differs from token \d+ on \(\d+ tokens in vLLM, \d+ in the trainer\)"):
        difference(trainer, asked)
    monkeypatch.setattr(vllm_rollouts, "check_used", lambda sent, used: None)
    trainer.model.train()
    rows = [trainer.train_dataset[i // 4] for i in range(16)]
    trainer._step = 0
    with pytest.raises(FloatingPointError, match=r"vLLM's log-probabilities differ .* by \d\.\d\d"):
        batch = trainer._prepare_inputs(rows)
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, batch)


def test_a_context_too_short_stops_with_one_sentence(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained[0]
    monkeypatch.setattr(trainer.vllm_generation, "_most", 60)
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens, which leaves no room for a completion of 48"):
        difference(trainer, [as_prompt([64, "What is it?"])])


def test_adapters_arrive_merged(small: Callable[..., Params]) -> None:
    _, rows, steps = train(small(max_steps=3, lora_rank=4))
    off = [step["kepo/vllm_difference"] for step in steps]
    print(f"\nLoRA, mean |Δ log p|: {', '.join(f'{each:.5f}' for each in off)}")
    assert len(off) == 3 and max(off) < 0.005 and len(rows[~rows["injected"]]) == 3 * 4 * 4


def test_a_bf16_run_stays_close(small: Callable[..., Params]) -> None:
    """The student under autocast and the engine in bfloat16, which gets new weights."""
    _, _, steps = train(small(max_steps=3, precision="bf16"))
    off = [step["kepo/vllm_difference"] for step in steps]
    print(f"\nboth in bfloat16, mean |Δ log p|: {', '.join(f'{each:.5f}' for each in off)}")
    assert len(off) == 3 and 0 < max(off) < vllm_rollouts.MOST_DIFFERENCE / 4
