"""What stands between TRL and vLLM, without one: prompts, checks, what is sampled. tests/real_vllm has the real one."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kepo_harness import ScriptedTrainer, fails_on_0, make_row, make_trainer
from requests import ConnectionError as NoServer
from transformers import AutoConfig
from trl.generation import vllm_generation
from trl.generation.vllm_client import parse_logprobs

from kepo_core.experiment.experiment import training_config
from kepo_core.experiment.models import EMBEDDED_DIR
from kepo_core.method import hinted, vllm_rollouts
from kepo_core.method.exploration import Request
from kepo_core.method.task import with_images
from kepo_core.method.vllm_rollouts import CheckedVLLM, check_used, most_difference, one_placeholder_each
from kepo_core.params import Params
from kepo_core.task.prompts import vqa_messages
from kepo_core.testbed.embedded import build_processor

IMAGE = 9
PROCESSOR = SimpleNamespace(image_token_id=IMAGE)


class Engine:
    """VLLMGeneration as far as it is talked to; it repeats the first placeholder of a picture, as vLLM does."""

    def __init__(self, size: int = 3, mode: str = "colocate", **more: Any) -> None:
        self.size, self.mode, self.asked = size, mode, []
        self.max_model_length, self.max_completion_length, self.generation_kwargs = 40, 8, {"seed": 1}
        self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty = 0.9, 0.8, 7, 0.1, 1.3
        self.structured_outputs_regex = "x+"
        self.accelerator, self.server_base_url = SimpleNamespace(is_main_process=False), "http://here"
        vars(self).update(more)

    def _place_features(self, features: Any, prompt_ids: list[int]) -> Any:
        return None if features is None else {"mm_placeholders": {"image": [{"length": prompt_ids.count(IMAGE)}]}}

    def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any) -> Any:
        self.asked.append(prompts)
        used = []
        for ids, pictures in zip(prompts, images or [None] * len(prompts), strict=True):
            left, row = len(pictures or ()), []
            for token in ids:
                repeats = self.size if token == IMAGE and left else 1
                left -= token == IMAGE and left > 0
                row += [token] * repeats
            used.append(row)
        return used, [[5]] * len(prompts), [[[-1.0]]] * len(prompts), None


def test_each_picture_has_one_placeholder() -> None:
    assert one_placeholder_each([1, 9, 9, 9, 2, 9, 3], 2, IMAGE, 0) == [1, 9, 2, 9, 3]
    assert one_placeholder_each([9, 9, 9, 9], 2, IMAGE, 0) == [9, 9]  # side by side: one run
    assert one_placeholder_each([9], 1, IMAGE, 0) == [9] and one_placeholder_each([1, 2], 0, IMAGE, 0) == [1, 2]
    for ids, pictures in (([9, 1, 9, 9], 3), ([1, 2], 1), ([9, 9], 0)):
        with pytest.raises(ValueError, match=f"prompt 4 has {pictures} pictures but"):
            one_placeholder_each(ids, pictures, IMAGE, 4)


def test_what_vllm_used_is_what_was_sent() -> None:
    checked = CheckedVLLM(engine := Engine(size=3), PROCESSOR)
    prompts = [[1, 9, 9, 9, 2], [9, 9, 9, 9, 9, 9], [4, 4]]
    used, ids, *_ = checked.generate(prompts, [["a"], ["a", "b"], None], 1)
    assert used == prompts and ids == [[5]] * 3 and engine.asked == [[[1, 9, 2], [9, 9], [4, 4]]]
    assert checked.generate([[4, 4]], None, 1)[0] == [[4, 4]]


def test_another_prompt_than_the_trainers_is_refused_by_row_and_token() -> None:
    engine = Engine(size=4)  # its processor makes more of a picture
    sentence = r"row 1 differs from token 4 on \(6 tokens in vLLM, 5 in the trainer\)"
    with pytest.raises(ValueError, match=sentence):
        CheckedVLLM(engine, PROCESSOR).generate([[4], [1, 9, 9, 9, 2]], [None, ["a"]], 1)
    with pytest.raises(ValueError, match=r"row 0 differs from token 2 on \(3 tokens in vLLM, 2 in"):
        check_used([[1, 2]], [[1, 2, 3]])
    check_used([[1, 2]], [(1, 2)])


def test_a_context_too_short_is_refused_by_row_and_length() -> None:
    checked = CheckedVLLM(Engine(), PROCESSOR)
    checked.generate([[4] * 32], None, 1)
    with pytest.raises(ValueError, match=r"prompt 1 has 33 tokens, .* completion of 8 .* context of 40: set vllm_max_"):
        checked.generate([[4], [4] * 33], None, 1)


def test_a_servers_pictures_are_as_large_as_the_trainers() -> None:
    engine = Engine(mode="server")
    CheckedVLLM(engine, PROCESSOR)
    theirs = {"mm_placeholders": {"image": [{"length": 3}]}}
    assert engine._place_features(theirs, [1, 9, 9, 9])["mm_placeholders"]["image"] == [{"length": 3}]
    assert engine._place_features(None, [1]) is None
    with pytest.raises(ValueError, match=r"makes \[3\] tokens from a prompt's pictures, the trainer \[2\]"):
        engine._place_features(theirs, [1, 9, 9])


@pytest.mark.parametrize("method", ["generate", "sync_weights"])
@pytest.mark.parametrize(
    ("met", "kind", "said"),
    [
        (NoServer("refused"), ConnectionError, "the vLLM server at http://here does not answer"),
        (Exception("Request failed: 400, too long"), ValueError, "http://here rejects the request, .* too long"),
        (RuntimeError("something else"), RuntimeError, "^something else$"),
    ],
)
def test_what_a_server_does_is_one_sentence(method: str, met: Exception, kind: type[Exception], said: str) -> None:
    def meet(*_: Any) -> None:
        raise met

    checked = CheckedVLLM(Engine(mode="server", **{method: meet}), PROCESSOR)
    with pytest.raises(kind, match=said):
        checked.generate([[1]], None, 1) if method == "generate" else checked.sync_weights()


def test_a_server_with_another_tokenizer_or_model_is_refused(tmp_path: Path) -> None:
    tokenizer = build_processor().tokenizer
    processor = SimpleNamespace(image_token_id=IMAGE, tokenizer=tokenizer)

    student = SimpleNamespace(config=AutoConfig.from_pretrained(EMBEDDED_DIR / "student"))

    def served(change: int, model: str = "on/its-disk-alone") -> Engine:
        def post(url: str, json: Any) -> Any:
            tokens = [token + change for token in tokenizer(json["prompt"])["input_ids"]]
            return SimpleNamespace(status_code=200, json=lambda: {"tokens": tokens})

        models = SimpleNamespace(json=lambda: {"data": [{"max_model_len": 30}]})
        session = SimpleNamespace(post=post, get=lambda url: models)
        client = SimpleNamespace(base_url="http://here", model="other", session=session, _post=post)
        client.get_server_info = lambda: {"model_config": {"model": model}}
        return Engine(
            mode="server", vllm_client=client, accelerator=SimpleNamespace(is_main_process=True), model=student
        )

    with pytest.raises(ValueError, match=r"prompt 0 has 23 tokens, .* context of 30"):  # the server's
        CheckedVLLM(served(0), processor).generate([[4] * 23], None, 1)
    with pytest.raises(ValueError, match="http://here serves other with another tokenizer than the student's"):
        CheckedVLLM(served(1), processor)
    larger = tmp_path / "larger"
    config = AutoConfig.from_pretrained(EMBEDDED_DIR / "student")
    config.text_config.num_hidden_layers += 1
    config.save_pretrained(larger)
    CheckedVLLM(served(0, str(EMBEDDED_DIR / "student")), processor)
    with pytest.raises(ValueError, match=r"serves .*larger, whose num_hidden_layers is \d, the student's \d"):
        CheckedVLLM(served(0, str(larger)), processor)


def test_trls_client_reads_the_tokens_of_newer_servers() -> None:
    """vLLM 0.32 tells a token's id in a field of its own, earlier ones in the text."""
    entries = [{"token_id": 7, "logprob": -0.5, "top_logprobs": [{"token_id": 7, "logprob": -0.5}]}]
    older = [{"token": "token_id:8", "logprob": -0.1, "top_logprobs": []}]
    told = {"choices": [{"logprobs": {"content": entries}}, {"logprobs": {"content": older}}, {"logprobs": None}]}
    client = SimpleNamespace(_post=lambda url, **_: told)
    vllm_rollouts._name_tokens(client)
    choices = client._post("http://here")["choices"]
    found = parse_logprobs([choice["logprobs"] for choice in choices[:2]])
    assert found == ([[[-0.5]], [[-0.1]]], [[[7]], [[8]]])


def test_an_evaluation_samples_plainly_and_leaves_no_trace() -> None:
    engine = Engine()
    checked, before = CheckedVLLM(engine, PROCESSOR), dict(vars(engine))
    with checked.sampling(0.0, 5, [2, 3]):
        assert (engine.temperature, engine.top_p, engine.top_k, engine.min_p) == (0.0, 1.0, 0, None)
        assert (engine.repetition_penalty, engine.max_completion_length) == (1.0, 5)
        assert engine.generation_kwargs == {"stop_token_ids": [2, 3], "logit_bias": {IMAGE: -100.0}}
    assert vars(engine) == before and engine.generation_kwargs == {"seed": 1, "logit_bias": {IMAGE: -100.0}}


def test_the_threshold_allows_for_what_the_sampling_cuts_off(tmp_path: Path) -> None:
    def most(**given: Any) -> float:
        return most_difference(training_config(Params().replace(use_vllm=True, **given), tmp_path))

    assert most() == pytest.approx(0.2) and most(top_p=0.9) == pytest.approx(0.2 + 0.10536, abs=1e-5)
    assert most(top_k=5) == most(min_p=0.1) == most(repetition_penalty=1.1) == float("inf")


def test_parameters_arrive(tmp_path: Path) -> None:
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://host:8000"}
    given = training_config(Params.load(None, server), tmp_path)
    assert (given.use_vllm, given.vllm_mode, given.vllm_server_base_url) == (True, "server", "http://host:8000")
    memory = Params().replace(use_vllm=True, vllm_gpu_memory_utilization=0.2, vllm_max_model_length=4096)
    here = training_config(memory, tmp_path)
    assert (here.vllm_mode, here.vllm_gpu_memory_utilization, here.vllm_max_model_length) == ("colocate", 0.2, 4096)
    assert here.vllm_server_base_url is None and here.vllm_importance_sampling_correction
    nucleus = training_config(Params().replace(use_vllm=True, top_p=0.95), tmp_path)
    assert not nucleus.vllm_importance_sampling_correction


def test_a_process_asks_a_server_for_as_many_as_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL gives each process its share of the answers by its own number of prompts, which must be everybody's."""
    tokenizer = build_processor().tokenizer
    trainer = make_trainer(tmp_path, fails_on_0)
    asked: list[str] = []

    def generate(self: Any, prompt_ids: Any, *_: Any) -> Any:
        asked.extend(tokenizer.decode(ids) for ids in prompt_ids)
        return [[*tokenizer("red")["input_ids"], tokenizer.eos_token_id]] * len(prompt_ids), None

    monkeypatch.setattr(ScriptedTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(trainer, "use_vllm", True)
    trainer.state.global_step = 0
    monkeypatch.setattr(hinted, "largest", lambda accelerator, number: max(3, number))
    monkeypatch.setattr(hinted._Sampler, "_scored", lambda self, places, draws: draws)
    row = make_row(0) | {"prompt": vqa_messages("Question 9?", ["red", "blue"], True)}
    prompt = with_images(row["prompt"], row)
    draws = hinted._Sampler(trainer, [row], [prompt], [], {0: 0}, "0", None).draw([Request(0, "look", 1)])
    assert len(draws) == 1 and ["look" in text for text in asked] == [True, False, False]


@pytest.mark.parametrize(
    ("given", "dtype"), [({}, "float32"), ({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16")]
)
def test_an_engine_computes_as_the_trainer_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(vllm_generation, "LLM", dict, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK", raising=False)
    args = SimpleNamespace(**{"use_vllm": True, "bf16": False, "fp16": False} | given)
    with vllm_rollouts.making_engine(args):
        os.environ.update(RANK="0", WORLD_SIZE="3")
        assert vllm_generation.LLM(seed=1) == {"seed": 1, "dtype": dtype}
    assert vllm_generation.LLM is dict and "RANK" not in os.environ and os.environ["WORLD_SIZE"] == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's engine takes new weights")
def test_weights_packed_for_a_cpu_are_one_sentence() -> None:
    engine = Engine()
    engine.sync_weights = lambda: torch.nn.Parameter().weight_loader()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="vLLM has packed its weights for this CPU and takes no new ones"):
        CheckedVLLM(engine, PROCESSOR).sync_weights()


def test_rows_without_pictures_go_with_others() -> None:
    """TRL looks for the first picture of every list that it is given."""
    engine = Engine()
    given: list[Any] = []
    generate = engine.generate
    engine.generate = lambda prompts, images, *rest: given.append(images) or generate(prompts, images, *rest)  # type: ignore
    CheckedVLLM(engine, PROCESSOR).generate([[1, 9, 9, 9], [4]], [["a"], []], 1)
    assert given == [[["a"], None]]
