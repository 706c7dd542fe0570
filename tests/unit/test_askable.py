"""The questions that a run samples are tried with its processor and tokenizer before any model is called."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from kepo_core.data.source import QA_FOLDER
from kepo_core.errors import DataError
from kepo_core.experiment import askable, experiment, models
from kepo_core.experiment.experiment import StudyData
from kepo_core.params import Params
from kepo_core.task.prompts import hint_aware_messages, hint_messages, vqa_messages


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 MRI questions about a picture each."""
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    (root / "Images").mkdir(parents=True)
    (root / QA_FOLDER).mkdir(parents=True)
    rows = []
    for i in range(60):
        Image.new("RGB", (32, 24), (i, 0, 0)).save(root / f"Images/{i}.png")
        rows.append(
            {"question_id": f"q{i}", "dataset": "Toy", "question_type": "Grading", "question": "What?",
             "gt_answer": "a", "option_A": "a", "option_B": "b", "image_path": f"Images/{i}.png",
             "modality_type": "MRI"}
        )  # fmt: skip
    (root / QA_FOLDER / "Toy.json").write_text(json.dumps(rows))
    return root


def change(root: Path, row: str, **fields: object) -> None:
    file = root / QA_FOLDER / "Toy.json"
    rows = json.loads(file.read_text())
    next(r for r in rows if r["question_id"] == row).update(fields)
    file.write_text(json.dumps(rows))


def load(root: Path, **changes: object) -> StudyData:
    small = {"train_items": 8, "eval_items": 4, "prompts_per_step": 2, "prompts_per_device": 2}
    return experiment.load_data(Params.load(None, {"data_root": str(root), **small, **changes}))


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (4000, 10)])
def test_a_picture_that_the_processor_refuses_is_left_out_and_counted(world: Path, size: tuple[int, int]) -> None:
    first, *others = load(world).train
    Image.new("RGB", size, (200, 0, 0)).save(first.image)
    data = load(world)
    assert [q.id for q in data.train[:7]] == [q.id for q in others] and len(data.train) == 8
    ((reason, sentences),) = data.ledger.dropped.items()
    assert reason == "the processor refuses its image" and len(sentences) == 1
    assert f"refuses image {first.image} of {size[0]}×{size[1]} pixels" in sentences[0]
    assert load(world, image_size=64).train[0].id == first.id  # squashed, as the model will see it
    assert load(world, image_size=4000, image_fit="longest").train[0].id != first.id


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("field", ["question", "option_B"])
def test_a_token_of_the_model_in_a_text_is_left_out_and_counted(world: Path, token: str, field: str) -> None:
    first = load(world).train[0]
    change(world, first.id, **{field: f"What is {token} here?"})
    data = load(world)
    assert first.id not in {q.id for q in data.train}
    (sentence,) = data.ledger.dropped["a special token in its text"]
    assert f"Question {first.id}: its text contains {token}" in sentence


@pytest.mark.parametrize("field", ["question", "option_B", "gt_answer", "question_id", "image_path", "dataset"])
def test_half_a_character_is_no_text(world: Path, field: str) -> None:
    change(world, "q7", **{field: "half \ud83d"})
    data = load(world, train_items=60)
    ((reason, sentences),) = data.ledger.dropped.items()
    assert reason == f"{field} is not text" and "Toy.json, row 8" in sentences[0]


def test_a_text_that_cannot_be_tokenized_is_left_out_and_counted(
    world: Path, processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky:
        def __init__(self) -> None:
            self.tokenizer = self

        def __getattr__(self, name: str):
            return getattr(processor, name)

        added_tokens_decoder: ClassVar = {}

        def __call__(self, text=None, images=None, **_) -> dict:
            if "What else?" in str(text):
                raise OverflowError("too much")
            return {"input_ids": [[]]}

    monkeypatch.setattr(askable, "load_processor", lambda *_: Picky())
    first = load(world).train[0]
    change(world, first.id, question="What else?")
    data = load(world)
    assert data.ledger.dropped == {
        "its text cannot be tokenized": [f"Question {first.id}: its text cannot be tokenized (too much)."]
    }


@pytest.mark.parametrize(("words", "option"), [(9000, ""), (200, "max_completion_length"), (200, "eval_max_tokens")])
def test_what_is_longer_than_the_students_context_is_left_out_and_counted(
    world: Path, processor, words: int, option: str
) -> None:
    first = load(world).train[0]
    question = " ".join(["long"] * words)
    change(world, first.id, question=question)
    messages = vqa_messages(question, first.options, Params().thinking)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    picture = [[Image.new("RGB", (32, 24))]]
    prompt = processor(text=[text], images=picture, return_tensors="pt")["input_ids"].shape[1]
    room = 2048 - prompt
    if option:
        assert load(world, explore=False, **{option: room}).train[0].id == first.id
    data = load(world, explore=False, **({option: room + 1} if option else {}))
    ((reason, (sentence,)),) = data.ledger.dropped.items()
    assert reason == "longer than the student's context" and first.id not in {q.id for q in data.train}
    assert f"Question {first.id}: its prompt of {prompt:,} tokens and an answer of up to " in sentence
    assert f"{room + 1 if option else 48:,} are longer than the student's context of 2,048 tokens" in sentence


def tokens(processor, messages: list[dict], size: tuple[int, int] = (32, 24)) -> int:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=[[Image.new("RGB", size)]], return_tensors="pt")["input_ids"].shape[1]


ROOM = {"max_completion_length": 40, "eval_max_tokens": 8, "hint_max_tokens": 100}


@pytest.mark.parametrize("context", ["hint+answer", "hint", "answer"])
def test_what_is_longer_than_the_students_context_with_a_hint_is_not_trained_on(
    world: Path, processor, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, given = load(world).train[0], ROOM | {"hint_context": context, "distill": False}
    change(world, first.id, question=" ".join(["long"] * 200))
    question = " ".join(["long"] * 200)
    told = hint_aware_messages(question, first.options, "", first.answer, context)
    longest = tokens(processor, told) + 100 * ("hint" in context) + 40
    with_context(monkeypatch, "student", longest)
    assert load(world, **given).train[0].id == first.id
    with_context(monkeypatch, "student", longest - 1)
    data = load(world, **given)
    ((reason, (sentence,)),) = data.ledger.dropped.items()
    assert reason == "longer than the student's context" and first.id not in {q.id for q in data.train}
    assert f"prompt with a hint of {longest - 40:,} tokens and an answer of up to 40 are longer than" in sentence
    assert load(world, **given, explore=False).train[0].id == first.id


def with_context(monkeypatch: pytest.MonkeyPatch, role: str, context: int) -> None:
    read = models.read_config

    def narrow(name: str, parameter: str = "student") -> object:
        config = read(name, parameter)
        config.get_text_config().max_position_embeddings = context if parameter == role else 10**6
        return config

    monkeypatch.setattr(askable, "read_config", narrow)


@pytest.mark.parametrize(
    ("given", "asks"),
    [
        ({"distill": False}, "asks for a hint"),
        ({"distill": False, "hint_source": "failure"}, "asks for a hint"),
        ({"explore": False}, ""),
        ({"method": "gkd"}, ""),
    ],
)
def test_what_is_longer_than_the_teachers_context_is_not_trained_on(
    world: Path, processor, given: dict, asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(world).train[0]
    question = " ".join(["long"] * 200)
    change(world, first.id, question=question)
    about = "" if "hint_source" in given else None
    asked = hint_messages(question, first.options, "A", about) if asks else vqa_messages(question, first.options, True)
    # The longest attempt is as long as the longest rollout.
    prompt, answer = tokens(processor, asked) + 40 * ("hint_source" in given), 100 if asks else 40
    with_context(monkeypatch, "teacher", prompt + answer)
    assert load(world, **ROOM, **given).train[0].id == first.id
    with_context(monkeypatch, "teacher", prompt + answer - 1)
    data = load(world, **ROOM, **given)
    ((reason, (sentence,)),) = data.ledger.dropped.items()
    assert reason == "longer than the teacher's context" and first.id not in {q.id for q in data.train}
    assert f"of {prompt:,} tokens and an answer of up to {answer} are longer than the teacher's context" in sentence
    assert (f"prompt that {asks} of" in sentence) if asks else ("its prompt of" in sentence)
    served = {"teacher_url": "http://127.0.0.1:9/v1", "teacher_top_k": 4} if given.get("method") != "gkd" else None
    if served:
        assert load(world, **ROOM, **given, **served).train[0].id == first.id


def test_only_what_is_trained_on_needs_room_for_hints_and_a_teacher(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(world, **ROOM)
    for question in (before.train[0], before.test[0]):
        change(world, question.id, question=" ".join(["long"] * 200))
    with_context(monkeypatch, "teacher", 300)
    data = load(world, **ROOM)
    assert [q.id for q in data.test] == [q.id for q in before.test]
    assert [q.id for q in data.train[:7]] == [q.id for q in before.train[1:]]
    before.write_items(world / "items.csv")
    with pytest.raises(DataError, match=f"Question {before.train[0].id}: .* longer than the teacher's context"):
        load(world, **ROOM, items_file=str(world / "items.csv"))


def test_a_picture_that_the_teachers_processor_refuses_is_not_trained_on(
    world: Path, processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky:
        def __getattr__(self, name: str):
            return getattr(processor, name)

        def __call__(self, text=None, images=None, **_):
            if images and images[0][0].size == (48, 32):
                raise ValueError(f"not {object()}")
            return processor(text=text, images=images, **_)

    first = load(world).train[0]
    Image.new("RGB", (48, 32), (200, 0, 0)).save(first.image)
    own = models.load_processor
    picky = lambda name, role="student": Picky() if role == "teacher" else own(name, role)  # noqa: E731
    monkeypatch.setattr(askable, "load_processor", picky)
    data = load(world)
    ((reason, (sentence,)),) = data.ledger.dropped.items()
    assert reason == "the processor refuses its image" and f"Question {first.id}: " in sentence
    assert "the teacher's processor refuses" in sentence and "(not <object object>)" in sentence
    assert load(world, explore=False).train[0].id == first.id  # its forward pass reads what the student's prepared


def test_vllms_context_counts(world: Path, processor) -> None:
    first = load(world).train[0]
    question = " ".join(["long"] * 200)
    change(world, first.id, question=question)
    longest = tokens(processor, vqa_messages(question, first.options, True)) + 48
    given = {"explore": False, "use_vllm": True, "eval_max_tokens": 8}
    assert load(world, **given, vllm_max_model_length=longest).train[0].id == first.id
    data = load(world, **given, vllm_max_model_length=longest - 1)
    ((_, (sentence,)),) = data.ledger.dropped.items()
    assert "or a larger vllm_max_model_length, may help" in sentence


def test_items_of_a_file_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    data = load(world)
    data.write_items(tmp_path / "items.csv")
    given = {"items_file": str(tmp_path / "items.csv")}
    assert load(world, **given).train == data.train
    change(world, data.test[1].id, question="<|image_pad|>?")
    with pytest.raises(DataError, match=f"Question {data.test[1].id}: its text contains"):
        load(world, **given)


def test_renamed_copies_of_trained_pictures_are_not_tested_on_and_counted_where_they_are(world: Path) -> None:
    before = load(world, train_items=60, eval_items=60)
    for question, copied in zip(before.test, before.train, strict=False):
        question.image.write_bytes(copied.image.read_bytes())
    data = load(world, train_items=60, eval_items=60)
    trained = {q.image.read_bytes() for q in data.train}
    assert not [q for q in data.test if q.image.read_bytes() in trained]
    identity = data.identity()
    assert identity["test_items_whose_image_is_trained_on"] == 0
    assert identity["pictures_of_another_name"] == len(before.test) > 0
    asked = load(world, split="question", train_items=60, eval_items=60)
    trained = {q.image.read_bytes() for q in asked.train}
    leaks = [q for q in asked.test if q.image.read_bytes() in trained]
    assert asked.identity()["test_items_whose_image_is_trained_on"] == len(leaks) > 0
    whole = load(world, split="question", train_items=60, eval_items=60, eval_split="validation")
    assert len({*asked.images.values(), *whole.images.values()}) <= 60 - len(before.test)
