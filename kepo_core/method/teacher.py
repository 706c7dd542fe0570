"""π_T in process: it writes hints, and gives its hidden states for the completions that pass the gate."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor
from transformers import GenerationConfig
from trl.models import prepare_deepspeed
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from kepo_core.method.forward import add_hidden_state_output, check_plain_head, let_generate
from kepo_core.task.prompts import hint_messages

_HINT = re.compile(r"<hint>(.*?)</hint>", re.DOTALL)
_STRUCTURE = ("<hint>", "</hint>", "<think>", "</think>", "<answer>", "</answer>")
_MARKUP = re.compile(r"<\S+>")
#: What a batch of GRPOTrainer holds for the model beside the ids, one entry per row (after splitting by images).
_MODEL_FIELDS = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "token_type_ids")
#: What must be equal for one model's image tensors to be readable by another.
_IMAGE_FIELDS = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "rescale_factor")


def parse_hint(text: str, markup: Sequence[str] = ()) -> str | None:
    """What stands in the first ``<hint>…</hint>``, on one or several lines; None if there is none or it is empty.

    Special tokens are neutralised: every string of ``markup`` and every tag that structures the prompts is cut
    out (again and again, as cutting can join two halves into a new one), so that a hint can neither end the
    user's turn, nor claim an image, nor pass for the prompt's own tags.
    """
    found = _HINT.search(text)
    if found is None:
        return None
    hint, before = found[1], ""
    while hint != before:
        before = hint
        for piece in (*_STRUCTURE, *markup):
            hint = hint.replace(piece, "")
    return hint.strip() or None


def markup_of(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a tokenizer, and added ones that look like tags, for `parse_hint`."""
    added = [text for text in tokenizer.get_added_vocab() if _MARKUP.fullmatch(text)]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


class Teacher:
    """A fixed vision-language model with its processor.

    Args:
        model: a Hugging Face image-text model; its parameters are frozen here.
        processor: its processor, with tokenizer and chat template.
        batch_size: most rows in one of its forward passes or generations.

    Raises:
        ValueError: logits that are more than states times the head, or a quantised head.
    """

    #: All processes have to ask at the same time: it may be sharded over them.
    collective = True

    def __init__(self, model: Any, processor: Any, batch_size: int = 64) -> None:
        check_plain_head(model, "teacher")
        if not (weight := model.get_output_embeddings().weight).is_floating_point():
            raise ValueError(
                f"the teacher's head is quantised ({weight.dtype}), expected floating point: the divergence reads it"
            )
        self.processor = processor
        self.batch_size = batch_size
        self._model = model.requires_grad_(False).eval()
        self._wrapped = self._model
        self._markup = markup_of(processor.tokenizer)
        add_hidden_state_output(self._model)
        let_generate(self._model)

    @property
    def model(self) -> Any:
        """π_T itself, frozen, as it was given."""
        return self._model

    @property
    def head(self) -> Any:
        """Its output embedding, with ``weight`` (V, H_T) and ``bias``."""
        return self._model.get_output_embeddings()

    def check_fits(self, student: Any, processor: Any) -> None:
        """Raise unless the student's tokens and image tensors mean the same to this teacher.

        Raises:
            ValueError: the vocabularies, the sizes of the heads or the cutting of images into patches differ.
        """
        mine, theirs = self.processor.tokenizer.get_vocab(), processor.tokenizer.get_vocab()
        if mine != theirs:
            differing = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
            raise ValueError(
                f"teacher and student have different vocabularies ({len(mine)} and {len(theirs)} entries, "
                f"{differing!r} for one), expected the same tokenizer: distillation compares them token by token"
            )
        sizes = self.head.weight.shape[0], student.get_output_embeddings().weight.shape[0]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the teacher's head has {sizes[0]} rows and the student's {sizes[1]}, expected as many")
        for name in _IMAGE_FIELDS:
            values = [getattr(p.image_processor, name, None) for p in (self.processor, processor)]
            if values[0] != values[1]:
                raise ValueError(
                    f"the teacher's {name} is {values[0]} and the student's {values[1]}, expected the same: "
                    "the teacher reads the images as they were prepared for the student"
                )

    def prepare(self, accelerator: Any, *, deepspeed: bool = False, fsdp: bool = False) -> None:
        """Put the model where the student is, sharded if the student is; a quantised one is whole on every process."""
        if getattr(self._model, "is_quantized", False):
            return
        if deepspeed:
            self._wrapped = prepare_deepspeed(self._model, accelerator)
        elif fsdp:
            # Layer by layer, as accelerate does the student: TRL's prepare_fsdp gathers all of it on every GPU at once.
            plugin = accelerator.state.fsdp_plugin
            students = plugin.transformer_cls_names_to_wrap  # overwritten by the names of the teacher's layers
            self._wrapped = fsdp2_prepare_model(accelerator, self._model).eval()
            plugin.transformer_cls_names_to_wrap = students
            let_generate(self._model)
        else:
            self._wrapped = accelerator.prepare_model(self._model, evaluation_mode=True)

    def write_hints(self, rows: Sequence[Mapping[str, Any]], *, max_tokens: int, seed: int) -> list[str | None]:
        """Hints h ~ π_T(·|x, y) (Eq. 8), sampled at temperature 1 for each row; None where no hint can be read.

        Args:
            rows: each with ``question``, ``options``, ``answer`` (a letter) and ``image`` (PIL).
            max_tokens: the longest hint, tags included.
            seed: all that the hints depend on besides rows and weights; the caller's generators are left alone.
        """
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        hints: list[str | None] = []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(rows), self.batch_size):
                texts = self._generate(rows[start : start + self.batch_size], max_tokens)
                hints += [parse_hint(text, self._markup) for text in texts]
        return hints

    def _generate(self, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[str]:
        prompts = [hint_messages(row["question"], row["options"], row["answer"]) for row in rows]
        texts = [
            self.processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts
        ]
        images = [[row["image"]] for row in rows]
        inputs = self.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        tokenizer, own = self.processor.tokenizer, self._model.generation_config
        declared = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        image_token = getattr(self._model.config, "image_token_id", None)
        # `generate` fills what an argument leaves open from the model's own configuration, which may carry penalties.
        self._model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
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
            inputs: with ``prompt_ids``, ``prompt_mask``, ``completion_ids``, ``completion_mask``, and the image
                fields with ``num_images`` where there are images.
            rows: which rows, at least one.
            passes: how many forward passes are made at least, as many as by any other process: where the model is
                sharded, each needs all of them. Those without rows of their own read the first again, for nothing.
        """
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        batches += [rows[:1]] * (passes - len(batches))
        width = inputs["completion_ids"].shape[1]
        states = [self._wrapped(**select_rows(inputs, batch), completion_length=width) for batch in batches]
        return torch.cat(states)[: len(rows)]


def select_rows(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Model inputs (prompt and completion joined) of some rows of a GRPOTrainer batch, each with its own images."""
    fields = {name: inputs[name] for name in (*_MODEL_FIELDS, "num_images") if inputs.get(name) is not None}
    split = split_pixel_values_by_grid(fields)
    chosen = {
        name: value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]
        for name, value in split.items()
    }
    merged: dict[str, Any] = unsplit_pixel_values_by_grid(chosen)
    merged.pop("num_images", None)
    index = list(rows)
    for joined, parts in (("input_ids", "ids"), ("attention_mask", "mask")):
        merged[joined] = torch.cat([inputs[f"prompt_{parts}"], inputs[f"completion_{parts}"]], dim=1)[index]
    return merged
