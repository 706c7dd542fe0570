"""Whether the models can read a question: checked with their processors and tokenizers before any model is called."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from kepo_core.data.images import shown_size
from kepo_core.data.inspection import Decodable, Inspector
from kepo_core.data.ledger import Ledger, RowError, reason_of
from kepo_core.data.records import Question
from kepo_core.experiment.methods import needs_teacher
from kepo_core.experiment.models import load_processor, read_config
from kepo_core.method.hinted import FAILURE_TOKENS
from kepo_core.params import Params
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import Messages, render_question, vqa_messages

#: The shortest question that separates the words before and after it.
_SHORTEST = {"question": "?", "options": [], "answer": "A"}


@dataclass
class _Reader:
    """A model's processor, its context length in tokens, and the tokens of a picture of each size."""

    role: str
    processor: Any
    context: int
    pictures: dict[tuple[int, int], int | str] = field(default_factory=dict)  # tokens, or why it is refused

    def prompt(self, messages: Messages) -> str:
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def count(self, text: str) -> int:
        return len(self.processor.tokenizer(text)["input_ids"])

    def picture(self, size: tuple[int, int]) -> int | str:
        if size not in self.pictures:
            prompt = self.prompt(vqa_messages("", (), True))
            try:
                read = self.processor(text=[prompt], images=[[Image.new("RGB", size)]], return_tensors="pt")
                self.pictures[size] = len(read["input_ids"][0]) - self.count(prompt)
            except Exception as error:  # of any type: a run would fail with it
                self.pictures[size] = reason_of(error)
        return self.pictures[size]


@dataclass(frozen=True)
class _Ask:
    """One of a question's prompts: the model that reads it, and its additional tokens over the plain prompt."""

    reader: _Reader
    sees: _Reader  # its processor prepares the picture
    prompt: str
    further: int
    answer: int  # tokens, at most
    to_change: str


class Askable:
    """Whether a run can decode a question's picture and read its prompts; refused questions go to the ledger.

    Checked are all prompts that training makes of a question: the plain one (for the teacher, too, if it guides), the
    one that requests a hint (with the longest attempt that it may show), and the one with the longest hint. Each must
    fit, with its longest answer, the context of its model. An evaluation (`in_evaluation`) has only the plain prompt. A
    served teacher is not checked: its processor is not available.

    Every plain prompt is tokenized; the others differ only in instructions, whose tokens are counted once. The image
    processors get one picture of each size: nothing else of an RGB picture can make them fail. A teacher with the
    student's image processor is not checked again. 3,000 questions take half a second of a core, each further picture
    size two milliseconds, plus decoding (`Inspector`).
    """

    def __init__(self, params: Params, inspector: Inspector, ledger: Ledger) -> None:
        self.params, self.inspector, self.ledger = params, inspector, ledger
        self.decodable = Decodable(ledger, inspector)
        self._student = _reader(params, "student")
        local = needs_teacher(params) and not params.teacher_url
        self._teacher = _reader(params, "teacher") if local else None
        if self._teacher and _alike(self._teacher.processor, self._student.processor):
            self._teacher.pictures = self._student.pictures
        self._special = sorted({token for reader in self._readers for token in _special_tokens(reader.processor)})
        longest = max(params.of_trl("max_completion_length"), params.eval_max_tokens)
        larger = ", or a larger vllm_max_model_length," if params.of_trl("use_vllm") else ""
        change = f"A smaller image_size, max_completion_length or eval_max_tokens{larger} may help."
        self._plain = _Ask(self._student, self._student, "prompt", 0, longest, change)
        self._asks = [self._plain, *self._further()]

    @property
    def _readers(self) -> list[_Reader]:
        return [self._student, self._teacher] if self._teacher else [self._student]

    def __call__(self, question: Question) -> bool:
        """False for a refused question, after noting it in the ledger, which raises if it is strict."""
        return self._fits(question, self._asks)

    def in_evaluation(self, question: Question) -> bool:
        """As a call, for a question that is not trained on."""
        return self._fits(question, [self._plain])

    def _further(self) -> list[_Ask]:
        params, student, teacher = self.params, self._student, self._teacher
        plain = student.count(student.prompt(vqa_messages("?", (), params.thinking)))
        longest, change = params.of_trl("max_completion_length"), "A smaller image_size, max_completion_length"
        asks = []
        if teacher and (params.method == "gkd" or params.distill):
            asks.append(_Ask(teacher, student, "prompt", 0, longest, f"{change} may help."))
        if params.method == "kepo" and params.explore:
            task = MultipleChoice(params.hint_context, params.thinking, params.answer_format)
            about = params.hint_source == "failure"
            ask = task.ask_about(_SHORTEST, "") if about else task.ask(_SHORTEST)
            hint, change = params.hint_max_tokens, f"{change} or hint_max_tokens may help."
            told = student.count(student.prompt(task.tell(_SHORTEST, ""))) - plain + (0 if ask is None else hint)
            asks.append(_Ask(student, student, "prompt with a hint", told, longest, change))
            if teacher and ask is not None:
                attempt = min(params.of_trl("max_completion_length"), FAILURE_TOKENS) if about else 0
                asked = teacher.count(teacher.prompt(ask)) - plain + attempt
                asks.append(_Ask(teacher, teacher, "prompt that asks for a hint", asked, hint, change))
        return asks

    def _fits(self, question: Question, asks: list[_Ask]) -> bool:
        if not self.decodable(question):
            return False
        try:
            text = self._text_tokens(question)
            for ask in asks:
                self._check(ask, question, text)
        except RowError as error:
            self.ledger.drop(error)
            return False
        return True

    def _text_tokens(self, question: Question) -> int:
        said = render_question(question.question, question.options)
        found = next((token for token in self._special if token in said), None)
        if found:
            raise RowError(
                "a special token in its text",
                f"Question {question.id}: its text contains {found}, a special token of the model, expected words.",
            )
        try:
            messages = vqa_messages(question.question, question.options, self.params.thinking)
            return self._student.count(self._student.prompt(messages))
        except Exception as error:  # as above
            raise RowError(
                "its text cannot be tokenized",
                f"Question {question.id}: its text cannot be tokenized ({reason_of(error)}).",
            ) from error

    def _check(self, ask: _Ask, question: Question, text: int) -> None:
        seen = self.inspector(question.image)
        size = shown_size((seen.width, seen.height), self.params.image_size, self.params.image_fit)
        picture, role = ask.sees.picture(size), ask.reader.role
        if isinstance(picture, str):
            raise RowError(
                "the processor refuses its image",
                f"Question {question.id}: the {ask.sees.role}'s processor refuses image {question.image} of "
                f"{size[0]}×{size[1]} pixels ({picture}). Another image_size or image_fit may help.",
            )
        length = text + picture + ask.further
        if length + ask.answer > ask.reader.context:
            raise RowError(
                f"longer than the {role}'s context",
                f"Question {question.id}: its {ask.prompt} of {length:,} tokens and an answer of up to {ask.answer:,} "
                f"are longer than the {role}'s context of {ask.reader.context:,} tokens. {ask.to_change}",
            )


def _reader(params: Params, role: str) -> _Reader:
    name = getattr(params, role)
    processor = load_processor(name, role)
    text = read_config(name, role).get_text_config()
    context = getattr(text, "max_position_embeddings", None) or processor.tokenizer.model_max_length
    if role == "student" and params.of_trl("use_vllm"):
        context = min(context, params.of_trl("vllm_max_model_length") or context)
    return _Reader(role, processor, context)


def _alike(one: Any, other: Any) -> bool:
    """Whether two processors treat pictures alike, for example those of one model family."""
    return type(one) is type(other) and one.image_processor.to_dict() == other.image_processor.to_dict()


def _special_tokens(processor: Any) -> list[str]:
    added = processor.tokenizer.added_tokens_decoder.values()
    own = [str(token.content) for token in added if token.special]
    return [*own, str(getattr(processor, "image_token", "<image>"))]
