"""Supervised fine-tuning on the right answers: TRL's SFTTrainer over the same rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import RandomSampler
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from kepo_core.data.images import ReadPicture, load_image
from kepo_core.data.records import Question
from kepo_core.task.dataset import to_dataset


def answer_text(letter: str) -> str:
    """The completion that supervision teaches: the right answer in the non-thinking format of Appendix C."""
    return f"<answer>{letter}</answer>"


def supervised_dataset(questions: Sequence[Question], pictures: ReadPicture = load_image) -> Dataset:
    """``to_dataset``'s rows for non-thinking prompts with the ``completion`` to be learned, as chat messages."""
    return to_dataset(questions, thinking=False, pictures=pictures, target=answer_text)


class WholeStepsSFTTrainer(SFTTrainer):  # type: ignore[misc]  # trl is not followed by the type checker
    """SFTTrainer that leaves out what is left of an epoch and fills no step, as TRL's other trainers do."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RandomSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return RandomSampler(dataset, num_samples=len(dataset) - len(dataset) % step)


def sft_trainer(
    model: Any,
    processor: Any,
    dataset: Dataset,
    arguments: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
    lora: LoraConfig | None = None,
) -> WholeStepsSFTTrainer:
    """TRL's SFTTrainer whose loss is the cross entropy of the completions alone (token mean).

    Args:
        model: the student.
        processor: its processor.
        dataset: from ``supervised_dataset``.
        arguments: of ``SFTConfig``, beside what this method fixes.
        callbacks: for the trainer.
        lora: what adapters to train; None: all weights.
    """
    args = SFTConfig(completion_only_loss=True, max_length=None, remove_unused_columns=False, **arguments)
    return WholeStepsSFTTrainer(
        model, args, train_dataset=dataset, processing_class=processor, callbacks=list(callbacks), peft_config=lora
    )
