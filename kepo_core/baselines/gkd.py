"""MM-GKD: generalised knowledge distillation with images, on TRL's DistillationTrainer.

Each generation batch is on-policy with probability λ (the student's own completions), else supervised (the right
answers); either way the divergence from the teacher's next-token distribution is the whole loss. λ = 1 is TRL's
DistillationTrainer to the bit, λ = 0 supervised distillation. Source: Agarwal et al., "On-policy distillation of
language models", 2024, Algorithm 1; the paper's Table 1 has λ = 0, 0.5 and 1.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from kepo_core.baselines.supervised import answer_text
from kepo_core.method.vision import MODEL_FIELDS


class MMGKDTrainer(DistillationTrainer):  # type: ignore[misc]  # trl is not followed by the type checker
    """DistillationTrainer that takes a part of its batches from the data.

    Args:
        lmbda: λ in [0, 1], the probability that a generation batch is on-policy.
        distill_temperature: of both distributions in the divergence; TRL's ``temperature`` is of sampling alone here.
        *args, **kwargs: as for DistillationTrainer; rows need ``answer`` (a letter) where λ < 1.
    """

    def __init__(self, *args: Any, lmbda: float, distill_temperature: float = 1.0, **kwargs: Any) -> None:
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda is {lmbda:g}, expected 0 to 1")
        super().__init__(*args, **kwargs)
        self.lmbda, self.temperature = lmbda, distill_temperature  # that of sampling is in the generation configuration
        self._rows: Sequence[Mapping[str, Any]] = ()

    def on_policy(self) -> bool:
        """Whether this optimiser step's batch is the student's own; the same on all processes."""
        # Named by seed and step, so that no other random number depends on λ.
        return random.Random(f"{self.args.seed}/lambda/{self.state.global_step}").random() < self.lmbda

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return batch

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, dict[str, Any]]:
        """TRL's; ``ValueError`` for a processor that makes a model input that would not arrive."""
        ids, images, fields = super()._tokenize_prompts(prompts)
        if images is not None and (further := sorted(fields.keys() - {*MODEL_FIELDS})):
            raise ValueError(
                f"the processor makes {further[0]}, which DistillationTrainer does not pass on: method gkd cannot "
                "train this model on pictures, method kepo can"
            )
        return ids, images, fields

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.on_policy():
            return super()._generate_single_turn(*args, **kwargs)
        texts = [answer_text(row["answer"]) for row in self._rows]
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*tokens, self._tokenizer.eos_token_id] for tokens in ids]


def gkd_trainer(
    model: Any,
    teacher: Any,
    processor: Any,
    dataset: Dataset,
    lmbda: float,
    distill_temperature: float,
    arguments: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
    lora: LoraConfig | None = None,
) -> MMGKDTrainer:
    """An `MMGKDTrainer` over ``to_dataset``'s rows; ``arguments`` are those of ``DistillationConfig``.

    ``lora`` says what adapters to train; without it, all weights are.
    """
    return MMGKDTrainer(
        model,
        teacher,
        DistillationConfig(**arguments),
        train_dataset=dataset,
        processing_class=processor,
        callbacks=list(callbacks),
        peft_config=lora,
        lmbda=lmbda,
        distill_temperature=distill_temperature,
    )
