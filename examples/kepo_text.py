r"""KEPO on an open-ended text task, as a TRL script: arithmetic in words, with tiny models trained here.

    python examples/kepo_text.py --steps 80 --output kepo_text_output

The student knows sums up to eight. If all its rollouts for a larger sum are wrong, the teacher writes a hint, and the
student tries again with it. It learns from right answers, with the teacher's guidance on every token.

For GSM8K with real models, replace three functions:

    def load_models(schooling=0):  # pretrained models need no schooling
        tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
        student, teacher = (AutoModelForCausalLM.from_pretrained(f"Qwen/Qwen3-{size}") for size in ("0.6B", "8B"))
        return student, teacher, tokenizer

    def load_data():
        return tuple(
            [{"prompt": [{"role": "user", "content": r["question"]}],
              "solution": r["answer"].replace(",", "").split()[-1]}
             for r in load_dataset("openai/gsm8k", "main", split=split)]
            for split in ("train", "test")
        )

    def last_number(text):
        return (re.findall(r"-?\d+", text.replace(",", "")) or [""])[-1]

In KEPOConfig, set `max_completion_length=1024, hint_max_tokens=256, learning_rate=1e-6`, a batch size that fits, and
`chat_template_kwargs={"enable_thinking": False}`, with which Qwen3 writes answers and hints at once. Instead of
`accuracy`, use `trainer.evaluate()`, with held-out rows as `eval_dataset`.

`notebooks/06_own_task.ipynb` reads REWARDS, TASK, load_data and load_models from this file.
"""

import argparse
import random
import warnings

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM, set_seed

from kepo_core import KEPOConfig, KEPOTrainer, Teacher, Templates

TO_TEN = "zero one two three four five six seven eight nine ten"
NUMBERS = f"{TO_TEN} eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
TASK = Templates(
    asking="The answer is {solution}. Write a hint inside <hint>...</hint>.",
    telling="Hint: {hint}. The answer is {solution}.",
)
Row, Lesson = dict[str, str], tuple[str, str]  # a prompt and its solution; a prompt and its completion


def text_of(completion: str | list[dict[str, str]]) -> str:
    """A completion's text: TRL passes text for a text prompt, and messages for a chat."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def last_number(text: str) -> str:
    """The answer in a text: its last number, or ""."""
    return ([word for word in text.split() if word in NUMBERS] or [""])[-1]


def correct(completions: list, solution: list[str], **_: object) -> list[float]:
    """1 for the right answer. The gate reads this reward, and a group in which it is always 0 explores."""
    return [float(last_number(text_of(c)) == answer) for c, answer in zip(completions, solution, strict=True)]


def brief(completions: list, **_: object) -> list[float]:
    """0.1 for at most three words. It counts only in the advantages: a group of short wrong answers still explores."""
    return [0.1 * (len(text_of(completion).split()) <= 3) for completion in completions]


REWARDS = [correct, brief]


def all_sums() -> list[Row]:
    """A row per sum of two numbers from one to ten."""
    sums = [(a, b) for a in range(1, 11) for b in range(1, 11)]
    return [{"prompt": f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", "solution": NUMBERS[a + b]} for a, b in sums]


def load_data() -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out rows."""
    rows = all_sums()
    random.Random(0).shuffle(rows)
    return rows[20:], rows[:20]


def lessons() -> tuple[list[Lesson], list[Lesson]]:
    """What both models learn first: the teacher all sums and hints, the student sums up to eight and to use a hint."""
    for_teacher, for_student = [], []
    for row in all_sums():
        x, y = row["prompt"], row["solution"]
        hint = f"one more than {NUMBERS[NUMBERS.index(y) - 1]}"
        for_teacher += [(x, y), (x, y), (TASK.ask(row), f"<hint> {hint} </hint>")]
        for_student += [(TASK.tell(row, hint), y)] + [(x, y), (x, y)] * (y in NUMBERS[:9])
    return for_teacher, for_student


def load_models(schooling: int = 200) -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Student, teacher and tokenizer: tiny models, trained here on lessons; at scale, pretrained checkpoints.

    ``schooling`` is the student's number of supervised steps; the teacher gets 1.5 times that.
    """
    for_teacher, for_student = lessons()
    splitter = pre_tokenizers.Split(Regex(r"</?hint>|\w+|\.+|[?:]"), behavior="removed", invert=True)
    texts = [text for lesson in for_teacher + for_student for text in lesson]
    words = dict.fromkeys(["<pad>", "<end>", *(word for text in texts for word, _ in splitter.pre_tokenize_str(text))])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = splitter
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    teacher = schooled(fast, for_teacher, schooling * 3 // 2)
    return schooled(fast, for_student, schooling), teacher, fast


def schooled(tokenizer: PreTrainedTokenizerFast, taught: list[Lesson], steps: int) -> Qwen3ForCausalLM:
    """A new tiny model after supervised training."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads, **tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        pairs = [(x, f"{y} <end>") for x, y in random.sample(taught, 64)]
        batch = tokenizer(pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
        labels = batch.input_ids.where(batch.pop("token_type_ids") == 1, -100)  # type 1: the completion
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """The share of right answers, over eight samples per prompt."""
    rows = rows * 8
    x = tokenizer([row["prompt"] for row in rows], return_tensors="pt").to(model.device)
    both = model.generate(**x, do_sample=True, top_k=0, max_new_tokens=8)
    texts = tokenizer.batch_decode(both[:, x.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(correct(texts, [row["solution"] for row in rows])) / len(rows)


def main() -> None:
    """Train the student and print the results."""
    parser = argparse.ArgumentParser(description="KEPO on arithmetic in words.")
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--schooling", type=int, default=200, help="student's supervised steps (default: %(default)s)")
    parser.add_argument("--output", default="kepo_text_output", help="folder for rollouts (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")  # TRL uses a deprecated name

    set_seed(0)
    student, teacher, tokenizer = load_models(options.schooling)
    rows, held_out = load_data()
    parts = {"held out": held_out, "trained on": rows}
    before = {name: accuracy(student, tokenizer, part) for name, part in parts.items()}
    args = KEPOConfig(
        output_dir=options.output,
        gate_reward="correct",
        tau=1.0,
        exploration_reward="correct",
        rejection_budget=5,
        num_generations=8,
        per_device_train_batch_size=256,  # 32 groups
        max_completion_length=8,
        max_steps=options.steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = KEPOTrainer(
        model=student,
        reward_funcs=REWARDS,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        teacher=Teacher(teacher, tokenizer),
        task=TASK,
    )
    trainer.remove_callback(PrinterCallback)  # the table below is shorter
    trainer.train()

    logs = [log for log in trainer.state.log_history if "kepo/reward" in log]
    names = ["reward", "all_fail_rate", "explored_groups", "rescued_groups", "gate_rate", "divergence"]
    print("step", *(f"{name:>15}" for name in names))
    for log in logs[::10]:
        print(f"{log['step']:4}", *(f"{log[f'kepo/{name}']:15.2f}" for name in names))
    explored, rescued = (sum(log[f"kepo/{kind}_groups"] for log in logs) for kind in ("explored", "rescued"))
    print(f"{explored:.0f} groups failed and explored; hints rescued {rescued:.0f} of them")
    for name, part in parts.items():
        print(f"sums right, {name}: {before[name]:.0%} before, {accuracy(student, tokenizer, part):.0%} after")


if __name__ == "__main__":
    main()
