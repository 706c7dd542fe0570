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
    """The target completion: the right answer in the non-thinking format of Appendix C."""
    return f"<answer>{letter}</answer>"


def supervised_dataset(questions: Sequence[Question], pictures: ReadPicture = load_image) -> Dataset:
    """Rows of ``to_dataset`` for non-thinking prompts, with the target ``completion`` as chat messages."""
    return to_dataset(questions, thinking=False, pictures=pictures, target=answer_text)


class WholeStepsSFTTrainer(SFTTrainer):  # type: ignore[misc]  # trl is not followed by the type checker
    """SFTTrainer that drops the incomplete last step of an epoch, as TRL's other trainers do."""

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
    """TRL's SFTTrainer; the loss is the cross entropy of only the completions (mean over tokens).

    Args:
        model: the student.
        processor: its processor.
        dataset: from ``supervised_dataset``.
        arguments: of ``SFTConfig``, except those that this function sets.
        callbacks: for the trainer.
        lora: the adapters to train; None: all weights are trained.
    """
    args = SFTConfig(completion_only_loss=True, max_length=None, remove_unused_columns=False, **arguments)
    return WholeStepsSFTTrainer(
        model, args, train_dataset=dataset, processing_class=processor, callbacks=list(callbacks), peft_config=lora
    )
