"""MM-GKD: generalised knowledge distillation with images, on TRL's DistillationTrainer.

Each generation batch is on-policy (the student's own completions) with probability λ, otherwise supervised (the right
answers). In both cases the loss is only the divergence from the teacher's next-token distribution. λ = 1 equals TRL's
DistillationTrainer bit for bit; λ = 0 is supervised distillation. Source: Agarwal et al., "On-policy distillation of
language models", 2024, Algorithm 1. The paper's Table 1 has λ = 0, 0.5 and 1.
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
    """DistillationTrainer that takes some of its batches from the data.

    Args:
        lmbda: λ in [0, 1], the probability that a generation batch is on-policy.
        distill_temperature: of both distributions in the divergence; here TRL's ``temperature`` is only for sampling.
        *args, **kwargs: as for DistillationTrainer; with λ < 1, rows need ``answer`` (a letter).

    Raises:
        ValueError: ``lmbda`` is outside [0, 1].
    """

    def __init__(self, *args: Any, lmbda: float, distill_temperature: float = 1.0, **kwargs: Any) -> None:
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda is {lmbda:g}, expected 0 to 1")
        super().__init__(*args, **kwargs)
        self.lmbda, self.temperature = lmbda, distill_temperature  # the generation configuration has that of sampling
        self._rows: Sequence[Mapping[str, Any]] = ()

    def on_policy(self) -> bool:
        """Whether this optimiser step's batch is on-policy; the same on all processes."""
        # Seeded by the run's seed and the step: no other random number depends on λ.
        return random.Random(f"{self.args.seed}/lambda/{self.state.global_step}").random() < self.lmbda

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return batch

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, dict[str, Any]]:
        """As TRL's; ``ValueError`` for a model input that TRL would drop."""
        ids, images, fields = super()._tokenize_prompts(prompts)
        if images is not None and (further := sorted(fields.keys() - {*MODEL_FIELDS})):
            raise ValueError(
                f"the processor makes {further[0]}, which DistillationTrainer does not pass to the model: method gkd "
                "cannot train this model on pictures, method kepo can"
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
    """An `MMGKDTrainer` for the rows of ``to_dataset``; ``arguments`` are those of ``DistillationConfig``.

    ``lora`` describes the adapters to train; None: all weights are trained.
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
