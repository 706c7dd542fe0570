"""Fixes for GRPOTrainer's handling of pictures; what cannot be fixed is refused.

Nothing here changes a batch that GRPOTrainer gets right.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kepo_core.method.resume import ResumableTrainer
from kepo_core.method.task import images_of

#: How many pictures a row has. GRPOTrainer does not pass it on, and the model then takes each to be a row's only one.
COUNTS = "batch_num_images"


class VisionTrainer(ResumableTrainer):
    """GRPOTrainer for rows with one picture, several, none, or a mixture, as far as the model allows it."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's; a batch without any picture is text, whatever its columns say."""
        has_column = "image" in inputs[0] or "images" in inputs[0]
        if has_column and not any(images_of(row) for row in inputs):
            inputs = [{**row, "images": []} for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, dict[str, Any]]:
        """TRL's; rows without pictures have an empty list of them, as processors expect, not None.

        Raises:
            ValueError: rows whose pictures GRPOTrainer would mix up.
        """
        ids, images, fields = super()._tokenize_prompts(prompts)
        if images is None:
            return ids, images, fields
        images = [pictures or [] for pictures in images]
        check_counts([len(pictures) for pictures in images], fields)
        return ids, images, fields

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's, with token types that stand beside their tokens."""
        kwargs.pop(COUNTS, None)  # one picture a row, as `check_counts` has seen
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, *args, **aligned(kwargs, input_ids.shape[1])
        )


def check_counts(counts: list[int], fields: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for rows that cannot be told apart by the tensors that their processor makes.

    Args:
        counts: pictures of each row.
        fields: what the processor made of all rows.
    """
    if COUNTS in fields and max(counts) > 1:
        row = next(row for row, count in enumerate(counts) if count > 1)
        raise ValueError(
            f"row {row} has {counts[row]} pictures, expected one at most: GRPOTrainer does not pass on {COUNTS}, by "
            "which this model tells several apart"
        )
    # One entry per row (SmolVLM), which GRPOTrainer takes for one per picture where there are as many of both.
    by_row = "pixel_attention_mask" in fields and "spatial_shapes" not in fields
    if by_row and sum(counts) == len(counts) and set(counts) != {1}:
        raise ValueError(
            f"{len(counts)} rows have {sum(counts)} pictures in all but not one each ({', '.join(map(str, counts))}), "
            "expected another mixture: GRPOTrainer would give rows the pictures of others with this model"
        )


def aligned(fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    """``fields`` with token types cut on the left to ``width`` tokens.

    GRPOTrainer cuts a rendered prompt into tokens a second time to get them, and a tokenizer that begins every text
    with a token of its own (Gemma's) then writes it twice: each type would stand one place behind its token.
    """
    return {
        name: value[:, -width:] if name.endswith("token_type_ids") and value is not None else value
        for name, value in fields.items()
    }
