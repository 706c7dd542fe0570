"""Prompts that are read once per group: the same tokens, states and gradients as if read once per completion."""

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from kepo_harness import picture
from test_architectures import CASES, REFUSED, make
from tiny_architectures import build
from torch import nn
from transformers import DynamicCache, GenerationConfig
from trl import GRPOTrainer

from kepo_core.method import shared_prompts, shared_scoring
from kepo_core.method.shared_prompts import SharedPrompts, first_rows
from kepo_core.method.task import with_images

#: Text alone, several pictures of different sizes, and rows with and without, as far as a family allows it.
SHARED = [(name, kind) for name, kind in CASES if kind in ("two", "mixed") and (name, kind) not in REFUSED]
SHARED += [("qwen3", "text"), ("qwen3-vl", "text")]


def test_rows_are_alike_by_their_tokens_and_the_pixels_of_their_pictures() -> None:
    red, again, blue = picture((255, 0, 0)), picture((255, 0, 0)), picture((0, 0, 255))
    ids = [[1, 2], [1, 2], [1, 2], [1, 2, 3], [1, 2], [1, 2]]
    assert first_rows(ids, None) == [0, 0, 0, 3, 0, 0]
    images = [[red], [again], [blue], [red], [red, red], None]
    assert first_rows(ids, images) == [0, 0, 2, 3, 4, 5]
    array: Any = [torch.zeros(2)]
    assert first_rows(ids[:2], [array, [torch.zeros(2)]]) == [0, 1]  # their contents are not compared


def draws(trainer: Any, groups: int = 4, size: int = 4) -> tuple[Any, list[Any]]:
    """One batch of rollouts: (by GRPOTrainer, by KEPOTrainer), from the same random state."""
    data = trainer.train_dataset
    asked = [with_images(data[i]["prompt"], data[i]) for i in range(groups) for _ in range(size)]
    batch = trainer._tokenize_prompts(asked)
    said = []
    for draw in (GRPOTrainer._generate_single_turn, type(trainer)._generate_single_turn):
        torch.manual_seed(3)
        said.append(draw(trainer, *batch, size)[0])
    return said


@pytest.mark.parametrize(("name", "kind"), SHARED)
def test_rollouts_are_those_of_grpo_trainer(tmp_path: Path, name: str, kind: str) -> None:
    """The prompts of a batch differ in length."""
    trainer = make(tmp_path, name, kind, max_completion_length=12)
    trainer.model.train()
    theirs, ours = draws(trainer)
    assert ours == theirs and len({tuple(ids) for ids in ours}) > 8
    assert trainer._sharing is not None and trainer._sharing.refused == ""
    assert "generate" not in vars(trainer.model)


def test_a_prompt_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, "qwen3-vl", "one")
    rows: list[tuple[int, int]] = []
    draws(trainer)  # the comparison is done
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    theirs, ours = draws(trainer)
    prompt = rows[0][1]
    assert rows[0] == (16, prompt) and theirs == ours
    begin = rows.index((4, prompt - 1))
    assert all(shape == (16, 1) for shape in rows[begin + 1 :]) and len(rows) - begin - 1 <= 5


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cache_implementation": "static"}, "cache_implementation is static"),
        ({"generation_kwargs": {"use_cache": False}}, "use_cache is False"),
    ],
)
def test_generation_that_cannot_share_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], why: str
) -> None:
    trainer = make(tmp_path, "qwen3", "text", **changed)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            theirs, ours = draws(trainer)
            assert ours == theirs
    assert [r.message for r in caplog.records if "read once" in r.message] == [
        f"each prompt is read once per completion instead of once per group (slower): {why}"
    ]


def test_dropout_would_be_one_for_all_of_a_group(tmp_path: Path) -> None:
    trainer = make(tmp_path, "qwen3", "text")
    trainer.model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    trainer.model.train()
    assert len(draws(trainer)[1]) == 16 and "dropout is on" in trainer._sharing.refused
    trainer._sharing.refused = ""
    trainer.model.eval()
    theirs, ours = draws(trainer)
    assert ours == theirs and trainer._sharing.refused == ""


def forgetful(read: Any, value: float) -> Any:
    """A cache whose last layer has lost the first token, like a model that continues prompts wrongly."""

    def reads(*args: Any) -> DynamicCache:
        cache = read(*args)
        cache.layers[-1].values[:, :, 0] = value
        return cache

    return reads


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_model_that_continues_prompts_otherwise_draws_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    trainer = make(tmp_path, "qwen3", "text")
    monkeypatch.setattr(shared_prompts, "_read", forgetful(shared_prompts._read, value))
    theirs, ours = draws(trainer)
    assert ours == theirs
    assert "logits differ" in trainer._sharing.refused and "from the usual ones" in caplog.text


def test_a_model_that_cannot_continue_a_cache_draws_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, "qwen3", "text")

    def fails(*_: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr(shared_prompts, "_read", fails)
    theirs, ours = draws(trainer)
    assert ours == theirs and trainer._sharing.refused == "Qwen3ForCausalLM does not continue a cache (ValueError: no)"


def test_processes_agree_before_one_of_them_shares() -> None:
    """Sharded models: if another process cannot share, this one does not share either."""
    model, tokenizer = build("qwen3")
    asked = iter([True, True])  # some process has equal prompts; some process cannot share them
    sharing = SharedPrompts(lambda flag: next(asked) or flag)
    inputs = dict(tokenizer(["red", "red"], return_tensors="pt"))
    with sharing.of(model, [0, 0], lambda given, rows: {k: v[rows] for k, v in given.items()}):
        assert "generate" in vars(model)
        model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=2))
    assert sharing.refused == "another process cannot" and "generate" not in vars(model)


# Scoring --------------------------------------------------------------------------------------------------------------


def step(trainer: Any, monkeypatch: pytest.MonkeyPatch, shares: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, divergence and gradients of one batch of given completions, all past the gate."""
    monkeypatch.setattr(shared_scoring.SharedReading, "works", shared_scoring.SharedReading.works if shares else
                        lambda *_: False)  # fmt: skip
    data = trainer.train_dataset
    said = [[50 + (row * 7 + token) % 200 for token in range(2 + row % 4)] for row in range(8)]
    monkeypatch.setattr(type(trainer), "_generate_single_turn", lambda *_, **__: ([list(ids) for ids in said], None))
    trainer._step, trainer._buffered_inputs, trainer.current_gradient_accumulation_steps = 0, None, 1
    trainer.model.train()
    torch.manual_seed(0)
    batch = trainer._prepare_inputs([data[i] for i in range(2) for _ in range(4)])
    batch["kepo_gate"] = torch.ones_like(batch["kepo_gate"])
    batch["advantages"] = torch.linspace(-1, 1, 8)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss), trainer._metrics["train"]["kepo/divergence"][-1], gradients


@pytest.mark.parametrize(("name", "kind"), SHARED)
def test_loss_and_gradient_are_those_of_prompts_read_row_by_row(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, name, kind, explore=False, gradient_accumulation_steps=1, per_device_train_batch_size=8,
                   gradient_checkpointing=False)  # fmt: skip
    works = shared_scoring.SharedReading.works
    answered: list[bool] = []
    monkeypatch.setattr(
        shared_scoring.SharedReading, "works", lambda *args: answered.append(works(*args)) or answered[-1]
    )
    shared = step(trainer, monkeypatch, True)
    assert answered == [True] * 3, "teacher, for its targets and for the probe, and student read shared prompts"
    alone = step(trainer, monkeypatch, False)
    assert shared[0] == pytest.approx(alone[0], rel=1e-4, abs=1e-5)
    assert shared[1] == pytest.approx(alone[1], rel=1e-4)
    assert shared[2].keys() == alone[2].keys()
    norm = torch.cat([g.flatten() for g in alone[2].values()]).norm()
    for parameter, gradient in alone[2].items():
        assert (shared[2][parameter] - gradient).norm() <= 1e-4 * norm, parameter


@pytest.mark.parametrize(
    "changed",
    [{"gradient_checkpointing": True}, {"num_iterations": 2}, {"distill_coef": 0.0}],
    ids=lambda c: next(iter(c)),
)
def test_what_cannot_be_shared_is_scored_row_by_row(
    tmp_path: Path, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing keeps no cache, a ratio has both sides from one kind of forward, a coefficient of 0 is GRPO."""
    trainer = make(tmp_path, "qwen3", "text", **{"explore": False, "gradient_checkpointing": False} | changed)
    seen: list[Any] = []
    shared = type(trainer)._shared
    monkeypatch.setattr(type(trainer), "_shared", lambda self, inputs: seen.append(shared(self, inputs)) or seen[-1])
    trainer.train()
    assert len(seen) >= 2 and (set(map(type, seen)) == {type(None)})


def test_a_backbone_that_continues_prompts_otherwise_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, "qwen3", "text", explore=False, gradient_checkpointing=False)
    spread = shared_scoring.spread

    def wrongly(backbone: Any, cache: DynamicCache, which: torch.Tensor) -> None:
        spread(backbone, cache, which.flip(0))

    monkeypatch.setattr(shared_scoring, "spread", wrongly)
    trainer.train()
    said = [r.message for r in caplog.records if "scored once per completion" in r.message]
    assert len(said) <= 2 and all("from the usual ones" in sentence for sentence in said) and said


def test_micro_batches_share_what_is_left_of_their_groups(tmp_path: Path) -> None:
    """Rows are shuffled over micro-batches: each knows its own distinct prompts."""
    trainer = make(tmp_path, "qwen3-vl", "mixed", explore=False, gradient_checkpointing=False)
    trainer.model.train()
    data = trainer.train_dataset
    trainer._step = 0
    batches = [trainer._prepare_inputs([data[i] for i in range(4) for _ in range(4)])]
    trainer._step = 1
    batches.append(trainer._prepare_inputs([data[i] for i in range(4) for _ in range(4)]))
    for batch in batches:
        shared = shared_scoring.shared_rows(batch, range(len(batch["prompt_ids"])))
        assert shared is not None and shared.length == batch["prompt_ids"].shape[1]
        few = shared.few["input_ids"]
        assert len(few) == len(set(batch["kepo_prompt"].tolist()))
        for row, number in enumerate(shared.which.tolist()):
            assert torch.equal(few[number], batch["prompt_ids"][row, :-1])
    assert set(itertools.chain(*(batch["kepo_prompt"].tolist() for batch in batches))) == {0, 4, 8, 12}
