"""The teacher π_T in this process: it writes hints and answers, and computes hidden states for completions."""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor
from transformers import GenerationConfig, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages
from trl.models import prepare_deepspeed

from kepo_core.method.forward import add_hidden_state_output, check_plain_head, let_generate
from kepo_core.method.shared_prompts import is_sharded
from kepo_core.method.shared_scoring import select_rows, shared_rows
from kepo_core.method.task import Prompt, images_in, markup_of, neutral, outside_thoughts

_HINT = re.compile(r"<hint>((?:(?!<hint>).)*?)</hint>", re.DOTALL)  # the innermost, if they are nested
#: Words that an instruction puts between the tags (``inside <hint> and </hint>``, ``<hint>your hint here</hint>``).
_SPOKEN_OF = {"and", "or", "to", "then", "opening", "closing", "your", "the", "hint", "here", "text", "tag", "tags"}
#: Settings that must be equal for one model to read the image tensors of another.
_IMAGE_FIELDS = (
    "model_input_names",
    "patch_size",
    "merge_size",
    "temporal_patch_size",
    "image_grid_pinpoints",
    "image_mean",
    "image_std",
    "rescale_factor",
)


def parse_hint(text: str, markup: Sequence[str] = ()) -> str | None:
    """The last complete ``<hint>…</hint>`` with a word of its own; None without one.

    Reasoning is removed first (`outside_thoughts`). Earlier pairs of tags may quote the instruction
    (``inside <hint>...</hint> tags: <hint>look left</hint>``), or hold a hint that the teacher then replaced. Later
    pairs may quote it, too (``between <hint> and </hint>``): words of the instruction do not make a hint.

    Every string of ``markup`` (special tokens) and every tag that structures the prompts is removed: a hint cannot
    end the user's turn, refer to an image, or imitate the prompt's tags.
    """
    hints = [neutral(hint, markup) for hint in _HINT.findall(outside_thoughts(text))]
    return next((hint for hint in reversed(hints) if {*re.findall(r"[^\W_]+", hint.lower())} - _SPOKEN_OF), None)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer that is the processor of a text model."""
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


class Teacher:
    """π_T: a frozen language model, with or without vision, in this process.

    Args:
        model: a Hugging Face causal language model or image-text model; this class freezes its parameters.
        processor: its processor or, for a text model, its tokenizer; chat prompts require a chat template.
        batch_size: maximum number of rows in one forward pass or generation.

    Raises:
        ValueError: the model scales or soft-caps its logits, or its head is quantised.

    Example:
    ```python
    >>> from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    >>> from kepo_core import Teacher
    >>> from kepo_core.testbed.embedded import build_tokenizer
    >>> tokenizer = build_tokenizer()
    >>> config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    >>> teacher = Teacher(Qwen3ForCausalLM(config), tokenizer)
    >>> len(teacher.write_hints(["1 + 1 = 2. Write a <hint>...</hint>."], max_tokens=4, seed=0))
    1

    ```
    """

    #: All processes must call it together, because it may be sharded over them.
    collective = True

    def __init__(self, model: Any, processor: Any, batch_size: int = 64) -> None:
        check_plain_head(model, "teacher")
        if not (weight := model.get_output_embeddings().weight).is_floating_point():
            raise ValueError(
                f"the teacher's head is quantised ({weight.dtype}), expected floating point: the divergence uses it"
            )
        self.processor = processor
        self.batch_size = batch_size
        self._model = model.requires_grad_(False).eval()
        self._wrapped = self._model
        self._tokenizer = tokenizer_of(processor)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # as TRL does for the student
        self._markup = markup_of(self._tokenizer)
        self._padded_apart = False  # its head has another number of rows than the student's
        add_hidden_state_output(self._model)
        let_generate(self._model)

    @property
    def model(self) -> Any:
        """π_T itself, the model that was passed, frozen."""
        return self._model

    @property
    def head(self) -> Any:
        """Its output embedding, with ``weight`` (V, H_T) and ``bias``."""
        return self._model.get_output_embeddings()

    def check_fits(self, student: Any, processor: Any, inputs: Collection[str] = ()) -> None:
        """Raise unless the student's tokens and image tensors mean the same to this teacher.

        Heads may be padded to different sizes, as in published checkpoints: the divergence uses the rows of both.

        Args:
            student, processor: the student's model, and its processor or tokenizer.
            inputs: names of the model inputs that the processor makes besides the tokens.

        Raises:
            ValueError: the vocabularies or the image preprocessing differ, a head has too few rows, or the teacher
                does not take an input.
        """
        mine, theirs = self._tokenizer.get_vocab(), tokenizer_of(processor).get_vocab()
        if mine != theirs:
            differing = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
            raise ValueError(
                f"teacher and student have different vocabularies ({len(mine)} and {len(theirs)} entries, "
                f"for example {differing!r}), expected the same tokenizer: distillation compares them token by token"
            )
        sizes = self.head.weight.shape[0], student.get_output_embeddings().weight.shape[0]
        if min(sizes) <= (last := max(mine.values())):
            raise ValueError(
                f"the teacher's head has {sizes[0]} rows and the student's {sizes[1]}, expected more than {last}, the "
                "highest token id"
            )
        self._padded_apart = sizes[0] != sizes[1]
        halves = [getattr(p, "image_processor", None) for p in (self.processor, processor)]
        if halves[1] is not None and halves[0] is None:
            raise ValueError("the student sees pictures but the teacher does not, expected an image-text teacher")
        for name in _IMAGE_FIELDS:
            values = [getattr(half, name, None) for half in halves]
            if values[0] != values[1]:
                raise ValueError(
                    f"the teacher's {name} is {values[0]} and the student's {values[1]}, expected the same: "
                    "the teacher gets the images that were prepared for the student"
                )
        if unknown := sorted(set(inputs) - inspect.signature(type(self._model).forward).parameters.keys()):
            raise ValueError(
                f"the student's processor makes {unknown[0]}, which the teacher ({type(self._model).__name__}) "
                "does not take, expected a teacher of the student's family: it gets the student's inputs"
            )

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ``ValueError`` if the teacher cannot be prompted in this form (text or chat)."""
        if not isinstance(prompt, str) and getattr(self.processor, "chat_template", None) is None:
            raise ValueError("the teacher's tokenizer has no chat template, expected one: the prompts are chats")

    def prepare(self, accelerator: Any, *, deepspeed: bool = False, fsdp: bool = False) -> None:
        """Put the model on the student's devices, sharded if the student is; a quantised one stays whole everywhere."""
        if getattr(self._model, "is_quantized", False):
            return
        if deepspeed:
            if self._padded_apart:
                raise ValueError(
                    "the teacher's head has another number of rows than the student's, expected the same number with "
                    "DeepSpeed, which shards both: use FSDP2 or DDP"
                )
            self._wrapped = prepare_deepspeed(self._model, accelerator)
        elif fsdp:
            # Layer by layer, as accelerate shards the student: TRL's prepare_fsdp gathers the whole model on every GPU.
            plugin = accelerator.state.fsdp_plugin
            students = plugin.transformer_cls_names_to_wrap  # overwritten by the names of the teacher's layers
            self._wrapped = fsdp2_prepare_model(accelerator, self._model).eval()
            plugin.transformer_cls_names_to_wrap = students
            let_generate(self._model)
        else:
            self._wrapped = accelerator.prepare_model(self._model, evaluation_mode=True)

    def write_hints(
        self, prompts: Sequence[Prompt], *, max_tokens: int, seed: int, template: Mapping[str, Any] | None = None
    ) -> list[str | None]:
        """Hints h ~ π_T(·|x, y) (Eq. 8), sampled at temperature 1 for each prompt; None where no hint can be read.

        Args:
            prompts: text, or messages whose image parts hold their pictures.
            max_tokens: maximum length in tokens, tags included.
            seed: seed of the sampling; the caller's random generators keep their state.
            template: further arguments of the chat template.
        """
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        hints: list[str | None] = []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(prompts), self.batch_size):
                texts = self._generate(prompts[start : start + self.batch_size], max_tokens, template or {})
                hints += [parse_hint(text, self._markup) for text in texts]
        return hints

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], *, max_tokens: int, template: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The teacher's own greedy answers, one for each prompt, as text; arguments as for `write_hints`."""
        texts: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            texts += self._generate(batch, max_tokens, template or {}, greedy=True)
        return texts

    def _generate(
        self, prompts: Sequence[Prompt], max_tokens: int, template: Mapping[str, Any], greedy: bool = False
    ) -> list[str]:
        """The generated texts; prompts with and without pictures form two batches."""
        texts = [""] * len(prompts)
        for pictured in (True, False):
            rows = [row for row, prompt in enumerate(prompts) if bool(images_in(prompt)) == pictured]
            if rows:
                written = self._generate_alike([prompts[row] for row in rows], max_tokens, template, greedy)
                for row, text in zip(rows, written, strict=True):
                    texts[row] = text
        return texts

    def _inputs(self, prompts: Sequence[Prompt], template: Mapping[str, Any]) -> Any:
        """The model's inputs for prompts that all have pictures, or that all lack them."""
        side = {"padding_side": "left"}
        if isinstance(prompts[0], str):
            return self.processor(text=list(prompts), padding=True, return_tensors="pt", **side)
        vision = isinstance(self.processor, ProcessorMixin)
        return self.processor.apply_chat_template(
            [prepare_multimodal_messages(prompt) if vision else prompt for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **{"processor_kwargs": {"padding": True, **side}}
            if vision
            else {"padding": True, "tokenizer_kwargs": side},
            **template,
        )

    def _generate_alike(
        self, prompts: Sequence[Prompt], max_tokens: int, template: Mapping[str, Any], greedy: bool
    ) -> list[str]:
        inputs = self._inputs(prompts, template)
        tokenizer, own = self._tokenizer, self._model.generation_config
        declared = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        image_token = getattr(self._model.config, "image_token_id", None)
        # `generate` takes unset arguments from the model's own configuration, which may carry penalties.
        sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self._model.generation_config = GenerationConfig(
            do_sample=not greedy,
            **sampling,
            max_new_tokens=max_tokens,
            eos_token_id=sorted({t for t in (*declared, tokenizer.eos_token_id) if t is not None}),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=None if image_token is None else [image_token],
        )
        try:
            output = self._model.generate(**inputs.to(self._model.device))
        finally:
            self._model.generation_config = own
        completions = output[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in self.processor.batch_decode(completions, skip_special_tokens=True)]

    @torch.no_grad()
    def hidden_states(self, inputs: Mapping[str, Any], rows: Sequence[int], passes: int = 1) -> Tensor:
        """The states that predict each completion token of some rows of a GRPOTrainer batch, (R, T, H_T).

        The context is what the student saw: the plain prompt x with the row's own image.

        Args:
            inputs: ``prompt_ids``, ``prompt_mask``, ``completion_ids``, ``completion_mask``, and, with images, the
                image fields and ``num_images``.
            rows: which rows, at least one.
            passes: minimum number of forward passes. All processes must make equally many where the model is sharded;
                passes without rows of their own repeat the first row, and their result is dropped.
        """
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        batches += [rows[:1]] * (passes - len(batches))
        width, apart = inputs["completion_ids"].shape[1], is_sharded(self._model)
        states = [
            self._wrapped(
                **select_rows(inputs, batch),
                completion_length=width,
                shared=None if apart else shared_rows(inputs, batch),
            )
            for batch in batches
        ]
        return torch.cat(states)[: len(rows)]
