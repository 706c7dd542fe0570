"""The plan against what is measured, and what it says of the paper's models without loading anything."""

import dataclasses
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration

from kepo_core.cli import main
from kepo_core.errors import ParamError
from kepo_core.experiment.adapters import lora_config
from kepo_core.experiment.models import load_model
from kepo_core.method.teacher import Teacher
from kepo_core.params import Params
from kepo_core.plan import architecture as shapes
from kepo_core.plan import memory, plan
from kepo_core.testbed.embedded import build_config

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import planned
from sizes import SIZES, Shape, config_of

TINY = dataclasses.replace(
    SIZES["small"], student=Shape((64, 6, 8, 2, 16, 160), (32, 3, 2, 96)),
    teacher=Shape((128, 3, 8, 2, 16, 384), (32, 2, 2, 96)), prompts=2, group=4, tokens=64, vocabulary=1024,
)  # fmt: skip
EXACT = ("student's weights", "gradients", "optimizer", "teacher's weights")


SLOW = [pytest.param(options, marks=pytest.mark.slow) for options in ({"lora_rank": 4}, {"bf16": True})]


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, *SLOW], ids=str)
def test_the_plan_is_what_is_measured(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Weights, gradients and optimizer to the byte, all others within a quarter (see the README for larger models)."""
    monkeypatch.setitem(planned.CASES, "tiny", (TINY, options))
    table = planned.compare("tiny").loc["tiny"]
    assert len(table) == 8 and (table["measured"] > 0).all()
    for name, row in table.iterrows():
        assert row["planned"] == pytest.approx(row["measured"], rel=1e-9 if name in EXACT else 0.25), name


def test_rows_that_share_a_prompt_take_less_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = dataclasses.replace(TINY, tokens=16)
    monkeypatch.setitem(planned.CASES, "alone", (alike, {}))
    monkeypatch.setitem(planned.CASES, "shared", (alike, {"shared": True}))
    alone, shared = (planned.compare(name).loc[name]["measured"] for name in ("alone", "shared"))
    assert (shared[list(EXACT)] == alone[list(EXACT)]).all()
    assert shared["kept by the forward pass"] < 0.75 * alone["kept by the forward pass"]
    for name in ("update, at its largest", "rollouts", "teacher's forward pass"):
        assert shared[name] <= alone[name], name


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("compute", [4, 2])
def test_a_layer_keeps_what_is_said(lora_rank: int, compute: int) -> None:
    """Within a per cent of what PyTorch keeps for the backward pass of one more layer."""
    length, a = 37, None

    def kept(layers: int, rows: int) -> int:
        nonlocal a
        size = dataclasses.replace(TINY, student=Shape((64, layers, 8, 2, 32, 160), (32, 2, 2, 96)))
        model = Qwen3VLForConditionalGeneration(config_of(size.student, size))
        a = shapes.architecture(model.config)
        if lora_rank:
            model = (model.bfloat16() if compute == 2 else model).requires_grad_(False)
            inject_adapter_in_model(lora_config(model, Params(lora_rank=lora_rank)), model)
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.float() if "lora_" in name else parameter.data
        decoder = model.get_decoder()
        states = torch.randn(rows, length, 64, dtype=decoder.norm.weight.dtype, requires_grad=True) * 1
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, 0] = 0  # padding, as in every batch of several prompts
        seen: dict[int, torch.Tensor] = {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: seen.setdefault(t.untyped_storage()._cdata, t), lambda t: t
            ),
            torch.autocast("cpu", torch.bfloat16, enabled=compute == 2),
        ):
            decoder(inputs_embeds=states, attention_mask=mask, use_cache=False)
        return sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in own)

    layer = [kept(3, rows) - kept(2, rows) for rows in (3, 6)]  # whose difference leaves out the weights' copies
    batch = memory.Batch(3, 1, length, 0, 16, compute, lora_rank, checkpointing=False)
    assert 3 * length * memory.layer(a, batch) == pytest.approx(layer[1] - layer[0], rel=0.01)


@pytest.mark.parametrize("name", ["embedded:student", "embedded:teacher"])
def test_parameters_are_counted_as_if_loaded(name: str) -> None:
    config, origin = shapes.load_config(name)
    a, model = shapes.architecture(config), load_model(name)
    assert origin == "its folder" and a.parameters == sum(p.numel() for p in model.parameters())
    assert a.vision == sum(p.numel() for p in model.model.visual.parameters())


def test_an_untied_head_is_counted_once() -> None:
    config = build_config("test")
    tied = shapes.architecture(config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    untied = shapes.architecture(config)
    assert (tied.head, untied.head) == (0, tied.vocabulary * tied.hidden)
    assert untied.parameters - tied.parameters == untied.head and untied.vision == tied.vision


# The paper's models -----------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))


def paper(gpus: int = 4, **changes: Any) -> plan.Setting:
    return plan.read(Params.load("params/paper.yaml", {**changes, "processes": gpus}))[0]


def test_the_papers_setting_needs_shards(nothing_loads: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "params/paper.yaml", "--gpu", "80GB", "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert "2.13 billion parameters" in text and "33.4 billion parameters" in text and "this package" in text
    assert "does not fit          fits          fits" in text
    assert main(["plan", "params/paper.yaml", "--gpu", "80GB", "--gpus", "1"]) == 1  # with the teacher whole
    text = capsys.readouterr().out
    assert "does not fit" in text and "teacher_quantization 4bit" in text
    four_bit = ["-p", "teacher_quantization", "4bit", "-p", "lora_rank", "16"]
    assert main(["plan", "params/paper.yaml", "--gpu", "80GB", "--gpus", "1", *four_bit]) == 0
    capsys.readouterr()
    served = ["-p", "teacher_url", "http://host/v1", "-p", "teacher_top_k", "20"]
    main(["plan", "params/paper.yaml", "--gpu", "80GB", *served])
    assert "teacher" not in capsys.readouterr().out.split("held throughout")[1].split("single change")[0]


def test_what_the_papers_models_hold_is_arithmetic(nothing_loads: None) -> None:
    """2,127,532,032 parameters: 4 bytes each as masters, 8 in the optimizer; shards are quarters."""
    p, t = 2_127_532_032, 33_357_390_064
    setting = paper(beta=0.1)
    assert plan.held(setting, "replicated") == {
        "student's weights": 4 * p, "optimizer": 8 * p, "gradient buckets of DDP": 4 * p, "reference": 4 * p,
        "teacher's weights": 2 * t,
    }  # fmt: skip
    assert plan.held(setting, "FSDP2") == {
        "student's weights": p, "optimizer": 2 * p, "reference": p, "teacher's weights": t / 2
    }  # fmt: skip
    assert plan.held(setting, "ZeRO-3")["student's weights"] == 1.5 * p
    lora = plan.held(paper(beta=0.1, lora_rank=16), "replicated")
    assert "reference" not in lora and lora["student's weights"] == 2 * p + 4 * 16 * setting.student.adapted
    whole = plan.held(paper(teacher_quantization="8bit"), "FSDP2")["teacher's weights"]
    assert t < whole < 1.1 * t  # not sharded
    assert "teacher's weights" not in plan.held(paper(distill=False, explore=False), "FSDP2")
    colocated = paper(use_vllm=True, vllm_gpu_memory_utilization=0.25)
    assert plan.held(colocated, "FSDP2")["vLLM"] == 20e9 and "rollouts" not in plan.moments(colocated, "FSDP2")


def test_a_reference_is_gathered_whole_under_fsdp2(nothing_loads: None) -> None:
    """In bf16; under ZeRO-3 as the student is."""
    p, setting = 2_127_532_032, paper(beta=0.1)
    found = {way: plan.moments(setting, way)["reference's forward pass"] for way in setting.ways}
    assert found["FSDP2"] > 2 * p > found["FSDP2"] - found["ZeRO-3"] > 0
    for other in (paper(), paper(beta=0.1, lora_rank=16)):
        assert "reference's forward pass" not in plan.moments(other, "FSDP2")


def test_a_teacher_that_answers_first_is_planned_at_the_length_of_completions(nothing_loads: None) -> None:
    found = plan.moments(paper(gate="teacher"), "FSDP2")
    as_long = plan.moments(paper(hint_max_tokens=1024), "FSDP2")["hints"]
    assert found["teacher's answers"] == as_long > found["hints"]
    for other in (paper(), paper(gate="teacher", distill=False)):
        assert "teacher's answers" not in plan.moments(other, "FSDP2")


def test_fsdp2_shares_out_gradients_with_the_last_window_alone(nothing_loads: None) -> None:
    """Before it, each GPU holds all of its own in float32, whatever their number."""
    p = 2_127_532_032
    one, two = (paper(prompts_per_step=4 * 2 * windows) for windows in (1, 2))
    assert (one.batch.windows, two.batch.windows) == (1, 2)
    for way, more in (("FSDP2", 4 * p), ("ZeRO-3", p)):
        found = [plan.moments(setting, way)["update"] for setting in (one, two)]
        assert found[1] - found[0] == pytest.approx(more, rel=1e-6)


def test_what_evaluates_before_and_after_has_to_fit_too(nothing_loads: None) -> None:
    """Each process has the whole student in float32, however many share it out in training."""
    eight = {"processes": 8, "prompts_per_step": 16, "eval_batch_size": 32, "eval_max_tokens": 4096}
    setting = plan.read(Params.load("params/paper.yaml", eight), gpu=44 * plan.GIB)[0]
    assert plan.evaluating(setting) > plan.evaluating(paper()) > 4 * 2_127_532_032
    text, fits = plan.as_text(setting, [])
    assert plan.total(setting, "FSDP2") < setting.gpu < plan.evaluating(setting) and not fits  # in any way
    assert f"evaluation before and after          {plan.evaluating(setting) / 2**30:>13.2f}" in text
    alone = paper(gpus=1, accelerate_config="")
    assert plan.evaluating(alone) == 0 and "before and after" not in plan.as_text(alone, [])[0]


def test_every_change_is_planned_and_more_of_anything_takes_more(nothing_loads: None) -> None:
    setting = paper(gpus=1, prompts_per_step=2)
    totals = {name: plan.total(other, "one process") for name, other in plan.changes(setting).items()}
    assert {"lora_rank 16", "teacher_quantization 4bit", "prompts_per_device 1"} <= set(totals)
    planned_total = plan.total(setting, "one process")
    # Two passes a step instead of one: gradients are there while the second goes forward.
    assert totals.pop("prompts_per_device 1") > planned_total > max(totals.values())
    more = ({"activation_checkpointing": False}, {"max_completion_length": 2048}, {"group_size": 16}, {"beta": 0.1})
    for change in more:
        assert plan.total(paper(gpus=1, prompts_per_step=2, **change), "one process") > planned_total


def test_zero3_takes_the_teacher_whole_and_none_that_is_quantised(nothing_loads: None) -> None:
    """DeepSpeed moves a model to the GPU before it cuts its part out of it."""
    setting = paper(gpus=8, prompts_per_step=16)
    assert setting.teacher is not None
    whole = 2 * setting.teacher.parameters
    assert plan.loading(setting, "ZeRO-3") > whole > plan.total(setting, "ZeRO-3") and plan.fits(setting, "ZeRO-3")
    small = replace(setting, gpu=48e9)
    assert plan.total(small, "ZeRO-3") < 48e9 and not plan.fits(small, "ZeRO-3") and plan.fits(small, "FSDP2")
    assert plan.loading(setting, "FSDP2") == 0
    assert paper(gpus=8, prompts_per_step=16, teacher_quantization="4bit").ways == ["replicated", "FSDP2"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "large"], "--gpu is 'large', expected the memory of one GPU"),
        (["--gpu", "0GB"], "--gpu is '0GB'"),
        (["--gpus", "0"], "processes must be at least 1, got 0"),
        (["--gpus", "3"], "prompts_per_step must be a multiple of prompts_per_device × processes (2 × 3), got 8"),
        (["--prompt-tokens", "0"], "--prompt-tokens must be at least 1, got 0"),
        (["-p", "method", "none"], "method is none, expected kepo"),
        (["-p", "student", "./nowhere"], "student is './nowhere', expected an existing folder"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "params/paper.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_model_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(shapes.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ParamError, match=r"teacher is 'some/model', whose configuration .* config\.json"):
        shapes.load_config("some/model", "teacher")


def test_the_teacher_reads_as_many_rows_at_a_time_as_is_planned() -> None:
    assert inspect.signature(Teacher).parameters["batch_size"].default == memory.TEACHER_ROWS


def test_sizes_of_gpus() -> None:
    assert plan.gpu_bytes("80GB") == plan.gpu_bytes("80") == 80e9
    assert plan.gpu_bytes("79.5GiB") == 79.5 * 2**30
