"""Teachers whose linear layers bitsandbytes quantises, on the CPU."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from kepo_harness import hint_prompt
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration
from transformers.quantizers import HfQuantizer

from kepo_core.data import phantom
from kepo_core.errors import ParamError
from kepo_core.experiment import experiment, models, pair
from kepo_core.experiment.models import load_model, load_processor
from kepo_core.method.teacher import Teacher
from kepo_core.params import Params
from kepo_core.plan import architecture, memory
from kepo_core.quiet import quiet_third_parties
from kepo_core.runs.run import Run
from kepo_core.task.dataset import to_dataset
from kepo_core.testbed.embedded import build_config, build_processor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    phantom.write_phantom(root, 0, {"MRI": 12, "CT": 4})
    return root


@pytest.mark.parametrize(("quantization", "layer"), [("8bit", Linear8bitLt), ("4bit", Linear4bit)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_quantised_teacher_takes_what_is_planned_and_writes_hints(
    world: Path, quantization: str, layer: type, precision: str
) -> None:
    model = load_model("embedded:teacher", "teacher", trained=False, precision=precision, quantization=quantization)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    assert all(isinstance(m, layer) for m in linear) and len(linear) > 20
    assert not any(p.requires_grad for p in model.parameters())
    a, compute = architecture.architecture(model.config), 2 if precision == "bf16" else 4
    planned = memory.teacher_weights(a, compute, quantization)
    assert planned == pytest.approx(held(model), rel=0.03)  # rows of these tiny layers are short, and have scales each
    teacher = Teacher(model, load_processor("embedded:teacher"))
    teacher.prepare(None, fsdp=True)  # bitsandbytes' weights are not sharded
    assert teacher._wrapped is model
    data = experiment.load_data(Params(data_root=str(world), train_items=8, eval_items=1))
    asked = [hint_prompt(row) for row in to_dataset(data.train, thinking=True)]
    hints = teacher.write_hints(asked, max_tokens=32, seed=0)
    assert all(hints) and len(set(hints)) > 1  # each can be read


def held(model: torch.nn.Module) -> int:
    """Bytes of all weights and of their scales; not of bitsandbytes' two tables, a KiB a layer however large it is."""
    total = 0
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        total += tensor.nbytes
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        if (scales := getattr(tensor, "SCB", None)) is not None:
            total += scales.nbytes
    return total


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_training_is_guided_by_about_the_same_teacher(
    world: Path, tmp_path: Path, quantization: str, caplog: pytest.LogCaptureFixture
) -> None:
    params = Params(
        data_root=str(world), train_items=4, eval_items=1, results_dir=str(tmp_path), explore=False, tau=0.0,
        prompts_per_step=2, prompts_per_device=2, group_size=2,
    ).replace(max_steps=1, save_steps=0)  # fmt: skip
    quiet_third_parties()
    data, told = experiment.load_data(params), {}
    for name in ("none", quantization):
        these = params.replace(teacher_quantization=name)
        run = Run.allocate(these, owner="test")
        with caplog.at_level(logging.WARNING):
            experiment.make_trainer(these, run, data, experiment.load_models(these)).train()
        told[name] = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])
    before, after = (told[name]["kepo/divergence"] for name in ("none", quantization))
    assert after != before and after == pytest.approx(before, rel={"8bit": 0.05, "4bit": 0.5}[quantization])
    assert told["none"]["reward"] == told[quantization]["reward"]
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]  # one a layer and pass


@pytest.mark.parametrize(("quantization", "bits"), [("8bit", 8), ("4bit", 4), ("none", 0)])
def test_transformers_is_told_how_to_quantise(monkeypatch: pytest.MonkeyPatch, quantization: str, bits: int) -> None:
    told: dict[str, Any] = {}
    real = AutoModelForImageTextToText.from_pretrained

    def from_pretrained(source: str, **kwargs: Any) -> Any:
        told.update(kwargs)
        model = real(source, dtype=kwargs["dtype"])
        model.is_quantized = bits > 0
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("was moved") if bits else model)
        return model, {"missing_keys": set()}

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(models, "best_device", lambda: torch.device("cpu"))
    model = load_model("embedded:teacher", "teacher", trained=False, precision="bf16", quantization=quantization)
    config = told["quantization_config"]
    assert told["device_map"] == ({"": 3} if bits else None)  # each process has one on its own GPU
    assert not any(p.requires_grad for p in model.parameters()) and told["use_safetensors"]
    if not bits:
        assert config is None
        return
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == 8, bits == 4)
    assert bits == 8 or (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert config.llm_int8_skip_modules is None  # transformers then leaves out the head


def test_the_head_is_not_quantised(tiny_model) -> None:
    """transformers leaves it out, tied or not; a checkpoint whose head is quantised nevertheless is refused."""
    model = tiny_model()
    assert {"lm_head"} <= set(HfQuantizer.get_modules_to_not_convert(model))
    untied = build_config("test")
    untied.tie_word_embeddings = untied.text_config.tie_word_embeddings = False
    assert {"lm_head"} <= set(HfQuantizer.get_modules_to_not_convert(Qwen3VLForConditionalGeneration(untied)))
    head = torch.nn.Linear(4, 4)
    head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.set_output_embeddings(head)
    with pytest.raises(ValueError, match=r"the teacher's head is quantised \(torch.int8\)"):
        Teacher(model, build_processor())


def test_a_quantised_teacher_that_cannot_be_is_refused_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "load_processor", lambda *_: pytest.fail("something was loaded"))
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ParamError, match=r"teacher_quantization is '4bit', which needs bitsandbytes .*pip install"):
        experiment.load_models(Params(teacher_quantization="4bit"))
