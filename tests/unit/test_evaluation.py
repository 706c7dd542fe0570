"""Evaluation: greedy whatever the checkpoint says, the same alone and in a batch, the model left as it was."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from kepo_core.data.images import Pictures, load_image
from kepo_core.data.loading import load_questions
from kepo_core.data.phantom import write_phantom
from kepo_core.data.records import AnswerOutcome
from kepo_core.experiment import answering, evaluation
from kepo_core.experiment.evaluation import evaluate, length_batches, trim
from kepo_core.task.dataset import to_dataset
from kepo_core.task.prompts import vqa_messages


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Fourteen questions about pictures of odd and differing sizes, one of them a JPEG in grey."""
    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root, 0, {"MRI": 2, "CT": 2})
    rows = load_questions(root)
    Image.open(rows[0].image).resize((101, 37)).save(rows[0].image)
    Image.open(rows[-1].image).convert("L").resize((48, 90)).save(rows[-1].image, format="JPEG")
    return [*rows[:7], *rows[-7:]]


@pytest.fixture
def model(tiny_model):
    return tiny_model(0)


SETTINGS = {"thinking": True, "max_tokens": 12, "batch_size": 5}


def test_records_come_in_order_and_do_not_depend_on_the_batch(model, processor, questions):
    together = evaluate(model, processor, questions, **SETTINGS)
    assert [answer.question_id for answer in together] == [question.id for question in questions]
    assert [answer.modality for answer in together] == [question.modality for question in questions]
    alone = evaluate(model, processor, questions, **SETTINGS | {"batch_size": 1})
    assert together == alone
    assert len({answer.completion for answer in together}) > 1
    backwards = evaluate(model, processor, questions[::-1], **SETTINGS | {"batch_size": 14})
    assert backwards[::-1] == together


def test_it_is_a_plain_argmax(model, processor, questions):
    """One token at a time over the whole sequence, without generate, cache or padding."""
    for question, answer in zip(questions[:2], evaluate(model, processor, questions[:2], **SETTINGS), strict=True):
        messages = vqa_messages(question.question, question.options, True)
        messages[0]["content"][0]["image"] = load_image(question.image)
        inputs = processor.apply_chat_template(
            [messages], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.eval()
        written = []
        for _ in range(SETTINGS["max_tokens"]):
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            logits[model.config.image_token_id] = -torch.inf
            token = logits.argmax().view(1, 1)
            written.append(int(token))
            if written[-1] == processor.tokenizer.eos_token_id:
                break
            for key, value in (("input_ids", token), ("attention_mask", torch.ones_like(token)),
                               ("mm_token_type_ids", torch.zeros_like(token))):  # fmt: skip
                inputs[key] = torch.cat([inputs[key], value], dim=1)
        assert answer.completion == processor.tokenizer.decode(written, skip_special_tokens=True)


def test_the_checkpoints_own_generation_settings_do_not_apply(model, processor, questions):
    plain = evaluate(model, processor, questions, **SETTINGS)
    state = torch.get_rng_state()
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=1, max_length=3,
        eos_token_id=model.generation_config.eos_token_id,
    )  # fmt: skip
    model.generation_config = own
    assert evaluate(model, processor, questions, **SETTINGS) == plain
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_placeholder_is_never_written(model, processor, questions):
    plain = evaluate(model, processor, questions[:3], **SETTINGS)
    wanted = torch.zeros(model.config.text_config.vocab_size)
    wanted[model.config.image_token_id] = 1000.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + wanted)
    assert evaluate(model, processor, questions[:3], **SETTINGS) == plain


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model, processor, questions, training, monkeypatch):
    model.train(training)
    own = model.generation_config
    evaluate(model, processor, questions[:1], **SETTINGS)
    assert (model.training, model.generation_config) == (training, own)

    def fail(**_):
        assert not model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(model, processor, questions[:1], **SETTINGS)
    assert (model.training, model.generation_config) == (training, own)
    assert not torch.is_inference_mode_enabled()


def scripted(processor, texts):
    """A ``generate`` that writes these texts, one to a row, ended and padded as generate does it."""

    def generate(**inputs):
        rows = [processor.tokenizer(text)["input_ids"] for text in texts]
        width = max(len(row) for row in rows)
        pad = processor.tokenizer.pad_token_id
        rows = [row + [pad] * (width - len(row)) for row in rows]
        return torch.cat([inputs["input_ids"], torch.tensor(rows)], dim=1)

    return generate


def test_completions_are_cut_at_their_end_and_scored(model, processor, questions, monkeypatch):
    rows = [question for question in questions if len(question.options) > 2][:3]
    wrong = "A" if rows[1].answer != "A" else "B"
    texts = [
        f"<think>bright</think><answer>{rows[0].answer}</answer><|im_end|>",
        f"<answer>{wrong}</answer><|im_end|>",
        "<think>" + "bright " * 40,
    ]
    # One batch in this very order, whatever the prompts' lengths.
    monkeypatch.setattr(evaluation, "_lengths", lambda *_: [3, 2, 1])
    monkeypatch.setattr(model, "generate", scripted(processor, texts))
    right, mistaken, endless = evaluate(model, processor, rows, **SETTINGS)
    assert (right.outcome, right.correct, right.format_ok, right.finished) == (AnswerOutcome.CORRECT, True, True, True)
    assert right.letter == rows[0].answer
    assert right.tokens == len(processor.tokenizer(texts[0])["input_ids"])
    assert "<think>" in right.completion
    assert "<|" not in right.completion
    assert (mistaken.outcome, mistaken.letter, mistaken.format_ok) == (AnswerOutcome.WRONG, wrong, False)
    assert (endless.outcome, endless.finished, endless.correct) == (AnswerOutcome.TRUNCATED, False, False)
    (mistaken,) = evaluate_one(model, processor, rows[1], texts[1], monkeypatch, thinking=False)
    assert mistaken.format_ok


def evaluate_one(model, processor, question, text, monkeypatch, thinking):
    monkeypatch.setattr(evaluation, "_lengths", lambda *_: [1])
    monkeypatch.setattr(model, "generate", scripted(processor, [text]))
    return evaluate(model, processor, [question], **SETTINGS | {"thinking": thinking})


def test_both_prompts_are_the_training_prompts(model, processor, questions, monkeypatch):
    asked = []
    monkeypatch.setattr(model, "generate", lambda **inputs: asked.append(inputs) or inputs["input_ids"])
    for thinking in (True, False):
        evaluate(model, processor, questions[:1], **SETTINGS | {"thinking": thinking})
        row = to_dataset(questions[:1], thinking)[0]
        row["prompt"][0]["content"][0]["image"] = row["image"]
        trained = processor.apply_chat_template(
            [row["prompt"]], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(asked[-1]["input_ids"], trained["input_ids"])
        assert torch.equal(asked[-1]["pixel_values"], trained["pixel_values"])
    assert not torch.equal(asked[0]["input_ids"], asked[1]["input_ids"])


def test_image_size_reaches_the_model(model, processor, questions, monkeypatch):
    grids = []
    monkeypatch.setattr(
        model, "generate", lambda **inputs: grids.append(inputs["image_grid_thw"].tolist()) or inputs["input_ids"]
    )
    for size in (0, 96):
        evaluate(model, processor, questions[:1], **SETTINGS, pictures=Pictures(size))
    assert grids[0] != grids[1]
    assert grids[1] == [[1, 12, 12]]


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_an_evaluation_that_was_cut_off_goes_on_and_its_records_are_the_same(
    model, processor, questions, tmp_path, monkeypatch, torn
):
    whole = evaluate(model, processor, questions, **SETTINGS)
    kept = tmp_path / "evaluation/untrained.jsonl"

    def stop(done, total):
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, questions, **SETTINGS, kept=kept, progress=stop)
    if torn:  # killed while a batch was being written
        kept.write_bytes(kept.read_bytes()[:-torn])
    rows = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: rows.append(len(inputs["input_ids"])) or generate(**inputs))
    assert evaluate(model, processor, questions, **SETTINGS, kept=kept) == whole
    assert rows == ([5, 4] if torn else [4])
    assert evaluate(model, processor, questions, **SETTINGS, kept=kept) == whole and len(rows) == 1 + bool(torn)
    again = evaluate(model, processor, questions, **SETTINGS | {"max_tokens": 5}, kept=kept)  # something else is asked
    assert len(again) == 14 and len(rows) == 4 + bool(torn)


def test_processes_share_the_batches_and_leave_one_file(model, processor, questions, tmp_path, monkeypatch):
    """Two processes, one after the other: the second finds the first's answers beside its own, and all are in one."""
    whole, kept = evaluate(model, processor, questions, **SETTINGS), tmp_path / "untrained.jsonl"
    gathered = [{}]
    monkeypatch.setattr(evaluation, "gather_object", lambda own: [*gathered, *own])
    told = []
    for number in (1, 0):
        accelerator = SimpleNamespace(process_index=number, num_processes=2)
        if number:
            with pytest.raises(KeyError):  # nobody has answered the others'
                evaluate(model, processor, questions, **SETTINGS, kept=kept, accelerator=accelerator,
                         progress=lambda *state: told.append(state))  # fmt: skip
            assert [path.name for path in tmp_path.iterdir()] == ["untrained.1.jsonl"] and told == [(5, 14)]
            continue
        assert evaluate(model, processor, questions, **SETTINGS, kept=kept, accelerator=accelerator) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["untrained.jsonl"]
    assert evaluation.read_answers(kept) == whole
    monkeypatch.setattr(model, "generate", None)  # all is known
    assert evaluate(model, processor, questions, **SETTINGS, kept=kept) == whole


def test_processes_in_step_draw_equally_often_and_as_many():
    batches, both = [[0, 1, 2], [3, 4, 5], [6, 7]], {}
    for number in (0, 1):
        both[number] = list(evaluation._share(batches, number, 2, {0, 1, 2}, in_step=True))
    assert both[0] == [(0, [0, 1, 2], [0, 1, 2]), (2, [6, 7], [6, 7, 0])]
    assert both[1] == [(1, [3, 4, 5], [3, 4, 5]), (3, [], [0, 1, 2])]
    assert list(evaluation._share(batches, 0, 2, {0, 1, 2}, in_step=False)) == [(2, [6, 7], [6, 7])]


def test_progress_is_told_after_every_batch(model, processor, questions):
    told = []
    evaluate(model, processor, questions, **SETTINGS, progress=lambda *state: told.append(state))
    assert told == [(5, 14), (10, 14), (14, 14)]
    assert evaluate(model, processor, [], **SETTINGS) == []


def test_batches_hold_similar_lengths_longest_first_and_lose_nothing():
    batches = length_batches([3, 9, 9, 1, 5], 2)
    assert batches == [[1, 2], [4, 0], [3]]
    with pytest.raises(ValueError, match="batch_size: 0"):
        length_batches([1], 0)


def test_trim_keeps_the_end_and_nothing_behind_it():
    completion, finished = trim([5, 2, 9, 2, 9], [9, 7])
    assert (completion, finished) == ([5, 2, 9], True)
    completion, finished = trim([5, 2], [9])
    assert (completion, finished) == ([5, 2], False)


def test_samples_of_a_question_read_it_once(model, processor, questions, monkeypatch):
    asked = {"thinking": True, "max_tokens": 6, "batch_size": 8, "temperature": 1.0, "samples": 4}
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    shared = [answer.completion for answer in evaluate(model, processor, questions[:4], **asked)]
    hook.remove()
    assert max(rows for rows, tokens in lengths if tokens > 1) == 2 < max(rows for rows, _ in lengths) == 8
    monkeypatch.setattr(answering.SharedPrompts, "refused", "no", raising=False)
    monkeypatch.setattr(answering.SharedPrompts, "__init__", lambda self: setattr(self, "_anyone", bool))
    assert [answer.completion for answer in evaluate(model, processor, questions[:4], **asked)] == shared


def test_samples_follow_their_seed_alone(model, processor, questions, tmp_path):
    asked = {"thinking": True, "max_tokens": 6, "batch_size": 4, "temperature": 1.0, "samples": 3}

    def records(seed, **more):
        torch.manual_seed(seed + 10)
        state = torch.get_rng_state()
        given = evaluate(model, processor, questions, **asked, seed=seed, **more)
        assert torch.equal(torch.get_rng_state(), state)
        return given

    first = records(0)
    assert [(a.question_id, a.sample) for a in first] == [(q.id, k) for q in questions for k in range(3)]
    assert len({a.completion for a in first[:3]}) > 1
    assert evaluate(model, processor, questions, **asked) == first  # whatever was drawn before
    assert records(1) != first
    said = [a.completion for a in evaluate(model, processor, questions[:1], **asked | {"samples": 8})]
    assert said[:4] != said[4:]  # each batch has draws of its own

    def stop(done, total):
        assert total == 42
        if done >= 20:
            raise KeyboardInterrupt

    kept = tmp_path / "untrained.jsonl"
    with pytest.raises(KeyboardInterrupt):
        records(0, kept=kept, progress=stop)
    assert records(0, kept=kept) == first  # samples, too, go on as if never stopped
    with pytest.raises(ValueError, match="temperature: -1"):
        evaluate(model, processor, questions, **SETTINGS, temperature=-1.0)
    with pytest.raises(ValueError, match="samples: 3 at temperature 0, expected 1, or a temperature above 0"):
        evaluate(model, processor, questions, **SETTINGS, samples=3)


def test_another_prompt_takes_the_place_of_the_training_prompt(model, processor, questions):
    seen = []
    record = processor.apply_chat_template
    spy = lambda messages, **options: seen.append(messages) or record(messages, **options)  # noqa: E731
    asked = [vqa_messages(f"Other {q.question}", q.options, False) for q in questions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "apply_chat_template", spy)
        evaluate(model, processor, questions, thinking=True, max_tokens=2, batch_size=4, messages=asked)
    assert seen == asked


def test_a_limit_of_nothing_is_refused(model, processor, questions):
    with pytest.raises(ValueError, match="max_tokens: 0"):
        evaluate(model, processor, questions, **SETTINGS | {"max_tokens": 0})


def test_the_dataset_makes_what_training_reads(questions):
    decoded = []
    dataset = to_dataset(questions, False, lambda path: decoded.append(path) or load_image(path, 32))
    assert len(dataset) == len(questions)
    row = dataset[0]
    assert set(row) == {"prompt", "image", "question", "options", "answer", "id", "modality"}
    assert (row["image"].mode, row["image"].size) == ("RGB", (32, 32))
    assert row["prompt"] == vqa_messages(questions[0].question, questions[0].options, thinking=False)
    assert (row["options"], row["answer"], row["id"]) == (
        list(questions[0].options), questions[0].answer, questions[0].id,
    )  # fmt: skip
    assert len(decoded) == 1  # lazily: one row, one picture
    group = dataset.__getitems__([3] * 8)
    assert len(group) == 8
    assert len(decoded) == 2  # a group of generations decodes its picture once
    assert to_dataset(questions, thinking=True)[0]["image"].size == (101, 37)
