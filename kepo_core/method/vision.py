"""Fixes for GRPOTrainer's handling of pictures; cases that cannot be fixed are refused.

Batches that GRPOTrainer handles correctly are unchanged. GRPOTrainer passes `MODEL_FIELDS` to the model by name, and
drops or fails on any other output of a processor (LLaVA-OneVision's ``batch_num_images``, VideoLLaMA 3's
``image_merge_sizes``). This module carries such inputs, row by row, to every forward pass of student and teacher.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import pad
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from kepo_core.method.resume import ResumableTrainer
from kepo_core.method.task import Row, images_of, with_images

#: Model inputs in a batch of GRPOTrainer besides the ids, one entry per row (after splitting by images).
MODEL_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
    "token_type_ids",
    "mm_token_type_ids",
)
#: Prefix of any other input's name in a batch, which holds a list with one tensor per row.
FURTHER = "kepo_input/"
#: Suffix of inputs with one entry per token, 0 on text; in a batch they cover the unpadded prompt.
PER_TOKEN = "token_type_ids"
#: Inputs that every row has.
PER_PROMPT = ("input_ids", "attention_mask")
_ARGUMENTS = (*MODEL_FIELDS, "batch_size", "compute_entropy", "compute_aux_loss", "num_images", "num_tiles")


class VisionTrainer(ResumableTrainer):
    """GRPOTrainer for rows with one picture, several, none, or a mixture, as far as the model supports it."""

    #: Further inputs for the model's next call: name → one tensor per row.
    _further: dict[str, list[Tensor]] | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with further model inputs; a batch without pictures is text, even if it has a picture column."""
        has_column = "image" in inputs[0] or "images" in inputs[0]
        if has_column and not any(images_of(row) for row in inputs):
            inputs = [{**row, "images": []} for row in inputs]
        self._further = None
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        further: dict[str, list[Tensor]] = self._further or {}
        return output | {FURTHER + name: rows for name, rows in further.items()}

    def picture_inputs(self, row: Row | None) -> set[str]:
        """Names of the model inputs that the processor makes from a row's pictures; empty for a row without pictures.

        Raises:
            ValueError: as in `check_inputs`, before anything is computed.
        """
        if row is None or not images_of(row) or isinstance(row["prompt"], str):
            return set()
        _, _, fields = self._tokenize_prompts([with_images(row["prompt"], row)])
        return set(fields)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, dict[str, Any]]:
        """As TRL's, but rows without pictures get an empty list, which processors expect, instead of None.

        Raises:
            ValueError: GRPOTrainer would mix up the rows' pictures, or the model does not take an input.
        """
        ids, images, fields = super()._tokenize_prompts(prompts)
        if images is None:
            return ids, images, fields
        images = [pictures or [] for pictures in images]
        check_inputs(fields, ids, images, self.processing_class.image_processor, self.model)
        check_counts([len(pictures) for pictures in images], fields)
        if self._further is None:  # the first of a batch: prompts with hints follow
            self._further = further_inputs(fields, images, self.processing_class.image_processor)
        return ids, images, fields

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **kwargs: Any
    ) -> Any:
        """As TRL's, with further inputs and aligned token types; rows without pictures get no picture inputs."""
        counts: list[int] = kwargs.get("num_images") or []
        known = {name: value for name, value in kwargs.items() if name in _ARGUMENTS}
        if self._further or not all(counts):
            if self.accelerator.num_processes > 1 and not all(counts) and torch.is_grad_enabled():
                check_pictured(counts, kwargs.get("batch_size") or len(input_ids))
            sizes = input_ids.shape[1] - logits_to_keep, logits_to_keep
            model = _Fed(model, beside_tokens(self._further or {}, *sizes), counts)
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, **aligned(known, input_ids.shape[1])
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss, with the batch's further inputs."""
        self._further = {name.removeprefix(FURTHER): inputs[name] for name in inputs if name.startswith(FURTHER)}
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss


class _Fed:
    """Replaces the model in TRL's forward pass: adds, call by call, the further inputs of the next rows.

    If none of these rows has a picture, it drops picture inputs: models fail on empty ones.
    """

    def __init__(self, model: Any, further: Mapping[str, Sequence[Tensor]], counts: Sequence[int]) -> None:
        self._model, self._further, self._counts, self._start = model, further, counts, 0

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        rows = slice(self._start, self._start + len(input_ids))
        self._start = rows.stop
        further = {name: torch.cat(list(values[rows])).to(input_ids.device) for name, values in self._further.items()}
        inputs = kwargs | further
        if self._counts and not any(self._counts[rows]):
            pictures = {name for name in (*MODEL_FIELDS, *further) if not name.endswith(PER_TOKEN)}
            inputs = {name: value for name, value in inputs.items() if name not in pictures}
        return self._model(input_ids=input_ids, **inputs)


def beside_tokens(further: Mapping[str, Sequence[Tensor]], prompt: int, completion: int) -> dict[str, Sequence[Tensor]]:
    """``further``, row by row, with per-token entries padded to match the tokens of a padded batch.

    Args:
        prompt, completion: padded lengths in tokens: prompts are padded on the left, completions on the right.
    """
    return {
        name: [pad(row, (prompt - row.shape[1], completion)) for row in rows] if name.endswith(PER_TOKEN) else rows
        for name, rows in further.items()
    }


def as_tensor(value: Any) -> Tensor:
    """A processor's output as a tensor, converted as in GRPOTrainer's generation."""
    return value if isinstance(value, Tensor) else torch.tensor(np.array(value))


def further_inputs(
    fields: Mapping[str, Any], images: Sequence[Sequence[Any]], image_processor: Any
) -> dict[str, list[Tensor]]:
    """The inputs among ``fields`` that GRPOTrainer does not know, row by row."""
    further = {name: value for name, value in fields.items() if name not in MODEL_FIELDS}
    return {
        name: [torch.tensor([list(row)]) for row in value]
        if name.endswith(PER_TOKEN)
        else by_row(name, as_tensor(value), images, image_processor)
        for name, value in further.items()
    }


def by_row(name: str, value: Tensor, images: Sequence[Sequence[Any]], image_processor: Any) -> list[Tensor]:
    """The model input ``name``, row by row: it has one entry per row, per row with pictures, or per picture.

    If the number of entries fits two of these, one row's pictures are processed separately to decide.

    Raises:
        ValueError: the number of entries fits none of these, or the choice is ambiguous.
    """
    counts = [len(pictures) for pictures in images]
    kinds = [counts, [int(count > 0) for count in counts], [1] * len(counts)]
    kinds = [sizes for sizes in kinds if sum(sizes) == len(value)]
    if any(sizes != kinds[0] for sizes in kinds):
        row = next(row for row in range(len(counts)) if counts[row] > 1)
        alone = image_processor(images=list(images[row])).get(name, ())
        kinds = [sizes for sizes in kinds if sizes[row] == len(alone)]
    if not kinds or any(sizes != kinds[0] for sizes in kinds):
        raise ValueError(
            f"the processor makes {len(value)} entries of {name} for {len(counts)} rows with {sum(counts)} pictures, "
            "expected one per row or one per picture, unambiguously: rows could get the inputs of others"
        )
    return list(value.split(kinds[0]))


def choose_rows(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of model inputs, each with its own pictures; picture inputs are dropped if all these rows are text.

    Args:
        inputs: tensors, or lists by row; with pictures also ``num_images`` and ``num_tiles`` by row.
    """
    chosen = {
        name: value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]
        for name, value in split_pixel_values_by_grid(inputs).items()
    }
    merged: dict[str, Any] = unsplit_pixel_values_by_grid(chosen)
    counts = merged.pop("num_images", None)
    merged.pop("num_tiles", None)  # TRL's own, like num_images: not a model input
    if counts is not None and not any(counts):  # rows of text among rows with pictures
        merged = {name: value for name, value in merged.items() if name.endswith((*PER_PROMPT, PER_TOKEN))}
    return {name: torch.cat(value) if isinstance(value, list) else value for name, value in merged.items()}


def _is_tiled(fields: Mapping[str, Any], pictures: int) -> bool:
    """Whether ``pixel_values`` holds tiles of pictures, decided as in GRPOTrainer."""
    pixels = fields.get("pixel_values", ())
    return "spatial_shapes" in fields or (len(pixels) not in (0, pictures) and np.ndim(pixels[0]) == 3)


def count_tiles(fields: Mapping[str, Any], images: Sequence[Sequence[Any]], image_processor: Any) -> list[int] | None:
    """How many tiles each row's pictures are cut into (InternVL, LFM2-VL); None for models without tiles."""
    if not _is_tiled(fields, sum(map(len, images))):
        return None
    cut = {"crop_to_patches": True} if "spatial_shapes" not in fields else {}
    return [len(image_processor(images=list(row), **cut)["pixel_values"]) if row else 0 for row in images]


def check_inputs(
    fields: Mapping[str, Any],
    ids: Sequence[Sequence[int]],
    images: Sequence[Sequence[Any]],
    image_processor: Any,
    model: Any,
) -> None:
    """Raise ``ValueError`` unless ``model`` takes every output of the processor in ``fields``, by name."""
    student = model.get_base_model() if is_peft_model(model) else model
    kind = type(student).__name__
    if unknown := sorted(fields.keys() - inspect.signature(type(student).forward).parameters):
        raise ValueError(
            f"the processor makes {unknown[0]}, which {kind} does not take, expected the model's own processor"
        )
    if fields and "pixel_values" not in fields and not all(name.endswith(PER_TOKEN) for name in fields):
        raise ValueError(
            f"the processor makes {', '.join(fields)} but no pixel_values: GRPOTrainer cannot train {kind} on pictures"
        )
    lengths = [len(row) for row in ids]
    for name in fields.keys() - {*MODEL_FIELDS}:
        entries = [len(row) if getattr(row, "shape", True) and hasattr(row, "__len__") else 0 for row in fields[name]]
        if not name.endswith(PER_TOKEN) and entries in (lengths, [max(lengths)] * len(ids)):
            raise ValueError(
                f"the processor makes {name}, an entry per token of the prompt, and its values for completions are "
                f"unknown: {kind} cannot be trained on pictures here"
            )
    if "spatial_shapes" not in fields and _is_tiled(fields, sum(map(len, images))):
        first = next(row for row in images if row)
        if "num_patches" not in image_processor(images=list(first), crop_to_patches=True):
            raise ValueError(
                f"the processor of {kind} cuts pictures into tiles but does not return num_patches: GRPOTrainer cannot "
                "assign tiles to rows"
            )


def check_pictured(counts: Sequence[int], size: int) -> None:
    """Raise ``ValueError`` if a forward pass of ``size`` rows has no picture: the other processes would hang."""
    if not all(any(counts[start : start + size]) for start in range(0, len(counts), size)):
        raise ValueError(
            f"a batch of {size} rows on one of several processes has no picture, expected at least one in each batch: "
            "raise the batch size, or train rows with and without pictures on one GPU"
        )


def check_counts(counts: list[int], fields: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if GRPOTrainer would assign the processor's outputs to the wrong rows.

    Args:
        counts: number of pictures of each row.
        fields: the processor's output for all rows.
    """
    # SmolVLM has one entry per row. GRPOTrainer takes it for one per picture if rows and pictures are equal in number.
    by_row = "pixel_attention_mask" in fields and "spatial_shapes" not in fields
    if by_row and sum(counts) == len(counts) and set(counts) != {1}:
        raise ValueError(
            f"{len(counts)} rows have {sum(counts)} pictures in all but not one each ({', '.join(map(str, counts))}), "
            "expected one picture per row with this model: GRPOTrainer would give rows the pictures of others"
        )


def aligned(fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    """``fields`` with token types cut on the left to ``width`` tokens.

    GRPOTrainer gets token types by tokenizing a rendered prompt a second time. A tokenizer that puts a special token
    before every text (Gemma's) then adds it twice, and shifts each type by one position.
    """
    return {
        name: value[:, -width:] if name.endswith(PER_TOKEN) and value is not None else value
        for name, value in fields.items()
    }
