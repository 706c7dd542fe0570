"""Open-ended visual question answering with KEPO, and a reward of your own.

    python examples/kepo_vqa.py --steps 20

The script draws pictures of a coloured square; the answer is a word, not a letter. The student never learned the names
of two of the six colours: all its rollouts fail there, until the teacher's hint lets it try the right word. Both models
are tiny Qwen3-VL, trained here in half a minute: nothing is downloaded.

For real models and your own pictures, replace two functions; rewards and task stay the same. Instead of `accuracy`,
which knows only these colours, use `trainer.evaluate()`, with held-out rows as `eval_dataset`. In KEPOConfig, set a
batch size that fits, and `max_completion_length=64, hint_max_tokens=256, learning_rate=1e-6`.

    def load_models(schooling=0):  # pretrained models need no schooling
        load = AutoModelForImageTextToText.from_pretrained
        processor = AutoProcessor.from_pretrained("Qwen/Qwen3-VL-2B-Instruct")
        return load("Qwen/Qwen3-VL-2B-Instruct", dtype="float32"), load("Qwen/Qwen3-VL-8B-Instruct"), processor

    def load_data():  # a folder with pictures and metadata.csv: file_name, question, solution
        rows = load_dataset("imagefolder", data_dir="my_pictures", split="train")
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
        return list(rows.select(range(100, len(rows)))), list(rows.select(range(100)))

`notebooks/06_own_task.ipynb` reads REWARDS, TASK, load_data and load_models from this file.
"""

import argparse
import random
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from kepo_core import KEPOConfig, KEPOTrainer, Teacher, Templates
from kepo_core.testbed.embedded import build_model, build_processor

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40),
           "purple": (150, 50, 190), "orange": (240, 140, 30)}  # fmt: skip
UNTAUGHT = ("purple", "orange")
QUESTION = "Which colour is the square?"
TASK = Templates(
    asking="The answer is {solution}. Write a hint inside <hint>...</hint>.",
    telling="Hint: {hint}",
)


def exact_word(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
    """The reward: 1 for exactly the right word, in upper or lower case, with or without a full stop; else 0."""
    said = [completion[0]["content"].strip(" .").lower() for completion in completions]
    return [float(word == right) for word, right in zip(said, solution, strict=True)]


#: By default, the gate and exploration read the first.
REWARDS = [exact_word]


def picture(colour: str, rng: random.Random) -> Image.Image:
    """A square of about that colour, at a random place on grey."""
    shade = tuple(min(max(value + rng.randrange(-25, 26), 0), 255) for value in COLOURS[colour])
    image, x, y = Image.new("RGB", (64, 64), (128, 128, 128)), rng.randrange(40), rng.randrange(40)
    image.paste(shade, (x, y, x + 24, y + 24))
    return image


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows for TRL: a prompt, its picture, and the columns that rewards and templates read."""
    rng = random.Random(seed)
    colours = [rng.choice(list(COLOURS)) for _ in range(count)]
    prompt = [{"role": "user", "content": QUESTION}]
    return [{"prompt": prompt, "image": picture(colour, rng), "solution": colour} for colour in colours]


def load_data() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training rows and the held-out rows."""
    return make_rows(160, seed=7), make_rows(120, seed=99)


def load_models(schooling: int = 110) -> tuple[Any, Any, Any]:
    """Student, teacher and processor; ``schooling``: the student's supervised steps (the teacher takes twice that)."""
    processor = build_processor()
    processor.tokenizer.add_tokens(list(COLOURS))  # such a small model learns whole words faster than letters
    student = school(build_model("test", 0), processor, 0, schooling, UNTAUGHT, writes_hints=False)
    return student, school(build_model("test", 1), processor, 1, 2 * schooling, (), writes_hints=True), processor


def school(model: Any, processor: Any, seed: int, steps: int, untaught: tuple[str, ...], writes_hints: bool) -> Any:
    """Supervised training: answers to the question, answers with a hint, and for a teacher also hints."""
    rng, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=4e-3)
    start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    for _ in range(steps):
        texts, images = [], []
        for row in make_rows(24, rng.getrandbits(31)):
            kind = rng.choice(["ask", "plain", "tell"] if writes_hints else ["plain", "plain", "tell"])
            if row["solution"] in untaught:
                kind = "tell"  # it reads the word, but never learns to match it with a picture
            hint = f"It looks {row['solution']}"
            prompt = {"plain": row["prompt"], "ask": TASK.ask(row), "tell": TASK.tell(row, hint)}[kind]
            reply = f"<hint>{hint}</hint>" if kind == "ask" else row["solution"]
            content = [{"type": "image"}, {"type": "text", "text": prompt[0]["content"]}]
            chat = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
            texts.append(processor.apply_chat_template(chat, tokenize=False))
            images.append([row["image"]])
        inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for ids, row_labels in zip(inputs["input_ids"].tolist(), labels, strict=True):
            answer = max(i for i in range(len(ids)) if ids[i : i + len(start)] == start) + len(start)
            row_labels[:answer] = -100  # only the reply is learned
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracy(model: Any, processor: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The share of right answers (greedy decoding), for taught and untaught colours."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = [[row["image"]] for row in rows]
    inputs = processor(text=[text] * len(rows), images=images, padding=True, return_tensors="pt").to(model.device)
    eos = processor.tokenizer.eos_token_id
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = exact_word([[{"content": text}] for text in said], [row["solution"] for row in rows])
    kinds = {"taught": False, "untaught": True}
    shares = {}
    for kind, wanted in kinds.items():
        scores = [score for score, row in zip(right, rows, strict=True) if (row["solution"] in UNTAUGHT) == wanted]
        shares[kind] = sum(scores) / len(scores)
    return shares


def main() -> None:
    """Prepare both models, train the student with KEPO, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--schooling", type=int, default=110, help="supervised steps of the student (the teacher takes twice as many)"
    )
    parser.add_argument("--output", default="kepo_vqa_output")
    options = parser.parse_args()

    student, teacher, processor = load_models(options.schooling)
    rows, held_out = load_data()
    before = accuracy(student, processor, held_out)

    trainer = KEPOTrainer(
        model=student,
        reward_funcs=REWARDS,
        args=KEPOConfig(
            output_dir=options.output,
            num_generations=8,
            per_device_train_batch_size=64,
            max_completion_length=8,
            max_steps=options.steps,
            learning_rate=1e-3,
            hint_max_tokens=16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        teacher=Teacher(teacher, processor),
        task=TASK,
    )
    trainer.train()

    rescued = sum(entry.get("kepo/rescued_groups", 0) for entry in trainer.state.log_history)
    after = accuracy(trainer.model, processor, held_out)
    print(f"groups rescued by a hint: {rescued:.0f}")
    for kind in before:
        print(f"right answers, colours {kind:>8}: {before[kind]:4.0%} before, {after[kind]:4.0%} after")


if __name__ == "__main__":
    main()
