"""Notebook 03 with rollouts and answers by a real vLLM, and its model served as it is."""

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from requests import post
from trl.generation.vllm_client import to_openai_messages

from kepo_core.cli import main
from kepo_core.data.images import load_image
from kepo_core.experiment import experiment
from kepo_core.runs.run import Run
from kepo_core.task.prompts import vqa_messages

#: Enough questions that a difference between the two back ends shows.
QUESTIONS = 25  # a category


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps that is asked before, on the way and after, by vLLM alone."""
    file = tmp_path_factory.mktemp("vllm") / "params.yaml"
    file.write_text(
        f"use_vllm: true\nvllm_max_model_length: 512\nresults_dir: {file.parent / 'results'}\n"
        f"train_items: 16\neval_items: {QUESTIONS}\nmax_steps: 3\nprompts_per_step: 4\nprompts_per_device: 4\n"
        "group_size: 4\nsave_steps: 0\ncurve_steps: 2\ncurve_items: 3\neval_batch_size: 64\n"
    )
    assert main(["run", "-f", str(file)]) == 0
    (folder,) = (file.parent / "results").glob("*/")
    return Run.open(folder)


@pytest.mark.parametrize("student", ["untrained", "trained"])
def test_both_back_ends_answer_alike_but_for_ties(run: Run, student: str) -> None:
    """Greedy answers part where two tokens are as likely as floating point can tell; those are counted."""
    table = pd.read_parquet(run.path / "predictions.parquet")
    asked = table[table.iloc[:, 0] == (student if student == "untrained" else run.params.method_name)]
    source = run.params.student if student == "untrained" else str(run.path / "model")
    params = run.params.replace(student=source, use_vllm=False)
    data, models = experiment.load_data(params), experiment.load_models(params, with_teacher=False)
    theirs = experiment.evaluate_student(params, models, data.test)
    assert list(asked["question_id"]) == [answer.question_id for answer in theirs] and len(theirs) == 8 * QUESTIONS
    apart = sum(text != answer.completion for text, answer in zip(asked["completion"], theirs, strict=True))
    right = asked["correct"].sum(), sum(answer.correct for answer in theirs)
    print(f"\n{student}: {apart} of {len(theirs)} answers differ; {right[0]} and {right[1]} right")
    assert apart <= len(theirs) // 50


def test_it_is_asked_on_the_way(run: Run) -> None:
    curve = pd.read_parquet(run.path / "curve.parquet")
    assert len(curve) == 3 * 8 * 3 and curve["completion"].str.len().gt(0).all()
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert max(row["kepo/vllm_difference"] for row in steps if "loss" in row) < 0.005


def test_its_model_is_served_as_it_is(run: Run, serve: Callable[..., Any]) -> None:
    """`vllm serve results/RUN/model` answers a question of the run as the run's own evaluation did."""
    serve(str(run.path / "model"), 8131, "trained")
    question = experiment.load_data(run.params).test[0]
    messages = vqa_messages(question.question, question.options, thinking=True)
    messages[0]["content"][0] = {"type": "image", "image": load_image(question.image)}
    body = {"model": "trained", "messages": to_openai_messages(messages), "temperature": 0, "max_tokens": 48}
    said = post("http://127.0.0.1:8131/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
    table = pd.read_parquet(run.path / "predictions.parquet")
    kept = table[(table["question_id"] == question.id) & (table.iloc[:, 0] == run.params.method_name)]
    text = f"{said.get('reasoning') or said.get('reasoning_content') or ''}{said['content']}"
    assert kept["completion"].iloc[0].replace("\n", "") in text.replace("\n", "")
