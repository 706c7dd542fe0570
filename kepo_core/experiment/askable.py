"""Whether a question can be put to the student: tried with its very processor and tokenizer before any model call."""

from PIL import Image

from kepo_core.data.images import shown_size
from kepo_core.data.inspection import Decodable, Inspector
from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.records import Question
from kepo_core.experiment.models import load_processor, read_config
from kepo_core.params import Params
from kepo_core.task.prompts import render_question, vqa_messages


class Askable:
    """Whether a question's picture is decoded, and its prompt read, as a run needs it; what is not goes to the ledger.

    Prompt and longest completion, in training or evaluation, fit the student's context.

    Every prompt is tokenized. The image processor sees one picture of each size, as nothing else of an RGB picture can
    make it fail. 3,000 questions take a third of a second of a core, decoding apart (`Inspector`).
    """

    def __init__(self, params: Params, inspector: Inspector, ledger: Ledger) -> None:
        self.params, self.inspector, self.ledger = params, inspector, ledger
        self.decodable = Decodable(ledger, inspector)
        self.processor = processor = load_processor(params.student)
        added = processor.tokenizer.added_tokens_decoder.values()
        own = {str(token.content) for token in added if token.special}
        self._special = sorted(own | {str(getattr(processor, "image_token", "<image>"))})
        text = read_config(params.student).get_text_config()
        self._context: int = getattr(text, "max_position_embeddings", None) or processor.tokenizer.model_max_length
        self._completion = max(params.of_trl("max_completion_length"), params.eval_max_tokens)
        self._sizes: dict[tuple[int, int], int | str] = {}  # size → its tokens, or why the processor refuses it

    def __call__(self, question: Question) -> bool:
        """False after noting it in the ledger, which raises if it is strict."""
        if not self.decodable(question):
            return False
        try:
            self._check_length(question, self._text_tokens(question) + self._picture_tokens(question))
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
                f"Question {question.id}: its text contains {found}, a token of the student's own, expected words.",
            )
        try:
            return self._count(self._prompt(question.question, question.options))
        except Exception as error:  # of any kind: whatever it is, a run would end in it
            raise RowError(
                "its text cannot be tokenized", f"Question {question.id}: its text cannot be tokenized ({error})."
            ) from error

    def _picture_tokens(self, question: Question) -> int:
        seen = self.inspector(question.image)
        size = shown_size((seen.width, seen.height), self.params.image_size, self.params.image_fit)
        if size not in self._sizes:
            self._sizes[size] = self._tried(size)
        found = self._sizes[size]
        if isinstance(found, str):
            raise RowError(
                "the processor refuses its image",
                f"Question {question.id}: image {question.image} of {size[0]}×{size[1]} pixels is refused by the "
                f"student's processor ({found}). Another image_size or image_fit may help.",
            )
        return found

    def _check_length(self, question: Question, prompt: int) -> None:
        if prompt + self._completion > self._context:
            raise RowError(
                "longer than the student's context",
                f"Question {question.id}: its prompt of {prompt:,} tokens and a completion of up to "
                f"{self._completion:,} are longer than the student's context of {self._context:,} tokens. A smaller "
                "image_size, max_completion_length or eval_max_tokens may help.",
            )

    def _tried(self, size: tuple[int, int]) -> int | str:
        """How many tokens a picture of this size adds to a prompt, or why the processor refuses it."""
        prompt = self._prompt("", ())
        try:
            read = self.processor(text=[prompt], images=[[Image.new("RGB", size)]], return_tensors="pt")
        except Exception as error:  # as above
            return " ".join(str(error).split()) or type(error).__name__
        return len(read["input_ids"][0]) - self._count(prompt)

    def _count(self, text: str) -> int:
        return len(self.processor.tokenizer(text)["input_ids"])

    def _prompt(self, question: str, options: tuple[str, ...]) -> str:
        messages = vqa_messages(question, options, self.params.thinking)
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
