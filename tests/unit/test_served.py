"""A served teacher: its hints, what it thinks of completions, what it is not believed, and training with it."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_teacher_server import FakeVLLM, error, serving
from kepo_harness import (
    batch_of,
    fails_on_0,
    hint_prompt,
    make_row,
    make_trainer,
    right,
    score_batch,
    sharp_model,
    wrong,
)

from kepo_core import cli
from kepo_core.data import phantom
from kepo_core.errors import ParamError
from kepo_core.experiment import experiment
from kepo_core.experiment import serving as study_serving
from kepo_core.experiment.models import load_model, load_processor
from kepo_core.method.chat_client import RETRIES, ChatClient, TeacherServerError
from kepo_core.method.served import Completion, ServedTeacher
from kepo_core.method.task import images_in, with_images
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOTrainer
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.task.dataset import to_dataset
from kepo_core.task.prompts import vqa_messages
from kepo_core.testbed.embedded import build_model, build_processor

#: The tokens of the untrained models: the rows of their heads.
VOCABULARY = build_model("test", 0).lm_head.weight.shape[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_model(1).eval()


@pytest.fixture
def server(model: Any) -> Iterator[FakeVLLM]:
    with serving(FakeVLLM(model, build_processor())) as served:
        yield served


@pytest.fixture(scope="module")
def embedded() -> FakeVLLM:
    return FakeVLLM(load_model("embedded:teacher", trained=False), load_processor("embedded:teacher"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    phantom.write_phantom(root, 0, {"MRI": 12, "CT": 4})
    return root


def served_teacher(server: FakeVLLM, folder: Path, top_k: int = 5, **options: Any) -> ServedTeacher:
    client = ChatClient(server.url, **{"timeout": 30, "retries": 0, "concurrency": 4} | options)
    return ServedTeacher(client, server.name, build_processor(), top_k=top_k, hints=folder / "hints")


def completion(said: str = "<think>red</think><answer>A</answer><|im_end|>", number: int = 0) -> Completion:
    row, processor = make_row(number), build_processor()
    messages = with_images(vqa_messages(row["question"], row["options"], thinking=True), row)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Completion(
        name=row["id"],
        messages=messages,
        prompt_ids=processor(text=[text], images=[[row["image"]]])["input_ids"][0],
        completion_ids=processor.tokenizer(said)["input_ids"],
    )


# Hints ------------------------------------------------------------------------------------------------------------


class Writer(FakeVLLM):
    """Writes a hint that names question and answer, of tokens that cannot harm."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        text = next(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
        hint = f"<hint>{text.split('?')[0]} is {text.split('answer is ')[1][0]}<|im_end|></hint>"
        return {"choices": [{"message": {"content": hint}}]}


@pytest.fixture
def writer() -> Iterator[Writer]:
    with serving(Writer(None, None)) as served:
        yield served


def test_each_hint_is_asked_for_once_and_kept(writer: Writer, tmp_path: Path) -> None:
    teacher = served_teacher(writer, tmp_path)
    rows = [hint_prompt(make_row(i)) for i in (0, 1, 0)]
    hints = ["Question 0 is A", "Question 1 is B", "Question 0 is A"]
    assert teacher.write_hints(rows, max_tokens=9) == hints
    assert len(writer.bodies) == 2 and all(body["temperature"] == 0 for body in writer.bodies)
    assert served_teacher(writer, tmp_path).write_hints(rows, max_tokens=9, seed=3) == hints
    assert len(writer.bodies) == 2 and teacher.write_hints([], max_tokens=9) == []
    assert all(path.suffix == ".txt" for path in (tmp_path / "hints").iterdir())


@pytest.mark.parametrize("content", [None, "", "no hint at all"])
def test_what_is_no_hint_is_asked_for_again(writer: Writer, tmp_path: Path, content: str | None) -> None:
    """As from a server whose settings hide the answer: once they are put right, hints come."""
    answer = writer.answer
    writer.answer = lambda body: {"choices": [{"message": {"content": content}}]}  # type: ignore[method-assign]
    assert served_teacher(writer, tmp_path).write_hints([hint_prompt(make_row(0))], max_tokens=9) == [None]
    writer.answer = answer  # type: ignore[method-assign]
    assert served_teacher(writer, tmp_path).write_hints([hint_prompt(make_row(0))], max_tokens=9) == ["Question 0 is A"]


@pytest.mark.parametrize("changed", ["picture", "answer", "max_tokens", "model"])
def test_a_kept_hint_is_that_of_model_prompt_and_picture(writer: Writer, tmp_path: Path, changed: str) -> None:
    row = make_row(0)
    served_teacher(writer, tmp_path).write_hints([hint_prompt(row)], max_tokens=9)
    if changed == "picture":
        row["image"] = make_row(1)["image"]
    elif changed == "answer":
        row["answer"] = "B"
    elif changed == "model":
        writer.name = "another"
    served_teacher(writer, tmp_path).write_hints([hint_prompt(row)], max_tokens=8 if changed == "max_tokens" else 9)
    assert len(writer.bodies) == 2


@pytest.mark.parametrize("content", [b"", b"no hint", b"\xff\x00"])
def test_a_kept_hint_that_cannot_be_read_is_asked_for_again(writer: Writer, tmp_path: Path, content: bytes) -> None:
    teacher = served_teacher(writer, tmp_path)
    teacher.write_hints([hint_prompt(make_row(0))], max_tokens=9)
    (path,) = (tmp_path / "hints").iterdir()
    whole = path.read_text()
    path.write_bytes(content)
    assert teacher.write_hints([hint_prompt(make_row(0))], max_tokens=9) == ["Question 0 is A"]
    assert path.read_text() == whole and len(writer.bodies) == 2


def test_hints_are_kept_as_they_come(writer: Writer, tmp_path: Path) -> None:
    """A server that dies in the middle is asked for the rest alone."""
    rows = [hint_prompt(make_row(i)) for i in range(3)]
    writer.trouble = lambda number: error(500, "engine dead") if number == 2 else None
    with pytest.raises(TeacherServerError, match="engine dead"):
        served_teacher(writer, tmp_path, concurrency=1).write_hints(rows, max_tokens=9)
    assert all(served_teacher(writer, tmp_path).write_hints(rows, max_tokens=9)) and len(writer.bodies) == 4


def test_hints_are_those_of_the_teacher_itself_and_its_pictures(
    embedded: FakeVLLM, world: Path, tmp_path: Path
) -> None:
    """Greedy, against the model in this process: the picture arrives, and the right letter."""
    data = experiment.load_data(
        Params(data_root=str(world), train_items=3, eval_items=1, prompts_per_step=2, prompts_per_device=2)
    )
    rows = [hint_prompt(row) for row in to_dataset(data.train, thinking=True)]
    with serving(embedded) as server:
        hints = served_teacher(server, tmp_path).write_hints(rows, max_tokens=32)
    teacher = Teacher(load_model("embedded:teacher", trained=False), embedded.processor)
    teacher._generate = _greedy(teacher)
    assert hints == teacher.write_hints(rows, max_tokens=32, seed=0)
    assert all(hints) and len(set(hints)) > 1


def _greedy(teacher: Teacher) -> Any:
    def generate(prompts: Sequence[Any], max_tokens: int, template: dict[str, Any]) -> list[str]:
        texts = []
        for messages in prompts:
            text = teacher.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            inputs = teacher.processor(text=[text], images=[images_in(messages)], return_tensors="pt")
            eos = teacher.processor.tokenizer.eos_token_id
            out = teacher.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, eos_token_id=eos)
            ids = out[0, inputs["input_ids"].shape[1] :]
            texts.append(teacher.processor.tokenizer.decode(ids, skip_special_tokens=True))
        return texts

    return generate


@pytest.mark.parametrize("answer", [{"choices": []}, {"choices": [{}]}, {}, [], "<html>", None])
def test_an_answer_without_a_message_ends_it(server: FakeVLLM, tmp_path: Path, answer: Any) -> None:
    server.bend = lambda _: answer
    with pytest.raises(TeacherServerError, match=f"{server.url} sent an answer without a message"):
        served_teacher(server, tmp_path).write_hints([hint_prompt(make_row(0))], max_tokens=3)


# Log-probabilities ------------------------------------------------------------------------------------------------


def own_log_probs(model: Any, one: Completion) -> torch.Tensor:
    """(t, V), by the model in this process."""
    processor = build_processor()
    text = processor.apply_chat_template(one.messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[images_in(one.messages)], return_tensors="pt")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([one.completion_ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    more = torch.zeros(1, len(one.completion_ids), dtype=torch.long)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], 1)
    with torch.no_grad():
        return model(**inputs).logits[0, -len(one.completion_ids) - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("top_k", [1, 5, VOCABULARY])
def test_scores_are_the_models_own(server: FakeVLLM, model: Any, tmp_path: Path, top_k: int) -> None:
    teacher = served_teacher(server, tmp_path, top_k)
    teacher.check_fits(build_model("test", 0), build_processor())
    asked = [completion(number=0), completion("<answer>B</answer>", number=1)]
    for one, (ids, log_probs, told) in zip(asked, teacher.score(asked), strict=True):
        own = own_log_probs(model, one)
        values, expected = own.topk(top_k)
        assert top_k == VOCABULARY or torch.equal(ids, expected)  # the unlikeliest can be equally likely
        assert torch.allclose(log_probs[:, :top_k].double(), own.gather(1, ids), atol=1e-4)
        assert torch.allclose(log_probs[:, :top_k].double(), values, atol=1e-4)
        sampled = torch.tensor(one.completion_ids).unsqueeze(1)
        assert torch.allclose(told.double(), own.gather(1, sampled)[:, 0], atol=1e-4)
        assert log_probs.shape[1] == (top_k + 1 if top_k < VOCABULARY else VOCABULARY)
        if top_k < VOCABULARY:
            assert torch.allclose(log_probs[:, top_k].double().exp(), 1 - values.exp().sum(1), atol=1e-4)


def test_too_many_log_probabilities_are_refused(server: FakeVLLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"top_k is {VOCABULARY + 1}, expected at most the student's {VOCABULARY}"):
        served_teacher(server, tmp_path, VOCABULARY + 1).check_fits(build_model("test", 0), build_processor())


def shifted(answer: dict[str, Any]) -> dict[str, Any]:
    """Every token with the log-probabilities of the one before."""
    told = answer["prompt_logprobs"]
    return answer | {"prompt_logprobs": [None, told[1], *told[1:-1]]}


def truncated(answer: dict[str, Any]) -> dict[str, Any]:
    """The last 30 tokens alone, as a server with a short context would keep them."""
    return answer | {name: answer[name][-30:] for name in ("prompt_token_ids", "prompt_logprobs")}


def without_picture(answer: dict[str, Any]) -> dict[str, Any]:
    image = build_processor().image_token_id
    keep = [place for place, token in enumerate(answer["prompt_token_ids"]) if token != image]
    return answer | {name: [answer[name][i] for i in keep] for name in ("prompt_token_ids", "prompt_logprobs")}


def last_token(answer: dict[str, Any], **changes: float | None) -> dict[str, Any]:
    """The last token's log-probabilities: ``first``, or ``all`` of them."""
    for number, entry in enumerate(answer["prompt_logprobs"][-1].values()):
        if "all" in changes or number == 0:
            entry["logprob"] = changes.get("all", changes.get("first"))
    return answer


def foreign(answer: dict[str, Any]) -> dict[str, Any]:
    """A likely token that the student does not have."""
    answer["prompt_logprobs"][-1][str(VOCABULARY)] = {"logprob": -9.0}
    return answer


def last_place(answer: dict[str, Any], told: Any) -> dict[str, Any]:
    return answer | {"prompt_logprobs": [*answer["prompt_logprobs"][:-1], told]}


MISSING = "log-probabilities came back, expected those of the top 3 tokens and of the student's own"
IMPOSSIBLE = "expected finite values whose probabilities sum to at most 1"
SPOILT = [
    (foreign, rf"token 12: \d {MISSING}, \d+, all ids below {VOCABULARY}"),
    (shifted, rf"completion q0, token \d+: \d {MISSING}"),
    (truncated, r"token 0 is .* on the server but \['<\|im_start\|>'\] here .*, of 30 and \d+, expected the same"),
    (without_picture, r"token \d+ is \['<\|vision_end\|>'\] on the server but \['<\|image_pad\|>'\] here"),
    (lambda a: a | {name: a[name][:-1] for name in ("prompt_token_ids", "prompt_logprobs")},
     r"token \d+ is \[\] on the server but \['<\|im_end\|>'\] here"),
    (lambda a: a | {"prompt_token_ids": [*a["prompt_token_ids"][:-1], 7]},
     r"token \d+ is \['.*'\] on the server but \['<.*>'\]"),
    (lambda a: a | {"prompt_logprobs": a["prompt_logprobs"][1:]}, "no prompt_token_ids with one prompt_logprobs each"),
    (lambda a: {"choices": a["choices"]}, "no prompt_token_ids with one prompt_logprobs each, expected vLLM"),
    (lambda a: "<html>", "no prompt_token_ids with one prompt_logprobs each, expected vLLM"),
    (lambda a: last_token(a, first=math.nan), f"token 12: .*nan.* came back, {IMPOSSIBLE}"),
    (lambda a: last_token(a, first=-math.inf), f"token 12: .*-inf.* came back, {IMPOSSIBLE}"),
    (lambda a: last_token(a, first=0.5), f"token 12: .* to 0.5 came back, {IMPOSSIBLE}"),
    (lambda a: last_token(a, all=-0.5), f"token 12: log-probabilities from -0.5 to -0.5 came back, {IMPOSSIBLE}"),
    (lambda a: last_token(a, first=None), f"token 12: 0 {MISSING}"),
    (lambda a: last_place(a, None), f"token 12: 0 {MISSING}"),
    (lambda a: last_place(a, {"2": {"logprob": -1}}), f"token 12: 1 {MISSING}"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_what_does_not_belong_to_the_students_tokens_is_not_believed(
    server: FakeVLLM, tmp_path: Path, number: int
) -> None:
    server.bend, said = SPOILT[number]
    with pytest.raises(TeacherServerError, match=f"the teacher at {server.url}, .*{said}"):
        teacher = served_teacher(server, tmp_path, top_k=3)
        teacher.check_fits(build_model("test", 0), build_processor())
        teacher.score([completion()])
    assert len(server.bodies) == 1  # asked again, it would say the same


# Batches ----------------------------------------------------------------------------------------------------------


def serve_trainer(trainer: KEPOTrainer, teacher: ServedTeacher) -> KEPOTrainer:
    teacher.check_fits(trainer.model, trainer.processing_class)
    trainer.teacher = teacher
    return trainer


def gradient(trainer: KEPOTrainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_only_gated_rows_are_asked_about_each_with_its_own_picture(server: FakeVLLM, tmp_path: Path) -> None:
    trainer = serve_trainer(make_trainer(tmp_path, fails_on_0, explore=False), served_teacher(server, tmp_path))
    batch = score_batch(trainer, 0, 1)
    gated = batch["kepo_gate"][:, 0].nonzero().flatten().tolist()
    assert 0 < len(gated) < 8 and len(server.bodies) == len(gated)
    asked = {message["content"] for body in server.bodies for message in body["messages"][1:]}
    assert asked == {right(make_row(1)) + "<|im_end|>"}
    lengths = [len(ids) for ids in batch["kepo_top_ids"]]
    assert lengths == [int(m.sum()) if r in gated else 0 for r, m in enumerate(batch["completion_mask"])]
    assert trainer._metrics["train"]["kepo/unasked"] == [0.0]
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


def test_loss_and_gradient_with_all_tokens_are_those_of_the_teacher_in_process(
    server: FakeVLLM, model: Any, tmp_path: Path
) -> None:
    found = []
    for served in (False, True):
        trainer = make_trainer(tmp_path, fails_on_0, explore=False, teacher_model=model, distill_beta=0.5)
        if served:
            serve_trainer(trainer, served_teacher(server, tmp_path, VOCABULARY))
        loss = trainer._compute_loss(trainer.model, score_batch(trainer, 0, 1))
        loss.backward()
        found.append(
            (loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        )
    (loss, grad), (served_loss, served_grad) = found
    assert served_loss == pytest.approx(loss, rel=1e-4)
    assert torch.allclose(served_grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max())


def test_completions_that_text_cannot_carry_are_counted_and_not_guided(server: FakeVLLM, tmp_path: Path) -> None:
    """A word put together from other pieces than the tokenizer's: no server that takes text can be asked about it."""
    teacher, tokenizer = served_teacher(server, tmp_path), build_processor().tokenizer
    usual = completion("<think>a disc</think><answer>B</answer><|im_end|>").completion_ids
    (whole,) = tokenizer(" disc")["input_ids"]
    place = usual.index(whole)
    spelt = [*usual[:place], *(tokenizer(letter)["input_ids"][0] for letter in " disc"), *usual[place + 1 :]]
    assert tokenizer.decode(spelt) == tokenizer.decode(usual) and spelt != usual
    written = [usual, spelt, usual]
    ids, mask = torch.zeros(3, len(spelt), dtype=torch.long), torch.zeros(3, len(spelt), dtype=torch.long)
    for row, tokens in enumerate(written):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    prompt = torch.tensor([completion().prompt_ids] * 3)
    inputs = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": ids}
    rows = [make_row(0) | {"prompt": vqa_messages("Question 0?", ["red", "blue"], thinking=True)}] * 3
    scores, left_out = teacher.score_batch(rows, inputs, mask)
    assert left_out.tolist() == [False, True, False] and len(server.bodies) == 2
    assert all([len(each) for each in kind] == [len(usual), 0, len(usual)] for kind in zip(*scores, strict=True))


def test_unasked_rows_leave_the_divergence_and_are_logged(server: FakeVLLM, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lambda *a: right(a[1]), explore=False)
    serve_trainer(trainer, served_teacher(server, tmp_path))
    original = trainer.teacher.is_canonical
    trainer.teacher.is_canonical = lambda one: one.name != "q0" and original(one)
    batch = score_batch(trainer, 0, 1)
    assert batch["kepo_gate"][:, 0].tolist() == [False] * 4 + [True] * 4
    assert trainer._metrics["train"]["kepo/unasked"] == [4.0] and trainer._metrics["train"]["kepo/gate_rate"] == [1.0]
    assert batch["kepo_gated_tokens"] == batch["completion_mask"][4:].sum()
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


def test_a_gate_that_stays_shut_asks_nothing(server: FakeVLLM, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lambda *a: wrong(a[1]), explore=False)
    serve_trainer(trainer, served_teacher(server, tmp_path))
    assert trainer._compute_loss(trainer.model, score_batch(trainer, 0, 1)).item() == 0.0
    assert server.bodies == []


def test_a_micro_batch_takes_the_answers_of_its_own_rows(server: FakeVLLM, tmp_path: Path) -> None:
    """Rows are shuffled and divided into micro-batches after they were asked about: the gradient stays the same."""

    def script(text: str, row: dict, before: int, hinted: bool) -> str:
        return right(row) if before % 2 else wrong(row) + " and much more" * (before % 3)

    grads = []
    for parts in (1, 4):
        trainer = make_trainer(tmp_path, script, explore=False, tau=0.0, per_device_train_batch_size=8 // parts,
                               gradient_accumulation_steps=parts)  # fmt: skip
        serve_trainer(trainer, served_teacher(server, tmp_path))
        inputs = batch_of(trainer, 0, 1)
        torch.manual_seed(0)
        for step in range(parts):
            trainer._step = step
            trainer._compute_loss(trainer.model, trainer._prepare_inputs(inputs)).backward()
        grads.append(gradient(trainer))
    assert len(server.bodies) == 16
    assert torch.allclose(grads[0], grads[1], rtol=1e-3, atol=1e-5 * grads[0].abs().max())


# Training ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, server: FakeVLLM) -> torch.Tensor:
    """The weights after three steps, from the newest checkpoint of ``folder`` if there is one."""
    trainer = make_trainer(folder, fails_on_0, max_steps=3, save_strategy="steps", save_steps=1,
                           per_device_train_batch_size=4, gradient_accumulation_steps=2, num_iterations=2)  # fmt: skip
    serve_trainer(trainer, served_teacher(server, folder.parent))
    trainer.teacher.write_hints = lambda rows, **_: ["look left" for _ in rows]
    trainer.train(resume_from_checkpoint=True)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_run_whose_teacher_died_goes_on_as_if_it_had_not(server: FakeVLLM, tmp_path: Path) -> None:
    wanted = trained(tmp_path / "whole", server)
    needed, server.bodies = len(server.bodies), []
    server.trouble = lambda number: error(500, "engine dead") if number >= needed - 2 else None
    with pytest.raises(TeacherServerError, match=r"engine dead\)$"):
        trained(tmp_path / "broken", server)
    assert list((tmp_path / "broken").glob("checkpoint-*"))
    server.trouble = lambda number: None
    weights = trained(tmp_path / "broken", server)
    assert torch.equal(weights, wanted)


def test_a_run_with_all_tokens_has_the_numbers_of_one_with_the_teacher_in_process(
    embedded: FakeVLLM, world: Path, tmp_path: Path
) -> None:
    params = Params(
        data_root=str(world), train_items=4, eval_items=1, results_dir=str(tmp_path), explore=False, tau=0.0,
        prompts_per_step=2, prompts_per_device=2, group_size=2,
    ).replace(max_steps=2, save_steps=0)  # fmt: skip
    data, logged = experiment.load_data(params), []
    embedded.bodies = []
    with serving(embedded) as server:
        for changes in ({}, {"teacher_url": server.url, "teacher_top_k": VOCABULARY}):
            these = params.replace(**changes)
            run = Run.allocate(these, owner="test")
            experiment.make_trainer(these, run, data, experiment.load_models(these)).train()
            lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
            logged.append([{name: value for name, value in row.items() if value is not None} for row in lines])
        assert len(server.bodies) == 1 + 2 * 4
    assert len(logged[0]) == len(logged[1]) >= 2
    for local, served in zip(*logged, strict=True):
        assert served.pop("kepo/unasked", 0) == 0
        measured = {name for name in local if name.startswith("kepo/top_k")}  # a server gives no whole distribution
        assert len(measured) > 0 and measured.isdisjoint(served)
        local = {name: value for name, value in local.items() if name not in measured}
        assert served == pytest.approx(local, rel=1e-4, abs=1e-6)
    assert logged[0][0]["kepo/divergence"] > 0


# Before a run, and `kepo check-teacher` ---------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nobody is asked twice; how often it would have been."""
    asked: list[int] = []

    def client(url: str, retries: int) -> ChatClient:
        asked.append(retries)
        return ChatClient(url, retries=0)

    monkeypatch.setattr(study_serving, "ChatClient", client)
    return asked


def given(server: FakeVLLM, **changes: Any) -> Params:
    return Params(teacher_url=server.url, teacher_top_k=20).replace(**changes)


def test_a_run_asks_first_what_it_is_going_to_ask(embedded: FakeVLLM, tmp_path: Path) -> None:
    with serving(embedded) as server:
        for changes, asked in (
            ({}, [False, True]),
            ({"explore": False}, [True]),
            ({"distill": False}, [False]),
            ({"distill": False, "hint_context": "answer"}, []),
        ):
            server.bodies = []
            models = experiment.load_models(given(server, **changes))
            assert ["prompt_logprobs" in body for body in server.bodies] == asked
            assert isinstance(models.teacher, ServedTeacher) == bool(asked)


def test_a_server_that_does_not_fit_stops_a_run_before_it_begins(embedded: FakeVLLM, impatient: list[int]) -> None:
    with serving(embedded) as server:
        server.bend = truncated
        with pytest.raises(ParamError, match=r"^teacher_url: the teacher at .* of 30 and .*--max-model-len"):
            experiment.load_models(given(server, explore=False))
        server.bend = lambda answer: answer
        with pytest.raises(ParamError, match=r"^teacher_url: .*HTTP 404.: The model `other/teacher` does not exist"):
            experiment.load_models(given(server, teacher="other/teacher"))
    with pytest.raises(ParamError, match=r"^teacher_url: .* does not answer"):
        experiment.load_models(given(server))
    assert set(impatient) == {RETRIES}  # it may be starting still


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_top_k": 5}, "teacher_url is '' and teacher_top_k 5, expected both"),
        ({"teacher_url": "http://h:8000/v1"}, "teacher_top_k 0, expected both .* --max-logprobs"),
        ({"teacher_url": "h:80/v1", "teacher_top_k": 5}, "teacher_url must be like http://HOST:8000/v1, got 'h:80/v1'"),
        ({"teacher_url": "http://h/v1?key=1", "teacher_top_k": 5}, "must be like"),
        ({"teacher_url": "http://me:secret@h/v1", "teacher_top_k": 5}, "no name or password: .*KEPO_TEACHER_KEY"),
        ({"teacher_url": "http://h/v1", "teacher_top_k": 5, "method": "gkd"}, "gkd needs the teacher's whole"),
        ({"teacher_url": "http://h/v1", "teacher_top_k": 5, "teacher_quantization": "8bit"}, "the server decides how"),
        ({"teacher_url": "http://h/v1", "teacher_top_k": 5, "distill_temperature": 2.0}, "temperature must be 1"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamError, match=said) as caught:
        Params(**changes)
    assert "secret@" not in str(caught.value)


def test_where_the_server_is_does_not_name_a_run_but_what_it_tells_does() -> None:
    one = Params(teacher_url="http://a/v1", teacher_top_k=20)
    assert one.replace(teacher_url="http://b/v1").hash == one.hash
    assert one.hash not in (Params().hash, one.replace(teacher_top_k=5).hash)


def test_check_teacher(embedded: FakeVLLM, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(embedded) as server:
        command = ["check-teacher", "-p", "teacher_url", server.url, "-p", "teacher_top_k", "20"]
        assert cli.main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [["pass", n] for n in ("hint", "alignment", "picture")]
        assert "<hint>" in lines[0] and "are the student's; the 20 most likely tokens have 0.9" in lines[1]
        server.bend = lambda answer: shifted(answer) if "prompt_logprobs" in answer else answer
        assert cli.main(command) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["pass", "FAIL"] and "the student's own" in lines[1]
    assert cli.main(["check-teacher"]) == 2
    assert "teacher_url is empty" in capsys.readouterr().err


def test_check_teacher_does_not_ask_on_where_nobody_is(embedded: FakeVLLM, impatient: list[int]) -> None:
    params = Params(teacher_url="http://127.0.0.1:9/v1", teacher_top_k=20)
    text, sound = study_serving.report(params, embedded.processor)
    assert not sound and text.startswith("FAIL  hint") and "does not answer" in text and "\n" not in text
    assert impatient == [2]


def test_check_teacher_finds_a_server_that_does_not_look_at_pictures(embedded: FakeVLLM) -> None:
    class Blind(FakeVLLM):
        def answer(self, body: dict[str, Any]) -> dict[str, Any]:
            for message in body["messages"]:
                for part in message["content"] if isinstance(message["content"], list) else []:
                    if part["type"] == "image_url":
                        part["image_url"] = _first.setdefault("url", part["image_url"])
            return super().answer(body)

    _first: dict[str, Any] = {}
    with serving(Blind(embedded.model, embedded.processor)) as server:
        text, sound = study_serving.report(given(server), embedded.processor)
    assert not sound and "FAIL  picture" in text and "ignores pictures" in text
