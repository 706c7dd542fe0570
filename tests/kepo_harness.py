"""A tiny world for trainer tests: made-up questions, and a student whose words are scripted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from kepo_core.method.task import with_images
from kepo_core.method.teacher import Teacher
from kepo_core.method.trainer import KEPOConfig, KEPOTrainer
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import vqa_messages
from kepo_core.testbed.embedded import build_model, build_processor

RIGHT = "<think>red</think><answer>{answer}</answer>"
WRONG = "<think>blue or so</think><answer>{other}</answer>"


def picture(colour: tuple[int, int, int]) -> Image.Image:
    """A patch of ``colour`` in the upper left of a grey square: turned over, it is another picture."""
    square = Image.new("RGB", (64, 64), (128, 128, 128))
    square.paste(colour, (0, 0, 32, 16))
    return square


def make_row(i: int) -> dict[str, Any]:
    options = ["red", "blue", "green"][: 2 + i % 2]
    return {
        "id": f"q{i}",
        "question": f"Question {i}?",
        "options": options,
        "answer": "AB"[i % 2],
        "image": picture((60 * i % 256, 40, 200 - 50 * i % 200)),
    }


def row_of(prompt: Any) -> dict[str, Any]:
    """The row that a prompt's messages ask about."""
    text = next(part["text"] for part in prompt[-1]["content"] if part["type"] == "text")
    return make_row(int(text.split("Question ")[1].split("?")[0]))


def hint_prompt(row: dict[str, Any]) -> Any:
    """What the teacher is asked with about a row, its picture included."""
    return with_images(MultipleChoice().ask(row), row)


def make_dataset(count: int = 4, thinking: bool = True) -> Dataset:
    rows = Dataset.from_list([make_row(i) for i in range(count)])

    def add_prompt(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        asked = zip(batch["question"], batch["options"], strict=True)
        return batch | {"prompt": [vqa_messages(q, o, thinking) for q, o in asked]}

    return rows.with_transform(add_prompt)


def sharp_model(seed: int) -> Any:
    """A random tiny model whose next-token distributions are far from uniform and from each other's."""
    model = build_model("test", seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    return model


def config(output_dir: Path, **overrides: Any) -> KEPOConfig:
    defaults: dict[str, Any] = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 24,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "report_to": "none",
    }
    return KEPOConfig(output_dir=str(output_dir), **(defaults | overrides))


#: (prompt text, dataset row, how often this prompt was asked before, hinted?) → what the student says
Script = Callable[[str, dict[str, Any], int, bool], str]


class ScriptedTrainer(KEPOTrainer):
    """KEPOTrainer whose student says what ``script`` tells; a text that ends in "…" hit the token limit."""

    script: Script
    calls: list[list[str]]  # the prompt texts of each call of the generation back end
    pictures: list[list[Any]]
    sampling_logps: float | None = None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        texts = self.processing_class.batch_decode(prompt_ids)
        self.calls.append(texts)
        self.pictures.append(images)
        ids = []
        for text in texts:
            number = int(text.split("Question ")[1].split("?")[0])
            before = sum(call.count(text) for call in self.calls[:-1]) + texts[: len(ids)].count(text)
            said = self.script(text, make_row(number), before, "ground truth" in text or "The hint is" in text)
            tokens = self._tokenizer(said.removesuffix("…"))["input_ids"]
            ids.append(tokens if said.endswith("…") else [*tokens, self._tokenizer.eos_token_id])
        logps = None if self.sampling_logps is None else [[self.sampling_logps] * len(row) for row in ids]
        return ids, logps


def right(row: dict[str, Any]) -> str:
    return RIGHT.format(answer=row["answer"])


def wrong(row: dict[str, Any]) -> str:
    return WRONG.format(other="AB".replace(row["answer"], ""))


def make_trainer(
    output_dir: Path,
    script: Script,
    hints: Callable[[dict[str, Any]], str | None] | None = None,
    student: Any = None,
    teacher_model: Any = None,
    dataset: Any = None,
    trainer_args: dict[str, Any] | None = None,
    rewards: Any = None,
    no_teacher: bool = False,
    thinking: bool = True,
    hint_context: str = "hint+answer",
    **overrides: Any,
) -> ScriptedTrainer:
    """A scripted trainer with a real (random) teacher; ``hints`` replaces what the teacher would write."""
    args = config(output_dir, **overrides)
    teacher = None
    if (args.distill or args.explore) and not no_teacher:
        teacher = Teacher(teacher_model or sharp_model(1), build_processor())
        if hints is not None:
            teacher.hint_rows = []

            def write(prompts: Sequence[Any], **_: Any) -> list[str | None]:
                rows = [row_of(prompt) for prompt in prompts]
                teacher.hint_rows.append([row["id"] for row in rows])
                return [hints(row) for row in rows]

            teacher.write_hints = write
    task = MultipleChoice(hint_context, thinking)
    trainer = ScriptedTrainer(
        student or sharp_model(0),
        rewards or task.reward_funcs,
        args,
        dataset or make_dataset(),
        teacher=teacher,
        task=task,
        processing_class=build_processor(),
        **(trainer_args or {}),
    )
    trainer.script, trainer.calls, trainer.pictures = script, [], []
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def batch_of(trainer: KEPOTrainer, *questions: int) -> list[dict[str, Any]]:
    """The rows of a generation batch: each question once per generation."""
    dataset = trainer.train_dataset
    return [dataset[q] for q in questions for _ in range(trainer.num_generations)]


def fails_on_0(text: str, row: dict, before: int, hinted: bool) -> str:
    """Question 0 is never answered without a hint; all others alternate between right and wrong."""
    if row["id"] == "q0":
        return right(row) if hinted else wrong(row)
    return right(row) if before % 2 else wrong(row)


def score_batch(trainer: KEPOTrainer, *questions: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(batch_of(trainer, *questions))


def decode(trainer: KEPOTrainer, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """The texts of a batch of completions."""
    return [
        trainer._tokenizer.decode(row[m.bool()], skip_special_tokens=True) for row, m in zip(ids, mask, strict=True)
    ]
