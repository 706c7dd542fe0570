"""KEPOTrainer with both parts off, used like GRPOTrainer: for all inputs that TRL takes, the same bits."""

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from test_grpo_parity import assert_same, mean_reward, run, settings, token_reward
from text_harness import text_model, tokenizer
from transformers import Qwen2Config, Qwen2ForSequenceClassification, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from kepo_core import KEPOConfig, KEPOTrainer

Rewards = list[float | None]


def chats(count: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"Number {i}?"}], "n": i} for i in range(count)])


def texts(count: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": f"Number {i}? ", "n": i} for i in range(count)])


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student: TRL loads its reference model by path."""
    folder = tmp_path_factory.mktemp("student")
    model = text_model(0)
    with torch.no_grad():
        model.lm_head.weight[tokenizer().eos_token_id] *= 4  # some completions end by themselves
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def both(
    folder: Path,
    student: Path,
    overrides: dict[str, Any],
    rewards: Any = None,
    dataset: Callable[[], Any] = chats,
    **arguments: Any,
) -> list[GRPOTrainer]:
    """Train with TRL and with KEPOTrainer, as TRL's users write it; check for equal bits. Returns both trainers."""
    trainers, results = [], []
    for cls, config, extra in (
        (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "scale_rewards": "none"}),
        (KEPOTrainer, KEPOConfig, {"distill": False, "explore": False}),
    ):
        args = config(**extra | settings(folder / cls.__name__, **overrides))
        trainers.append(
            cls(
                model=Qwen3ForCausalLM.from_pretrained(student),
                reward_funcs=rewards() if rewards else [token_reward, mean_reward],
                args=args,
                train_dataset=dataset(),
                processing_class=tokenizer(),
                **arguments,
            )
        )
        results.append(run(trainers[-1]))  # before the next is built, which seeds the generators
    assert trainers[0].reward_func_names == trainers[1].reward_func_names
    assert_same(*results)
    return trainers


OFF_POLICY = {"num_iterations": 2, "max_steps": 4, "beta": 0.1, "gradient_accumulation_steps": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"loss_type {name}": {"loss_type": name, **OFF_POLICY} for name in
       ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo")},
    "loss_type luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", **OFF_POLICY},
    **{f"scale_rewards {value}": {"scale_rewards": value} for value in ("group", "batch", "none", True, False)},
    "importance_sampling_level": {"importance_sampling_level": "sequence", **OFF_POLICY},
    "plain KL": {"use_bias_correction_kl": False, **OFF_POLICY},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.3, 2.0]},
    "clipping": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5, **OFF_POLICY},
    "masks": {"mask_truncated_completions": True, "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.5},
    "entropy bonus": {"entropy_coef": 0.01, "gradient_accumulation_steps": 2},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "beta": 0.1},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
    "padding and tables": {"pad_to_multiple_of": 8, "log_completions": True},
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_every_choice_of_trls_is_trls_bit_for_bit(tmp_path: Path, case: str, student: Path) -> None:
    both(tmp_path, student, SETTINGS[case])


def some_apply(completions: list, completion_ids: list, **_: Any) -> Rewards:
    return [None if i % 3 == 0 else float(sum(ids) % 5) for i, ids in enumerate(completion_ids)]


def for_few(completions: list, n: list[int], **_: Any) -> Rewards:
    return [1.0 + i if i % 2 else None for i in n]


async def later(completions: list, completion_ids: list, **_: Any) -> Rewards:
    await asyncio.sleep(0.01)
    return [float(ids[0] % 3) for ids in completion_ids]


class Judge:
    def __call__(self, completions: list, completion_ids: list, **_: Any) -> torch.Tensor:
        return torch.tensor([float(len(set(ids))) for ids in completion_ids])


class LateJudge:
    async def __call__(self, completions: list, completion_ids: list, **_: Any) -> Rewards:
        return [float(len(ids)) - ids[-1] / 100 for ids in completion_ids]


def scaled(completions: list, completion_ids: list, scale: float, log_extra: Any, log_metric: Any, **_: Any) -> Rewards:
    values = [scale * (sum(ids) % 4) for ids in completion_ids]
    log_extra("value", values)
    log_metric("mean value", sum(values) / len(values))
    return values


def judge_model() -> Qwen2ForSequenceClassification:
    made = tokenizer()
    config = Qwen2Config(vocab_size=len(made), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, num_labels=1,
                         pad_token_id=made.pad_token_id)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Qwen2ForSequenceClassification(config)
    model.config._name_or_path = "some/judge"
    return model


REWARDS: dict[str, Callable[[], Any]] = {
    "one function": lambda: token_reward,
    "some None": lambda: [some_apply, mean_reward],
    "all None for some": lambda: [some_apply],
    "one of several None": lambda: [for_few, token_reward],
    "coroutine": lambda: [later, token_reward],
    "objects and partials": lambda: [Judge(), LateJudge(), functools.partial(scaled, scale=0.5)],
}


@pytest.mark.parametrize("case", REWARDS)
def test_every_kind_of_reward_is_trls_bit_for_bit(tmp_path: Path, case: str, student: Path) -> None:
    both(tmp_path, student, {"log_completions": True, "num_generations": 4}, REWARDS[case])


def test_a_reward_model_is_trls_bit_for_bit(tmp_path: Path, student: Path) -> None:
    classes = [tokenizer(), None]
    _, ours = both(tmp_path, student, {}, lambda: [judge_model(), token_reward], reward_processing_classes=classes)
    assert ours.reward_func_names == ["judge", "token_reward"]


@pytest.mark.parametrize(
    "dataset", [texts, lambda: chats().to_iterable_dataset(), lambda: texts().to_iterable_dataset()],
    ids=["text", "stream of chats", "stream of text"],
)  # fmt: skip
def test_every_kind_of_prompt_is_trls_bit_for_bit(tmp_path: Path, dataset: Any, student: Path) -> None:
    _, ours = both(tmp_path, student, {"temperature": 3.0}, dataset=dataset)  # rollouts of a group must differ
    assert isinstance(ours.train_dataset, Dataset | IterableDataset)


def test_evaluation_is_trls(tmp_path: Path, student: Path) -> None:
    overrides = {"per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    _, ours = both(tmp_path, student, overrides, eval_dataset=chats(4))
    assert any("eval_reward" in entry for entry in ours.state.log_history)


class Game:
    """An environment that owns prompt and reward."""

    def reset(self, **_: Any) -> str:
        return "Say a number."

    def guess(self, number: int) -> str:
        """
        Guess a number.

        Args:
            number: The guess.

        Returns:
            The verdict.
        """
        return "no"

    def get_reward(self) -> float:
        Game.asked += 1
        return float(Game.asked % 5)

    asked = 0


TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m.get('tool_calls') or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_environment_may_own_the_reward(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a reward function and without a data set."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    results = []
    for cls, config, extra in (
        (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "scale_rewards": "none"}),
        (KEPOTrainer, KEPOConfig, {"distill": False, "explore": False}),
    ):
        Game.asked = 0
        made = tokenizer()
        made.chat_template = TOOL_TEMPLATE
        made.response_template = {
            "defaults": {"role": "assistant"},
            "start_anchor": "<|im_start|>assistant\n",
            "fields": {"content": {"close_pattern": r"<\|im_end\|>|$", "content": "text"}},
        }
        args = config(**extra | settings(tmp_path / cls.__name__))
        results.append(
            run(
                cls(
                    model=Qwen3ForCausalLM.from_pretrained(student),
                    args=args,
                    processing_class=made,
                    environment_factory=Game,
                )
            )
        )
    assert_same(*results)


def test_no_configuration_is_trls_own_folder_and_what_can_work(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = KEPOTrainer(str(student), token_reward, train_dataset=chats())
    assert trainer.args.output_dir == f"{student.name}-KEPO"
    assert not trainer.args.distill and not trainer.args.explore
