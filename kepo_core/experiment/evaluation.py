"""Model + questions → one record per answer, read by the parser of the training rewards."""

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from kepo_core.data.images import ReadPicture, load_image
from kepo_core.data.records import Answer, AnswerOutcome, Question
from kepo_core.experiment.answering import drawing, in_step
from kepo_core.files import in_place_of
from kepo_core.method.vllm_rollouts import CheckedVLLM
from kepo_core.task.prompts import Messages, vqa_messages
from kepo_core.task.rewards import score

#: Sequences per call of vLLM, which makes its own batches: fewer would leave it idle.
VLLM_AT_ONCE = 256

#: Called with (answers so far, all answers) after every batch.
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
    accelerator: Any = None,
    share: tuple[int, int] = (0, 1),
) -> list[Answer]:
    """Ask ``model`` every question and score its answers; records are in the order of ``questions``.

    Decoding ignores the checkpoint's generation configuration (penalties, sampling): it is greedy, or sampling with
    ``temperature``. The prompt is the training prompt, or that of ``messages``. Batches have questions of similar
    length, padded on the left; a greedy answer does not depend on its neighbours beyond floating-point rounding. The
    model's mode (train or eval), its configuration and torch's random state are unchanged afterwards. Samples depend
    on ``seed`` and the batch's number; with vLLM also on the order in which the engine works.

    Args:
        model: a Qwen3-VL or another image-text model with ``generate``, or a `CheckedVLLM`.
        processor: its processor, with a chat template.
        thinking: prompt and format with or without explicit reasoning; see ``prompts.vqa_messages``.
        max_tokens: most tokens of a completion; one that reaches it without an end-of-text token is not finished.
        batch_size: questions per batch; at least `VLLM_AT_ONCE` for vLLM.
        pictures: reads the picture at a path, as RGB.
        messages: another prompt per question, for example a hint-aware one.
        temperature: of sampling; 0 decodes greedily.
        samples: answers per question, for mean@k; consecutive in the records. More than 1 needs a temperature.
        seed: of sampling.
        progress: called after every batch.
        kept: a file for partial results. An interrupted evaluation continues after its last whole batch; batches are
            formed in advance, so the records are the same as without the interruption. Each further process writes
            its own file beside it, until ``kept`` has all answers.
        accelerator: of several processes that all call this: each answers its share of the batches, and all return
            all answers.
        answer_format: what counts as an answer; see ``rewards``.
        share: (number, of), without an ``accelerator``: this process answers only its share of the batches, beside
            other processes with the same ``kept``, and returns the answers that it knows.
    """
    if samples < 1 or (samples > 1 and not temperature):
        raise ValueError(f"samples: {samples} at temperature {temperature:g}, expected 1, or a temperature above 0.")
    asked_as = messages or [vqa_messages(q.question, q.options, thinking) for q in questions]
    texts = [_prompt_text(processor, prompt) for prompt in asked_as]
    lengths = _lengths(processor, texts)
    if isinstance(model, CheckedVLLM):
        batch_size = max(batch_size, VLLM_AT_ONCE)
    asked = [(q.id, q.answer) for q in questions]
    settings = [thinking, max_tokens, batch_size, temperature, samples, seed, texts, asked, answer_format]
    if isinstance(model, CheckedVLLM):
        settings.append("vllm")
    number, of = share if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    file = AnswerFile(kept, settings, number) if kept is not None else None
    batches = length_batches([length for length in lengths for _ in range(samples)], batch_size)
    answers: dict[int, Answer] = {} if file is None else dict(file.known)  # by row: question number × samples + sample
    with drawing(model, processor, max_tokens, temperature) as (stop_tokens, draw):
        for name, batch, filled in _share(batches, number, of, answers, in_step=of > 1 and in_step(model)):
            rows = [questions[i // samples] for i in filled]
            drawn = draw(
                [texts[i // samples] for i in filled], [pictures(q.image) for q in rows], f"{seed}/evaluation/{name}"
            )
            now = {
                i: _record(processor, question, tokens, stop_tokens, thinking, answer_format, sample=i % samples)
                for i, question, tokens in zip(batch, rows, drawn, strict=False)
            }
            answers |= now
            if file is not None:
                file.add(now)
            if progress is not None:
                progress(len(answers), len(lengths) * samples)
    if share != (0, 1):
        return [answers[i] for i in sorted(answers)]
    for part in gather_object([answers]) if of > 1 else ():
        answers |= part
    if file is not None and number == 0 and (of > 1 or len(parts(file.path)) > 1):
        file.take_all({i: answers[i] for batch in batches for i in batch})  # as one process would have left them
    return [answers[i] for i in range(len(lengths) * samples)]


def _share(
    batches: Sequence[list[int]], number: int, of: int, known: Container[int], *, in_step: bool
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Process ``number``'s batches that are not ``known`` yet: (the batch's number, its rows, the rows to sample).

    Processes ``in_step`` get equally many batches of equally many rows; samples beyond a batch's own rows are unused.
    """
    turns = -(-len(batches) // of)
    for place in range(number, turns * of, of):
        batch = batches[place] if place < len(batches) else []
        if in_step:
            yield place, batch, batch + batches[0][: len(batches[0]) - len(batch)]
        elif not all(row in known for row in batch):
            yield place, batch, batch


class AnswerFile:
    """Answers by row number, written to disk after each batch: a first line of identity, then one JSON line each.

    ``known`` has the answers of an earlier evaluation with the same ``settings``, of all its processes, without
    unfinished lines. A file of other settings is overwritten.
    """

    def __init__(self, path: Path, settings: Any, process: int = 0) -> None:
        self._identity = json.dumps({"asked": hashlib.sha256(json.dumps(settings).encode()).hexdigest()}) + "\n"
        self.path = path.with_stem(f"{path.stem}.{process}") if process else path
        self.known = dict[int, Answer]()
        for file in parts(path):
            self.known |= _read(file, self._identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = _read(self.path, self._identity) if self.path.exists() else {}
        self._hold(own)

    def _hold(self, answers: Mapping[int, Answer]) -> None:
        with in_place_of(self.path) as partial:
            partial.write_text(self._identity + _lines(answers), encoding="utf-8")

    def take_all(self, answers: Mapping[int, Answer]) -> None:
        """Write ``answers`` to this file and delete the files of the other processes."""
        self._hold(answers)
        for file in parts(self.path)[1:]:
            file.unlink()

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Append ``answers`` and flush them to disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(answers))
            file.flush()
            os.fsync(file.fileno())


def parts(path: Path) -> list[Path]:
    """The existing files of an evaluation's answers: its own and those of further processes."""
    return [file for file in (path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))) if file.exists()]


def answered(path: Path) -> int:
    """Number of answers that an evaluation has written so far; 0 without a file."""
    return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in parts(path))  # the first line is not an answer


def read_answers(path: Path) -> list[Answer]:
    """All answers of a finished evaluation in ``path``, in their order."""
    found = _read(path)
    return [found[number] for number in sorted(found)]


def _read(path: Path, identity: str | None = None) -> dict[int, Answer]:
    """The finished lines of a file of answers; none if the file has another ``identity``."""
    first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    rows = [json.loads(line) for line in lines if line.endswith("\n")] if identity in (None, first) else []
    return {row.pop("number"): Answer(**row | {"outcome": AnswerOutcome(row["outcome"])}) for row in rows}


def _lines(answers: Mapping[int, Answer]) -> str:
    return "".join(json.dumps({"number": i, **asdict(answer)}) + "\n" for i, answer in answers.items())


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of ``lengths`` in batches of similar length, longest first: too large a batch fails at the start."""
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}, expected at least 1.")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def trim(tokens: Sequence[int], stop_tokens: Container[int]) -> tuple[list[int], bool]:
    """Cut ``tokens`` after the first stop token → (completion including it, whether one was found).

    The padding that ``generate`` adds to rows of a batch is not part of a completion.
    """
    end = next((place for place, token in enumerate(tokens) if token in stop_tokens), None)
    return (list(tokens), False) if end is None else (list(tokens[: end + 1]), True)


def _prompt_text(processor: Any, messages: Messages) -> str:
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _lengths(processor: Any, texts: Sequence[str]) -> list[int]:
    """Prompt lengths in tokens, with one token per image: pictures are not opened to sort prompts."""
    return [len(ids) for ids in processor.tokenizer(list(texts))["input_ids"]] if texts else []


def _record(
    processor: Any,
    question: Question,
    tokens: Sequence[int],
    stop_tokens: Container[int],
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
