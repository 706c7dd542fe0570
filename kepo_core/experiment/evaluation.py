"""Model + questions → one record per question, decoded and read by the training parser."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kepo_core.data.images import ReadPicture, load_image
from kepo_core.data.records import Answer, AnswerOutcome, Question
from kepo_core.task.prompts import Messages, vqa_messages
from kepo_core.task.rewards import score

#: Called with (questions answered so far, questions in all) after every batch.
Progress = Callable[[int, int], None]


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    thinking: bool,
    max_tokens: int,
    batch_size: int,
    pictures: ReadPicture = load_image,
    messages: Sequence[Messages] | None = None,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    kept: Path | None = None,
    answer_format: str = "paper",
) -> list[Answer]:
    """Ask ``model`` every question and score what it says; records come in the order of ``questions``.

    Decoding has a generation configuration of its own: penalties or sampling that a checkpoint carries do not
    apply. It is greedy unless ``temperature`` says otherwise. The prompt is the training prompt unless ``messages``
    says otherwise. Batches hold questions of similar length, padded on the left,
    and a greedy answer does not depend on its neighbours beyond floating-point rounding. The model is left in the
    mode (train or eval) and with the configuration it came in, and so is torch's random state: what a batch samples
    follows from ``seed`` and the batch's number.

    Args:
        model: a Qwen3-VL or another image-text model with ``generate``.
        processor: its processor, with a chat template.
        thinking: which prompt and format; see ``prompts.vqa_messages``.
        max_tokens: most tokens of a completion; one that reaches it without an end-of-text token is not finished.
        batch_size: questions per batch.
        pictures: reads the picture at a path, as RGB.
        messages: another prompt per question, e.g. a hint-aware one.
        temperature: of sampling; 0 decodes greedily.
        samples: answers per question, for mean@k; they follow each other in the records. More than 1 needs a
            temperature.
        seed: names what is sampled.
        progress: told after every batch how far it is.
        kept: a file that keeps the answers as they come. An evaluation that was cut off goes on behind its last whole
            batch, and as batches are formed before, its records are those of one that was not.
        answer_format: what counts as an answer; see ``rewards``.
    """
    if samples < 1 or (samples > 1 and not temperature):
        raise ValueError(f"samples: {samples} at temperature {temperature:g}, expected 1, or more with a temperature.")
    asked_as = messages or [vqa_messages(q.question, q.options, thinking) for q in questions]
    texts = [_prompt_text(processor, prompt) for prompt in asked_as]
    lengths = _lengths(processor, texts)
    settings = [
        thinking,
        max_tokens,
        batch_size,
        temperature,
        samples,
        seed,
        texts,
        [(q.id, q.answer) for q in questions],
        answer_format,
    ]
    file = AnswerFile(kept, settings) if kept is not None else None
    answers: dict[int, Answer] = {}  # by row: question number × samples + sample
    with _decoding(model, processor, max_tokens, temperature) as stop_tokens:
        rows = [length for length in lengths for _ in range(samples)]
        for number, batch in enumerate(length_batches(rows, batch_size)):
            if file is not None and file.known.keys() >= set(batch):
                answers |= {i: file.known[i] for i in batch}
                continue
            asked = [questions[i // samples] for i in batch]
            with _seeded(f"{seed}/evaluation/{number}", model.device):
                completions = _generate(model, processor, [texts[i // samples] for i in batch], asked, pictures)
            now = {
                i: _record(processor, question, tokens, stop_tokens, thinking, answer_format, sample=i % samples)
                for i, question, tokens in zip(batch, asked, completions, strict=True)
            }
            answers |= now
            if file is not None:
                file.add(now)
            if progress is not None:
                progress(len(answers), len(rows))
    return [answers[i] for i in range(len(answers))]


class AnswerFile:
    """Answers by the number of their row, on disk as they come: a line of JSON each, below a line of identity.

    ``known`` holds what an earlier evaluation of the same ``settings`` left, but for a line that it did not finish; a
    file of other settings is begun anew.
    """

    def __init__(self, path: Path, settings: Any) -> None:
        self.path, self.known = path, dict[int, Answer]()
        identity = json.dumps({"asked": hashlib.sha256(json.dumps(settings).encode()).hexdigest()}) + "\n"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines[1:] if line.endswith("\n")] if lines[:1] == [identity] else []
        for line in whole:
            row = json.loads(line)
            number = row.pop("number")
            self.known[number] = Answer(**row | {"outcome": AnswerOutcome(row["outcome"])})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join([identity, *whole]), encoding="utf-8")

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Append ``answers`` and see that they reach the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"number": i, **asdict(answer)}) + "\n" for i, answer in answers.items()))
            file.flush()
            os.fsync(file.fileno())


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of ``lengths`` in batches of similar length, the longest first: too large a batch fails at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}, expected at least 1.")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def trim(tokens: Tensor, stop_tokens: Sequence[int]) -> tuple[Tensor, bool]:
    """Cut ``tokens`` (T,) after the first stop token → (completion with it, whether there was one).

    What ``generate`` fills in behind the end, so that rows of a batch are equally long, is no part of a completion.
    """
    ends = torch.isin(tokens, torch.tensor(stop_tokens, device=tokens.device)).nonzero()
    return (tokens[: int(ends[0]) + 1], True) if len(ends) else (tokens, False)


def _prompt_text(processor: Any, messages: Messages) -> str:
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _lengths(processor: Any, texts: Sequence[str]) -> list[int]:
    """Prompt lengths in tokens, each image counted as one: pictures are not opened for an ordering."""
    return [len(ids) for ids in processor.tokenizer(list(texts))["input_ids"]] if texts else []


@contextmanager
def _seeded(name: str, device: torch.device) -> Iterator[None]:
    """Torch's random state, the CPU's and ``device``'s, named by ``name`` for a while."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


@contextmanager
def _decoding(model: Any, processor: Any, max_tokens: int, temperature: float) -> Iterator[list[int]]:
    """Evaluation mode and a plain configuration on ``model`` for a while; yields the stop tokens.

    The configuration is exchanged on the model, since ``generate`` fills whatever an argument leaves open from it.
    What ends a text is no matter of taste: the checkpoint's own stop tokens count beside the tokenizer's.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}, expected at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature}, expected 0 (greedy) or more.")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    own, was_training = model.generation_config, model.training
    tokenizer = processor.tokenizer
    declared = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stop_tokens = sorted({token for token in (*declared, tokenizer.eos_token_id) if token is not None})
    image_token = getattr(model.config, "image_token_id", None)
    model.generation_config = GenerationConfig(
        **sampling,
        max_new_tokens=max_tokens,
        eos_token_id=stop_tokens,
        pad_token_id=tokenizer.pad_token_id,
        # As in training: a sampled image placeholder would stand for no image.
        suppress_tokens=None if image_token is None else [image_token],
    )
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what it leaves in caches cannot be trained with
            yield stop_tokens
    finally:
        model.generation_config = own
        model.train(was_training)


def _generate(
    model: Any, processor: Any, texts: Sequence[str], questions: Sequence[Question], pictures: ReadPicture
) -> Tensor:
    """Completions (B, T) of the batch, padded behind their ends."""
    images = [[pictures(question.image)] for question in questions]
    inputs = processor(text=list(texts), images=images, padding=True, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    output: Tensor = model.generate(**inputs)
    return output[:, inputs["input_ids"].shape[1] :]


def _record(
    processor: Any,
    question: Question,
    tokens: Tensor,
    stop_tokens: Sequence[int],
    thinking: bool,
    answer_format: str,
    sample: int,
) -> Answer:
    completion, finished = trim(tokens, stop_tokens)
    text = str(processor.tokenizer.decode(completion, skip_special_tokens=True))
    result = score(text, question.answer, question.options, thinking=thinking, finished=finished,
                   answer_format=answer_format)  # fmt: skip
    return Answer(
        question_id=question.id,
        modality=question.modality,
        question_type=question.question_type,
        completion=text,
        outcome=result.outcome,
        letter=result.letter,
        correct=result.accuracy == 1,
        format_ok=result.format_ok,
        tokens=len(completion),
        finished=finished,
        sample=sample,
    )
