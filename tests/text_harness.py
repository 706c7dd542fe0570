"""A task that has nothing to do with the paper's: riddles as text, two rewards of its own, and a scripted student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kepo_harness
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kepo_core import KEPOConfig, KEPOTrainer, Teacher, Templates
from kepo_core.testbed.embedded import CHAT_TEMPLATE, build_tokenizer

WORDS = ("piano", "river", "candle", "shadow", "sponge", "egg", "clock", "road")
ASKING = "It is a {solution}. Write a hint inside <hint>...</hint>."
TELLING = "The hint is {hint} and the solution {solution}."


def tokenizer() -> PreTrainedTokenizerFast:
    made = build_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def text_model(seed: int, hidden: int = 32, padded_rows: int = 0) -> Qwen3ForCausalLM:
    """A random language model without vision, whose next-token distributions are far from uniform."""
    made = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(made) + padded_rows, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id,
            )
        ).float()  # fmt: skip
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.5)
    return model


def riddles(chat: bool = True) -> Dataset:
    """Rows with their own columns: no id, no options, no picture."""

    def row(i: int) -> dict[str, Any]:
        text = f"Riddle {i}?"
        return {"prompt": [{"role": "user", "content": text}] if chat else text, "solution": WORDS[i]}

    return Dataset.from_list([row(i) for i in range(len(WORDS))])


def said(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def correct(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
    """10 for a completion that names the solution, else 0."""
    return [10.0 * (word in said(c).split()) for c, word in zip(completions, solution, strict=True)]


def brief(completions: list[Any], **_: Any) -> list[float]:
    """A hundredth off for each character."""
    return [-0.01 * len(said(c)) for c in completions]


#: (riddle, how often this prompt was asked before, hinted?) → what the student says
Script = Callable[[int, int, bool], str]


def fails_on_0(riddle: int, before: int, hinted: bool) -> str:
    """Riddle 0 is solved at the second hint-aware draw, riddle 1 never, all others every other time."""
    if riddle == 1 or (riddle == 0 and not (hinted and before)):
        return "no idea" + " at all" * (before % 3)
    return f"a {WORDS[riddle]}" if before % 2 else "who knows"


class ScriptedText(KEPOTrainer):
    """KEPOTrainer whose student says what ``script`` tells; ``calls`` are the prompts of each generation."""

    script: Script = staticmethod(fails_on_0)

    def _generate_single_turn(self, prompt_ids: Any, *_: Any) -> Any:
        texts = self._tokenizer.batch_decode(prompt_ids)
        if not hasattr(self, "calls"):
            self.calls: list[list[str]] = []
        self.calls.append(texts)
        ids = []
        for text in texts:
            before = sum(call.count(text) for call in self.calls[:-1]) + texts[: len(ids)].count(text)
            riddle = int(text.split("Riddle ")[1].split("?")[0])
            reply = type(self).script(riddle, before, "The hint is" in text)
            ids.append([*self._tokenizer(reply)["input_ids"], self._tokenizer.eos_token_id])
        return ids, None


def config(output_dir: Path, **overrides: Any) -> KEPOConfig:
    return kepo_harness.config(output_dir, **({"per_device_train_batch_size": 16, "tau": 5.0} | overrides))


def text_of(prompt: Any) -> str:
    """The text of a prompt's last message."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def hinting(teacher: Any) -> Any:
    """``teacher``, whose hints are written for it: a random model writes no tags. What it is asked is kept."""
    teacher.asked = []

    def write(prompts: Any, **_: Any) -> list[str]:
        texts = [text_of(prompt) for prompt in prompts]
        teacher.asked += texts
        return [f"h{text.split('Riddle ')[1].split('?')[0]}" for text in texts]

    teacher.write_hints = write
    return teacher


def make_trainer(
    output_dir: Path, chat: bool = True, teacher: Any = None, rewards: Any = None, cls: type = ScriptedText,
    student: Any = None, **overrides: Any,
) -> Any:  # fmt: skip
    teacher = hinting(Teacher(text_model(1), tokenizer())) if teacher is None else teacher
    return cls(
        student or text_model(0),
        rewards or [correct, brief],
        config(output_dir, **overrides),
        riddles(chat),
        processing_class=tokenizer(),
        teacher=teacher,
        task=Templates(asking=ASKING, telling=TELLING),
    )
